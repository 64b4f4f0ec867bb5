"""The training script to copy: resuming without a shared disk, running it twice, and what it says when it cannot."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import commands
from helpers.commands import EXAMPLES, Done

HAVE_DATA = "sklearn is not installed"

# Each rank in a folder of its own, as on hosts without a shared disk.
APART = """
import os, runpy, sys
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def launch(script: Path, *words: str, cwd: Path) -> Done:
    return commands.launch(2, script, *words, cwd=cwd, deadline=200.0)


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_only_rank_0_has_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    apart = tmp_path / "apart.py"
    apart.write_text(APART.format(script=str(EXAMPLES / "train.py")))
    first = launch(apart, "--epochs", "1", "--checkpoint", "a.pt", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "0" / "a.pt").exists() and not (tmp_path / "1" / "a.pt").exists()
    second = launch(apart, "--epochs", "2", "--checkpoint", "a.pt", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "resumed a.pt after epoch 1" in second.stdout and "epoch 2: " in second.stdout
    third = launch(apart, "--epochs", "2", "--checkpoint", "a.pt", cwd=tmp_path)
    assert third.returncode == 0 and "nothing is left to train; test accuracy" in third.stdout
    (tmp_path / "1" / "b.pt").write_text("that of another rank is not looked at")
    other = launch(apart, "--epochs", "1", "--checkpoint", "b.pt", cwd=tmp_path)
    assert other.returncode == 0 and "resumed" not in other.stdout and "epoch 1: " in other.stdout


def no_file(path: Path) -> None:
    path.write_text("junk")


def another_network(path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict(), "optimizer": {}, "epoch": 1}, path)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("what", "name"),
    [(no_file, "a.pt"), (another_network, "a.pt"), (no_file, "a.pt/below.pt")],
    ids=["junk", "another network", "below a file"],
)
def test_what_cannot_be_resumed_ends_all_ranks_at_once(what: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    what(tmp_path / "a.pt")
    done = launch(EXAMPLES / "train.py", "--epochs", "2", "--checkpoint", name, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count(f"{name} is no checkpoint to resume from") == 1
    # (what torchrun says of ranks that have ended is not the script's)
    assert "Traceback" not in done.stderr.split("no checkpoint")[0] and 'train.py", line' not in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("batch", ["0", "9999"])
def test_a_batch_that_there_cannot_be(batch: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    done = launch(EXAMPLES / "train.py", "--batch", batch, cwd=tmp_path)
    assert done.returncode != 0 and f"--batch {batch}" in done.stderr and 'train.py", line' not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "gradient_penalty.py", "small_batch.py", "population.py"])
def test_without_the_extra_it_is_named(script: str, tmp_path: Path) -> None:
    code = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; import runpy; "
    code += f"sys.argv = [{script!r}]; sys.path.insert(0, {str(EXAMPLES)!r}); "
    code += f"runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    (tmp_path / "without.py").write_text(code)
    done = commands.launch(1, tmp_path / "without.py", cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"{script} needs sklearn(\.datasets)?, of the extra \[examples\]: pip install '\.\[examples\]'\n",
        done.stderr,
    )


SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_option_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what ``--help`` prints."""
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    asked: list[argparse.ArgumentParser] = []
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: asked.append(parser))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert left.value.code == 0
    (parser,) = asked
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []


def test_one_seed_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from experiment import cell, mean_and_std

    assert cell(mean_and_std([95.04]), 1) == "95.0"
    assert cell(mean_and_std([1.0, 2.0]), 1) == "1.5 ± 0.7"
