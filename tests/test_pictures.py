"""Pictures of experiments and benchmarks are drawn from the CSVs beside them, alike, and small enough for a page."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import pytest

from helpers.commands import EXAMPLES, ROOT, environment, must, run

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: examples)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: examples)")
pytest.importorskip("tqdm", reason="tqdm is not installed (extra: examples)")

BENCHMARKS = ROOT / "benchmarks"


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a PNG."""
    found: tuple[int, int] = struct.unpack(">II", path.read_bytes()[16:24])
    return found


@pytest.mark.parametrize("folder", [EXAMPLES, BENCHMARKS], ids=lambda folder: folder.name)
def test_pictures_come_from_the_csvs(folder: Path, tmp_path: Path) -> None:
    """Each can be drawn again without measuring; its letters are legible where it is shown 700 pixels wide."""
    results, copy = folder / "results", tmp_path / "results"
    shutil.copytree(results, copy, ignore=shutil.ignore_patterns("*.png", "*.md"))
    kinds = ["*"] if folder == EXAMPLES else ["*.csv"]
    sources = sorted(path for kind in kinds for path in copy.glob(kind))
    must(run(sys.executable, folder / "redraw.py", *sources, env=environment()))
    drawn = {path.relative_to(copy) for path in copy.rglob("*.png")}
    assert drawn == {path.relative_to(results) for path in results.rglob("*.png")}
    for name in drawn:
        assert size(copy / name) == size(results / name), f"{name}: run make pictures"
        assert max(size(copy / name)) <= 1200, name  # 7 inches wide: 10 points are 14 of 700 pixels


def test_each_method_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pictures

    for column in ("label", "colour"):
        assert len({getattr(method, column) for method in pictures.METHODS.values()}) == len(pictures.METHODS)
