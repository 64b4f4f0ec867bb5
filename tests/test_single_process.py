"""One process: what ``nn.BatchNorm`` can do, a synchronized layer can. With peers: an error with a way out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from helpers.oracle import close
from helpers.processes import run_processes
from syncbn import RankMismatchError, SyncBatchNorm, convert_sync_batchnorm

C = 3
ROUNDING = 5e-6


def plain(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C, **options))


def ours(seed: int = 0, **options: Any) -> nn.Module:
    return convert_sync_batchnorm(plain(seed, **options))


def batch(seed: int = 0) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


OPTIONS: list[dict[str, Any]] = [{}, {"affine": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_an_ensemble_under_vmap(options: dict[str, Any], gradients: bool) -> None:
    models = [ours(seed, **options) for seed in range(3)]
    singles = [plain(seed, **options) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(p: Any, b: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,)).pow(3).sum()

    if gradients:
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))(parameters, buffers, batch())
        for single in singles:
            single(batch()).pow(3).sum().backward()
        expected = torch.stack([single[0].weight.grad for single in singles])
        close(found["0.weight"], expected, 1e-3, 1e-4, "gradients")
    else:
        found = torch.func.vmap(loss, in_dims=(0, 0, None))(parameters, buffers, batch())
        close(found, torch.stack([single(batch()).pow(3).sum() for single in singles]), 1e-4, 1e-4, "losses")
    for index, single in enumerate(singles):
        for name, value in single.named_buffers():
            close(buffers[name][index], value, ROUNDING, ROUNDING, name)


@pytest.mark.parametrize("options", [*OPTIONS, {"momentum": None}], ids=str)
def test_a_step_of_fake_tensors(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        model = ours(**options)
        y = model(torch.randn(5, 4))
        y.sum().backward()
    assert y.shape == (5, C) and model[0].weight.grad.shape == (C, 4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fake_inputs_of_a_real_model(options: dict[str, Any]) -> None:
    model, reference = ours(**options), plain(**options)
    for net in (model, reference):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert net(mode.from_tensor(batch())).shape == (5, C)
    for found, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(found, expected)
    close(model(batch()), reference(batch()), ROUNDING, ROUNDING, "y of a real step afterwards")


def test_a_mask_of_fake_tensors_and_meta_tensors() -> None:
    with FakeTensorMode():
        assert SyncBatchNorm(C)(torch.randn(5, C), mask=torch.ones(5, 1, dtype=torch.bool)).shape == (5, C)
    layer = SyncBatchNorm(C, device="meta", activation="relu")
    x = torch.randn(5, C, device="meta", requires_grad=True)
    layer(x, x).sum().backward()
    assert x.grad is not None and x.grad.is_meta


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_make_fx_records_the_computation(options: dict[str, Any], mode: str) -> None:
    model = ours(**options)
    reference = plain(**options)

    def step(x: Tensor) -> Tensor:
        return model(x)

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(batch())
    assert not any("syncbn" in str(node.target) for node in graph.graph.nodes)
    reference.load_state_dict(model.state_dict())  # (a trace on real tensors has moved the statistics)
    close(graph(batch(1)), reference(batch(1)), ROUNDING, ROUNDING, "y of another batch than was traced")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_script_trace_of_training(options: dict[str, Any]) -> None:
    x = torch.randn(5, C, 2, 2)
    layer = convert_sync_batchnorm(nn.BatchNorm2d(C, **options))
    recorded = torch.jit.trace(layer, (x,), check_trace=False)
    reference = nn.BatchNorm2d(C, **options)
    reference.load_state_dict(layer.state_dict())
    close(recorded(2.0 * x + 1.0), reference(2.0 * x + 1.0), ROUNDING, ROUNDING, "y")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_without_running_statistics() -> None:
    """(with them torch's own refuses as well)"""
    for layer in (SyncBatchNorm(C, track_running_stats=False), ours(track_running_stats=False)[1]):
        own = nn.BatchNorm1d(C, track_running_stats=False)
        x, v = torch.randn(4, C), torch.randn(4, C)
        for found, expected in zip(torch.func.jvp(layer, (x,), (v,)), torch.func.jvp(own, (x,), (v,)), strict=True):
            close(found, expected, ROUNDING, ROUNDING, "jvp")
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, v))
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        close(tangent, torch.func.jvp(own, (x,), (v,))[1], ROUNDING, ROUNDING, "tangent")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "way", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda way: way.__name__
)
def test_jacobians(way: Callable[..., Any]) -> None:
    layer, own = SyncBatchNorm(C, track_running_stats=False), nn.BatchNorm1d(C, track_running_stats=False)
    x = torch.randn(4, C)
    found, expected = (way(lambda x, norm=norm: norm(x).pow(3).sum(0))(x) for norm in (layer, own))
    close(found, expected, 1e-3, 1e-3, way.__name__)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", [True, False])
