"""Draws the pictures of the guide beside this file: ``python docs/pictures/draw.py``. Standard library only.

The floors come from the data of the test that enforces them. A test compares the files with what this draws.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from helpers.floors import FLOORS  # noqa: E402

BATCH = ("modules", "functional", "autograd", "kernels", "comm")
"""The rooms that a batch goes through."""

WIDTH = 980
MARGIN = 20
LETTER = 7.9  # pixels of a letter of names, which are set in a monospaced font

# The background is drawn, so that a page in another mode than the reader's system shows a card that can be read.
STYLE = """
  .card { fill: #ffffff; } .line { stroke: #6e7781; fill: none; } .head { fill: #6e7781; }
  text { fill: #1f2328; font: 14px system-ui, "Helvetica Neue", Arial, sans-serif; }
  .name { font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
  .small { fill: #57606a; font-size: 13px; } .title { font-weight: 600; }
  .box { fill: #f3f5f8; stroke: #8c959f; } .main { fill: #dcebff; stroke: #1f6feb; stroke-width: 1.6; }
  .floor { stroke: #d0d7de; } .sample { fill: #0072b2; stroke: #ffffff; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; } .line { stroke: #9198a1; } .head { fill: #9198a1; }
    text { fill: #f0f6fc; } .small { fill: #b1bac4; }
    .box { fill: #262c36; stroke: #6e7681; } .main { fill: #12315c; stroke: #58a6ff; }
    .floor { stroke: #3d444d; } .sample { fill: #56b4e9; }
  }
"""


class Stage(NamedTuple):
    """A step of a forward or a backward: what it is called, what it does, where it is written."""

    verb: str
    does: tuple[str, ...]
    where: str
    together: bool = False


FORWARD = (
    Stage("measure", ("count, mean, squared", "deviations of x"), "kernels"),
    Stage("share", ("2C + 1 float64:", "n, mean, M2", "of every rank"), "comm", True),
    Stage("remember", ("move the running", "statistics"), "memory.py, kernels"),
    Stage("normalize", ("by mean and variance", "of all ranks"), "kernels"),
)
BACKWARD = (
    Stage("pack sums", ("of g and of g * xhat;", "they are dbias, dweight"), "kernels"),
    Stage("share", ("2C float64:", "sum g, sum g * xhat", "of every rank"), "comm", True),
    Stage("input gradient", ("dx, from the sums", "of all ranks"), "kernels"),
)


def draw_floors() -> str:
    """A row for each floor, the lowest at the bottom."""
    step, top = 48, 46
    parts = [_text(MARGIN, 28, "Imports point down: a room knows only what lies on the floors below it", "title")]
    for row, (title, rooms) in enumerate(reversed(FLOORS.items())):
        y = top + row * step
        parts.append(_text(MARGIN, y + 24, title, "small"))
        x = 280.0
        for room in rooms:
            width = LETTER * len(room) + 20
            parts.append(_box(x, y + 4, width, 30, room in BATCH))
            parts.append(_text(x + width / 2, y + 23, room, "name", "middle"))
            x += width + 8
        if row:
            parts.append(f'<line class="floor" x1="{MARGIN}" y1="{y - 5}" x2="{WIDTH - MARGIN}" y2="{y - 5}"/>')
    bottom = top + len(FLOORS) * step
    parts.append(_box(MARGIN, bottom + 4, 16, 16, True))
    parts.append(_text(MARGIN + 24, bottom + 17, "a batch goes through these, from top to bottom", "small"))
    return _svg(bottom + 34, parts, "The floors of the package")


def draw_step() -> str:
    """A training step of two ranks: forward and backward, a message each."""
    parts = _panel(0, "Forward", "x", FORWARD, "y")
    parts += _panel(250, "Backward, with g = dL/dy", "g", BACKWARD, "dx")
    note = "The verbs are functions in syncbn/autograd.py; below each column, where its work is done."
    parts.append(_text(MARGIN, 510, note, "small"))
    return _svg(526, parts, "One training step of two ranks, and its two messages")


def draw_samples() -> str:
    """Where the samples of a batch are, and which of them a rank's mean and variance are of: locally, and together."""
    ranks, lane, gap, top = (3, 2, 3), 62, 12, 78
    total, bottom = sum(ranks), top + len(ranks) * (lane + gap) - gap
    parts: list[str] = []
    for left, title, words in (
        (MARGIN, "nn.BatchNorm: as many estimates as ranks", "mean, var of its {n}"),
        (WIDTH / 2 + MARGIN, "SyncBatchNorm: one estimate, of all samples", "mean, var of all {total}"),
    ):
        together = left > MARGIN
        parts.append(_text(left, 28, title, "title"))
        parts.append(_text(left + 64, 56, "samples: they stay", "small"))
        if together:
            parts.append(_text(left + 226, 56, "what travels", "small"))
            parts.append(_box(left + 54, top - 8, 246, bottom - top + 16, True))
        for rank, n in enumerate(ranks):
            y = top + rank * (lane + gap)
            middle = y + lane / 2
            parts.append(_text(left, middle + 5, f"rank {rank}", "small"))
            parts.append(_box(left + 62, y, 140, lane, not together))
            for sample in range(n):
                parts.append(f'<circle class="sample" cx="{left + 90 + 42 * sample:g}" cy="{middle:g}" r="14"/>')
            if together:
                parts.append(_box(left + 222, middle - 15, 70, 30, False))
                parts.append(_text(left + 257, middle + 5, "n, μ, M2", "name", "middle"))
                parts.append(
                    f'<line class="line" x1="{left + 202:g}" y1="{middle:g}" x2="{left + 222:g}" y2="{middle:g}"/>'
                )
            parts.append(_arrow(left + (300 if together else 206), middle, left + (320 if together else 226)))
            parts.append(_text(left + (324 if together else 232), middle + 5, words.format(n=n, total=total), "small"))
    notes = (
        "Each rank normalizes its own samples. Alone it does so by its own estimate, which is noise when they are few;",
        "together by one, the same bits on every rank. Count, mean and squared deviations travel, never samples.",
    )
    for line, words in enumerate(notes):
        parts.append(_text(MARGIN, bottom + 40 + 18 * line, words, "small"))
    return _svg(bottom + 76, parts, "Where the samples of each rank go, without and with synchronization")


def _panel(top: float, title: str, start: str, stages: tuple[Stage, ...], end: str) -> list[str]:
    parts = [_text(MARGIN, top + 28, title, "title")]
    left, width, gap, height = 140, 174, 26, 74
    lanes = [top + 44, top + 44 + height + 14]
    for rank, lane in enumerate(lanes):
        middle = lane + height / 2
        parts.append(_text(MARGIN, middle + 5, f"rank {rank}", "small"))
        parts.append(_text(left - 36, middle + 5, start, "name", "end"))
        for column in range(len(stages) + 1):
            x = left + column * (width + gap)
            parts.append(_arrow(x - gap - (6 if column == 0 else 0), middle, x - 2))
        parts.append(_text(left + len(stages) * (width + gap) + 6, middle + 5, end, "name"))
    for column, stage in enumerate(stages):
        x = left + column * (width + gap)
        tall = lanes[1] + height - lanes[0]
        for lane in lanes[:1] if stage.together else lanes:
            parts.append(_box(x, lane, width, tall if stage.together else height, stage.together))
            inside = lane + (tall if stage.together else height) / 2 - 9 * len(stage.does) + 6
            parts.append(_text(x + width / 2, inside, stage.verb, "title", "middle"))
            for line, words in enumerate(stage.does):
                parts.append(_text(x + width / 2, inside + 19 + 17 * line, words, "small", "middle"))
        parts.append(_text(x + width / 2, lanes[1] + height + 19, stage.where, "name", "middle"))
    return parts


def _svg(height: float, parts: list[str], title: str) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" width="{WIDTH}" height="{height:g}" rx="8"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, main: bool) -> str:
    kind = "main" if main else "box"
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>'


def _arrow(x1: float, y: float, x2: float) -> str:
    line = f'<line class="line" x1="{x1:g}" y1="{y:g}" x2="{x2 - 6:g}" y2="{y:g}"/>'
    return line + f'<path class="head" d="M{x2:g} {y:g}l-8 -4v8z"/>'


PICTURES = {"floors.svg": draw_floors, "step.svg": draw_step, "samples.svg": draw_samples}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())
