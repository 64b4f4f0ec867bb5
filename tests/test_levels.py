"""Groups whose hosts have leaders: what arrives, and who is named when a leader or a rank is lost."""

from __future__ import annotations

import errno
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import syncbn
from helpers.faults import run_faulty
from helpers.links import exchange, link_of, travel
from helpers.oracle import close, step, whole_batch
from helpers.ranks import run_ranks
from programs.faults import Fault
from syncbn import PeerLostError, RankMismatchError, SyncBatchNorm, wire
from syncbn.comm import board, carrier, handshake, sockets, two_levels
from syncbn.wire import Call

W = 5  # 0, 2 and 4 on one host, led by 0; 1 and 3 on the other, led by 1
TIMEOUT = 1.0
LONG = "long " * 1000 + "end"
WIDTHS = [1, 7, wire.FRAME - 1, wire.FRAME, wire.FRAME + 1, 3 * wire.FRAME + 5]


@pytest.fixture(autouse=True)
def _two_hosts() -> Iterator[None]:
    with travel("two levels"):
        yield


def payload(rank: int, width: int) -> Tensor:
    return torch.arange(width, dtype=torch.float64) + 1000.0 * rank


def check_exchange(rank: int, group: Any, width: int = 5) -> None:
    parts = exchange(link_of(group), payload(rank, width), Call(wire.SUM, "x"))
    assert [torch.equal(part, payload(peer, width)) for peer, part in enumerate(parts)] == [True] * group.size()


def hosts_are(monkeypatch: pytest.MonkeyPatch, host: Callable[[int], int]) -> None:
    def named() -> handshake.Host:
        return f"host {host(int(threading.current_thread().name.removeprefix('rank ')))}".encode(), 0, 0

    monkeypatch.setattr(handshake, "this_host", named)


def peers_by_socket(group: Any) -> tuple[int, ...]:
    link: Any = link_of(group)
    return tuple(link._carrier.by_socket)


# ---- what arrives


@pytest.mark.parametrize("world", [3, 4, W])
def test_each_rank_gets_all_payloads_in_rank_order(world: int) -> None:
    def body(rank: int, group: Any) -> tuple[int, ...]:
        for width in [*WIDTHS, *reversed(WIDTHS)]:
            check_exchange(rank, group, width)
        return peers_by_socket(group)

    hosts = [[rank for rank in range(world) if rank % 2 == host] for host in range(2)]
    for rank, peers in enumerate(run_ranks(world, body)):
        mine = hosts[rank % 2]
        assert peers == (tuple(mine[1:]) if rank == mine[0] else (mine[0],))


def test_ranks_out_of_step_in_time() -> None:
    def body(rank: int, group: Any) -> None:
        for i in range(30):
            if rank == i % W:
                time.sleep(0.15 if i % 10 == 0 else 0.002)
            check_exchange(rank, group, 7 if i % 2 else 9000)

    run_ranks(W, body)


def test_layers_are_those_of_the_whole_batch() -> None:
    xs = [torch.randn(n, 4, 2, dtype=torch.float64) + n for n in (2, 0, 3, 1, 4)]

    results = run_ranks(W, lambda rank, group: step(SyncBatchNorm(4, process_group=group).double(), xs[rank], xs[rank]))
    expected = whole_batch(xs, xs)
    for rank in range(W):
        for name in ("y", "dx", "dweight", "dbias"):
            close(results[rank][name], getattr(expected, name)[rank], 1e-12, 1e-12, name)
        for name in ("running_mean", "running_var"):
            assert torch.equal(results[rank][name], results[0][name])


