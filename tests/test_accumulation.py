"""Running statistics of a step out of those of its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from helpers.oracle import close
from helpers.ranks import peers_of, run_ranks
from syncbn import SyncBatchNorm
from syncbn.accumulation import step_statistics

C = 3


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def micro_batches(world: int) -> list[list[Tensor]]:
    """Per rank, micro-batches of different sizes and far from each other; one of them is empty on a rank."""
    sizes = [(3, 1, 2), (2, 0, 4), (1, 3, 0)][:world]
    return [[torch.randn(n, C, 4, dtype=torch.float64) * (1 + i) + 5 * i for i, n in enumerate(mine)] for mine in sizes]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_whole_step_moves_the_running_statistics_once(momentum: float | None, world: int) -> None:
    batches = micro_batches(world)
    whole = nn.BatchNorm1d(C, momentum=momentum, dtype=torch.float64)

    def body(rank: int, group: Any) -> SyncBatchNorm:
        layer = SyncBatchNorm(C, momentum=momentum, process_group=peers_of(group), dtype=torch.float64)
        for step in range(3):
            with step_statistics(layer):
                for x in batches[rank]:
                    layer(x * (1 + step))
                    assert layer.num_batches_tracked == step
        return layer

    for step in range(3):
        whole(torch.cat([x for mine in batches for x in mine]) * (1 + step))
    layers = run_ranks(world, body)
    for layer in layers:
        assert layer.num_batches_tracked == 3
        for name in ("running_mean", "running_var"):
            close(getattr(layer, name), getattr(whole, name), 1e-13, 1e-13, name)
            assert torch.equal(getattr(layer, name), getattr(layers[0], name))


def test_each_micro_batch_is_normalized_as_ever(world: int) -> None:
    batches = micro_batches(world)

    def body(rank: int, group: Any) -> None:
        layers = [SyncBatchNorm(C, process_group=peers_of(group), dtype=torch.float64) for _ in range(2)]
        for x in batches[rank]:
            x.requires_grad_()
            with step_statistics(layers[0]):
                ours = layers[0](x)
            theirs = layers[1](x)
            assert torch.equal(ours, theirs)
            gradients = [torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (ours, theirs)]
            assert torch.equal(*gradients)

    run_ranks(world, body)


def test_masks(world: int) -> None:
    batches = micro_batches(world)
    masks = [[torch.rand(len(x), 1, 4) < 0.7 for x in mine] for mine in batches]
    pairs = [pair for mine in zip(batches, masks, strict=True) for pair in zip(*mine, strict=True)]
    valid = torch.cat([x.movedim(1, -1)[mask.squeeze(1)] for x, mask in pairs])
    whole = nn.BatchNorm1d(C, dtype=torch.float64)
    whole(valid)

    def body(rank: int, group: Any) -> SyncBatchNorm:
        layer = SyncBatchNorm(C, process_group=peers_of(group), dtype=torch.float64)
        with step_statistics(layer):
            for x, mask in zip(batches[rank], masks[rank], strict=True):
                layer(x, mask=mask)
        return layer

    for layer in run_ranks(world, body):
        close(layer.running_mean, whole.running_mean, 1e-13, 1e-13, "running_mean")
        close(layer.running_var, whole.running_var, 1e-13, 1e-13, "running_var")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_collects_once(use_reentrant: bool) -> None:
    layers = [SyncBatchNorm(C) for _ in range(2)]
    x = torch.randn(6, C)
    for number, layer in enumerate(layers):
        with step_statistics(layer):
            for part in x.split([4, 2]):
                part = part.clone().requires_grad_()
                y = checkpoint(layer, part, use_reentrant=use_reentrant) if number else layer(part)
                y.sum().backward()
    for ours, theirs in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    eager, layer = SyncBatchNorm(C), SyncBatchNorm(C)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(6, C) + 2
        for model, run in ((eager, eager), (layer, compiled)):
            with step_statistics(model):
                for part in x.split(3):
                    run(part)
    for ours, theirs in zip(layer.buffers(), eager.buffers(), strict=True):
        close(ours, theirs, 1e-6, 1e-6, "buffer")


def test_micro_batches_that_are_not_finite_or_empty() -> None:
    layer = SyncBatchNorm(C)
    x = torch.randn(4, C)
    x[0, 1] = float("nan")
    with step_statistics(layer):
        layer(torch.randn(4, C))
        layer(x)
    assert layer.running_mean[1] == 0 and layer.running_var[1] == 1
    assert (layer.running_mean[[0, 2]] != 0).all() and layer.num_batches_tracked == 1
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with step_statistics(layer):
        layer(torch.empty(0, C))
    with step_statistics(layer):
        pass
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_step_that_fails_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(C, C), SyncBatchNorm(C), nn.Sequential(SyncBatchNorm(C)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(KeyError), step_statistics(model):
        model(torch.randn(4, C))
        raise KeyError
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    model(torch.randn(4, C))
    assert model[1].num_batches_tracked == 1 and model[2][0].num_batches_tracked == 1


def test_twice_at_a_time_is_refused() -> None:
    model = nn.Sequential(SyncBatchNorm(C), SyncBatchNorm(C))
    with step_statistics(model[1]):
        with pytest.raises(RuntimeError, match="layer '1' collects"), step_statistics(model):
            pass
        assert model[0]._memory is None and model[1]._memory is not None
    assert model[1]._memory is None


def test_what_cannot_collect() -> None:
    lazy = syncbn.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(ValueError, match="layer '0' has not seen its first input"), step_statistics(lazy):
        pass
    bare = SyncBatchNorm(C, track_running_stats=False)
    with step_statistics(bare):
        bare(torch.randn(4, C))
    frozen = SyncBatchNorm(C).eval()
    with step_statistics(frozen):
        frozen(torch.randn(4, C))
    assert frozen.num_batches_tracked == 0 and torch.equal(frozen.running_mean, torch.zeros(C))
