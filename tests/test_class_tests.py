"""Code that asks for batch norm by class finds converted, built and reverted layers; and what comes with it."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from helpers.oracle import close
from helpers.processes import run_processes
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

C = 3
SHAPES: dict[type[Any], tuple[int, ...]] = {
    nn.BatchNorm1d: (4, C),
    nn.BatchNorm2d: (4, C, 2, 2),
    nn.BatchNorm3d: (4, C, 2, 2, 2),
}
LAZY = {nn.LazyBatchNorm1d: nn.BatchNorm1d, nn.LazyBatchNorm2d: nn.BatchNorm2d, nn.LazyBatchNorm3d: nn.BatchNorm3d}
WEIGHT_DECAY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = tuple(value for name, value in vars(nn).items() if "Norm" in name and isinstance(value, type))


class ScaledBatchNorm(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@pytest.mark.parametrize("cls", SHAPES)
def test_a_converted_layer_has_the_class_it_had(cls: type[Any]) -> None:
    layer = convert_sync_batchnorm(cls(C))
    assert isinstance(layer, cls) and isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, (cls, nn.GroupNorm)) and issubclass(type(layer), cls)
    assert not any(isinstance(layer, other) for other in SHAPES if other is not cls)
    assert type(layer).__name__ == "SyncBatchNorm"
    assert repr(layer).startswith("SyncBatchNorm(3, eps=1e-05, momentum=0.1")
    assert layer(torch.randn(SHAPES[cls])).shape == SHAPES[cls]
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(4, C, 2, 2, 2, 2))
    assert type(revert_sync_batchnorm(layer)) is cls


@pytest.mark.parametrize("cls", LAZY)
def test_so_has_a_lazy_one(cls: type[Any]) -> None:
    layer = convert_sync_batchnorm(cls())
    assert isinstance(layer, cls) and isinstance(layer, SyncBatchNorm)
    layer(torch.randn(SHAPES[LAZY[cls]]))
    assert isinstance(layer, LAZY[cls]) and isinstance(layer, SyncBatchNorm) and not isinstance(layer, cls)
    assert type(layer) is type(convert_sync_batchnorm(LAZY[cls](C)))


@pytest.mark.parametrize("parametrized", [False, True])
def test_under_a_parametrization_too(parametrized: bool) -> None:
    layer = nn.BatchNorm2d(C)
    if parametrized:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    convert_sync_batchnorm(layer)
    assert isinstance(layer, nn.BatchNorm2d) and isinstance(layer, SyncBatchNorm)
    if parametrized:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is type(convert_sync_batchnorm(nn.BatchNorm2d(C)))


def built() -> nn.Module:
    return SyncBatchNorm(C, activation="relu")


def converted() -> nn.Module:
    return convert_sync_batchnorm(nn.BatchNorm2d(C))


def converted_subclass() -> nn.Module:
    return convert_sync_batchnorm(ScaledBatchNorm(C))


def converted_torch_own() -> nn.Module:
    return convert_sync_batchnorm(nn.SyncBatchNorm(C))


def reverted() -> nn.Module:
    return revert_sync_batchnorm(SyncBatchNorm(C))


MAKERS = [built, converted, converted_subclass, converted_torch_own]


@pytest.mark.parametrize("make", [*MAKERS, reverted])
def test_usual_tests_find_every_layer(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert isinstance(layer, WEIGHT_DECAY) and isinstance(layer, NORMS)
    assert isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert "BatchNorm" in type(layer).__name__


@pytest.mark.parametrize("make", MAKERS)
def test_what_torchs_own_sync_batchnorm_is_a_layer_is(make: Callable[[], nn.Module]) -> None:
    assert isinstance(make(), nn.SyncBatchNorm)


def test_what_was_built_is_none_of_a_dimension() -> None:
    assert not isinstance(built(), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert not isinstance(reverted(), nn.SyncBatchNorm)


def roundtrips() -> dict[str, Callable[[Any], Any]]:
    def saved(layer: Any) -> Any:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "torch.save": saved}


@pytest.mark.parametrize("way", roundtrips())
@pytest.mark.parametrize("cls", [*SHAPES, ScaledBatchNorm])
def test_copies_have_the_class_too(cls: type[Any], way: str) -> None:
    layer = convert_sync_batchnorm(cls(C))
    again = roundtrips()[way](layer)
    assert type(again) is type(layer) and isinstance(again, cls)
    x = torch.randn(SHAPES.get(cls, (4, C, 2, 2)))
    close(again(x), layer(x), 0.0, 0.0, "y")
    assert type(revert_sync_batchnorm(again)) is cls


def test_freezing_by_class_freezes() -> None:
    """As detectors freeze their backbone: eval mode and no gradients, for layers of two classes."""
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), SyncBatchNorm(C)))
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            layer.eval().requires_grad_(False)
    model(torch.randn(2, C, 4, 4))
    assert [int(layer.num_batches_tracked) for layer in (model[1], model[2])] == [0, 0]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias"}


def test_one_import_migrates_a_script() -> None:
    """``from syncbn import SyncBatchNorm`` in place of ``from torch.nn import SyncBatchNorm``."""
    model = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    assert isinstance(model[1], SyncBatchNorm) and isinstance(model[1], nn.BatchNorm2d)
    assert model[1].layer_name == "1"
    assert isinstance(SyncBatchNorm.convert_sync_batchnorm(module=nn.BatchNorm1d(C), process_group=None), SyncBatchNorm)
    assert isinstance(SyncBatchNorm(C).convert_sync_batchnorm(nn.BatchNorm1d(C)), SyncBatchNorm)


def test_the_arguments_are_those_of_torchs_layer() -> None:
    layer = SyncBatchNorm(C, 1e-3, None, False, True, None, "cpu", torch.float64)
    assert layer.eps == 1e-3 and layer.momentum is None and layer.weight is None
    assert layer.running_mean is not None and layer.running_mean.dtype == torch.float64
    assert SyncBatchNorm(C, bias=False).bias is None


# ---- other converters


def theirs(module: nn.Module) -> nn.Module:
    """As other libraries convert: every batch norm gets replaced, and the children of everything are visited."""

    def convert_syncbn_model(module: nn.Module) -> nn.Module:
        made = nn.SyncBatchNorm(C) if isinstance(module, nn.modules.batchnorm._BatchNorm) else module
        for name, child in module.named_children():
            made.add_module(name, convert_syncbn_model(child))
        return made

    return convert_syncbn_model(module)


class Converter:
    """Methods, other spellings, and children without their names."""

    def replaceBNwithSyncBN(self, module: nn.Module) -> nn.Module:
        for index, child in enumerate(module.children()):
            module._modules[str(index)] = self.replaceBNwithSyncBN(child)
        return nn.SyncBatchNorm(C) if isinstance(module, nn.modules.batchnorm._BatchNorm) else module


def back(module: nn.Module) -> nn.Module:
    """As people go back from torch's own, to evaluate on a CPU: without the activation of ours."""

    def _revert_sync_batchnorm(module: nn.Module) -> nn.Module:
        made = nn.BatchNorm2d(C) if isinstance(module, nn.SyncBatchNorm) else module
        for name, child in module.named_children():
            made.add_module(name, _revert_sync_batchnorm(child))
        return made

    return _revert_sync_batchnorm(module)


