"""Checkpoints that let the first pass remember nothing, so that the second one counts: then it does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from helpers.oracle import close
from helpers.ranks import run_ranks

STEPS = 3


def block() -> nn.Sequential:
    return copy.deepcopy(TEMPLATE)


torch.manual_seed(0)  # (here, for ranks are threads and share their generator)
TEMPLATE = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)


def layers(net: nn.Module) -> list[Any]:
    return [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def switch_by_hooks(net: nn.Module) -> None:
    """As fairscale's checkpoint_wrapper patches batch norm."""

    def before(layer: Any, args: Any) -> None:
        layer.kept = layer.track_running_stats
        if not torch.is_grad_enabled():
            layer.track_running_stats = False

    def after(layer: Any, args: Any, output: Any) -> None:
        layer.track_running_stats = layer.kept

    for layer in layers(net):
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


@contextlib.contextmanager
def untracked(net: nn.Module) -> Iterator[None]:
    for layer in layers(net):
        layer.track_running_stats = False
    yield
    for layer in layers(net):
        layer.track_running_stats = True


@contextlib.contextmanager
def unmoved(net: nn.Module) -> Iterator[None]:
    for layer in layers(net):
        layer.momentum = 0.0
    yield
    for layer in layers(net):
        layer.momentum = 0.1


class OwnCheckpoint(torch.autograd.Function):
    """As people write it, with a way to run the first pass in."""

    @staticmethod
    def forward(ctx: Any, net: nn.Module, first: Callable[[nn.Module], Any], x: Tensor) -> Tensor:
        ctx.net, ctx.x = net, x
        with torch.no_grad(), first(net):
            y: Tensor = net(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.net(x)
        torch.autograd.backward(y, grads)
        return None, None, x.grad


def by_hooks(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(net, x, use_reentrant=True)
    return y


def by_own(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = OwnCheckpoint.apply(net, untracked, x)
    return y


def by_momentum(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = OwnCheckpoint.apply(net, unmoved, x)
    return y


def not_reentrant(net: nn.Module, x: Tensor) -> Tensor:
    with untracked(net):
        y: Tensor = checkpoint(net, x, use_reentrant=False)
    return y


WAYS = {
    "hooks": (switch_by_hooks, by_hooks),
    "own function": (None, by_own),
    "momentum": (None, by_momentum),
    "not reentrant": (None, not_reentrant),
}


def trained(rank: int, group: Any, kind: str, twice: bool) -> dict[str, Tensor]:
    """Three steps; with ``twice`` two forwards go before each backward."""
    prepare, run = WAYS[kind]
    net = syncbn.convert_sync_batchnorm(block(), group)
    if prepare is not None:
        prepare(net)
    for step in range(STEPS):
        losses = [run(net, batch(rank, step + 10 * k)).pow(3).sum() for k in range(1 + twice)]
        torch.stack(losses).sum().backward()
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def expected(size: int, twice: bool) -> dict[str, Tensor]:
    net = block()
    for step in range(STEPS):
        order = [step + 10, step] if twice else [step]  # the recomputations come in reverse order
        for number in order:
            net(torch.cat([batch(rank, number) for rank in range(size)]))
    return dict(net.named_buffers())


@pytest.mark.parametrize("twice", [False, True], ids=["one forward", "two forwards"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", WAYS)
def test_the_recomputation_counts(kind: str, size: int, twice: bool) -> None:
    for found in run_ranks(size, trained, kind, twice):
        for name, value in expected(size, twice).items():
            if kind == "momentum" and name.endswith("num_batches_tracked"):
                continue  # (the first pass has counted as well: it moved nothing)
            close(found[name], value, 1e-12, 1e-12, name)


def fairscales(rank: int, group: Any) -> dict[str, Tensor]:
    from fairscale.nn.checkpoint import checkpoint_wrapper

    net = syncbn.convert_sync_batchnorm(block(), group)
    wrapped = checkpoint_wrapper(net)
    for step in range(STEPS):
        wrapped(batch(rank, step)).pow(3).sum().backward()
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@pytest.mark.parametrize("size", [1, 2])
def test_fairscale(size: int) -> None:
    pytest.importorskip("fairscale.nn.checkpoint", reason="fairscale is not installed", exc_type=ImportError)
    for found in run_ranks(size, fairscales):
        for name, value in expected(size, False).items():
            close(found[name], value, 1e-12, 1e-12, name)


class Functional(nn.BatchNorm1d):
    """A subclass that calls the function itself, and hands over its statistics when it tracks them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum or 0.0, self.eps)


def subclass(rank: int, group: Any, switched: bool) -> Tensor:
    net = syncbn.convert_sync_batchnorm(nn.Sequential(Functional(4)).double(), group)
    if switched:
        switch_by_hooks(net)
    for step in range(STEPS):
        by_hooks(net, batch(rank, step)).pow(3).sum().backward()
    mean: Tensor = net[0].running_mean  # type: ignore[assignment]
    return mean.clone()


@pytest.mark.parametrize("switched", [False, True], ids=["as it is", "first pass switched off"])
def test_a_subclass_with_its_own_call(switched: bool) -> None:
    plain = nn.BatchNorm1d(4).double()
    for step in range(STEPS):
        plain(torch.cat([batch(rank, step) for rank in range(2)]))
    for found in run_ranks(2, subclass, switched):
        assert plain.running_mean is not None
        close(found, plain.running_mean, 1e-12, 1e-12, "running_mean")


def test_an_untracked_forward_is_not_made_up_for() -> None:
    """Nothing was recomputed, so nothing is owed: to checkpoints that count by the rule, or to none."""
    net = syncbn.convert_sync_batchnorm(block())
    with untracked(net), torch.no_grad():
        net(batch(0, 7))
    for step in range(STEPS):
        net(batch(0, step)).pow(3).sum().backward()
    for name, value in expected(1, False).items():
        close(dict(net.named_buffers())[name], value, 1e-12, 1e-12, name)


def test_where_it_cannot_be_told_a_warning_says_so() -> None:
    net = syncbn.convert_sync_batchnorm(block())
    said: list[str] = []
    for _ in range(2):  # (once per layer)
        with untracked(net):
            first = checkpoint(net, batch(0, 0), use_reentrant=False)
        second = checkpoint(net, batch(0, 1), use_reentrant=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            second.sum().backward()
            first.sum().backward()
        said += [str(warning.message) for warning in caught]
    assert len(said) == 2 and "layer '1'" in " ".join(said) and "layer '4'" in " ".join(said)
    assert all("cannot be told" in text for text in said)
    assert [int(layer.num_batches_tracked) for layer in layers(net)] == [4, 4]


def test_notes_leave_no_trace() -> None:
    net = syncbn.convert_sync_batchnorm(block())
    by_own(net, batch(0, 0)).sum().backward()
    copy.deepcopy(net)
    assert not [name for layer in layers(syncbn.revert_sync_batchnorm(net)) for name in vars(layer) if "passes" in name]
