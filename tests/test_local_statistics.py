"""What would stay local without a word is named: no process group, batch norm out of reach, nothing to convert."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers.processes import run_processes
from syncbn import SyncBatchNorm, convert_sync_batchnorm, groups, revert_sync_batchnorm

C = 3
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(groups, "_noticed", False)
    groups.size_of_job.cache_clear()
    yield
    groups.size_of_job.cache_clear()


@pytest.mark.parametrize("name", SIZES)
def test_no_group_in_a_job_of_several(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    layer = SyncBatchNorm(C)
    layer.eval()(torch.randn(4, C))
    layer.train()
    with pytest.warns(UserWarning, match=rf"one of 4 \({name}\).*no process group.*init_process_group\(\)"):
        layer(torch.randn(4, C))
    layer(torch.randn(4, C))  # said once
    convert_sync_batchnorm(nn.BatchNorm1d(C))(torch.randn(4, C))


@pytest.mark.parametrize("size", ["1", "", "auto"])
def test_a_job_of_one_is_silent(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("PMI_SIZE", size)
    SyncBatchNorm(C)(torch.randn(4, C))


def test_what_torchrun_says_goes_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # eight jobs of one rank
    SyncBatchNorm(C)(torch.randn(4, C))


@pytest.mark.parametrize("call", ["function", "accumulated", "compiled", "mask"])
def test_whatever_trains(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    layer: Any = SyncBatchNorm(C)
    x = torch.randn(4, C)
    with pytest.warns(UserWarning, match="init_process_group"):
        if call == "function":
            syncbn.functional.sync_batch_norm(x, None, None, training=True)
        elif call == "compiled":
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        elif call == "mask":
            layer(x, mask=torch.ones(4, 1, dtype=torch.bool))
        else:
            with syncbn.accumulation.step_statistics(layer):
                layer(x)


def one_rank(rank: int, size: int) -> list[str]:
    """A job of two, of which each rank initialized a group of its own."""
    import os

    os.environ["WORLD_SIZE"] = "2"
    said = []
    for group in (None, dist.new_group([0])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            groups._noticed = False
            SyncBatchNorm(C, process_group=group)(torch.randn(4, C))
        said.append(" ".join(str(warning.message) for warning in caught))
    return said


def test_a_default_group_of_one_rank(tmp_path: Path) -> None:
    ((default, named),) = run_processes(1, one_rank, tmp_path)
    assert "the default process group has one rank" in default and "one of 2 (WORLD_SIZE)" in default
    assert named == ""


def with_peers(rank: int, size: int) -> int:
    import os

    os.environ["WORLD_SIZE"] = str(size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SyncBatchNorm(C)(torch.randn(4, C))
    return len(caught)


def test_with_peers_nothing_is_said(tmp_path: Path) -> None:
    assert run_processes(2, with_peers, tmp_path) == [0, 0]


# ---- what cannot be reached


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


def loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


SCRIPTS = {
    "script": lambda: torch.jit.script(Stem()),
    "load": lambda: loaded(torch.jit.script(Stem())),
    "trace": lambda: torch.jit.trace(Stem(), torch.randn(2, 3, 4, 4)),
    "a layer": lambda: torch.jit.script(nn.BatchNorm2d(C)),
    "a function": lambda: torch.jit.script(Function()),
}
NAMES = {"a layer": "backbone", "a function": "backbone"}


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_batch_norm_in_scripts_is_named(kind: str) -> None:
    model = nn.ModuleDict({"backbone": SCRIPTS[kind](), "head": nn.BatchNorm2d(C)})
    name = NAMES.get(kind, "backbone.bn")
    with pytest.warns(UserWarning, match=rf"cannot reach.*'{name}' \(TorchScript\)\. Convert before") as caught:
        convert_sync_batchnorm(model)
    assert len(caught) == 1 and "head" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert isinstance(model["head"], SyncBatchNorm)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_a_whole_script() -> None:
    with pytest.warns(UserWarning, match=r"cannot reach.*'bn' \(TorchScript\)"):
        convert_sync_batchnorm(torch.jit.script(Stem()))


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_scripts_without_batch_statistics_are_left_alone() -> None:
    model = nn.Sequential(
        torch.jit.script(nn.Conv2d(3, C, 1)),
        torch.jit.trace(Stem().eval(), torch.randn(2, 3, 4, 4)),  # in eval mode for good
        torch.jit.freeze(torch.jit.script(Stem().eval())),
        nn.BatchNorm2d(C),
    )
    convert_sync_batchnorm(model)


class Foreign(nn.Module):
    """Another library's batch norm, which derives from none of torch's."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        if momentum is not None:
            self.momentum = momentum


def test_another_librarys_layer_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(Foreign()), Foreign(momentum=None))  # the last is frozen
    with pytest.warns(UserWarning, match=r"cannot reach.*: '1\.0' \(test_local_statistics\.Foreign\)\. Convert"):
        convert_sync_batchnorm(model)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.Sequential(nn.GroupNorm(1, C), nn.InstanceNorm2d(C, track_running_stats=True))],
    ids=["linear", "others"],
)
def test_a_model_without_batch_norm(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"found no batch normalization in this {type(model).__name__}: nothing"):
        assert convert_sync_batchnorm(model) is model


def test_what_is_synchronized_already_is_found() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), SyncBatchNorm(C), nn.LazyBatchNorm1d()))
    convert_sync_batchnorm(model)
    convert_sync_batchnorm(SyncBatchNorm(C))


@pytest.mark.parametrize("wrong", [[nn.BatchNorm1d(C)], None, nn.BatchNorm1d, {"bn": nn.BatchNorm1d(C)}], ids=repr)
@pytest.mark.parametrize("function", [convert_sync_batchnorm, revert_sync_batchnorm, syncbn.check_ranks_agree])
def test_what_is_no_model(function: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a"):
        function(wrong)
