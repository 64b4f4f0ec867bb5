"""Run the cells of a notebook one after the other, as its kernel would: ``python notebook.py NOTEBOOK``.

A cell's function is defined in ``__main__``, as in Jupyter, so that what sends it to other processes finds the same
here. Pictures are drawn and not shown.
"""

import json
import os
import sys
from pathlib import Path

path = Path(sys.argv[1])
os.chdir(path.parent)
for number, each in enumerate(json.loads(path.read_text())["cells"]):
    if each["cell_type"] == "code":
        exec(compile("".join(each["source"]), f"{path.name}, cell {number}", "exec"), globals())
