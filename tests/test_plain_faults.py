"""The same faults with plain all-reduces over gloo, for comparison: the left half of the table in docs/faults.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.faults import Rank, run_faulty
from helpers.plain import make_plain
from helpers.ranks import run_ranks
from programs.faults import Fault

pytestmark = pytest.mark.integration
ABORT = -6


def run(folder: Path, fault: Fault) -> list[Rank]:
    return run_faulty(2, fault, folder, timeout=1.0, convert=make_plain)


def means(rank: Rank, layer: str) -> Any:
    return rank.report["state"][f"{layer}.running_mean"]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """Without any fault the plain layer is right."""
    ranks = run(tmp_path_factory.mktemp("right"), Fault("none"))
    assert [rank.code for rank in ranks] == [0, 0]
    assert means(ranks[0], "bn3") == means(ranks[1], "bn3")
    return ranks


@pytest.mark.parametrize(
    ("kind", "phase", "layer"),
    [
        ("skip", "forward", "bn2"),
        ("eval", "forward", "bn2"),
        ("no_grad", "forward", "bn2"),
        ("skip backward", "between", "bn2"),
    ],
)
def test_plain_goes_on_with_wrong_numbers(tmp_path: Path, right: list[Rank], kind: str, phase: str, layer: str) -> None:
    """From then on each exchange meets another one. Nothing is said until one rank ends, steps later."""
    ranks = run(tmp_path, Fault(kind, phase, layer=layer))
    assert ranks[1].code == 0 and means(ranks[1], "bn3") != means(right[1], "bn3")
    assert ranks[0].report["step"] == 2 and "layer" not in ranks[0].report["text"]  # the fault was in step 1


def test_plain_mixes_swapped_layers(tmp_path: Path, right: list[Rank]) -> None:
    """Nothing is ever said."""
    ranks = run(tmp_path, Fault("swap", layer="bn1"))
    assert [rank.code for rank in ranks] == [0, 0]
    assert means(ranks[0], "bn2") != means(right[0], "bn2") and means(ranks[0], "bn2") != means(ranks[1], "bn2")


@pytest.mark.parametrize("kind", ["width", "channels", "dtype", "collective"])
def test_plain_aborts_the_process(tmp_path: Path, kind: str) -> None:
    """Messages of different lengths: one process aborts, which no Python can catch; the other loses it."""
    ranks = run(tmp_path, Fault(kind))
    assert sorted(rank.code for rank in ranks) == [ABORT, 1]
    assert all("layer" not in rank.report.get("text", "") for rank in ranks)


@pytest.mark.parametrize("kind", ["exit", "kill", "stop", "exception"])
def test_plain_names_no_layer(tmp_path: Path, kind: str) -> None:
    ranks = run(tmp_path, Fault(kind))
    assert ranks[0].report["error"] == "RuntimeError" and ranks[0].code == 1
    assert "layer" not in ranks[0].report["text"] and "rank 1" not in ranks[0].report["text"]


def test_plain_keeps_what_is_not_finite(tmp_path: Path) -> None:
    ranks = run(tmp_path, Fault("nan"))
    assert [rank.code for rank in ranks] == [0, 0]
    assert any(mean != mean for mean in means(ranks[0], "bn2"))


def test_the_all_reduce_of_syncbn_has_the_same_limit(tmp_path: Path) -> None:
    """What it cannot catch: a peer in a collective of another length, where one all-reduce carries the message."""
    ranks = run_faulty(2, Fault("collective"), tmp_path, timeout=1.0, way="all-reduce")
    assert ABORT in [rank.code for rank in ranks]


def test_plain_waits_for_a_model_in_eval_mode() -> None:
    def body(rank: int, group: Any) -> str:
        net = nn.Sequential(nn.BatchNorm1d(4))
        make_plain(net, group)
        net.train(rank == 0)
        try:
            net(torch.ones(2, 4))
        except RuntimeError as error:
            return str(error)
        time.sleep(1.5)  # keeps the connection open
        return ""

    started = time.monotonic()
    text, _ = run_ranks(2, body, timeout=1.0)
    assert "Timed out" in text and "layer" not in text and time.monotonic() - started > 1.0


def test_plain_counts_a_recomputed_batch_twice() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    checkpoint(net, torch.randn(3, 2), use_reentrant=False).sum().backward()
    assert net[1].num_batches_tracked == 2