def test_batched_gradients_of_an_ordinary_forward(activation: str | None, affine: bool) -> None:
    """The forward is over when ``vmap`` meets its backward."""
    layer = SyncBatchNorm(C, activation=activation, affine=affine)
    own = nn.Sequential(nn.BatchNorm1d(C, affine=affine), nn.ReLU() if activation else nn.Identity())
    x = torch.randn(6, C)
    gs = torch.randn(5, 6, C)
    found = []
    for norm in (layer, own):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *norm.parameters()]
        found.append(torch.autograd.grad(norm(leaf), inputs, gs, is_grads_batched=True))
        vectorized = torch.autograd.functional.jacobian(norm, x, vectorize=True)
        assert isinstance(vectorized, Tensor) and vectorized.shape == (6, C, 6, C)
        found.append((vectorized,))
    for mine, theirs in ((found[0], found[2]), (found[1], found[3])):
        for one, other in zip(mine, theirs, strict=True):
            close(one, other, 1e-4, 1e-5, "gradients")


def test_a_mode_that_counts_sees_the_layer() -> None:
    model, reference = ours(), plain()
    for net in (model, reference):
        with FlopCounterMode(display=False) as counter:
            y = net(batch())
            y.sum().backward()
        assert counter.get_total_flops() > 0
    close(model(batch()), reference(batch()), ROUNDING, ROUNDING, "y")


def test_other_layouts_are_refused_as_they_are_by_torch() -> None:
    with pytest.raises(TypeError, match="dense"):
        SyncBatchNorm(C)(torch.randn(4, C).to_sparse())


# ---- with peers


def named() -> SyncBatchNorm:
    layer = SyncBatchNorm(C)
    layer.layer_name = "neck.bn"  # type: ignore[assignment]
    return layer


def jvp(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(layer, (x,), (x,))


def dual(layer: nn.Module, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return layer(torch.autograd.forward_ad.make_dual(x, x))


def vmap(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(layer)(torch.stack([x, x]))


def traced(layer: nn.Module, x: Tensor) -> Any:
    return make_fx(lambda x: layer(x))(x)


def scripted(layer: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(layer, (x,))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "jvp": (jvp, r"forward-mode differentiation"),
    "dual": (dual, r"forward-mode differentiation"),
    "vmap": (vmap, r"torch\.vmap"),
    "make_fx": (traced, "make_fx"),
    "torch.jit.trace": (scripted, r"torch\.jit\.trace"),
}


def in_turn(rank: int, size: int) -> dict[str, Any]:
    """What each of them says, on all ranks and on one; and that the group goes on after each."""
    warnings.simplefilter("ignore")
    layer, x = named(), torch.randn(4, C)
    found: dict[str, Any] = {}
    for kind, (call, _) in REFUSED.items():
        for alone in (False, True):
            said = ""
            try:
                (layer if alone and rank > 0 else partial(call, layer))(x)
            except (NotImplementedError, RankMismatchError) as error:
                said = f"{type(error).__name__}: {error}"
            y = layer(torch.full((1, C), float(rank)))
            found[f"{kind} {alone}"] = said, float(y.detach().abs().min())
    # Reverse mode, and modes that only look, go on with peers.
    with FlopCounterMode(display=False):
        y = layer(torch.full((1, C), float(rank)))
    found["counted"] = float(y.detach().abs().min())
    found["reverse"] = torch.func.grad(lambda x: layer(x).pow(3).sum())(torch.full((1, C), 1.0 + rank))
    leaf = torch.full((2, C), 1.0 + rank, requires_grad=True)
    try:
        torch.autograd.grad(layer(leaf), leaf, torch.ones(2, 2, C), is_grads_batched=True)
    except NotImplementedError as error:
        found["batched"] = str(error)
    return found


def test_with_peers_an_error_names_the_layer(tmp_path: Path) -> None:
    first, second = run_processes(2, in_turn, tmp_path)
    for kind, (_, what) in REFUSED.items():
        for alone in (False, True):
            key = f"{kind} {alone}"
            assert first[key][0].startswith("NotImplementedError: layer 'neck.bn': "), (key, first[key])
            assert re.search(what, first[key][0]) and "syncbn.revert_sync_batchnorm(model)" in first[key][0]
            assert second[key][0].startswith("RankMismatchError" if alone else "NotImplementedError"), second[key]
            assert "neck.bn" in second[key][0]
            assert first[key][1] > 0.9 and second[key][1] > 0.9
    assert first["counted"] > 0.9 and torch.isfinite(first["reverse"]).all()
    assert "neck.bn" in first["batched"] and "batched gradients" in second["batched"]
