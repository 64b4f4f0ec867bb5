"""The picture of a noise report."""

from __future__ import annotations

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
            "NoiseReport.plot needs matplotlib: pip install matplotlib. (to_csv and to_json need nothing.)"
        ) from error
    import matplotlib

    columns = -(-len(curves) // 26)
    figure = Figure(figsize=(7 + 1.9 * columns, 4.8), layout="constrained")
    axis = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    handles: list[Any] = []
    for i, (layer, curve) in enumerate(curves.items()):
        colour = colours(0.92 * i / max(len(curves) - 1, 1))
        sizes, noises, errors = zip(*curve, strict=True)
        handles.append(axis.errorbar(sizes, noises, errors, fmt="o-", ms=3, lw=1.2, color=colour, label=layer))
    label = f"threshold {threshold:g}"
    handles.append(axis.axhline(threshold, color="tab:red", ls="--", lw=1.2, label=label))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({size for curve in curves.values() for size, _, _ in curve})
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.set_xlabel("ranks that share statistics")
    axis.set_ylabel("noise (standard deviations of a channel)")
    axis.set_title(title)
    axis.grid(alpha=0.3, which="both")
    small = 8 if len(curves) <= 26 else 6.5
    figure.legend(
        handles=handles, loc="outside right upper", ncols=columns, fontsize=small, title="layer, first to last"
    )
    figure.savefig(path, dpi=150)
