"""The notebooks run from the first cell to the last, show what they say, and hold the output of such a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT, environment, must, run

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: examples)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: examples)")
pytest.importorskip("tqdm", reason="tqdm is not installed (extra: examples)")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PROGRAM = Path(__file__).parent / "programs" / "notebook.py"


def execute(name: str) -> str:
    """Run all cells of a notebook in a process of their own; returns what they print."""
    notebook = ROOT / "docs" / "notebooks" / name
    return must(run(sys.executable, PROGRAM, notebook, env=environment(MPLBACKEND="Agg")))


@pytest.mark.integration
def test_small_batches_on_ranks_from_a_cell() -> None:
    said = execute("small_batch.ipynb")
    accuracy = {
        norm: float(value) for norm, value in re.findall(r"^(\w+) .* accuracy ([0-9.]+) %$", said, re.MULTILINE)
    }
    assert set(accuracy) == {"local", "sync", "group"}
    assert accuracy["sync"] > accuracy["local"] + 15, said


def test_the_noise_report() -> None:
    said = execute("noise.ipynb")
    assert "0.1: per-device noise 0.09, no need to synchronize" in said
    assert re.search(r"for all layers: (16|32|64) ranks", said), said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_output_is_stored(path: Path) -> None:
    """The site and viewers show it: text, and a picture, and no error; run in order, by Jupyter."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs), "a warning is stored"
    assert len(path.read_bytes()) < 200_000
