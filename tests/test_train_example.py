"""The training script to copy: resuming without a shared disk, running it twice, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
HAVE_DATA = "sklearn is not installed"

# Each rank in a folder of its own, as on hosts without a shared disk.
APART = """
import os, runpy, sys
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def launch(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "syncbn.launch", "-n", "2", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, env=env)


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_only_rank_0_has_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    (tmp_path / "apart.py").write_text(APART.format(script=str(EXAMPLES / "train.py")))
    first = launch("apart.py", "--epochs", "1", "--checkpoint", "a.pt", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "0" / "a.pt").exists() and not (tmp_path / "1" / "a.pt").exists()
    second = launch("apart.py", "--epochs", "2", "--checkpoint", "a.pt", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "resumed a.pt after epoch 1" in second.stdout and "epoch 2: " in second.stdout
    third = launch("apart.py", "--epochs", "2", "--checkpoint", "a.pt", cwd=tmp_path)
    assert third.returncode == 0 and "nothing is left to train; test accuracy" in third.stdout
    (tmp_path / "0" / "a.pt").write_text("junk")
    broken = launch("apart.py", "--epochs", "2", "--checkpoint", "a.pt", cwd=tmp_path)
    assert broken.returncode == 1
    assert broken.stderr.count("a.pt is no checkpoint to resume from") == 1
    assert "Traceback" not in broken.stderr.split("no checkpoint")[0]


@pytest.mark.parametrize("script", ["train.py", "gradient_penalty.py", "small_batch.py", "population.py"])
def test_without_the_extra_it_is_named(script: str, tmp_path: Path) -> None:
    code = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; import runpy; "
    code += f"sys.argv = [{script!r}]; sys.path.insert(0, {str(EXAMPLES)!r}); "
    code += f"runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"{script} needs sklearn(\.datasets)?: pip install 'syncbn\[examples\]'\n", done.stderr)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_option_is_explained(path: Path) -> None:
    text = path.read_text()
    calls = text.split("add_argument(")[1:]
    assert all("help=" in call.split("parser.")[0].split("return ")[0] for call in calls)


def test_one_seed_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason=HAVE_DATA)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from experiment import cell, mean_and_std

    assert cell(mean_and_std([95.04]), 1) == "95.0"
    assert cell(mean_and_std([1.0, 2.0]), 1) == "1.5 ± 0.7"
