"""The picture of a noise report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[int, float, float]]  # group size, noise, its standard error


def draw(curves: Mapping[str, Curve], threshold: float, title: str, path: str | Path) -> None:
    """Draw noise against group size, one line per layer, and the threshold: as in ``NoiseReport.plot``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "NoiseReport.plot needs matplotlib: pip install matplotlib, or the extra [examples]. (to_csv and "
            "to_json need nothing.)"
        ) from error
    import matplotlib

    columns = -(-len(curves) // 20)
    figure = Figure(figsize=(5.3 + 1.7 * columns, 4.2), layout="constrained")
    axis = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    handles: list[Any] = []
    for i, (layer, curve) in enumerate(curves.items()):
        # (Beyond 0.8 it is yellow, which white paper swallows.)
        colour = colours(0.8 * i / max(len(curves) - 1, 1))
        sizes, noises, errors = zip(*curve, strict=True)
        handles.append(axis.errorbar(sizes, noises, errors, fmt="o-", ms=4, lw=1.4, color=colour, label=layer))
    label = f"threshold {threshold:g}"
    handles.append(axis.axhline(threshold, color="0.4", ls="--", lw=1.4, label=label))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({size for curve in curves.values() for size, _, _ in curve})
    axis.set_xticks(ticks, [str(k) for k in ticks])
    low, high = axis.get_ylim()
    round_ones = [figures * 10.0**power for power in range(-6, 7) for figures in (1, 2, 5)]
    away = [value for value in round_ones if low < value < high and abs(math.log2(value / threshold)) > 0.5]
    axis.set_yticks([*away, threshold], [f"{value:g}" for value in [*away, threshold]])
    axis.set_yticks([], minor=True)
    axis.set_xlabel("ranks that share statistics")
    axis.set_ylabel("noise (standard deviations of a channel)")
    figure.suptitle(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    small = 9 if len(curves) <= 20 else 7
    figure.legend(
        handles=handles,
        loc="outside right center",
        ncols=columns,
        fontsize=small,
        title="layer, first to last",
        frameon=False,
    )
    figure.savefig(path, dpi=150)
