"""How pictures of experiments and benchmarks look: one colour for each method in all of them, panels, legends.

Not a script: the experiments beside it import it, and so do the benchmarks. A figure is 7 inches wide, so that its
letters are as large as a page's where it is shown at 700 pixels. The colours are told apart with every kind of colour
blindness, and on white paper; each method has a marker of its own as well.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WIDTH = 7.0  # inches


class Method(NamedTuple):
    """What stands for a method: its name in legends and tables, a colour and a marker."""

    label: str
    colour: str
    marker: str


METHODS = {
    "sync": Method("SyncBN", "#0072b2", "o"),
    "local": Method("local BN", "#d55e00", "s"),
    "group": Method("GN(8)", "#009e73", "D"),
    "none": Method("no normalization", "#6b6b6b", "X"),
    "he": Method("none, He's weights", "#999933", "h"),
    "double": Method("none, twice He's", "#ddaa88", "p"),
    "renorm": Method("local renorm", "#e69f00", "v"),
    "sync_renorm": Method("SyncBN renorm", "#56b4e9", "^"),
    "frozen": Method("frozen statistics", "#cc79a7", "P"),
    "plain": Method("SyncBN, no weight and bias", "#aa4499", "*"),
    "half": Method("SyncBN over half the ranks", "#332288", "<"),
    "shuffled": Method("shuffled BN", "#a58b00", ">"),
    "torch": Method("nn.SyncBatchNorm", "#117733", "d"),
    "fairscale": Method("fairscale", "#882255", "v"),
    "naive": Method("naive", "#44aa99", "^"),
}
MARKERS = "osD^vXP<>"
LIMIT = "#6b6b6b"  # thresholds, tolerances and other lines that are not measured

STYLE: Any = {  # of matplotlib
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 3,
    "figure.titlesize": 10.5,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def labels(*methods: str) -> dict[str, str]:
    """Return the names of these methods, in this order, by their keys."""
    return {method: METHODS[method].label for method in methods}


def look(method: str, **more: Any) -> dict[str, Any]:
    """Return colour, marker and label of a method as keywords of ``plot`` and ``errorbar``; `more` goes before."""
    label, colour, marker = METHODS[method]
    return {"color": colour, "marker": marker, "label": label} | more


def other(index: int, count: int, label: str, **more: Any) -> dict[str, Any]:
    """Return the same for one of `count` lines that are no methods: shades from purple to green, in order."""
    import matplotlib

    red, green, blue, _ = matplotlib.colormaps["viridis"](0.8 * index / max(count - 1, 1))  # beyond is yellow on white
    return {"color": (red, green, blue), "marker": MARKERS[index % len(MARKERS)], "label": label} | more


@contextlib.contextmanager
def figure(path: Path, title: str, panels: int = 2, columns: int = 2, height: float = 3.2) -> Iterator[Sequence[Any]]:
    """Give the axes of so many panels, row by row, each of `height` inches, and save them as a PNG; makes the folder.

    A panel without a partner takes a row of its own.
    """
    import matplotlib
    from matplotlib.figure import Figure  # needs no display, as pyplot would

    rows = -(-panels // columns)
    with matplotlib.rc_context(STYLE):
        whole = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        grid = whole.add_gridspec(rows, columns)
        places = [grid[row, column] for row in range(rows) for column in range(columns)][:panels]
        if panels % columns == 1:
            places[-1] = grid[rows - 1, :]
        yield [whole.add_subplot(place) for place in places]
        whole.suptitle(textwrap.fill(title, 90))
        path.parent.mkdir(parents=True, exist_ok=True)
        # (The version of matplotlib, which it would write into the file, makes equal pictures unequal.)
        whole.savefig(path, dpi=160, metadata={"Software": None})


def legend_below(axes: Iterable[Any], columns: int = 4) -> None:
    """Put one legend for all these panels below them: each label once, in the order of its first line."""
    axes = list(axes)
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    axes[0].figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)))


def powers_of_two(axis: Any, values: Sequence[int], label: str) -> None:
    """Label a horizontal axis on which these values double."""
    axis.set_xscale("log", base=2)
    ticks(axis.xaxis, values)
    axis.set_xlabel(label)


def ticks(axis: Any, values: Sequence[float]) -> None:
    """Put ticks at these values of ``axes.xaxis`` or ``axes.yaxis``, and nowhere else."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)
