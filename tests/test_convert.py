"""To synchronized batch norm and back, with all that a layer is to the rest of a program."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers.links import forced
from helpers.oracle import close, whole_batch
from helpers.ranks import run_ranks
from syncbn import RankMismatchError, SyncBatchNorm, convert_sync_batchnorm, groups, revert_sync_batchnorm

ROUNDING = 5e-6  # of float32 batch norm: alone a layer has kernels of its own
C = 3
PLAIN: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (), nn.BatchNorm2d: (4, 4), nn.BatchNorm3d: (2, 2, 2)}


# ---- subclasses as people write them (importable, so that pickles find them)


class NormAct(nn.BatchNorm2d):
    """Reaches super().forward, then does more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.LeakyReLU(0.3)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class TimmShaped(nn.BatchNorm2d):
    """Calls F.batch_norm itself, counts by itself, then drops and activates."""

    def __init__(self, channels: int, momentum: float | None = 0.1, track: bool = True) -> None:
        super().__init__(channels, momentum=momentum, track_running_stats=track)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        bn_training = True if self.training else (self.running_mean is None) and (self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class ByHand(nn.BatchNorm2d):
    """Computes its own statistics: cannot be synchronized."""

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(input, (0, 2, 3), keepdim=True)
        return (input - mean) / (var + self.eps).sqrt()


class LowLevel(nn.BatchNorm2d):
    """Calls below F.batch_norm."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, False
        )


def _below(layer: nn.BatchNorm2d, input: Tensor) -> Tensor:
    return torch.batch_norm(
        input, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, 0.1, layer.eps, False
    )


class SuperOnlyInEval(nn.BatchNorm2d):
    """Looks as if it reached super().forward."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return _below(self, input)
        return super().forward(input)


def _functional(layer: nn.BatchNorm2d, input: Tensor) -> Tensor:
    return F.batch_norm(input, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1, layer.eps)


class FunctionalInTraining(nn.BatchNorm2d):
    """F.batch_norm in a helper, super().forward in eval."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return _functional(self, input)
        return super().forward(input)


class OwnNames(nn.BatchNorm2d):
    """Has names of its own that SyncBatchNorm has too, as a submodule and as plain attributes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.LeakyReLU(0.3)
        self.layer_name = "mine"

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(super().forward(input))


class FunctionAttribute(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = F.leaky_relu

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(super().forward(input))


class Bypass(nn.BatchNorm2d):
    """Does nothing while switched off, as drop-path and freezing schemes do."""

    on = False

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.on else input


class Frozen(nn.BatchNorm2d):
    """Normalizes with running statistics also in training."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Grandchild(NormAct):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class NoForward(nn.BatchNorm2d):
    extra = 1


class Two(nn.BatchNorm2d):
    """More than one input and output."""

    def forward(  # type: ignore[override]
        self, input: Tensor, gate: Tensor, *, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        y = super().forward(input)
        return y * gate * scale, y


class SubclassOfSync(SyncBatchNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return -super().forward(input, residual)


# ---- class, identity, and what stays


@pytest.mark.parametrize("cls", PLAIN)
def test_there_and_back(cls: type[nn.Module]) -> None:
    layer: Any = cls(C, eps=1e-3, momentum=0.2)
    state = {name: id(value) for name, value in [*layer.named_parameters(), *layer.named_buffers()]}
    before = set(layer.__dict__)
    converted: Any = convert_sync_batchnorm(layer)
    assert converted is layer
    assert isinstance(layer, SyncBatchNorm)
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    assert {name: id(value) for name, value in [*layer.named_parameters(), *layer.named_buffers()]} == state
    assert revert_sync_batchnorm(layer) is layer
    assert type(layer) is cls
    assert {name: id(value) for name, value in [*layer.named_parameters(), *layer.named_buffers()]} == state
    assert set(layer.__dict__) == before
    layer(torch.randn(3, C, *PLAIN[cls]))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_everything_is_kept(dtype: torch.dtype, track: bool, affine: bool) -> None:
    layer = nn.BatchNorm2d(C, affine=affine, track_running_stats=track, dtype=dtype)
    layer.eval()
    layer.custom = {"key": 1}  # type: ignore[assignment]
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    if affine:
        layer.weight.requires_grad_(False)
    convert_sync_batchnorm(layer)
    assert not layer.training
    assert layer.custom == {"key": 1}
    assert all(value.dtype in (dtype, torch.int64) for value in layer.state_dict().values())
    if affine:
        assert not layer.weight.requires_grad and layer.bias.requires_grad
    layer(torch.randn(2, C, 3, 3, dtype=dtype, requires_grad=True)).float().sum().backward()
    assert calls == ["pre", "forward", "backward"]


@pytest.mark.parametrize("name", ["activation", "layer_name", "residual"])
def test_custom_attributes_may_have_our_names(name: str) -> None:
    layer = nn.BatchNorm2d(C)
    setattr(layer, name, "custom")
    x = torch.randn(4, C, 2, 2)
    expected = copy.deepcopy(layer)(x)
    model = convert_sync_batchnorm(nn.Sequential(layer))
    close(model(x), expected, ROUNDING, ROUNDING, "y")
    assert getattr(layer, name) == "custom"
    revert_sync_batchnorm(model)
    assert getattr(layer, name) == "custom"


def test_conversion_in_place_reaches_optimizers_and_lists() -> None:
    model = nn.Sequential(nn.Conv2d(1, C, 1), nn.BatchNorm2d(C))
    held = [model[1]]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_sync_batchnorm(model)
    assert isinstance(held[0], SyncBatchNorm)
    before = model[1].bias.detach().clone()
    model(torch.randn(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].bias, before)


def test_shared_modules() -> None:
    """Under two names of one parent, and under two parents: one layer before, one layer after."""
    shared = nn.BatchNorm2d(C)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": shared, "d": shared})
    convert_sync_batchnorm(model)
    assert model["a"][0] is model["b"][0] is model["c"] is model["d"] is shared
    assert isinstance(shared, SyncBatchNorm)
    revert_sync_batchnorm(model)
    back: nn.Module = shared
    assert model["a"][0] is model["d"] is back
    assert type(back) is nn.BatchNorm2d


def test_other_normalizations_are_untouched() -> None:
    others = [
        nn.InstanceNorm2d(C),
        nn.LazyInstanceNorm2d(),
        nn.GroupNorm(1, C),
        nn.LayerNorm(C),
        nn.LocalResponseNorm(2),
    ]
    with pytest.warns(UserWarning, match="found no batch normalization"):
        model = convert_sync_batchnorm(nn.Sequential(*others))
    assert [type(layer) for layer in model] == [type(layer) for layer in others]
    revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in others]


def test_a_layer_as_root() -> None:
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm1d(C)), SyncBatchNorm)


def test_converting_twice_changes_nothing() -> None:
    def body(rank: int, group: Any) -> None:
        model = nn.Sequential(nn.BatchNorm1d(C), NormAct(C), TimmShaped(C), SyncBatchNorm(C, process_group=group))
        convert_sync_batchnorm(model, group)
        before = [(type(layer), layer.process_group, layer.layer_name) for layer in model]
        convert_sync_batchnorm(model)
        assert [(type(layer), layer.process_group, layer.layer_name) for layer in model] == before
        assert all(layer.process_group is group for layer in model)
        revert_sync_batchnorm(revert_sync_batchnorm(model))
        assert [type(layer) for layer in model][:3] == [nn.BatchNorm1d, NormAct, TimmShaped]

    run_ranks(2, body)


def test_names() -> None:
    model = nn.Sequential(nn.ModuleDict({"module": nn.Sequential(nn.BatchNorm1d(C)), "bn": nn.BatchNorm1d(C)}))
    convert_sync_batchnorm(model)
    assert model[0]["bn"].layer_name == "0.bn"
    assert model[0]["module"][0].layer_name == "0.0"  # as if wrapped


def test_conversion_is_all_or_nothing() -> None:
    class Bad(nn.SyncBatchNorm):
        pass

    model = nn.Sequential(nn.BatchNorm1d(C), Bad(C), nn.BatchNorm1d(C))
    with pytest.raises(TypeError, match=r"layer '1'.*Bad.*SyncBatchNorm"):
        convert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, Bad, nn.BatchNorm1d]


# ---- what the converted layer computes


def forwards(make: Callable[[], nn.Module], *, steps: int = 2, channels_last: bool = False) -> tuple[Any, Any, Any]:
    """Two ranks of the converted layer, and the layer itself with the whole batch: outputs, gradients and layers."""
    batches = [torch.randn(7, C, 3, 3, dtype=torch.float64) * 2 + 1 for _ in range(steps)]
    plain: Any = make().double()
    ours = [copy.deepcopy(plain) for _ in range(2)]
    whole = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        y = plain(x)
        y.pow(3).sum().backward()
        whole.append((y.detach(), x.grad))

    def body(rank: int, group: Any) -> list[tuple[Tensor, Tensor | None]]:
        layer = convert_sync_batchnorm(ours[rank], group)
        results = []
        for batch in batches:
            x = batch.split([5, 2])[rank].clone().requires_grad_()
            y = layer(x)
            y.pow(3).sum().backward()
            results.append((y.detach(), x.grad))
        return results

    return run_ranks(2, body), whole, (ours, plain)


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(C),
    "cumulative": lambda: nn.BatchNorm2d(C, momentum=None),
    "norm and activation": lambda: NormAct(C),
    "timm": lambda: TimmShaped(C),
    "timm cumulative": lambda: TimmShaped(C, None),
    "timm without statistics": lambda: TimmShaped(C, track=False),
    "grandchild": lambda: Grandchild(C),
    "no forward": lambda: NoForward(C),
    "own names": lambda: OwnNames(C),
    "function attribute": lambda: FunctionAttribute(C),
}


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclasses_keep_their_behaviour(kind: str) -> None:
    results, whole, (ours, plain) = forwards(SUBCLASSES[kind])
    for step, (y, dx) in enumerate(whole):
        close(torch.cat([result[step][0] for result in results]), y, 1e-12, 1e-12, f"y of step {step}")
        close(torch.cat([result[step][1] for result in results]), dx, 1e-10, 1e-10, f"dx of step {step}")
    for layer in ours:
        assert isinstance(layer, type(plain)) or type(layer) is SyncBatchNorm
        assert isinstance(layer, SyncBatchNorm)
        for name, value in plain.state_dict().items():
            close(layer.state_dict()[name], value, 1e-12, 1e-12, name)
        x = torch.randn(2, C, 3, 3, dtype=torch.float64)
        close(layer.eval()(x), plain.eval()(x), 1e-12, 1e-12, "y in eval")
        revert_sync_batchnorm(layer)
        assert type(layer) is type(plain)
        close(layer(x), plain(x), 1e-12, 1e-12, "y after the way back")
        close(layer.train()(x), copy.deepcopy(plain).train()(x), 1e-12, 1e-12, "y after the way back")


@pytest.mark.parametrize("cls", [ByHand, LowLevel, SuperOnlyInEval, FunctionalInTraining])
def test_subclasses_that_would_stay_local_raise(cls: type[nn.BatchNorm2d]) -> None:
    def body(rank: int, group: Any) -> None:
        model = convert_sync_batchnorm(nn.Sequential(cls(C)), group)
        with pytest.raises(RuntimeError, match=rf"layer '0'.*{cls.__name__}"):
            model(torch.randn(3, C, 2, 2))
        model.eval()(torch.randn(3, C, 2, 2))  # nothing to synchronize

    run_ranks(2, body)
    convert_sync_batchnorm(cls(C))(torch.randn(3, C, 2, 2))  # nobody to synchronize with


@pytest.mark.parametrize("cls", [Bypass, Frozen])
def test_subclasses_that_use_no_batch_statistics(cls: type[nn.BatchNorm2d]) -> None:
    x = torch.randn(3, C, 2, 2)

    def body(rank: int, group: Any) -> None:
        close(convert_sync_batchnorm(cls(C), group)(x), cls(C)(x), 1e-6, 1e-6, "y")

    run_ranks(2, body)


def test_subclass_with_several_inputs_and_outputs() -> None:
    x, gate = torch.randn(6, C, 2, 2), torch.randn(6, C, 2, 2)
    expected = Two(C)(x, gate, scale=3.0)

    def body(rank: int, group: Any) -> Any:
        part = slice(0, 4) if rank == 0 else slice(4, 6)
        return convert_sync_batchnorm(Two(C), group)(x[part], gate[part], scale=3.0)

    for i, both in enumerate(zip(*run_ranks(2, body), strict=True)):
        close(torch.cat(both), expected[i], 1e-5, 1e-5, f"output {i}")


def test_subclass_that_errs_alone() -> None:
    """Its own check fails before anything is shared: its peers hear of it."""

    def body(rank: int, group: Any) -> None:
        layer = convert_sync_batchnorm(TimmShaped(C), group)
        with pytest.raises(AssertionError if rank == 0 else RankMismatchError, match="4D"):
            layer(torch.randn(3, C) if rank == 0 else torch.randn(3, C, 2, 2))
        layer(torch.randn(3, C, 2, 2))

    run_ranks(2, body)


def test_subclass_of_ours() -> None:
    model = nn.Sequential(SubclassOfSync(C))
    convert_sync_batchnorm(model)
    assert type(model[0]) is SubclassOfSync
    assert model[0].layer_name == "0"


def test_class_with_its_own_dimension_check() -> None:
    for cls, shape in ((nn.BatchNorm1d, (2, C, 4, 4)), (nn.BatchNorm2d, (2, C)), (nn.BatchNorm3d, (2, C, 4, 4))):
        layer = convert_sync_batchnorm(cls(C))
        with pytest.raises(ValueError, match="expected"):
            layer(torch.randn(shape))
        with pytest.raises(ValueError, match="expected"):
            layer.eval()(torch.randn(shape))


# ---- nn.SyncBatchNorm, lazy and parametrized layers


def test_torch_sync_batchnorm_is_accepted() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    convert_sync_batchnorm(model)
    assert type(model[0]) is SyncBatchNorm
    x = torch.randn(3, C, 2, 2)
    close(model[0](x), nn.BatchNorm2d(C)(x), ROUNDING, ROUNDING, "y")
    revert_sync_batchnorm(model)
    assert not isinstance(model[0], SyncBatchNorm | nn.SyncBatchNorm)
    close(model[0](x), nn.BatchNorm2d(C)(x), ROUNDING, ROUNDING, "y")
    model[0](torch.randn(4, C))  # of any dimension, as it was


def test_torch_sync_batchnorm_keeps_its_group() -> None:
    def body(rank: int, group: Any) -> None:
        layer = nn.SyncBatchNorm(C, process_group=group)
        assert convert_sync_batchnorm(layer).process_group is group

    run_ranks(2, body)


def test_revert_takes_torch_sync_batchnorm() -> None:
    layer = revert_sync_batchnorm(nn.SyncBatchNorm(C, momentum=0.3))
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert layer.momentum == 0.3
    layer(torch.randn(4, C))


def test_revert_of_a_layer_that_was_built_synchronized() -> None:
    x, residual = torch.randn(4, C, 2), torch.randn(4, C, 2)
    layer = SyncBatchNorm(C, activation="relu")
    plain = copy.deepcopy(layer)
    revert_sync_batchnorm(layer)
    assert not isinstance(layer, SyncBatchNorm)
    close(layer(x, residual), plain(x, residual), ROUNDING, ROUNDING, "y")
    convert_sync_batchnorm(layer)
    assert isinstance(layer, SyncBatchNorm)
    close(layer(x, residual), plain(x, residual), ROUNDING, ROUNDING, "y")


LAZY = {
    nn.LazyBatchNorm1d: (nn.BatchNorm1d, (5,)),
    nn.LazyBatchNorm2d: (nn.BatchNorm2d, (4, 4)),
    nn.LazyBatchNorm3d: (nn.BatchNorm3d, (2, 2, 2)),
}


@pytest.mark.parametrize("cls", LAZY)
def test_lazy(cls: Any) -> None:
    origin, spatial = LAZY[cls]
    x = torch.randn(6, C, *spatial, dtype=torch.float64)
    expected = whole_batch([x[:4], x[4:]], [x[:4], x[4:]])

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(nn.Sequential(cls(dtype=torch.float64)), group)
        y = model(x[:4] if rank == 0 else x[4:])
        close(y, expected.y[rank], 1e-12, 1e-12, "y")
        layer = model[0]
        assert isinstance(layer, SyncBatchNorm)
        assert layer.num_features == C and layer.weight.shape == (C,)
        with pytest.raises(ValueError, match="expected"):
            layer(torch.randn(1, C, 1, 1, 1, 1, dtype=torch.float64))
        return type(revert_sync_batchnorm(model)[0])

    assert run_ranks(2, body) == [origin] * 2


@pytest.mark.parametrize("cls", LAZY)
def test_lazy_reverted_before_its_first_input(cls: Any) -> None:
    layer = revert_sync_batchnorm(convert_sync_batchnorm(cls()))
    assert type(layer) is cls
    layer(torch.randn(3, C, *LAZY[cls][1]))
    assert type(layer) is LAZY[cls][0]


def test_lazy_loads_a_state_dict() -> None:
    layer = convert_sync_batchnorm(nn.LazyBatchNorm2d())
    source = nn.BatchNorm2d(C)
    source(torch.randn(3, C, 2, 2))
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, C, 2, 2)
    close(layer.eval()(x), source.eval()(x), 0, 0, "y")


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@pytest.mark.parametrize("first", ["parametrize", "convert"])
def test_parametrized(first: str) -> None:
    x = torch.randn(6, C, 2, 2, dtype=torch.float64)
    expected = whole_batch([x[:4], x[4:]], [x[:4], x[4:]], torch.full((C,), 2.0))

    def body(rank: int, group: Any) -> None:
        layer: Any = nn.BatchNorm2d(C, dtype=torch.float64)
        if first == "parametrize":
            parametrize.register_parametrization(layer, "weight", Double())
            convert_sync_batchnorm(layer, group)
        else:
            convert_sync_batchnorm(layer, group)
            parametrize.register_parametrization(layer, "weight", Double())
        assert isinstance(layer, SyncBatchNorm)
        mine = (x[:4], x[4:])[rank]
        y = layer(mine)
        close(y, expected.y[rank], 1e-12, 1e-12, "y")
        y.backward(mine)
        close(layer.parametrizations.weight.original.grad, 2 * expected.dweight[rank], 1e-12, 1e-12, "dweight")
        close(copy.deepcopy(layer)(mine), expected.y[rank], 1e-12, 1e-12, "y of a copy")

    run_ranks(2, body)


@pytest.mark.parametrize("first", ["parametrize", "convert"])
def test_parametrized_and_reverted(first: str) -> None:
    x = torch.randn(6, C, 2, 2)
    layer: Any = nn.BatchNorm2d(C)
    if first == "parametrize":
        parametrize.register_parametrization(layer, "weight", Double())
        convert_sync_batchnorm(layer)
    else:
        convert_sync_batchnorm(layer)
        parametrize.register_parametrization(layer, "weight", Double())
    revert_sync_batchnorm(layer)
    assert not isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, nn.BatchNorm2d)
    close(layer(x), 2 * nn.BatchNorm2d(C)(x), 1e-6, 1e-6, "y")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.BatchNorm2d
    assert torch.equal(layer.weight, torch.full((C,), 2.0))


def test_parametrization_removed_while_converted() -> None:
    layer: Any = nn.BatchNorm2d(C)
    parametrize.register_parametrization(layer, "weight", Double())
    convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, SyncBatchNorm)
    assert torch.equal(layer.weight, torch.full((C,), 2.0))
    back: nn.Module = revert_sync_batchnorm(layer)
    assert type(back) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hook() -> None:
    """The older weight_norm: the weight is a plain attribute, made anew in a hook of each forward."""
    layers = [nn.utils.weight_norm(nn.BatchNorm2d(C), "weight", dim=None) for _ in range(2)]
    for layer in layers:
        nn.init.constant_(layer.weight_g, 3.0)
    x = torch.randn(6, C, 2, 2)
    close(convert_sync_batchnorm(layers[0])(x), layers[1](x), ROUNDING, ROUNDING, "y")


# ---- copies, pickles, files


def roundtrips() -> dict[str, Callable[[Any], Any]]:
    def by_file(module: Any) -> Any:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
        "old pickle": lambda module: pickle.loads(pickle.dumps(module, protocol=2)),
        "torch.save": by_file,
    }


@pytest.mark.parametrize("way", roundtrips())
@pytest.mark.parametrize("kind", [k for k in SUBCLASSES if k != "function attribute"])
def test_copies(way: str, kind: str) -> None:
    """In one process with a default group: the copy is as synchronized as the original, and as revertible."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = convert_sync_batchnorm(nn.Sequential(SUBCLASSES[kind]()), group)
        x = torch.randn(4, C, 3, 3)
        with forced():
            model(x)
            again = roundtrips()[way](model)
            assert type(again[0]) is type(model[0])
            assert again[0] is not model[0]
            assert again[0].layer_name == model[0].layer_name
            # (that another group of the same ranks is found instead of this one makes no difference)
            assert groups.group_ranks(again[0].process_group) == [0]
            assert again[0]._group.resolve() is not None
            close(again(x), model(x), 0, 0, "y")
            for name, value in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], value), name
        assert type(revert_sync_batchnorm(again)[0]) is type(revert_sync_batchnorm(model)[0])
    finally:
        dist.destroy_process_group()


