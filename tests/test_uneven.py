"""Loaders of unequal lengths, against one process with all ranks' batches."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncbn
from helpers.links import SEE_EACH_RANK
from helpers.oracle import close
from helpers.processes import run_processes
from helpers.ranks import outcomes, peers_of, run_ranks
from programs.uneven import train_join, train_joined, whole_batches
from syncbn import RankMismatchError, uneven

LOADERS: dict[str, list[tuple[int, ...]]] = {
    "one ends first": [(4, 3, 2), (2,)],
    "one has nothing": [(), (3, 4)],
    "three": [(2, 5), (), (3, 1, 4)],
    "equal": [(3, 3), (3, 3)],
}


def same_state(results: Sequence[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        for rank, result in enumerate(results):
            close(result["state"][name], value, 1e-9, 1e-9, f"{name} of rank {rank}")
            if "running" in name:
                assert torch.equal(result["state"][name], results[0]["state"][name])


@pytest.mark.integration
@pytest.mark.parametrize("loaders", LOADERS)
def test_trains_like_one_process(tmp_path: Path, loaders: str) -> None:
    """Weights and statistics after several steps of SGD with momentum, DistributedDataParallel included."""
    sizes = LOADERS[loaders]
    results = run_processes(len(sizes), train_joined, tmp_path, sizes, False)
    steps = max(map(len, sizes))
    for rank, result in enumerate(results):
        padded = [[*own, *[0] * (steps - len(own))] for own in sizes]
        assert result["seen"] == [(padded[rank][step], sum(own[step] for own in padded)) for step in range(steps)]
    same_state(results, whole_batches(sizes))


@pytest.mark.integration
def test_a_mean_loss(tmp_path: Path) -> None:
    sizes = LOADERS["three"]
    same_state(run_processes(3, train_joined, tmp_path, sizes, True), whole_batches(sizes))


@pytest.mark.integration
def test_join_of_ddp_ends_the_epoch_for_all(tmp_path: Path) -> None:
    """With ``throw_on_early_termination`` every rank raises once one has run out; until then all is as ever."""
    sizes = [(3, 3, 3), (3,)]
    results = run_processes(2, train_join, tmp_path, sizes, True, timeout=2.0)
    assert [result["error"] for result in results] == ["RuntimeError"] * 2
    assert "exhausted" in results[0]["text"] and "exhausted" in results[1]["text"]
    assert [result["steps"] for result in results] == [1, 1]
    same_state(results, whole_batches(sizes, steps=1))


@pytest.mark.integration
def test_join_of_ddp_without_throwing(tmp_path: Path) -> None:
    """It does not know of the layers' exchanges: an error that says so, not a hang."""
    went_on, _ = run_processes(2, train_join, tmp_path, [(3, 3, 3), (3,)], False, timeout=2.0)
    assert went_on["error"] == "PeerLostError" and went_on["steps"] == 1
    assert "forward of layer 'bn1'" in went_on["text"] and "Not arrived: rank 1" in went_on["text"]


# ---- the helper itself


@pytest.mark.usefixtures("way")
def test_counts_and_scale() -> None:
    def body(rank: int, group: Any) -> list[tuple[int, int, float]]:
        loader = [torch.ones(2 + rank, 3)] * (1 + rank)
        return [(step.count, step.total, step.scale) for step in uneven.joined(loader, process_group=group)]

    two, three = run_ranks(2, body)
    assert two == [(2, 5, 0.4), (0, 3, 2 / 3)] and three == [(3, 5, 0.4), (3, 3, 2 / 3)]


Pair = namedtuple("Pair", ["x", "names"])


@pytest.mark.usefixtures("way")
def test_the_structure_comes_from_a_peer() -> None:
    """A rank that never had a batch: the first rank with one describes it."""

    def body(rank: int, group: Any) -> list[Any]:
        x = torch.ones(2, 3, 4, dtype=torch.bfloat16).to(memory_format=torch.contiguous_format)
        full = {"pair": Pair(x, ["a", "b"]), "list": [torch.arange(2), (torch.eye(2), 5)], "scalar": torch.tensor(7.0)}
        return [step.data for step in uneven.joined([full] if rank == 1 else [], process_group=group)]

    first, _, last = run_ranks(3, body)
    for (data,) in (first, last):
        assert type(data["pair"]).__name__ == "Pair" and data["pair"].names == []
        assert data["pair"].x.shape == (0, 3, 4) and data["pair"].x.dtype == torch.bfloat16
        assert data["list"][0].shape == (0,) and data["list"][0].dtype == torch.int64
        assert data["list"][1][0].shape == (0, 2) and data["list"][1][1] == 5
        assert data["scalar"] == 7.0


