"""The rows of results: shown and written as they come, whatever happens next."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator

import timing

from on_gpu.cases import Rows


class Table:
    """The rows, shown and written as they come."""

    COMMON = ("part", "shape", "layout", "dtype", "what", "ranks", "device", "machine", "error")

    def __init__(self, name: str, device: str) -> None:
        self.count = self.failed = 0
        self.given = {"device": device, "machine": timing.machine()}
        self.file = None
        if name:
            timing.OUT.mkdir(parents=True, exist_ok=True)
            self.file = (timing.OUT / name).open("w", newline="")
            # One value to a line, since parts have different ones.
            self.writer = csv.writer(self.file, lineterminator="\n")
            self.writer.writerow([*self.COMMON, "name", "value"])

    def add(self, row: dict[str, object]) -> None:
        self.count += 1
        self.failed += "error" in row
        show(row)
        if self.file is None:
            return
        known = [(row | self.given).get(key, "") for key in self.COMMON]
        values = {key: value for key, value in row.items() if key not in self.COMMON} or {"": ""}
        for key, value in values.items():
            self.writer.writerow([*known, key, f"{value:.4g}" if isinstance(value, float) else value])
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def show(row: dict[str, object]) -> None:
    names = ("part", "shape", "layout", "dtype", "what")
    numbers = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float) and " us" not in key]
    times = [f"{key} {value:.0f}" for key, value in row.items() if isinstance(value, float) and " us" in key]
    counts = [f"{key} {value}" for key, value in row.items() if isinstance(value, int)]
    error = [str(row["error"])] if "error" in row else []
    head = " ".join(str(row[key]) for key in names if key in row)
    print(f"{head:<58} {'  '.join(times + numbers + counts + error)}", flush=True)


def work_off(
    todo: Iterator[tuple[str, Callable[[], Rows]]], table: Table | None, is_late: Callable[[], bool], keeps: bool
) -> list[str]:
    """Measure one thing after the other, as long as there is time; what was left out.

    Args:
        table: takes the rows as they come; None on ranks that write none.
        keeps: make a row of an error, and go on.
    """
    left_out = []
    for what, measure in todo:
        if is_late():
            left_out.append(what)
            continue
        try:
            rows = measure()
        except Exception as error:
            if not keeps:
                raise
            rows = [{"part": what, "what": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())}]
        for row in rows if table is not None else []:
            table.add(row)
    return left_out
