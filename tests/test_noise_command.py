"""``python -m syncbn noise``: the report of a user's own model and batches, from one process."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from syncbn.__main__ import main

SCRIPT = """
import torch
from torch import nn
from beside import SIZE

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8))
    return model, (torch.randn(4, SIZE) for _ in range(64))

def with_forward():
    model, batches = build()
    return model, [{"x": batch} for batch in batches], lambda model, batch: model(batch["x"])

def number():
    return 3

def evaluated():
    model, batches = build()
    return model.eval(), batches

def broken():
    model, _ = build()
    return model, [torch.randn(4, SIZE + 1)]

def raises():
    raise ValueError("mine")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's script, which imports a module beside it; the imports of the process are restored."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("networks", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("SIZE = 6\n")
    path = tmp_path / "networks.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("function", ["build", "with_forward"])
def test_report_and_files(script: Path, function: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise", f"{script}:{function}", "--ranks", "1", "4", "--out", "found/mine"]) == 0
    out = capsys.readouterr().out
    assert "Synchronize over 16 ranks or more, as 1 asks for" in out and "64 batches on 1 rank" in out
    with Path("found/mine.csv").open() as file:
        noise = {row["group_size"]: float(row["mean_noise"]) for row in csv.DictReader(file)}
    assert noise == {"1": pytest.approx(0.5, abs=0.1), "4": pytest.approx(0.25, abs=0.06)}  # 1 / sqrt(4 k)
    pytest.importorskip("matplotlib")
    assert Path("found/mine.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_the_table(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["noise", f"{script}:build", "--batches", "8"]) == 0
    assert "no picture: NoiseReport.plot needs matplotlib" in capsys.readouterr().out
    assert Path("noise.csv").exists() and not Path("noise.png").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("networks.py:number", "networks.py:number must return (model, batches) or (model, batches, forward), not int"),
        ("networks.py:absent", "networks.py has no function 'absent'"),
        ("absent.py:build", "there is no file absent.py"),
        ("networks.py", "names no function: give SCRIPT.py:FUNCTION or MODULE:FUNCTION"),
        ("networks.py:evaluated", "none of them in training mode"),
    ],
)
def test_what_cannot_be_measured(script: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise", name]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


@pytest.mark.parametrize(("function", "error"), [("broken", RuntimeError), ("raises", ValueError)])
def test_errors_of_the_users_own_code_are_raised(script: Path, function: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        main(["noise", f"networks:{function}"])
