"""The versions of torch and Python with which the tests of this version were run: what, and when."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    """Two versions, as ``"2.13"`` and ``"3.11"``, what of the tests passed with them, and the day."""

    torch: str
    python: str
    passed: str
    date: str


CORE = "core tests"

ENTRIES = (
    Entry("2.11", "3.11", CORE, "2026-11-25"),
    Entry("2.12", "3.11", CORE, "2026-11-25"),
    Entry("2.13", "3.11", "all tests", "2026-11-25"),
    Entry("2.14", "3.11", CORE + ", networks of timm and torchvision", "2026-11-25"),
    Entry("2.14", "3.12", CORE, "2026-11-25"),
    Entry("2.14", "3.13", CORE, "2026-11-25"),
    Entry("2.15", "3.13", CORE, "2026-11-25"),
)
"""README.md has the same table."""


def about(torch: str, python: str) -> str:
    """What of the tests passed with these versions, such as ``"2.13.0+cpu"`` and ``"3.11.7"``."""
    own = _minor(torch), _minor(python)
    for entry in ENTRIES:
        if (entry.torch, entry.python) == own:
            return f"torch {entry.torch} with Python {entry.python}: {entry.passed} passed on {entry.date}"
    near = [entry.python for entry in ENTRIES if entry.torch == own[0]]
    known = f"that torch was tested with Python {' and '.join(near)}" if near else f"tested: {_list()}"
    return f"torch {own[0]} with Python {own[1]} was not tested; {known}"


def _list() -> str:
    return "torch " + ", ".join(dict.fromkeys(entry.torch for entry in ENTRIES))


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