@pytest.mark.usefixtures("way")
def test_all_loaders_empty() -> None:
    assert run_ranks(2, lambda rank, group: list(uneven.joined([], process_group=group))) == [[], []]


@pytest.mark.usefixtures("way")
def test_own_count_and_own_empty() -> None:
    def body(rank: int, group: Any) -> list[tuple[Any, int, int]]:
        steps = uneven.joined(["abc"] * rank, process_group=group, count=len, empty=lambda batch: "")
        return [(step.data, step.count, step.total) for step in steps]

    assert run_ranks(2, body) == [[("", 0, 3)], [("abc", 3, 3)]]


@pytest.mark.usefixtures("way")
def test_a_batch_without_tensors() -> None:
    """The rank that cannot count says so, and tells its peer."""
    loaders = [[torch.ones(2)], ["text"]]
    mismatch, error = outcomes(2, lambda rank, group: list(uneven.joined(loaders[rank], process_group=group)))
    assert isinstance(error, TypeError) and "has no tensor to count samples by" in str(error)
    assert isinstance(mismatch, syncbn.RankMismatchError) and mismatch.refused_by == (1,)


@pytest.mark.parametrize("at", [0, 1])
def test_a_loader_that_raises(at: int, way: str) -> None:
    """Its rank raises what it raised, the others name it, nobody waits."""

    def loader(rank: int) -> Iterator[Tensor]:
        for number in range(3):
            if rank == 1 and number == at:
                raise OSError("disk on fire")
            yield torch.ones(2)

    def body(rank: int, group: Any) -> list[uneven.Step]:
        return list(uneven.joined(loader(rank), process_group=group))

    started = time.monotonic()
    first, error, last = outcomes(3, body, timeout=10.0)
    assert time.monotonic() - started < 5.0
    assert isinstance(error, OSError)
    for peer in (first, last):
        assert isinstance(peer, syncbn.RankMismatchError) and peer.refused_by == (1,)
        assert "rank 1 could not make the call" in str(peer)
    if way in SEE_EACH_RANK:
        assert "its loader raised OSError: disk on fire" in str(first)


@pytest.mark.usefixtures("way")
def test_a_rank_that_left_the_loop() -> None:
    """One rank stops early and goes on to something else: named, not mixed."""

    def body(rank: int, group: Any) -> str:
        layer = syncbn.SyncBatchNorm(1, process_group=group)
        with pytest.raises(syncbn.RankMismatchError) as caught:
            for _ in uneven.joined([torch.ones(2)] * 3, process_group=group):
                if rank == 1:
                    layer(torch.ones(2, 1))
        return str(caught.value)

    waiting, left = run_ranks(2, body)
    assert "count of samples" in waiting and "forward of a layer without a name" in left