OTHERS = [nn.SyncBatchNorm.convert_sync_batchnorm, theirs, Converter().replaceBNwithSyncBN, back]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("convert", OTHERS, ids=["torch", "apex", "method", "back"])
def test_other_converters_are_refused(make: Callable[[], nn.Module], convert: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), make())
    layer = model[1]
    layer.layer_name = "neck.bn"  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"met the layer 'neck\.bn' of syncbn.*sync_batchnorm=True.*revert"):
        convert(model)
    with pytest.raises(RuntimeError, match="syncbn"):  # as DDP and torch.compile wrap a model
        convert(nn.ModuleDict({"module": model}))
    assert model[1] is layer
    if make is not built:
        plain = convert(revert_sync_batchnorm(model))
        assert not isinstance(plain[1], SyncBatchNorm)


def test_a_reverted_activation_is_not_lost_either() -> None:
    model = revert_sync_batchnorm(nn.Sequential(SyncBatchNorm(C, activation="relu"), SyncBatchNorm(C)))
    with pytest.raises(RuntimeError, match="activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model[1])) is nn.SyncBatchNorm


def test_children_are_listed_to_others() -> None:
    layer = converted()
    assert list(layer.named_children()) == [] and list(layer.children()) == []
    assert list(nn.Sequential(layer).modules())[1] is layer
    layer.extra = nn.ReLU()  # type: ignore[assignment]
    assert [name for name, _ in nn.Sequential(layer).named_modules()] == ["", "0", "0.extra"]
    assert [name for name, _ in layer.named_children()] == ["extra"]

    def count_sync_batchnorms(module: nn.Module) -> int:
        return isinstance(module, nn.SyncBatchNorm) + sum(map(count_sync_batchnorms, module.children()))

    assert count_sync_batchnorms(nn.Sequential(layer)) == 1


class Looks(nn.Module):
    """A forward that looks through its own modules, as those do that switch parts on and off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        return self.norm(x) * norms + len(list(self.norm.named_children())) + len(list(self.children()))


def test_compilers_list_modules_too() -> None:
    model = convert_sync_batchnorm(Looks())
    x = torch.randn(2, C, 2, 2)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    close(compiled(x), expected, 1e-5, 1e-5, "compiled")
    exported = torch.export.export(model.eval(), (x,), strict=True)
    close(exported.module()(x), model(x), 1e-5, 1e-5, "exported")


# ---- DistributedDataParallel


def in_ddp(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for make in MAKERS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(C, C, 1), make()).double()
        ddp = DistributedDataParallel(model)
        y = ddp(batch().chunk(size)[rank])
        y.square().sum().backward()
        names = [name for name, module in ddp.named_modules() if isinstance(module, nn.SyncBatchNorm)]
        found[make.__name__] = y.detach(), names, model[0].weight.grad
    alone = DistributedDataParallel(SyncBatchNorm(C))
    found["alone"] = float(alone(torch.full((1, C), float(rank))).abs().min())
    try:
        DistributedDataParallel(nn.SyncBatchNorm(C))
    except ValueError as error:
        found["torch's own"] = str(error)
    return found


def batch() -> Tensor:
    return torch.randn(4, C, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_ddp_takes_them_on_cpus(tmp_path: Path) -> None:
    results = run_processes(2, in_ddp, tmp_path)
    for make in MAKERS:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Conv2d(C, C, 1), make()).double()
        ys, names, grads = zip(*(result[make.__name__] for result in results), strict=True)
        close(torch.cat(ys), whole(batch()), 1e-12, 1e-12, make.__name__)
        assert names == (["module.1"], ["module.1"])
        assert torch.equal(*grads)
    assert min(result["alone"] for result in results) > 0.9
    # (if torch takes its own one day, ours need not be hidden any more)
    assert all("GPU" in result["torch's own"] for result in results)


# ---- the front door


def test_version_is_written_in_one_place() -> None:
    root = Path(__file__).parents[1]
    written = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert syncbn.__version__ == written
    assert "__version__" in dir(syncbn) and "diagnostics" in dir(syncbn)


def test_version_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from syncbn import _version

    monkeypatch.setattr(_version, "__file__", str(tmp_path / "syncbn" / "_version.py"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"that of {name}")
    assert _version.version() == "that of syncbn"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n')
    assert _version.version() == "that of syncbn"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert _version.version() == "unknown"


def test_diagnostics_needs_no_import_of_its_own() -> None:
    code = (
        "import sys, syncbn\n"
        "assert 'syncbn.diagnostics' not in sys.modules\n"
        "assert syncbn.diagnostics.measure_noise and 'syncbn.diagnostics' in sys.modules\n"
        "try: syncbn.diagnostic\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "module 'syncbn' has no attribute 'diagnostic'\n"