def test_copies_of_lazy_layers() -> None:
    for name, way in roundtrips().items():
        if name == "deepcopy":  # torch has none of uninitialized parameters
            continue
        layer = way(convert_sync_batchnorm(nn.LazyBatchNorm2d()))
        layer(torch.randn(3, C, 2, 2))
        assert isinstance(layer, SyncBatchNorm)


def test_deepcopy_keeps_what_is_shared_shared() -> None:
    shared = nn.BatchNorm1d(C)
    model = copy.deepcopy(convert_sync_batchnorm(nn.ModuleDict({"a": shared, "b": shared})))
    assert model["a"] is model["b"]


def test_state_dict_goes_both_ways() -> None:
    for make in SUBCLASSES.values():
        plain, ours = make(), convert_sync_batchnorm(make())
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        plain(torch.randn(3, C, 2, 2))
        assert list(plain.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(plain.state_dict())
        plain.load_state_dict(ours.state_dict())


def test_old_state_dict_without_a_counter() -> None:
    state: Any = nn.BatchNorm2d(C).state_dict()
    del state["num_batches_tracked"]
    del state._metadata[""]["version"]
    SyncBatchNorm(C).load_state_dict(state)


def test_apply_and_moves_go_on_working() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C), NormAct(C)))
    model.half().float().to(torch.float64).to(memory_format=torch.channels_last)
    model.apply(lambda module: None)
    assert model[0].weight.dtype == torch.float64
    model.to("meta")
    assert model[1].running_mean.device.type == "meta"


def test_converted_class_is_made_once() -> None:
    a, b = convert_sync_batchnorm(NormAct(C)), convert_sync_batchnorm(NormAct(C))
    assert type(a) is type(b)
    assert isinstance(a, NormAct)
    assert "NormAct" in repr(a)


def test_forward_wrapped_on_the_object() -> None:
    """As profilers and offloaders do: what they call inside is the old class's forward, which would stay local."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model[1].forward = functools.wraps(model[1].forward)(lambda input: nn.BatchNorm2d.forward(model[1], input))
    with pytest.raises(TypeError, match=r"layer '1'.*BatchNorm2d.*before"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
