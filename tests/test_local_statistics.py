"""What would stay local without a word is named: no process group, batch norm out of reach, nothing to convert."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn
from helpers.processes import run_processes
from syncbn import SyncBatchNorm, convert_sync_batchnorm, groups, revert_sync_batchnorm

C = 3
SIZES = (
    "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in SIZES + SLURM:
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
    with pytest.warns(UserWarning, match=rf"one of 4 \({name}\).*no process group is.*init_process_group\(\)"):
        layer(torch.randn(4, C))
    layer(torch.randn(4, C))  # said once
    convert_sync_batchnorm(nn.BatchNorm1d(C))(torch.randn(4, C))


@pytest.mark.parametrize(
    ("set_by_slurm", "tasks"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, 4),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 4),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 2),  # of the allocation, a part
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),  # the batch script
        ({"SLURM_NTASKS": "4"}, 1),  # a shell in an allocation
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "WORLD_SIZE": "1"}, 1),
    ],
    ids=str,
)
def test_tasks_of_slurm(set_by_slurm: dict[str, str], tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in set_by_slurm.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SyncBatchNorm(C)(torch.randn(4, C))
    assert [f"one of {tasks} (SLURM" in str(warning.message) for warning in caught] == [True] * (tasks > 1)


@pytest.mark.parametrize("size", ["1", "", "auto", "0", "-2"])
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


class Branches(Stem):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            for _ in range(2):
                x = self.bn(self.conv(x))
        return x


class Beside(Stem):
    """Another method is what trains."""

    @torch.jit.export
    def run(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return x


def normalized(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, training=True)


class HasFunction(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


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
    "below a forward": lambda: torch.jit.script(Branches()),
    "beside the forward": lambda: torch.jit.script(Beside()),
    "in parts": lambda: nn.ModuleDict({"bn": nn.Sequential(torch.jit.script(nn.BatchNorm2d(C)))}),
    "a compiled function": lambda: HasFunction(torch.jit.script(normalized)),
    "a traced function": lambda: HasFunction(torch.jit.trace(normalized, torch.randn(2, C, 2, 2))),
}
NAMES = {
    "a layer": "backbone",
    "a function": "backbone",
    "in parts": "backbone.bn.0",
    "a compiled function": "backbone.function",
    "a traced function": "backbone.function",
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
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


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_whole_script() -> None:
    with pytest.warns(UserWarning, match=r"cannot reach.*'bn' \(TorchScript\)"):
        convert_sync_batchnorm(torch.jit.script(Stem()))
    with pytest.warns(UserWarning, match=r"cannot reach.*the model itself \(TorchScript\)"):
        convert_sync_batchnorm(torch.jit.script(Function()))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripts_without_batch_statistics_are_left_alone() -> None:
    model = nn.Sequential(
        torch.jit.script(nn.Conv2d(3, C, 1)),
        torch.jit.trace(Stem().eval(), torch.randn(2, 3, 4, 4)),  # in eval mode for good
        torch.jit.freeze(torch.jit.script(Stem().eval())),
        nn.BatchNorm2d(C),
    )
    convert_sync_batchnorm(model)


# ---- graphs of operators


class Unfolding(torch.fx.Tracer):
    """Looks into what has a forward of its own in this file."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, Function)


def exported(training: bool) -> nn.Module:
    module: nn.Module = torch.export.export(Stem().train(training), (torch.randn(2, 3, 4, 4),)).module()
    return module


