"""Ranks that give up a step together, wherever the others are, and the example that shows how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import syncbn
from helpers.commands import EXAMPLES, load
from helpers.links import LATE, WAYS
from helpers.processes import run_processes
from helpers.ranks import outcomes, run_ranks
from syncbn.steps import vote

ways = pytest.mark.parametrize("way", [*WAYS, LATE], indirect=True)


@ways
@pytest.mark.parametrize("noes", [(), (1,), (0, 2), (0, 1, 2)])
def test_between_steps(way: str, noes: tuple[int, ...]) -> None:
    """All hear the same, and the group goes on."""

    def body(rank: int, group: Any) -> list[bool]:
        votes = [vote(rank not in noes, "no memory", process_group=group)]
        return [*votes, vote(True, process_group=group)]

    assert run_ranks(3, body, timeout=5.0) == [[not noes, True]] * 3


def test_alone() -> None:
    assert vote(True) is True and vote(False) is False


@pytest.mark.parametrize("where", ["forward", "backward", "vote"])
@pytest.mark.parametrize("noes", [(1,), (0, 2)])
def test_in_the_middle_of_a_step(where: str, noes: tuple[int, ...]) -> None:
    """The others are in a layer, forward or backward, or in a vote; then all train on."""

    def body(rank: int, group: Any) -> tuple[bool, str, Tensor]:
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        layer.layer_name = "norm"
        text, fails = "", rank in noes
        try:
            if fails and where == "forward":
                raise torch.OutOfMemoryError("staged")
            y = layer(torch.randn(4, 3, requires_grad=True))
            if fails and where == "backward":
                raise torch.OutOfMemoryError("staged")
            y.sum().backward()
            if fails:
                raise torch.OutOfMemoryError("staged")
            ok = vote(True, process_group=group)
        except torch.OutOfMemoryError as error:
            ok = vote(False, f"out of memory: {error}", process_group=group)
        except syncbn.RankMismatchError as error:
            assert error.refused_by == noes
            ok, text = False, str(error)
        layer.reset_running_stats()
        layer(torch.full((2, 3), float(rank)))
        assert layer.running_mean is not None
        return ok, text, layer.running_mean

    for rank, (ok, text, mean) in enumerate(run_ranks(3, body, timeout=5.0)):
        assert not ok
        torch.testing.assert_close(mean, torch.full((3,), 0.1))
        if rank not in noes and where != "vote":
            assert f"{where} of layer 'norm'" in text and "out of memory: staged" in text


def test_a_real_mismatch_is_not_a_vote() -> None:
    """A rank that votes while another is in a layer, neither having failed."""

    def body(rank: int, group: Any) -> None:
        if rank == 0:
            vote(True, process_group=group)
        else:
            syncbn.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3))

    for error in outcomes(2, body, timeout=5.0):
        assert isinstance(error, syncbn.RankMismatchError) and error.refused_by == ()
        assert "vote (call 0)" in str(error) and "forward of a layer" in str(error)


@pytest.mark.parametrize("way", [LATE], indirect=True)
@pytest.mark.usefixtures("way")
def test_a_vote_settles_the_late_checks() -> None:
    """On a device the vote is the moment at which all that went before has been checked."""

    def body(rank: int, group: Any) -> str:
        layers = [syncbn.SyncBatchNorm(4, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        layers[rank](torch.randn(3, 4))
        with pytest.raises(syncbn.RankMismatchError) as caught:
            vote(True, process_group=group)
        return str(caught.value)

    for rank, text in enumerate(run_ranks(2, body, timeout=5.0)):
        assert f"forward of layer {'ab'[rank]!r}" in text


# ---- the example


def run_example(rank: int, world: int, *args: Any) -> tuple[int, dict[str, Tensor]]:
    example: Any = load(EXAMPLES / "step_vote.py")
    return example.train(*args)


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_the_example_skips_one_step_together(tmp_path: Path, where: str, world: int) -> None:
    results = run_processes(world, run_example, tmp_path, 5, 1, 2, where, timeout=10.0)
    assert [done for done, _ in results] == [4] * world
    for _, state in results:
        assert all(torch.equal(value, results[0][1][name]) for name, value in state.items())
        assert state["1.num_batches_tracked"] == state["4.num_batches_tracked"] == 4
