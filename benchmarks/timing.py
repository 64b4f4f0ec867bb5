"""What the benchmarks share: sides measured in turn, medians, the machine, CSV, and the look of pictures."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.launch import MALLOC

RESULTS = Path(__file__).parent / "results"
"""The results that the pages show."""

OUT = Path(os.environ.get("BENCHMARKS_OUT") or "out/benchmarks")
"""Where a run writes: elsewhere, unless the variable ``BENCHMARKS_OUT`` says so."""

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # `pictures`: one look for benchmarks and experiments


def keep_freed_memory() -> None:
    """Start this program again with an allocator that keeps freed memory, unless it has one.

    Without it, glibc gives freed blocks back to the system, and each new activation faults its pages in: both sides of
    a comparison would be timed on that. The C library reads the settings at start-up, hence the second start.
    """
    if os.environ.get("MALLOC_TOP_PAD_") != MALLOC["MALLOC_TOP_PAD_"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def in_turn(
    sides: Mapping[str, Callable[[], object]], rounds: int, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Median seconds of each side over the rounds; with a group, the mean over ranks of the medians."""
    times = seconds_in_turn(sides, rounds, group)
    medians = torch.tensor([statistics.median(values) for values in times.values()], dtype=torch.float64)
    if group is not None:
        dist.all_reduce(medians, group=group)
        medians /= group.size()
    return dict(zip(times, medians.tolist(), strict=True))


def seconds_in_turn(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    group: dist.ProcessGroup | None = None,
    rotate: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each side in each round, measured A B C A B C ... after two rounds of warm-up.

    With a group, the ranks start each measurement together, so that a side that does not communicate is slowed by its
    neighbours as much as one that does. ``rotate``: each round begins with another side, that no side always follows
    the same one.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        first = turn % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            if group is not None:
                dist.barrier(group)
            started = time.perf_counter()
            sides[name]()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a table of a Markdown page: their keys are its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """The processor, the cores, and the versions that numbers depend on."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def write_csv(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write the rows, each with the machine, to a file in ``OUT``; numbers with four digits."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(shown | {"machine": machine()})
    return path


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of ``write_csv``; what reads as a number is one."""
    with path.open(newline="") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def where(rows: Sequence[Mapping[str, Any]]) -> str:
    """The processor and the number of cores that the rows of a CSV were measured on."""
    return str(rows[0]["machine"]).partition(", Python")[0].replace("(R)", "").replace(" Processor", "")