def decomposed() -> nn.Module:
    program = torch.export.export(Stem(), (torch.randn(2, 3, 4, 4),))
    module: nn.Module = program.run_decompositions().module()
    return module


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "torch.fx": lambda: torch.fx.GraphModule(Function(), Unfolding().trace(Function())),
    "make_fx": lambda: make_fx(Stem().__call__)(torch.randn(2, 3, 4, 4)),
    "torch.export": lambda: exported(True),
    "torch.export, decomposed": decomposed,
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("kind", GRAPHS)
def test_batch_norm_in_graphs_is_named(kind: str) -> None:
    graph = GRAPHS[kind]()
    with pytest.warns(UserWarning, match=r"cannot reach.*: 'neck' \(a graph of operators\)\. Convert before") as caught:
        convert_sync_batchnorm(nn.ModuleDict({"neck": graph, "head": nn.BatchNorm2d(C)}))
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"cannot reach.*: the model itself \(a graph"):
        convert_sync_batchnorm(graph)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_graphs_without_batch_statistics_are_left_alone() -> None:
    model = nn.Sequential(exported(False), make_fx(Stem().eval().__call__)(torch.randn(2, 3, 4, 4)))
    model.append(torch.fx.symbolic_trace(Stem()))  # whose batch norm is a layer
    convert_sync_batchnorm(model)
    assert isinstance(model[2].bn, SyncBatchNorm)


# ---- layers of other libraries


class Foreign(nn.Module):
    """Another library's batch norm, which derives from none of torch's."""

    def __init__(self, mean: str = "running_mean", var: str = "running_var", rate: str = "momentum") -> None:
        super().__init__()
        self.register_buffer(mean, torch.zeros(C))
        self.register_buffer(var, torch.ones(C))
        if rate:
            setattr(self, rate, 0.1)


class AsParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.running_mean, self.running_var = (nn.Parameter(torch.zeros(C), requires_grad=False) for _ in range(2))
        self.momentum = 0.1


class MyBatchNorm(nn.Module):
    """Known by its name alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class MyFrozenBatchNorm(Foreign):
    """As in torchvision, detectron2 and timm."""


class BatchNormOfSparse(nn.Module):
    """A wrapper, of what is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(C)


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "buffers": Foreign,
    "TensorFlow's names": lambda: Foreign("moving_mean", "moving_variance", "decay"),
    "parameters": AsParameters,
    "a name": MyBatchNorm,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_librarys_layer_is_named(kind: str) -> None:
    layer = FOREIGN[kind]()
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(layer))
    name = type(layer).__name__
    with pytest.warns(UserWarning, match=rf"cannot reach.*: '1\.0' \(test_local_statistics\.{name}\)\. Convert"):
        convert_sync_batchnorm(model)


@pytest.mark.parametrize(
    "layer",
    [
        Foreign(rate=""),
        MyFrozenBatchNorm(),
        MyFrozenBatchNorm(rate=""),
        BatchNormOfSparse(),
        nn.InstanceNorm2d(C, track_running_stats=True),
        nn.LazyInstanceNorm2d(track_running_stats=True),
        nn.GroupNorm(1, C),
        nn.SyncBatchNorm(C),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_uses_no_batch_statistics_or_is_converted_is_not_named(layer: nn.Module) -> None:
    convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), layer))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.GroupNorm(1, C), nn.InstanceNorm2d(C, track_running_stats=True)),
        nn.Sequential(nn.LazyInstanceNorm2d()),
    ],
    ids=["linear", "others", "lazy"],
)
def test_a_model_without_batch_norm(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"found no batch normalization in this {type(model).__name__}: nothing"):
        assert convert_sync_batchnorm(model) is model


def test_what_is_synchronized_already_is_found() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), SyncBatchNorm(C), nn.LazyBatchNorm1d()))
    convert_sync_batchnorm(model)
    convert_sync_batchnorm(SyncBatchNorm(C))


@pytest.mark.parametrize("wrong", [[nn.BatchNorm1d(C)], None, nn.BatchNorm1d, {"bn": nn.BatchNorm1d(C)}], ids=repr)
@pytest.mark.parametrize(
    "function",
    [
        convert_sync_batchnorm,
        revert_sync_batchnorm,
        syncbn.check_ranks_agree,
        lambda wrong: syncbn.accumulation.step_statistics(wrong).__enter__(),
        lambda wrong: syncbn.update_population_stats(wrong, []),
        lambda wrong: syncbn.diagnostics.measure_noise(wrong, []),
    ],
    ids=["convert", "revert", "agree", "accumulate", "population", "noise"],
)
def test_what_is_no_model(function: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a"):
        function(wrong)
