"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import csv
import doctest
import re
import shlex
import statistics
from pathlib import Path

import pytest

import syncbn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUNS = ROOT / "examples" / "results" / "small_batch" / "runs.csv"
COMMANDS = [
    line.strip()
    for line in re.findall(r"^ {4}\S.*$|`(?:make|python) [^`]+`", README, flags=re.MULTILINE)
    if line.strip(" `").startswith(("make ", "python "))
]


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(block, {}, f"README block {number}", "README.md", 0)
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    words = shlex.split(command.strip("`"), comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), words
        return
    scripts = [word for word in words if word.endswith(".py")]
    assert scripts and all((ROOT / script).is_file() for script in scripts), words
    if words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), words


def test_commands_were_found() -> None:
    assert {"make demo", "make test"} <= {" ".join(command.strip("`").split()[:2]) for command in COMMANDS}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`syncbn\.([\w.]+)", README))))
def test_name_exists(name: str) -> None:
    if (ROOT / "syncbn" / f"{name}.py").exists():
        return
    found: object = syncbn
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)|`((?:examples|launch|docs)/[^`]+)`", README)))
)
def test_path_exists(path: tuple[str, str]) -> None:
    assert (ROOT / (path[0] or path[1]).split()[0]).exists()


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
