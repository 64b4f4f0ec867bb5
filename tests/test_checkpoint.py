"""Activation checkpointing: a layer runs twice, counts its batch once, and gives the gradients of a plain run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import syncbn
from helpers.ranks import run_ranks
from syncbn import _torch

aten = torch.ops.aten


def block(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width)
    ).double()


def batch(rank: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randn(4 + rank, 6, generator=generator, dtype=torch.float64, requires_grad=True)


Result = dict[str, Tensor]
Run = Callable[[nn.Module, int], Tensor | None]


def train(world: int, plain: Run, other: Run) -> None:
    """Run both on the same weights and data: equal gradients, buffers and losses, bit for bit."""
    template = block()

    def body(rank: int, group: Any) -> tuple[Result, Result]:
        return result(rank, group, plain), result(rank, group, other)

    def result(rank: int, group: Any, run: Run) -> Result:
        net = syncbn.convert_sync_batchnorm(copy.deepcopy(template), group)
        loss = run(net, rank)
        if loss is not None:
            loss.backward()
        found = {f"grad of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        return found | dict(net.named_buffers())

    for expected, found in run_ranks(world, body, timeout=10.0):
        assert expected.keys() == found.keys() and len(found) == 8 + 6
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def once(net: nn.Module, rank: int) -> Tensor:
    return net(batch(rank)).square().sum()


def expect_batches(run: Run, batches: int) -> Run:
    """``run``, after whose backward each layer has counted so many batches."""

    def checked(net: nn.Module, rank: int) -> None:
        loss = run(net, rank)
        if loss is not None:
            loss.backward()
        counts = [buffer.item() for name, buffer in net.named_buffers() if "num_batches" in name]
        assert counts == [batches] * 2

    return checked


@pytest.mark.parametrize("reentrant", [True, False])
def test_statistics_once_and_equal_gradients(world: int, reentrant: bool) -> None:
    def run(net: nn.Module, rank: int) -> Tensor:
        return checkpoint(net, batch(rank), use_reentrant=reentrant).square().sum()

    train(world, once, expect_batches(run, 1))


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested(world: int, outer: bool, inner: bool) -> None:
    """A layer inside both runs three times, and counts once."""

    def run(net: Any, rank: int) -> Tensor:
        def nested(x: Tensor) -> Tensor:
            return net[2:](checkpoint(net[:2], x, use_reentrant=inner))

        return checkpoint(nested, batch(rank), use_reentrant=outer).square().sum()

    train(world, once, expect_batches(run, 1))


POLICIES: dict[str, Callable[[Any], bool]] = {
    "nothing": lambda op: False,
    "matrix products": lambda op: op in (aten.mm.default, aten.addmm.default),
    # These are among the layer's own operations, which it does not run alike in both passes.
    "sums and copies": lambda op: any(word in str(op) for word in ("add", "sum", "copy", "sub", "mul", "clone")),
    "everything": lambda op: True,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_selective(world: int, policy: str) -> None:
    def choose(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if POLICIES[policy](op) else CheckpointPolicy.PREFER_RECOMPUTE

    def run(net: nn.Module, rank: int) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, choose)
        return checkpoint(net, batch(rank), use_reentrant=False, context_fn=contexts).square().sum()

    train(world, once, expect_batches(run, 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_several_forwards_in_flight(world: int, reentrant: bool) -> None:
    """Three forwards of the same layers, then one backward: it recomputes them in an order of its own."""

    def plain(net: nn.Module, rank: int) -> Tensor:
        return sum((net(batch(rank, number)).square().sum() * (number + 1) for number in range(3)), torch.zeros(()))

    def run(net: nn.Module, rank: int) -> Tensor:
        losses = [
            checkpoint(net, batch(rank, number), use_reentrant=reentrant).square().sum() * (number + 1)
            for number in range(3)
        ]
        return sum(losses, torch.zeros(()))

    train(world, plain, expect_batches(run, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_backwards(world: int, reentrant: bool) -> None:
    """Two forwards, then a backward for each, in the order of the forwards."""

    def plain(net: nn.Module, rank: int) -> None:
        losses = [net(batch(rank, number)).square().sum() for number in range(2)]
        for loss in losses:
            loss.backward()

    def run(net: nn.Module, rank: int) -> None:
        losses = [checkpoint(net, batch(rank, n), use_reentrant=reentrant).square().sum() for n in range(2)]
        for loss in losses:
            loss.backward()

    train(world, plain, expect_batches(run, 2))


def in_hook(forward: Callable[[nn.Module, Tensor], Tensor]) -> Run:
    """A forward of the net within a hook of its own backward."""

    def run(net: nn.Module, rank: int) -> None:
        def hook(_: Tensor) -> None:
            with torch.enable_grad():
                forward(net, batch(rank, 1))

        x = batch(rank)
        y = net(x)
        y.register_hook(hook)
        y.square().sum().backward()

    return run


def test_forward_in_a_backward_hook_counts(world: int) -> None:
    """It is a forward like any other, although a backward is under way."""

    def plain(net: nn.Module, rank: int) -> None:
        net(batch(rank)).square().sum().backward()
        net(batch(rank, 1))

    train(world, plain, expect_batches(in_hook(lambda net, x: net(x)), 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_in_a_backward_hook(world: int, reentrant: bool) -> None:
    """Forward and backward of a checkpoint inside a hook of another backward: its first pass counts, its second not."""

    def inner(net: nn.Module, x: Tensor) -> Tensor:
        loss = checkpoint(net, x, use_reentrant=reentrant).square().sum()
        loss.backward()
        return loss

    def plain(net: nn.Module, rank: int) -> None:
        in_hook(lambda net, x: (net(x).square().sum().backward(), x)[1])(net, rank)

    train(world, plain, expect_batches(in_hook(inner), 2))


def test_hook_within_a_recomputed_forward(world: int) -> None:
    """A backward inside a recomputation, with a forward in its hook: that forward counts, the recomputed one not."""

    def run(net: nn.Module, rank: int) -> Tensor:
        seen: list[int] = []

        def forward(x: Tensor) -> Tensor:
            y = net(x)
            if seen:  # the second pass
                probe = torch.zeros((), requires_grad=True)
                product = probe * 1.0
                product.register_hook(lambda _: (net(batch(rank, 1)), None)[1])
                product.backward()
            seen.append(1)
            return y

        # (without reentry the second pass ends as soon as it has what was saved, before the probe)
        return checkpoint(forward, batch(rank), use_reentrant=True).square().sum()

    def plain(net: nn.Module, rank: int) -> None:
        net(batch(rank)).square().sum().backward()
        net(batch(rank, 1))

    train(world, plain, expect_batches(run, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_without_the_private_signal(world: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that does not tell whether a backward runs: the stack alone says so."""
    monkeypatch.setattr(_torch, "_graph_task_id", None)

    def run(net: nn.Module, rank: int) -> Tensor:
        return checkpoint(net, batch(rank), use_reentrant=reentrant).square().sum()

    train(world, once, expect_batches(run, 1))


def test_without_the_private_signal_in_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_graph_task_id", None)
    test_forward_in_a_backward_hook_counts(2)


def test_another_library_s_checkpoint(world: int) -> None:
    """A Function whose backward runs the forward again, as other libraries have them."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.net = net
            with torch.no_grad():
                return net(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                ctx.net(x).backward(grad)
            return x.grad, None

    train(world, once, expect_batches(lambda net, rank: Again.apply(batch(rank), net).square().sum(), 1))


def test_ranks_may_not_differ_in_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank recomputes and the other does not: an error on both, no wait."""
    template = block()

    def body(rank: int, group: Any) -> str:
        net = syncbn.convert_sync_batchnorm(copy.deepcopy(template), group)
        x = batch(rank)
        y = checkpoint(net, x, use_reentrant=False) if rank else net(x)
        with pytest.raises(syncbn.RankMismatchError) as caught:
            y.square().sum().backward()
        return str(caught.value)

    for text in run_ranks(2, body, timeout=2.0):
        assert "rank 0: backward of layer '4'" in text and "rank 1: forward of layer '1'" in text
