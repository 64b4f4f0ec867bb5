"""Runs the Python of one page on this rank: ``mpiexec -n 2 python -m mpi4py docs_page.py PAGE``."""

import sys
from pathlib import Path

from helpers import pages

if __name__ == "__main__":
    page = pages.read(Path(sys.argv[1]))
    assert pages.run(page) == page.titles()
