"""An error on one rank is told to the others exactly once, whatever it is like."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import syncbn
from helpers.ranks import make_group, outcomes, run_ranks
from syncbn import RankMismatchError, comm
from syncbn.comm import link_of
from syncbn.steps import vote
from syncbn.together import describe_error, tell, telling
from syncbn.wire import COUNT, Call

CPU = torch.device("cpu")


@pytest.fixture(params=["one hop", "all-reduce"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How messages travel on gloo."""
    if request.param == "all-reduce":
        monkeypatch.setattr(comm, "LEVELS_LIMIT", 1)
    return str(request.param)


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "plain": (lambda: KeyError("a bad sample"), "its loader raised KeyError: 'a bad sample'"),
    "surrogates": (lambda: OSError("disk \udcff on fire"), "OSError: disk \\udcff on fire"),
    "unreadable": (Unreadable, "Unreadable: (its text cannot be read: str() raised RuntimeError)"),
    "long": (lambda: ValueError("a" * 10_000_000 + "the end"), "aaa [...] aaa"),
    "umlauts": (lambda: ValueError("\u00fc" * 100_000), "\u00fc [...] \u00fc"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_refusal_always_arrives(way: str, kind: str) -> None:
    make, text = ERRORS[kind]

    def body(rank: int, group: Any) -> list[Any]:
        link = link_of(group, CPU)
        caught: Exception | None = None
        try:
            with telling(link, Call(COUNT), 2, "its loader"):
                if rank == 1:
                    raise make()
                link.sum(torch.ones(2, dtype=torch.float64), Call(COUNT))
        except Exception as error:
            caught = error
        assert vote(True, process_group=group)
        return [caught]

    (peer,), (error,) = run_ranks(2, body, timeout=5.0)
    assert type(error) is type(make())
    assert isinstance(peer, RankMismatchError) and peer.refused_by == (1,)
    if way == "one hop":
        assert text in str(peer) and len(str(peer)) < 5000
        assert kind != "long" or "the end" in str(peer)


def test_a_vote_may_say_anything() -> None:
    def body(rank: int, group: Any) -> list[bool]:
        return [vote(rank == 0, "\udcff" * 10_000_000, process_group=group), vote(True, process_group=group)]

    assert run_ranks(2, body, timeout=5.0) == [[False, True]] * 2


@pytest.mark.parametrize("how", ["again", "from", "while", "from none", "deep"])
def test_nobody_is_told_twice(way: str, how: str) -> None:
    """Not in a context around, and not if the error is wrapped in another: the next exchange is everybody's own."""

    def wrap(error: Exception) -> None:
        if how == "again":
            raise error
        if how == "from":
            raise RuntimeError("wrapped") from error
        if how == "from none":
            raise RuntimeError("wrapped") from None
        try:
            raise RuntimeError("wrapped")
        except RuntimeError as first:
            if how == "deep":
                raise LookupError("twice") from first
            raise

    def body(rank: int, group: Any) -> bool:
        link = link_of(group, CPU)
        with contextlib.suppress(RuntimeError, LookupError, OSError), telling(link, Call(COUNT), 2):
            try:
                with telling(link, Call(COUNT), 2):
                    if rank == 1:
                        raise OSError("disk on fire")
                    link.sum(torch.ones(2, dtype=torch.float64), Call(COUNT))
            except Exception as error:
                wrap(error)
        return vote(True, process_group=group)

    assert run_ranks(2, body, timeout=5.0) == [True, True]


def test_an_error_that_one_group_knows_is_told_to_the_other() -> None:
    """The rank of both groups tells each once."""

    def body(rank: int, world: Any) -> bool:
        link, other = link_of(world, CPU), link_of(make_pair(rank), CPU)
        with contextlib.suppress(OSError, RankMismatchError), telling(link, Call(COUNT), 1):
            if rank < 2:
                with telling(other, Call(COUNT), 2):
                    if rank == 0:
                        raise OSError("disk on fire")
                    other.sum(torch.ones(2, dtype=torch.float64), Call(COUNT))
            link.sum(torch.ones(1, dtype=torch.float64), Call(COUNT))
        return vote(True, process_group=world)

    store = torch.distributed.HashStore()

    def make_pair(rank: int) -> Any:
        return make_group(store, rank, 2, 5.0) if rank < 2 else None

    assert run_ranks(3, body, timeout=5.0) == [True] * 3


def test_a_lost_peer_does_not_hide_the_error() -> None:
    def body(rank: int, group: Any) -> None:
        if rank == 0:
            return
        link = link_of(group, CPU)
        with telling(link, Call(COUNT), 2):
            raise OSError("disk on fire")

    left, error = outcomes(2, body, timeout=1.0)
    assert left is None and isinstance(error, OSError)


def test_alone_nobody_is_told() -> None:
    link = link_of(None, CPU)
    error = OSError("disk on fire")
    tell(error, link, Call(COUNT), 1)
    with pytest.raises(OSError, match="on fire"), telling(link, Call(COUNT), 1):
        raise error
    assert describe_error(error) == "OSError: disk on fire"
    assert syncbn.steps.vote(True)


def not_dense(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them prototypes
        if kind == "nested":
            return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])
        return torch.ones(4, 3).to_sparse() if kind == "sparse" else torch.ones(4, 3).to_sparse_csr()


@pytest.mark.parametrize("kind", ["sparse", "csr", "nested"])
@pytest.mark.parametrize("argument", ["input", "residual", "moments"])
@pytest.mark.usefixtures("way")
def test_tensors_that_are_not_dense(kind: str, argument: str) -> None:
    """The rank's own error, its peer is told in the same call, and both go on."""
    odd = not_dense(kind)

    def body(rank: int, group: Any) -> torch.Tensor:
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        x = torch.randn(4, 3)
        with pytest.raises((TypeError, ValueError) if rank == 0 else RankMismatchError):
            if argument == "moments":
                syncbn.functional.global_moments(odd if rank == 0 else x, process_group=group)
            elif argument == "input":
                layer(odd if rank == 0 else x)
            else:
                layer(x, odd) if rank == 0 else layer(x)
        assert layer.num_batches_tracked == 0
        layer(x)
        assert layer.running_mean is not None
        return layer.running_mean

    first, second = run_ranks(2, body)
    assert torch.equal(first, second)


@pytest.mark.usefixtures("way")
def test_calls_within_a_transform_of_torch_func() -> None:
    """On one rank, which makes them there for the first time."""

    def calls(group: Any) -> None:
        assert vote(True, process_group=group)
        assert [step.total for step in syncbn.uneven.joined([torch.ones(2, 3)], process_group=group)] == [4]
        model = torch.nn.Sequential(syncbn.SyncBatchNorm(3, process_group=group))
        syncbn.update_population_stats(model, [torch.randn(4, 3)], process_group=group)

    def body(rank: int, group: Any) -> None:
        if rank == 0:
            torch.func.grad(lambda x: (calls(group), x.sum())[1])(torch.ones(2))
        else:
            calls(group)
        assert vote(True, process_group=group)

    run_ranks(2, body)
