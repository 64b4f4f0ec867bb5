"""The links that gather each rank's message: on a device (here a CPU's tensors act one), and in pairs of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import syncbn
from helpers.links import Arrival, connect, exchange, exchanges_made, link_of, travel
from helpers.oracle import assert_matches, step, whole_batch
from helpers.processes import run_processes
from helpers.ranks import run_ranks
from syncbn import RankMismatchError, comm, wire
from syncbn.comm.all_gather import AllGatherOfPairs, AllGatherOnDevice
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.groups import on_one_node
from syncbn.wire import Call

CPU = torch.device("cpu")
CALL = Call(wire.FORWARD, "stem")


class Late(AllGatherOnDevice):
    """The path of a device, on the CPU: headers are looked at when they have arrived."""

    def _check_later(self, front: Tensor, call: Call, width: int, number: int) -> None:
        self._late.append((Arrival(), front.clone(), call, width, number))


LINKS: dict[str, Any] = {"device": Late, "pairs": AllGatherOfPairs}


@pytest.mark.parametrize("kind", LINKS)
def test_each_payload_comes_in_rank_order(kind: str) -> None:
    """Of whatever width: beyond a first message as well. In pairs, to 48 bits."""

    def body(rank: int, group: Any) -> Any:
        link = LINKS[kind](group, CPU)
        connect(group, link)
        found = []
        for width in (1, 7, 1018, 1024, 1025, 5000):
            payload = torch.randn(width, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * 1e5
            found.append((payload, exchange(link, payload, CALL), link.gather(payload, CALL), link.sum(payload, CALL)))
        link.settle()
        assert link.exchanges == 18 and not link.raw
        return found

    results = run_ranks(3, body)
    bits = 0.0 if kind == "device" else 2.0**-48
    for turn in zip(*results, strict=True):
        sent = [payload for payload, *_ in turn]
        for _, parts, gathered, total in turn:
            for part, again, payload in zip(parts, gathered, sent, strict=True):
                assert ((part - payload).abs() <= bits * payload.abs()).all() and torch.equal(part, again)
            assert torch.equal(total, turn[0][3])
            torch.testing.assert_close(total, sum(sent), rtol=1e-12, atol=1e-8)


def batches(offset: float) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    sizes = (4, 0, 3)
    return ([torch.randn(n, 5, 3).double().add(shift) for n in sizes] for shift in (offset, 0.0))  # type: ignore


def layers_on_all_ways(rank: int, size: int) -> list[Any]:
    """A step of a layer over each link, far from zero too."""
    results = []
    for make in (Late, AllGatherOfPairs, AllReduceOnDevice):
        group = torch.distributed.new_group()
        connect(group, make(group, CPU))
        for offset in (0.0, 1e4):
            xs, gs = batches(offset)
            result = step(syncbn.SyncBatchNorm(5, process_group=group).double(), xs[rank], gs[rank])
            assert exchanges_made(group) == (2 if offset == 0 else 4)
            results.append({key: value for key, value in result.items() if key != "grad_fn"})
        link_of(group).settle()
    return results


def test_layers_in_processes_equal_the_whole_batch(tmp_path: Any) -> None:
    """Triples lose nothing far from zero, not even as pairs of float32; sums do. All ranks have equal bits."""
    ranks = run_processes(3, layers_on_all_ways, tmp_path)
    errors: dict[int, float] = {}
    for place in range(6):
        results = [rank[place] for rank in ranks]
        offset = 1e4 * (place % 2)
        expected = whole_batch(*batches(offset))
        errors[place] = float(max((r["y"] - y).abs().max() for r, y in zip(results, expected.y, strict=True) if len(y)))
        if offset == 0 and place != 2:
            assert_matches(results, expected, torch.float64)
        for result in results:
            for name in ("running_mean", "running_var"):
                assert torch.equal(result[name], results[0][name])
    assert errors[2] < 2.0**-44  # pairs, near zero
    assert errors[1] < 1e-11 and errors[3] < 1e4 * 2.0**-44  # far from zero: triples, and in pairs
    assert errors[5] > 4 * errors[1]  # sums


DIFFERENT = {
    "layer": (Call(wire.FORWARD, "b"), 7, "rank 0, 2: forward of layer 'stem' (3 channels"),
    "kind": (Call(wire.BACKWARD, "stem"), 7, "rank 1: backward of layer 'stem'"),
    "width": (CALL, 9, "rank 1: forward of layer 'stem' (4 channels"),
}


@pytest.mark.parametrize("other", DIFFERENT)
@pytest.mark.parametrize("kind", LINKS)
def test_ranks_that_differ_are_all_named(kind: str, other: str) -> None:
    """And the group stays usable. On a device, when the headers have arrived."""
    call, width, said = DIFFERENT[other]
    Arrival.arrived = False

    def body(rank: int, group: Any) -> str:
        link = LINKS[kind](group, CPU)
        given = (call, width) if rank == 1 else (CALL, 7)
        payload = torch.ones(given[1], dtype=torch.float64)
        if kind == "device":
            exchange(link, payload, given[0])
            exchange(link, torch.ones(3, dtype=torch.float64), Call(wire.SUM))
        with pytest.raises(RankMismatchError, match="different calls") as caught:
            if kind == "device":
                link.settle()
            else:
                exchange(link, payload, given[0])
        assert float(link.sum(torch.ones(5, dtype=torch.float64), Call(wire.SUM))[0]) == 3.0
        assert f"This is rank {rank}" in str(caught.value) and "call 0)" in str(caught.value)
        return str(caught.value)

    for text in run_ranks(3, body):
        assert said in text.replace("rank 0 and 2", "rank 0, 2")


@pytest.mark.parametrize("kind", LINKS)
def test_a_refusal_tells_the_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_CHECKS", "sync")

    def body(rank: int, group: Any) -> None:
        link = LINKS[kind](group, CPU)
        if rank == 1:
            link.refuse(CALL, "wrong shape \u00fc (3, 4)", 7)
        else:
            with pytest.raises(RankMismatchError, match=r"stem.*rank 1: wrong shape \u00fc \(3, 4\)") as caught:
                exchange(link, torch.ones(7, dtype=torch.float64), CALL)
            assert caught.value.refused_by == (1,) and link.broke_off
        assert float(link.sum(torch.ones(5, dtype=torch.float64), Call(wire.SUM))[0]) == 3.0

    run_ranks(3, body)


@pytest.mark.parametrize("kind", LINKS)
def test_ranks_that_are_not_finite_are_named(kind: str) -> None:
    def body(rank: int, group: Any) -> str:
        link = LINKS[kind](group, CPU)
        connect(group, link)
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        link._warned.add("")  # (threads cannot catch warnings one by one)
        Arrival.arrived = True
        x = torch.randn(2, 3)
        x[0, 1] = 0.0 if rank == 0 else (torch.nan, torch.inf, 3e38)[rank - 1]
        y = layer(x if rank < 3 else x * 10)
        assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()
        link.settle()
        return link._broken

    if kind == "pairs":  # where the host looks, it is told at once
        warned: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AllGatherOfPairs, "warn_broken", lambda self, shared, layer: warned.append(
                self._broken_ranks(shared)))  # fmt: skip
            run_ranks(3, body)
        assert set(warned) == {"rank 1, 2"}
    else:
        assert run_ranks(3, body) == ["rank 1, 2"] * 3


# ---- which link


@pytest.mark.parametrize(
    ("limit", "local", "kind"),
    [
        ("", "3", AllReduceOnDevice), ("8", "3", AllGatherOnDevice), ("2", "3", AllReduceOnDevice),
        ("8", "2", AllReduceOnDevice), ("8", "", AllReduceOnDevice), ("8", "many", AllReduceOnDevice),
    ],
)  # fmt: skip
def test_the_rule(limit: str, local: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a device's group in one node, of so many ranks as the environment says; by no property of a message."""
    monkeypatch.setenv("SYNCBN_GATHER", limit)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)

    def body(rank: int, group: Any) -> Any:
        assert on_one_node(group) == (local == "3")
        assert type(comm.link_of(group, CPU)) is comm.OneHop  # gloo has ways of its own
        return type(comm.link_of(group, torch.device("meta")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "is_gloo", lambda group, device: device.type == "cpu")
        assert run_ranks(3, body) == [kind] * 3


def test_a_device_without_float64_gets_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncbn._torch.has_float64", lambda device: False)
    with travel("all-reduce"):
        (link,) = run_ranks(1, lambda rank, group: comm._new_link(group, CPU, {}))
    assert type(link) is AllGatherOfPairs and link.way() == "one all-gather of pairs of float32 on cpu"
