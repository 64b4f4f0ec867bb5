"""Draw the pictures of benchmarks again, from the CSVs beside them: nothing is measured.

python benchmarks/redraw.py                     # all of benchmarks/results
python benchmarks/redraw.py out/latency.csv     # these files, each named like its benchmark
"""

from __future__ import annotations

import argparse
from pathlib import Path

import latency
import layer
import scaling
import step
import timing

DRAWN = {"latency": latency.plot, "layer": layer.plot, "scaling": scaling.plot}


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the pictures of benchmarks from their CSVs")
    every = [path for path in sorted(timing.RESULTS.glob("*.csv")) if path.stem.partition("-")[0] in {*DRAWN, "step"}]
    parser.add_argument("files", type=Path, nargs="*", default=every, help="CSVs (all in benchmarks/results)")
    files: list[Path] = parser.parse_args().files
    steps = {path.parent for path in files if path.stem.startswith("step-")}
    for path in files:
        if not path.stem.startswith("step-"):
            DRAWN[path.stem.partition("-")[0]](path)
            print(f"drawn: {path.with_suffix('.png')}")
    for folder in steps:
        print(f"drawn: {step.plot(folder)}")


if __name__ == "__main__":
    main()
