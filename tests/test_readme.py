"""The README is short, and its numbers are those of the runs. (That what it shows runs is in test_docs.py.)"""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUNS = ROOT / "examples" / "results" / "small_batch" / "runs.csv"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 190


def test_the_two_commands_come_first() -> None:
    assert re.findall(r"^ {4}(make \w+)", README, flags=re.MULTILINE)[:2] == ["make demo", "make test"]


def test_the_table_is_that_of_the_runs() -> None:
    """Every accuracy and loss in the measured table is what the committed runs give."""
    with RUNS.open() as file:
        rows = list(csv.DictReader(file))
    for samples in sorted({row["samples_per_device"] for row in rows}):
        cells = []
        for field, digits in (("test_accuracy", 1), ("train_loss", 4)):
            for norm in ("local", "sync", "group"):
                values = [
                    float(row[field]) for row in rows if (row["norm"], row["samples_per_device"]) == (norm, samples)
                ]
                cells.append(f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        assert f"| {samples} | " + " | ".join(cells) + " |" in README


def test_the_table_of_segmentation_is_that_of_the_runs() -> None:
    """The same cells are in the README and on the page of results."""
    with (ROOT / "examples" / "results" / "segmentation" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = (ROOT / "examples" / "results" / "README.md").read_text()
    for samples in ("1", "2"):
        cells = []
        for norm in ("local", "half", "sync", "group", "frozen"):
            values = [
                float(row["mean_iou"]) for row in rows if (row["norm"], row["samples_per_device"]) == (norm, samples)
            ]
            cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
        assert f"| {samples}: test mean IoU % | " + " | ".join(cells) + " |" in README
        assert f"| {samples} | " + " | ".join(cells) + " |" in results