def test_equal_in_bits_to_the_one_hop() -> None:
    def body(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        x = torch.randn(3 + rank, 9, generator=torch.Generator().manual_seed(rank))
        layer = SyncBatchNorm(9, process_group=group)
        y: Tensor = layer(x)
        assert layer.running_var is not None
        return y, layer.running_var

    there = run_ranks(W, body)
    with travel("one hop"):
        expected = run_ranks(W, body)
    for one, other in zip(there, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("odd", range(W))
@pytest.mark.parametrize("width", [9, 9000, wire.FRAME + 9])
def test_calls_of_other_widths_are_named_on_all_ranks(odd: int, width: int) -> None:
    def body(rank: int, group: Any) -> str:
        link = link_of(group)
        with pytest.raises(RankMismatchError, match="different calls") as caught:
            exchange(link, payload(rank, width if rank == odd else 70), Call(wire.FORWARD, "a"))
        check_exchange(rank, group)
        return str(caught.value)

    others = ", ".join(str(rank) for rank in range(W) if rank != odd)
    for text in run_ranks(W, body):
        assert f"rank {odd}: forward of layer 'a' ({width // 2} channels" in text
        assert f"rank {others}: forward of layer 'a' (35 channels" in text


@pytest.mark.parametrize("refusing", [(0,), (3,), (1, 4)])
def test_refusals_are_heard_on_all_hosts(refusing: tuple[int, ...]) -> None:
    def body(rank: int, group: Any) -> str:
        link, call = link_of(group), Call(wire.FORWARD, "a")
        text = ""
        if rank in refusing:
            link.refuse(call, f"reason of {rank} {LONG}", 7)
        else:
            with pytest.raises(RankMismatchError) as caught:
                exchange(link, payload(rank, 7), call)
            assert caught.value.refused_by == refusing
            text = str(caught.value)
        check_exchange(rank, group)
        return text

    for text in run_ranks(W, body):
        assert not text or all(f"rank {rank}: reason of {rank} {LONG}" in text for rank in refusing)


# ---- who leads


def test_ranks_of_one_host_have_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_are(monkeypatch, lambda rank: 0)

    def body(rank: int, group: Any) -> tuple[int, ...]:
        check_exchange(rank, group)
        return peers_by_socket(group)

    assert run_ranks(4, body) == [tuple(peer for peer in range(4) if peer != rank) for rank in range(4)]
    monkeypatch.setattr(two_levels, "SOCKETS_LIMIT", 3)
    assert run_ranks(4, body) == [(1, 2, 3), (0,), (0,), (0,)]


def test_ranks_that_share_no_host_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_are(monkeypatch, lambda rank: rank)

    def body(rank: int, group: Any) -> tuple[int, ...]:
        for width in WIDTHS:
            check_exchange(rank, group, width)
        return peers_by_socket(group)

    assert run_ranks(3, body) == [()] * 3


@pytest.mark.parametrize("alone", [0, 1, 4])
def test_a_rank_without_a_connection_leads_itself(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = handshake._address

    def wrong(name: bytes) -> bytes:
        return address(name) + (b"?" if threading.current_thread().name == f"rank {alone}" else b"")

    monkeypatch.setattr(handshake, "_address", wrong)

    def body(rank: int, group: Any) -> tuple[int, ...]:
        for width in WIDTHS:
            check_exchange(rank, group, width)
        return peers_by_socket(group)

    peers = run_ranks(W, body)
    assert peers[alone] == () and not any(alone in others for others in peers)


@pytest.mark.parametrize("name", ["_hand_out", "_take"])
def test_a_host_without_memory_to_share_goes_without_a_leader(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all its ranks alike; the other host keeps its own."""
    real = getattr(board, name)

    def fail(*args: Any) -> memoryview:
        if threading.current_thread().name in ("rank 0", "rank 4"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*args)

    monkeypatch.setattr(board, name, fail)
    monkeypatch.setattr(handshake, "is_of_kernel", lambda error: isinstance(error, OSError))

    def body(rank: int, group: Any) -> tuple[int, ...]:
        for width in WIDTHS:
            check_exchange(rank, group, width)
        return peers_by_socket(group)

    assert run_ranks(W, body) == [(), (3,), (), (1,), ()]


def test_nothing_is_left_behind() -> None:
    def body(rank: int, group: Any) -> None:
        check_exchange(rank, group, 3)

    run_ranks(W, body)
    gc.collect()
    before = len(sockets._all)
    run_ranks(W, body)
    gc.collect()
    assert len(sockets._all) == before


# ---- losses


def check_named(texts: list[str], lost: int) -> None:
    for rank, text in enumerate(texts):
        assert rank == lost or f"Not arrived: rank {lost}." in text, (rank, text)


@pytest.mark.integration
@pytest.mark.parametrize("rank", [0, 1, 3, 4])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_killed_process_is_named_on_all_hosts(tmp_path: Path, rank: int, phase: str) -> None:
    ranks = run_faulty(W, Fault("kill", phase, rank=rank), tmp_path, timeout=10.0, way="two levels")
    assert [each.code for each in ranks] == [-signal.SIGKILL if each == rank else 1 for each in range(W)]
    check_named([each.report.get("text", "") for each in ranks], rank)
    for each, other in enumerate(ranks):
        assert each == rank or (other.report["error"] == "PeerLostError" and other.report["seconds"] < 1.0)


@pytest.mark.parametrize("absent", range(W))
def test_a_rank_that_does_not_come_is_named_at_the_timeout(absent: int) -> None:
    over = threading.Barrier(W)

    def body(rank: int, group: Any) -> str:
        check_exchange(rank, group)
        text = ""
        if rank != absent:
            started = time.monotonic()
            with pytest.raises(PeerLostError) as caught:
                check_exchange(rank, group)
            text = str(caught.value)
            assert TIMEOUT - 0.2 < time.monotonic() - started < TIMEOUT + 1.0
        over.wait(10.0)
        return text

    check_named(run_ranks(W, body, timeout=TIMEOUT), absent)


@pytest.mark.parametrize("interrupted", range(W))
def test_an_interrupted_rank_is_named_on_all_hosts(interrupted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Barrier(W)
    swap = two_levels.TwoLevels._lead if interrupted in (0, 1) else two_levels.TwoLevels._follow
    armed = threading.Event()

    def interrupt(self: Any, *args: Any) -> None:
        if armed.is_set() and self._rank == interrupted:
            raise KeyboardInterrupt
        swap(self, *args)

    monkeypatch.setattr(two_levels.TwoLevels, swap.__name__, interrupt)

    def body(rank: int, group: Any) -> str:
        check_exchange(rank, group)
        over.wait(10.0)
        armed.set()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt if rank == interrupted else PeerLostError) as caught:
            check_exchange(rank, group)
        assert time.monotonic() - started < 2.0
        with pytest.raises(PeerLostError, match="cannot be used any more"):
            check_exchange(rank, group)
        over.wait(10.0)
        return str(caught.value)

    texts = run_ranks(W, body)
    check_named(texts, interrupted)
    assert all("KeyboardInterrupt" in text for rank, text in enumerate(texts) if rank != interrupted)


def test_margins_are_short() -> None:
    """Of the timeout, what a leader leaves for its word to others."""
    assert carrier._MARGIN <= 1.0


def test_a_leader_that_sends_nonsense() -> None:
    def body(rank: int, group: Any) -> str:
        check_exchange(rank, group)
        link: Any = link_of(group)
        if rank == 1:
            block = torch.zeros(4, dtype=torch.float64)
            block.view(torch.int64)[0] = -9
            link._carrier._gloo.start(block, {})
            link._carrier._gloo.send_last(block, [0])
            return ""
        with pytest.raises(PeerLostError) as caught:
            check_exchange(rank, group)
        return str(caught.value)

    texts = run_ranks(W, body, timeout=TIMEOUT)
    assert all("rank 1: it sent bytes that are no message" in texts[rank] for rank in (0, 2, 4)), texts


def test_groups_of_any_size_have_leaders() -> None:
    hosts: list[handshake.Host | None] = [(str(rank // 64).encode(), 0, 0) for rank in range(4096)]
    assert two_levels.is_led(hosts)
    assert two_levels.leader_or_all(64, hosts) == set(range(65, 128))
    assert two_levels.leader_or_all(70, hosts) == {64}
    assert two_levels.leader_or_all(0, [None] * 100) == set()
    assert not two_levels.is_led(hosts[:64]) and two_levels.is_led(hosts[:65])
    assert two_levels.leader_or_all(5, hosts[:64]) == set(range(64)) - {5}
    assert syncbn.comm.LEVELS_LIMIT >= 4096
