"""Draw the pictures of experiments again, from the CSVs beside them: nothing is measured.

python examples/redraw.py                              # all of examples/results
python examples/redraw.py out/small_batch out/claims   # these folders, each named like its experiment
"""

import argparse
import importlib
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Let each experiment draw what is in its folder."""
    parser = argparse.ArgumentParser(description="Draw the pictures of experiments from their CSVs.")
    every = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    parser.add_argument("folders", type=Path, nargs="*", default=every, help="of results (all in examples/results)")
    for folder in parser.parse_args().folders:
        importlib.import_module(folder.name).draw(folder)
        print(f"drawn: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")


if __name__ == "__main__":
    main()