# ---- empty views


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((0, 3, 4), (0, -1), (0, 12)),
        ((0, 3, 4), (0, 3, -1), (0, 3, 4)),
        ((0, 3, 4), (0, -1, 2), (0, 6, 2)),
        ((0, 3, 4), (-1, 12), (0, 12)),
        ((2, 0, 4), (2, 0, -1), (2, 0, 4)),
        ((0,), (0, -1), (0, 1)),
    ],
)
def test_empty_views(shape: tuple[int, ...], sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    with uneven.empty_views():
        for y in (x.view(*sizes), x.view(sizes), x.reshape(*sizes), torch.reshape(x, sizes), x.reshape(list(sizes))):
            assert y.shape == expected
        y.sum().backward()
        assert x.flatten(0).shape == (0,) and x.flatten(1).shape[0] == shape[0] if len(shape) > 1 else True
    assert x.grad is not None and x.grad.shape == shape


def test_empty_views_leave_others_alone() -> None:
    with uneven.empty_views():
        x = torch.arange(6.0)
        assert x.view(2, -1).shape == (2, 3) and x.view(torch.int32).dtype == torch.int32
        for sizes in ((4, -1), (-1, -1)):
            with pytest.raises(RuntimeError):
                x.view(*sizes)
        with pytest.raises(RuntimeError):  # not to be inferred
            torch.empty(0, 3).view(0, -1, 2)


def test_alone() -> None:
    steps = list(uneven.joined([torch.ones(3), torch.ones(1)]))
    assert [(step.count, step.total, step.world_size) for step in steps] == [(3, 3, 1), (1, 1, 1)]
    with pytest.raises(OSError, match="on fire"):
        list(uneven.joined(_on_fire()))


def _on_fire() -> Iterator[Tensor]:
    yield torch.ones(1)
    raise OSError("disk on fire")


# ---- other counts than samples


def tokens(rank: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Features and targets of this rank's sequences, with -100 where there is no token: another number on each."""
    generator = torch.Generator().manual_seed(10 * rank + micro)
    x, y = torch.randn(3, 6, generator=generator).double(), torch.randint(4, (3,), generator=generator)
    y[: rank + micro] = -100
    return x, y


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_loss_scale(world: int, micro_batches: int, as_tensor: bool) -> None:
    """The average over ranks of the scaled sums' gradients is the gradient of the mean over all tokens."""
    weight = torch.randn(4, 6).double()

    def body(rank: int, group: Any) -> Tensor:
        w = weight.clone().requires_grad_()
        batches = [tokens(rank, micro) for micro in range(micro_batches)]
        count = sum((y != -100).sum() for _, y in batches)
        scale = uneven.loss_scale(count if as_tensor else int(count), process_group=peers_of(group))
        for x, y in batches:
            loss = scale * F.cross_entropy(x @ w.T, y, reduction="sum", ignore_index=-100)
            assert loss.dtype == torch.float64
            loss.backward()
        assert w.grad is not None and not scale.requires_grad
        return w.grad

    gradients = run_ranks(world, body)
    w = weight.clone().requires_grad_()
    every = [tokens(rank, micro) for rank in range(world) for micro in range(micro_batches)]
    F.cross_entropy(torch.cat([x for x, _ in every]) @ w.T, torch.cat([y for _, y in every])).backward()
    torch.testing.assert_close(torch.stack(gradients).mean(0), w.grad, rtol=1e-12, atol=1e-12)


def test_loss_scale_within_joined() -> None:
    """Ranks that have run out count nothing, and take part."""
    lengths = ([4, 2, 3], [5])  # tokens of each batch

    def body(rank: int, group: Any) -> list[float]:
        loader = [torch.ones(n) for n in lengths[rank]]
        return [
            uneven.loss_scale(step.data.numel(), process_group=group).item()
            for step in uneven.joined(loader, process_group=group)
        ]

    assert run_ranks(2, body) == [[2 / 9, 2 / 2, 2 / 3]] * 2


def test_loss_scale_keeps_dtypes_and_nothing_counts_for_nothing(world: int) -> None:
    def body(rank: int, group: Any) -> tuple[float, float, torch.dtype]:
        nothing = uneven.loss_scale(0, process_group=peers_of(group))
        weights = uneven.loss_scale(0.125, process_group=peers_of(group))  # of classes: less than one in all
        w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        (weights * w.sum()).backward()
        assert w.grad is not None
        return nothing.item(), weights.item(), w.grad.dtype

    assert run_ranks(world, body) == [(0.0, 8.0, torch.bfloat16)] * world


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), torch.ones(2)], ids=str)
def test_a_wrong_count_raises_on_every_rank(count: Any) -> None:
    first, second = outcomes(2, lambda rank, group: uneven.loss_scale(count if rank else 1, process_group=group))
    assert isinstance(second, ValueError) and "count must be" in str(second)
    assert isinstance(first, RankMismatchError) and "count must be" in str(first)


def test_loss_scale_is_no_count_of_samples() -> None:
    def body(rank: int, group: Any) -> Any:
        return uneven.loss_scale(1, process_group=group) if rank else list(uneven.joined([], process_group=group))

    for error in outcomes(2, body):
        assert isinstance(error, RankMismatchError) and "loss_scale" in str(error) and "count of samples" in str(error)
