"""Draw the pictures of benchmarks again, from the CSVs beside them: nothing is measured.

python benchmarks/redraw.py                     # all of benchmarks/results
python benchmarks/redraw.py out/latency.csv     # these files, each named like its benchmark
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import accumulation
import compiled
import latency
import layer
import masks
import memory
import scaling
import step
import timing

DRAWN: dict[str, Callable[[Path], object]] = {
    "accumulation-costs": accumulation.plot,
    "compiled": compiled.plot,
    "latency": latency.plot,
    "layer": layer.plot,
    "masks": masks.plot,
    "memory": memory.plot,
    "scaling": scaling.plot,
}
"""What draws a CSV, by the beginning of its name."""


def drawer(path: Path) -> Callable[[Path], object] | None:
    """What draws this file by itself, or None."""
    return next((draw for name, draw in DRAWN.items() if path.stem.startswith(name)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the pictures of benchmarks from their CSVs")
    every = [path for path in sorted(timing.RESULTS.glob("*.csv")) if drawer(path) or path.stem.startswith("step-")]
    parser.add_argument("files", type=Path, nargs="*", default=every, help="CSVs (all in benchmarks/results)")
    files: list[Path] = parser.parse_args().files
    steps = {path.parent for path in files if path.stem.startswith("step-")}
    for path in files:
        if draw := drawer(path):
            draw(path)
            print(f"drawn: {path.with_suffix('.png')}")
    for folder in steps:
        print(f"drawn: {step.plot(folder)}")


if __name__ == "__main__":
    main()
