"""What is said when something is wrong: one clear line, and what to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from helpers.commands import LAUNCHER, MPIEXEC, ROOT, Done, environment, run
from helpers.ranks import run_ranks
from syncbn import RankMismatchError, SyncBatchNorm, convert_sync_batchnorm, update_population_stats

# ---- ranks that disagree


def differing(rank: int, group: Any, change: dict[str, Any]) -> str:
    net = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4), SyncBatchNorm(4))
    if rank == 1:
        for name, value in change.items():
            setattr(net[2], name, value)
    with pytest.raises(RankMismatchError) as caught:
        syncbn.check_ranks_agree(net, group)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"momentum": 0.2}, """first at position 1: rank 0, 2: "momentum": 0.1; rank 1: "momentum": 0.2 (layer '2')"""),
        (
            {"eps": 1e-3, "training": False},
            """rank 0, 2: "eps": 1e-05, "training": true; rank 1: "eps": 0.001, "training": false (layer '2')""",
        ),
    ],
    ids=["one field", "two fields"],
)
def test_ranks_that_disagree_are_told_in_what(change: dict[str, Any], said: str) -> None:
    for text in run_ranks(3, differing, change):
        assert said in text
        assert "num_features" not in text and '"name"' not in text


def renamed(rank: int, group: Any) -> str:
    net = nn.Sequential()
    net.add_module("a" if rank == 0 else "b", SyncBatchNorm(4 if rank == 0 else 8))
    with pytest.raises(RankMismatchError) as caught:
        syncbn.check_ranks_agree(net, group)
    return str(caught.value)


def test_layers_of_other_names_are_other_layers() -> None:
    for text in run_ranks(2, renamed):
        assert 'first at position 0: rank 0: "name": "a"; rank 1: "name": "b". ' in text


def constant(rank: int, group: Any, kind: str) -> str:
    """Rank 1 has no data, and feeds something that needs no gradient."""
    layer = SyncBatchNorm(4, process_group=group)
    layer.weight.requires_grad_(kind != "frozen" or rank == 0)
    x = torch.randn(4 if rank == 0 else 0, 4, requires_grad=kind == "frozen" or rank == 0)
    try:
        layer(x)
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["constant", "frozen"])
def test_gradients_that_differ_have_advice_of_their_own(kind: str) -> None:
    for text in run_ranks(2, constant, kind):
        assert "gradients for" in text
        assert "requires_grad_()" in text and "syncbn.uneven.joined" in text
        assert "check_ranks_agree" not in text


def long_names(rank: int, group: Any, head: int) -> str:
    layer = SyncBatchNorm(4, process_group=group)
    layer.layer_name = "block." * head + f"{rank}." + "block." * 40 + "bn"  # type: ignore[assignment]
    with pytest.raises(RankMismatchError) as caught:
        layer(torch.randn(4, 4))
    return str(caught.value)


@pytest.mark.parametrize("head", [0, 40], ids=["head", "middle"])
def test_long_names_that_differ_in_front_of_their_tail(head: int) -> None:
    for text in run_ranks(2, long_names, head):
        first, second = text.partition("rank 0: ")[2].split("; rank 1: ")
        named = [side.partition("layer ")[2].partition("]")[0] for side in (first, second)]
        assert all("block.bn [" in name for name in named) and named[0] != named[1]


# ---- wrong arguments


@pytest.mark.parametrize("wrong", ["gloo", 4, [0, 1]], ids=repr)
def test_a_wrong_group(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"process_group must be None, a ProcessGroup.*got {type(wrong).__name__}"):
        convert_sync_batchnorm(nn.BatchNorm1d(3), wrong)


def test_what_new_subgroups_returns_is_not_one_group() -> None:
    def body(rank: int, group: Any) -> None:
        with pytest.raises(TypeError, match=r"new_subgroups returns .* take the first"):
            convert_sync_batchnorm(nn.BatchNorm1d(3), (group, [group]))

    run_ranks(2, body)


def test_a_group_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "ProcessGroup")
    with pytest.raises(ValueError, match=r"process_group: this PyTorch was built without torch\.distributed"):
        SyncBatchNorm(3, process_group=object())
    SyncBatchNorm(3)(torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_integer_statistics(name: str, dtype: torch.dtype) -> None:
    layer = SyncBatchNorm(3)
    setattr(layer, name, torch.zeros(3, dtype=dtype))
    for training in (True, False):
        with pytest.raises(ValueError, match=f"{name} must be a floating point tensor, got {dtype}"):
            layer.train(training)(torch.randn(4, 3))
    with pytest.raises(ValueError, match=name):
        syncbn.functional.sync_batch_norm(torch.randn(4, 3), layer.running_mean, layer.running_var, training=True)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [[0.0, 0.0, 0.0], "zeros", 3])
def test_vectors_that_are_no_tensors(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), name: value}
    for training in (True, False):
        with pytest.raises(
            TypeError, match=rf"{name} must be a tensor of shape \(3,\) or None, got {type(value).__name__}"
        ):
            syncbn.functional.sync_batch_norm(torch.randn(4, 3), training=training, **arguments)


def test_population_statistics_of_what_is_no_data(tmp_path: Path) -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(1)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got a list"):
        update_population_stats([model], [torch.randn(4, 1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"iterable of batches, got 'train\.pt'; load the file"):
        update_population_stats(model, "train.pt")
    with pytest.raises(TypeError, match=r"iterable of batches, got PosixPath"):
        update_population_stats(model, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a batch is a str, 'one\.pt': if that names a file, load it"):
        update_population_stats(model, ["one.pt", "two.pt"])
    for wrong in (None, 5, lambda: [torch.randn(4, 1)], torch.randn(4, 1)):
        with pytest.raises(TypeError, match=r"must be an iterable of batches, got (a|one) "):
            update_population_stats(model, wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"must be an iterable of batches, got (a|one) "):
            syncbn.diagnostics.measure_noise(model, wrong)  # type: ignore[arg-type]
    used = iter([torch.randn(4, 1)])
    update_population_stats(model, used)
    with pytest.raises(ValueError, match="is an iterator used up"):
        update_population_stats(model, used)
    texts = ["a sentence"]
    update_population_stats(model, texts, forward=lambda model, text: model(torch.full((2, 1), float(len(text)))))


# ---- the launcher


def launch(*arguments: str, cwd: Path = ROOT, **variables: str) -> Done:
    return run(*LAUNCHER, *arguments, cwd=cwd, env=environment(**variables))


WRONG = {
    "-n two x.py": "-n must be a number of ranks, or one of auto, cpu, gpu, xpu; got 'two'",
    "-np 2 x.py": "-np: the number of ranks is given by -n, as in -n 2",
    "-np2 x.py": "-np2: the number of ranks is given by -n, as in -n 2",
    "--ranks 2 x.py": "--ranks: the number of ranks is given by -n, as in -n 2",
    "--engine mpi --nprocs=2 x.py": "--nprocs=2: the number of ranks is given by -n, as in -n 2",
    "-n 2 -m syncbn.nothing": "module 'syncbn.nothing' does not exist ('syncbn' has no 'nothing')",
    "-n 2 -m json.tool.below": "module 'json.tool.below' does not exist ('json.tool' has no 'below')",
    "-n 2 -m syncbn.kernels": "module 'syncbn.kernels' cannot be run: it is a package without a __main__.py",
    "-n 2 -m json": "module 'json' cannot be run: it is a package without a __main__.py",
    "-n 2 -m nothing.at.all": "module 'nothing.at.all' does not exist (looked in {cwd} and the installed packages)",
    "-n 0 x.py": "-n must be at least 1, got 0",
    "-n -1 x.py": "-n must be at least 1, got -1",
    "--engine mpi -n -1 x.py": "-n must be at least 1, got -1",
    "-n 99999999999 x.py": "-n 99999999999 is more ranks than a host can have processes (4194304)",
    "--nnodes two x.py": "--nnodes must be a number of hosts, or LEAST:MOST; got 'two'",
    "--nnodes 0 x.py": "--nnodes must be a number of hosts, or LEAST:MOST; got '0'",
    "--nnodes 1:many x.py": "--nnodes must be a number of hosts, or LEAST:MOST; got '1:many'",
    "-n 2.5 x.py": "-n must be a number of ranks, or one of auto, cpu, gpu, xpu; got '2.5'",
    "--engine mpi -n 2.5 x.py": "with --engine mpi, -n must be the number of ranks, got '2.5'",
    "-n": "argument -n/--nproc-per-node/--nproc_per_node: expected one argument",
    "-n 2": "no script: syncbn-launch -n 4 train.py [arguments], or -m module",
    "--ranks two x.py": "--ranks: the number of ranks is given by -n, as in -n 2",
    "--nproc 2 x.py": "--nproc: the number of ranks is given by -n, as in -n 2",
    "--num_processes 2 x.py": "--num_processes: the number of ranks is given by -n, as in -n 2",
    "-n 2 x.py": "script 'x.py' does not exist (in {cwd})",
    "-n 2 .": "script '.' is a folder without a __main__.py",
    "--master-port -5 -m json.tool": "--master-port must be a port below 65536, got '-5'",
    "--master-port http -m json.tool": "--master-port must be a port below 65536, got 'http'",
}


@pytest.mark.parametrize("line", WRONG)
def test_the_launcher_says_one_line(line: str, tmp_path: Path) -> None:
    done = launch(*line.split(), cwd=tmp_path)
    said = WRONG[line].replace("{cwd}", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"syncbn-launch: error: {said}\n")


def test_the_launcher_reads_what_the_environment_says() -> None:
    done = launch("-n", "2", "-m", "json.tool", SYNCBN_PIN="abc")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "SYNCBN_PIN must be a number of cores per rank (0: do not pin), got 'abc'" in done.stderr
    assert launch("--dry-run", "-m", "json.tool", SYNCBN_PIN="").returncode == 0
    done = launch("--check", "-n", "2", SYNCBN_CHECK_TIMEOUT="long")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "SYNCBN_CHECK_TIMEOUT must be a number of seconds to wait for a rank, got 'long'" in done.stderr


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = launch("-n", "2", "--master-port", port, "-m", "json.tool")
    assert done.returncode == 2
    assert done.stderr == (
        f"syncbn-launch: error: port {port} (--master-port) cannot be used here: Address already in use. Choose "
        "another, or leave it out\n"
    )


def test_modules_that_exist_are_found(tmp_path: Path) -> None:
    (tmp_path / "space" / "inner").mkdir(parents=True)
    (tmp_path / "space" / "inner" / "train.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('must not be imported here')")
    (tmp_path / "package" / "__main__.py").write_text("")
    for module in ("space.inner.train", "package", "timeit", "json.tool", "syncbn"):
        assert launch("--dry-run", "-m", module, cwd=tmp_path).returncode == 0, module
    assert "'space.inner' has no 'test'" in launch("-m", "space.inner.test", cwd=tmp_path).stderr


LOOP = """
import os, sys, time, torch, torch.distributed as dist, syncbn
dist.init_process_group("gloo")
layer = syncbn.SyncBatchNorm(3)
layer(torch.randn(4, 3))
os.write(1, b"ready\\n")
try:
    while True:
        layer(torch.randn(4, 3))
        if "sleep" in sys.argv:
            time.sleep(1)
