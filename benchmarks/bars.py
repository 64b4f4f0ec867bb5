"""Horizontal bars for the small tables: a bar for each case, of each side in its colour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timing  # noqa: F401  (says where `pictures` is)

Values = Mapping[str, Mapping[str, float]]
"""What to draw: sides, keys of ``pictures.METHODS`` or other texts, and the value of each case."""


def draw(path: Path, title: str, panels: Mapping[str, Values]) -> Path:
    """Draw a picture beside a CSV, a panel for each quantity; returns its path.

    Args:
        path: of the CSV.
        title: what is measured, and where.
        panels: what to draw, by the label of the horizontal axis. All have the same cases.
    """
    import pictures

    picture = path.with_suffix(".png")
    cases = list(next(iter(next(iter(panels.values())).values())))
    sides = max(len(values) for values in panels.values())
    height = 1.3 + 0.28 * len(cases) * max(sides, 1.3)
    with pictures.figure(picture, title, len(panels), len(panels), height) as every:
        for axes, (label, values) in zip(every, panels.items(), strict=True):
            width = 0.8 / len(values)
            for place, (side, found) in enumerate(values.items()):
                known = side in pictures.METHODS
                look = pictures.look(side) if known else pictures.other(place, len(values), side)
                at = [number + (place - (len(values) - 1) / 2) * width for number in range(len(cases))]
                bars = axes.barh(at, list(found.values()), width * 0.9, color=look["color"], label=look["label"])
                axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axes.set_yticks(range(len(cases)), cases if axes is every[0] else [""] * len(cases))
            axes.set_ylim(len(cases) - 0.5, -0.5)
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.15)
            axes.set_xlabel(label)
        if sides > 1:
            pictures.legend_below(every)
    return picture