finally:
    os.write(1, b"left\\n")
"""


def interrupted(whom: str, folder: Path, doing: str, engine: str = "torchrun") -> tuple[int, str, list[str]]:
    """Code, output and lines of errors of a job of two ranks that Ctrl-C ended."""
    (folder / "loop.py").write_text(LOOP)
    job = subprocess.Popen(
        [*LAUNCHER, "--engine", engine, "-n", "2", str(folder / "loop.py"), doing],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert job.stdout is not None
        assert [job.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        time.sleep(0.5)
        if whom == "all":
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        else:
            job.send_signal(signal.SIGINT)
        said, errors = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, said, errors.splitlines()


@pytest.mark.integration
@pytest.mark.parametrize(("doing", "whom"), [("sleep", "launcher"), ("work", "all")])
def test_ctrl_c_ends_a_job_with_one_line(doing: str, whom: str, tmp_path: Path) -> None:
    code, said, lines = interrupted(whom, tmp_path, doing)
    assert code == 130
    assert said == "left\nleft\n"  # a script's own clean-up runs
    assert len(lines) == 2 and lines[0].startswith("syncbn-launch: 2 ranks on")
    assert lines[1] == "syncbn-launch: interrupted; all ranks have ended"


@pytest.mark.mpi
@pytest.mark.integration
@pytest.mark.skipif(MPIEXEC is None or find_spec("mpi4py") is None, reason="no mpiexec or no mpi4py: the extra [mpi]")
@pytest.mark.parametrize("whom", ["all", pytest.param("launcher", marks=pytest.mark.slow)])
def test_ctrl_c_under_mpi_leaves_the_lines_to_mpiexec(whom: str, tmp_path: Path) -> None:
    code, said, errors = interrupted(whom, tmp_path, "sleep", engine="mpi")
    assert code == 130
    lines = said.splitlines() + errors
    own = [line for line in lines if line.startswith("[mpiexec@")]  # what MPICH says of itself
    assert len(own) <= 2 and "Traceback" not in said
    assert sorted(set(lines) - set(own)) == sorted({"left", errors[0]})
    assert errors[0].startswith("syncbn-launch: 2 ranks on") and said.count("left\n") == 2
