"""Frames over Unix sockets: sizes, deadlines, who gets in, what is left, and what peers hear of each other's ends.

Ranks are threads of this process where nothing has to die; else they are forked by a process that imported all once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from syncbn.comm import farewell, handshake, packets, polling, sockets
from syncbn.comm.farewell import Farewell
from syncbn.comm.sockets import PeersLost, Sockets

LONGEST = 128 + 16384 * 8


def soon() -> float:
    """Seconds: 0.2, and what the machine takes to run anybody, by how many wait for a core."""
    return 0.2 + 0.3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


DEADLINE = 60.0


@pytest.fixture(params=["compiled", "python"])
def course(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smooth course of an exchange in compiled code, and in Python alone."""
    if request.param == "python":
        monkeypatch.setattr(packets, "swap", None)
    elif packets.swap is None:
        pytest.skip("the compiled part is not there")


both = pytest.mark.usefixtures("course")


class World:
    """Ranks as threads of this process; ``tell`` is a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.told = [0] * size
        self.between: Callable[[int, int], None] = lambda rank, turn: None  # called on each rank after each tell
        self._records = [b""] * size
        self._barrier = threading.Barrier(size, timeout=DEADLINE)

    def connect(self, rank: int) -> Sockets:
        def tell(record: bytes) -> list[bytes]:
            self._records[rank] = record
            self._barrier.wait()
            records = list(self._records)
            assert len({len(one) for one in records}) == 1
            self._barrier.wait()
            self.told[rank] += 1
            self.between(rank, self.told[rank])
            return records

        return Sockets.connect(rank, self.size, tell)

    def run(self, body: Callable[..., Any]) -> list[Any]:
        """``body(rank)`` on all ranks; results, or the first exception."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                results[rank] = body(rank)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a rank hangs"
        for error in errors:
            raise error
        return results


def run(size: int, body: Callable[[int, Sockets], Any]) -> list[Any]:
    world = World(size)
    return world.run(lambda rank: body(rank, world.connect(rank)))


def swap(
    link: Sockets, frame: bytes, timeout: float = 10.0, room: int | None = None, pause: float = 0.0
) -> dict[int, bytes]:
    """One exchange; each peer's frame, as long as this rank's."""
    buffers = [memoryview(bytearray(room or max(LONGEST, len(frame)))) for _ in link.peers]
    if pause:
        link.send(memoryview(frame))
        time.sleep(pause)
        link.receive(buffers, time.monotonic() + timeout)
    else:
        link.swap(memoryview(frame), buffers, time.monotonic() + timeout)
    return {peer: bytes(buffer[: len(frame)]) for peer, buffer in zip(link.peers, buffers, strict=True)}


def content(rank: int, turn: int, length: int) -> bytes:
    return random.Random(rank * 1000 + turn).randbytes(length)


def check_swaps(rank: int, link: Sockets, lengths: Sequence[int], room: int | None = None) -> None:
    assert link.peers == tuple(peer for peer in range(len(link.peers) + 1) if peer != rank)
    for turn, length in enumerate(lengths):
        for peer, got in swap(link, content(rank, turn, length), room=room).items():
            assert got == content(peer, turn, length), (rank, peer, length)


def lost(link: Sockets, *, timeout: float = 10.0, frame: bytes = bytes(136)) -> PeersLost:
    with pytest.raises(PeersLost) as caught:
        swap(link, frame, timeout)
    return caught.value


# ---- frames

LENGTHS = [8, 136, 4232, LONGEST - 8, LONGEST, LONGEST + 8, 2 * LONGEST, 2 * handshake.PACKET, 8 * handshake.PACKET]


@both
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_rank_gets_each_frame(size: int) -> None:
    run(size, lambda rank, link: check_swaps(rank, link, [*LENGTHS, *reversed(LENGTHS)]))


@both
def test_more_than_all_buffers_hold() -> None:
    """100,000 channels on four ranks: each reads while it writes."""
    run(4, lambda rank, link: check_swaps(rank, link, [200_001 * 8, 136, 200_001 * 8]))


@both
@pytest.mark.parametrize("buffer", [4096, 20_000])
def test_a_kernel_that_gives_little_room(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "BUFFER", buffer)
    monkeypatch.setattr(sockets, "BUFFER", buffer)

    def body(rank: int, link: Sockets) -> None:
        assert link._packet < 2 * buffer
        check_swaps(rank, link, [*LENGTHS, *reversed(LENGTHS)])
        if rank == 0:
            link.send(memoryview(bytes(400_000)))  # a rank that leaves behind all that fits is heard all the same
            with contextlib.suppress(PeersLost):
                link.receive([memoryview(bytearray(400_000))] * 2, time.monotonic() + 0.3)
        else:
            time.sleep(0.5)
            assert lost(link, frame=bytes(400_000)).timed_out

    run(3, body)


@both
def test_buffers_as_short_as_the_frames() -> None:
    run(3, lambda rank, link: check_swaps(rank, link, [8, 8, 16], room=16))


def test_frames_of_different_lengths_arrive_whole() -> None:
    """As where ranks make different calls: what was sent is there for the layer above to compare."""
    lengths = [136, 4232, LONGEST, 16]

    def body(rank: int, link: Sockets) -> None:
        for turn in range(8):
            buffers = [memoryview(bytearray(LONGEST)) for _ in link.peers]
            link.send(memoryview(content(rank, turn, lengths[(rank + turn) % 4])))
            link.receive(buffers, time.monotonic() + 10.0)
            for peer, buffer in zip(link.peers, buffers, strict=True):
                length = lengths[(peer + turn) % 4]
                assert bytes(buffer[:length]) == content(peer, turn, length)

    run(4, body)


@both
def test_ranks_out_of_step_in_time() -> None:
    """A rank may be one exchange ahead, and a wait longer than a read blocks."""

    def body(rank: int, link: Sockets) -> None:
        for turn in range(40):
            if rank == turn % 3:
                time.sleep(0.15 if turn % 10 == 0 else 0.002)
            length = LONGEST if turn % 2 else 136
            for peer, got in swap(link, content(rank, turn, length)).items():
                assert got == content(peer, turn, length)

    run(3, body)


def test_two_of_the_longest_frames_go_without_waiting() -> None:
    """One that a peer has not read, and one of the next exchange."""

    def body(rank: int, link: Sockets) -> None:
        for _ in range(2):
            link.send(memoryview(bytes(LONGEST)))
            assert link._sent == 1
            if rank == 1:
                time.sleep(0.2)
            link.receive([memoryview(bytearray(LONGEST))], time.monotonic() + 5.0)

    run(2, body)


def test_a_frame_that_does_not_fit() -> None:
    def body(rank: int, link: Sockets) -> PeersLost:
        if rank == 0:
            swap(link, bytes(8000))
            return lost(link)
        with pytest.raises(PeersLost) as caught:
            swap(link, bytes(16), room=16)
        return caught.value

    for error in run(2, body):
        assert error.ranks == {0: "it sent 8000 bytes where 16 were awaited"}


def test_overlapping_groups() -> None:
    """Four ranks in a group of all and in one of two, in threads side by side."""
    whole, halves = World(4), [World(2), World(2)]

    def body(rank: int) -> None:
        both = whole.connect(rank), halves[rank // 2].connect(rank % 2)
        for turn in range(20):
            assert set(swap(both[0], content(rank, turn, 136)).items()) == {
                (peer, content(peer, turn, 136)) for peer in range(4) if peer != rank
            }
            other = rank ^ 1
            assert swap(both[1], content(rank, turn, 4232)) == {other % 2: content(other, turn, 4232)}

    whole.run(body)


# ---- what is left


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def listeners() -> list[bytes]:
    """Names at which this process listens."""
    mine = open_sockets()
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "@syncbn-" in line]
    return [b"\0" + line[7][1:].encode() for line in lines if line[3] == "00010000" and f"socket:[{line[6]}]" in mine]


def open_sockets() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if name.startswith("socket:")]


def test_nothing_is_left_of_two_thousand_groups() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    gc.collect()
    before = open_files(), threading.active_count(), len(sockets._all)
    worlds = [World(2) for _ in range(2000)]
    memory = [0, 0]

    def body(rank: int) -> None:
        for turn, world in enumerate(worlds):
            link = world.connect(rank)
            swap(link, bytes(136))
            if turn % 3 == 0:
                link.close("done")
            if turn == 500 and rank == 0:
                memory[0] = resident()

    World(2).run(body)
    memory[1] = resident()
    gc.collect()
    assert (open_files(), threading.active_count(), len(sockets._all)) == before
    assert memory[1] - memory[0] < 16 * 2**20


def test_nothing_listens_once_connected() -> None:
    def body(rank: int, link: Sockets) -> None:
        swap(link, bytes(136))
        assert listeners() == []
        assert not any(os.get_inheritable(end.socket.fileno()) for end in link._ends)
        swap(link, bytes(136))

    run(3, body)


def test_a_dropped_group_says_farewell() -> None:
    def body(rank: int, link: Sockets) -> None:
        swap(link, bytes(136))
        if rank == 0:
            return
        assert lost(link).ranks == {0: "it dropped the group"}

    run(2, body)


# ---- who gets in, and who cannot


def refuse_on(rank: int, world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Sockets]:
    """A ``connect`` whose function ``name`` fails on one rank."""
    here = threading.local()
    real = getattr(handshake, name)

    def failing(*args: Any) -> Any:
        if getattr(here, "rank", None) == rank:
            raise OSError(24, "Too many open files")
        return real(*args)

    monkeypatch.setattr(handshake, name, failing)
    monkeypatch.setattr(handshake, "is_of_kernel", lambda error: isinstance(error, OSError))

    def connect(me: int) -> Sockets:
        here.rank = me
        return world.connect(me)

    return connect


@pytest.mark.parametrize("name", ["_check_room", "_prepare", "_uid", "_address"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_fails_goes_without_on_both_sides(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    world = World(3)
    connect = refuse_on(rank, world, name, monkeypatch)

    def body(me: int) -> None:
        link = connect(me)
        assert link.peers == (() if me == rank else tuple({0, 1, 2} - {me, rank}))
        assert set(swap(link, bytes(136))) == set(link.peers)

    world.run(body)
    assert world.told == [4, 4, 4]
    gc.collect()
    assert open_files() == before


def test_half_of_the_descriptors_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8, 1 << 20))
    assert run(2, lambda rank, link: link.peers) == [(), ()]


def test_no_descriptor_for_a_rank_that_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_room(made: socket.socket) -> None:
        if made.getsockname():  # taken from a listener
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(handshake, "_check_room", check_room)
    monkeypatch.setattr(handshake, "is_of_kernel", lambda error: isinstance(error, OSError))
    assert run(2, lambda rank, link: link.peers) == [(), ()]


def test_ranks_of_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are 0, 0, 1, 1, 2."""
    here = threading.local()
    real = handshake._About.host
    monkeypatch.setattr(handshake._About, "host", lambda self: (*real(self), self.secret[0]))
    monkeypatch.setattr(handshake.secrets, "token_bytes", lambda n: bytes([here.host]) + os.urandom(n - 1))
    world = World(5)

    def body(rank: int) -> Sockets:
        here.host = rank // 2
        return world.connect(rank)

    assert [link.peers for link in world.run(body)] == [(1,), (0,), (3,), (2,), ()]
    alone = World(2)

    def apart(rank: int) -> Sockets:
        here.host = rank
        return alone.connect(rank)

    assert [link.peers for link in alone.run(apart)] == [(), ()]
    assert alone.told == [1, 1]


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")
@pytest.mark.parametrize("unaware", [False, True], ids=["seen", "found by the connection"])
def test_network_namespaces(unaware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if unaware:  # as on virtual machines that are copies of one: all ids are equal
        monkeypatch.setattr(handshake._About, "host", lambda self: (b"", 0, 0))
    world = World(3)

    def body(rank: int) -> tuple[int, ...]:
        if rank == 1:
            assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())
        return world.connect(rank).peers

    assert world.run(body) == [(2,), (), (0,)]
    assert world.told == [4, 4, 4]


@pytest.mark.parametrize("hello", [b"", b"x", b"x" * 76, b"sbnH" + bytes(40), b"x" * 4096])
@pytest.mark.parametrize("count", [1, 10, 500])
def test_strangers(hello: bytes, count: int) -> None:
    """They connect while the ranks do, say something or nothing, and stay: nobody waits for them or takes them in."""
    world = World(2)
    theirs: list[socket.socket] = []

    def between(rank: int, turn: int) -> None:
        if rank == 0 and turn == 1:
            for name in listeners():
                for _ in range(count):
                    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    theirs.append(stranger)
                    stranger.setblocking(False)
                    with contextlib.suppress(BlockingIOError):  # the queue is full
                        stranger.connect(name)
                        stranger.send(hello)
        if rank == 1 and turn == 1:
            time.sleep(0.1)

    world.between = between
    started = time.monotonic()
    links = world.run(world.connect)
    assert time.monotonic() - started < 5.0
    assert theirs
    if count <= 10:
        assert [link.peers for link in links] == [(1,), (0,)]
    assert len({link.peers == () for link in links}) == 1, "the ranks do not agree"
    for stranger in theirs:
        with contextlib.suppress(OSError):
            assert stranger.recv(1000) == b""
        stranger.close()


def test_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_uid", lambda end: os.geteuid() + 1)
    assert run(3, lambda rank, link: link.peers) == [()] * 3


def test_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of another group, which found the name."""
    real, here = handshake.hashlib.sha256, threading.local()
    monkeypatch.setattr(handshake.hashlib, "sha256", lambda data: real(data + bytes(here.rank == 1)))
    world = World(3)

    def body(rank: int) -> tuple[int, ...]:
        here.rank = rank
        return world.connect(rank).peers

    assert world.run(body) == [(2,), (), (0,)]


def test_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        size = handshake._ANSWER.size

        def pack(self, magic: bytes, nonce: bytes) -> bytes:
            return handshake_answer.pack(magic, os.urandom(16))

    handshake_answer = handshake._ANSWER
    monkeypatch.setattr(handshake, "_ANSWER", Wrong())
    assert run(2, lambda rank, link: link.peers) == [(), ()]


# ---- time


def test_the_deadline_is_that_of_the_whole_exchange() -> None:
    """Rank 1 comes late, rank 2 later, rank 3 never: rank 0 waits once."""
    world = World(4)

    def body(rank: int) -> tuple[float, PeersLost | None]:
        link = world.connect(rank)
        time.sleep((0.0, 0.5, 0.9, 1.8)[rank])
        started = time.monotonic()
        error = lost(link, timeout=(1.2, 10.0, 10.0, 10.0)[rank])
        return time.monotonic() - started, error

    (waited, error), *others = world.run(body)
    assert 1.1 < waited < 1.2 + soon()
    assert error is not None and error.timed_out and set(error.ranks) == {3}
    for waited, heard in others:
        assert heard is not None and heard.timed_out and heard.ranks == error.ranks
        assert waited < 0.8 + soon()
    assert others[2][0] < soon()  # rank 3 hears at once that the others gave it up


def test_a_peer_that_does_not_read_in_time() -> None:
    def body(rank: int, link: Sockets) -> None:
        if rank == 1:
            link.send(memoryview(bytes(136)))
            time.sleep(0.6)
            with pytest.raises(PeersLost) as caught:
                link.receive([memoryview(bytearray(2_000_000))], time.monotonic() + 5.0)
            error = caught.value
        else:
            error = lost(link, frame=bytes(2_000_000), timeout=0.3)
        assert error.timed_out and set(error.ranks) == {1}

    run(2, body)


def test_a_deadline_that_is_over_takes_what_is_there() -> None:
    def body(rank: int, link: Sockets) -> None:
        link.send(memoryview(bytes(136)))
        time.sleep(0.2)
        link.receive([memoryview(bytearray(136))], time.monotonic() - 1.0)

    run(2, body)


def test_no_deadline() -> None:
    def body(rank: int, link: Sockets) -> None:
        time.sleep(0.2 * rank)
        swap(link, bytes(136), timeout=float("inf"))

    run(2, body)


# ---- ends of peers, as far as threads can show them


def vanish(link: Sockets) -> None:
    """As if this rank's process were killed."""
    link._dead = PeersLost({}, False)
    for end in link._ends:
        end.socket.shutdown(socket.SHUT_RDWR)
    link._close()


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("frame", [136, 500_000])
def test_a_lost_rank_is_named_while_waiting_for_another(delivered: bool, frame: int) -> None:
    """Rank 3 vanishes before or after it sent its frame; rank 2 comes late; 0 and 1 wait for it, and are innocent."""

    def body(rank: int, link: Sockets) -> tuple[float, PeersLost | None]:
        if rank == 3:
            if delivered:
                link.send(memoryview(bytes(136)))
            time.sleep(0.4)
            vanish(link)
            return time.monotonic(), None
        if rank == 2:
            time.sleep(1.2)
        error = lost(link, frame=bytes(frame))
        return time.monotonic(), error

    results = run(4, body)
    for rank in (0, 1, 2):
        moment, error = results[rank]
        assert error is not None and error.ranks == {3: polling._KILLED} and not error.timed_out
        if rank < 2:
            assert moment - results[3][0] < soon()


@pytest.mark.parametrize("how", ["close", "vanish", "vanish in the next"])
def test_a_rank_that_leaves_after_the_exchange_is_no_loss_to_it(how: str) -> None:
    """Rank 0 reaches rank 2 at once, and rank 1 only later, after rank 2 has left."""

    def body(rank: int, link: Sockets) -> None:
        if rank == 0:
            slow = link._sends[0]  # and not by ``swap``

            def send(*args: Any) -> int:
                time.sleep(0.5 if how != "vanish" else 0.12)
                return slow(*args)

            link._sends = [link._sends[1], send]
            buffers = [memoryview(bytearray(LONGEST)) for _ in link.peers]
            link.send(memoryview(content(0, 0, 136)))
            link.receive(buffers, time.monotonic() + 5.0)
        else:
            got = swap(link, content(rank, 0, 136))
            assert got[0] == content(0, 0, 136)
        if rank == 2:
            if how == "vanish in the next":
                link.send(memoryview(bytes(136)))
            vanish(link) if how.startswith("vanish") else link.close("it was done")
        else:
            error = lost(link)
            assert set(error.ranks) == {2}

    run(3, body)


@both
def test_blame_is_passed_on() -> None:
    """Each rank that gave up closed its connections too, and is not blamed for that."""

    def body(rank: int, link: Sockets) -> dict[int, str]:
        if rank == 0:
            link.give_up({7: "it was lost in some other way"}, timed_out=True)
            return {}
        time.sleep(0.1 * rank)
        error = lost(link)
        assert error.timed_out
        return error.ranks

    for ranks in run(4, body)[1:]:
        assert ranks == {7: "it was lost in some other way"}


@both
def test_a_farewell_of_one_that_did_not_read_what_it_was_sent() -> None:
    """The kernel says that the connection was reset, before it gives what was sent."""

    def body(rank: int, link: Sockets) -> None:
        if rank == 0:
            time.sleep(0.3)
            link.close("it had enough")
        else:
            assert lost(link).ranks == {0: "it had enough"}

    run(2, body)


@both
@pytest.mark.parametrize("frame", [136, 2_000_000])
def test_a_rank_that_leaves_while_others_hold_its_connections(frame: int) -> None:
    """As processes do that were forked behind Python's back: peers hear of it all the same."""

    def body(rank: int, link: Sockets) -> float:
        if rank == 0:
            copies = [end.socket.dup() for end in link._ends]
            link.send(memoryview(bytes(136)))
            time.sleep(0.3)
            link.close("it had enough")
            closed = time.monotonic()
            time.sleep(1.0)
            for copy in copies:
                copy.close()
            return closed
        if frame == 136:
            swap(link, bytes(frame))
        assert lost(link, frame=bytes(frame)).ranks == {0: "it had enough"}
        return time.monotonic()

    closed, heard = run(2, body)
    assert heard - closed < soon()


@both
def test_a_farewell_is_longer_than_the_buffers() -> None:
    def body(rank: int, link: Sockets) -> None:
        reason = "it had enough " * 100
        if rank == 0:
            with contextlib.suppress(BlockingIOError):
                link._ends[0].socket.recv(1000)  # else the peer hears of a reset, and no more takes the quick way
            time.sleep(0.03)
            link.close(reason)
        else:
            with pytest.raises(PeersLost) as caught:
                swap(link, bytes(16), room=16)
            assert caught.value.ranks == {0: reason}

    run(2, body)


@both
def test_a_rank_that_arrives_after_all_gave_up() -> None:
    """Frames and farewells lie there for it; it may read them although the peers closed with unread frames."""

    def body(rank: int, link: Sockets) -> PeersLost:
        if rank == 2:
            time.sleep(0.8)
        return lost(link, timeout=0.4)

    errors = run(3, body)
    for error in errors:
        assert error.timed_out and set(error.ranks) == {2}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError, TimeoutError, ConnectionResetError])
def test_an_exception_between_the_writes(
    wide: bool, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes out of an exchange ends it: a handler of signals may raise at any point."""
    monkeypatch.setattr(packets, "swap", None)

    def body(rank: int, link: Sockets) -> None:
        swap(link, bytes(136))
        if rank == 1:

            def handler(*args: Any) -> int:
                raise raised("now")

            link._reads[1] = link._sends[1] = handler  # type: ignore[assignment]
            with pytest.raises(raised, match="now"):
                swap(link, bytes(136))
            error = lost(link)
        else:
            frame = bytes(800_000 if wide else 136)
            with contextlib.suppress(PeersLost):  # rank 0 has all frames, perhaps
                swap(link, frame)
            error = lost(link, frame=frame)
        assert error.ranks == {1: f"it was interrupted by {raised.__name__}: now"}

    run(3, body)


@both
def test_an_exchange_that_was_left_unfinished() -> None:
    def body(rank: int, link: Sockets) -> None:
        if rank == 1:
            link.send(memoryview(bytes(136)))
        else:
            with contextlib.suppress(PeersLost):  # its frame is there, perhaps
                swap(link, bytes(136))
        assert lost(link).ranks == {1: sockets._UNFINISHED}
        with pytest.raises(PeersLost, match="rank 1"):
            link.receive([], 0.0)
        link.close("again")

    run(2, body)


# ---- text


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "reason", ["", "\ud800 lone", "\u00fc" * 10, "x" * 10_000_000, "\ud800" * 10_000, '"\\\n\x00' * 5000]
)
@pytest.mark.parametrize("count", [1, 3, 64])
def test_farewells(reason: str, count: int) -> None:
    packet = farewell.encode(Farewell(dict.fromkeys(range(count), reason), True, 12))
    assert len(packet) <= farewell.LIMIT and len(packet) % 2 == 1
    said = farewell.decode(packet)
    assert said is not None and list(said.lost) == list(range(count)) and said.timed_out and said.exchanges == 12
    for text in said.lost.values():
        text.encode()
        assert not reason or text[:2] == farewell.clean(reason, 100)[:2]


@pytest.mark.parametrize(
    "packet", [b"", b"sbnF", b"sbnF{}", b"sbnF[1,2,3]", b'sbnF[{"a":"b"},true,1]', b"sbnF\xff", b"x"]
)
def test_bytes_that_are_no_farewell(packet: bytes) -> None:
    assert farewell.decode(packet) is None


@both
def test_a_farewell_always_arrives() -> None:
    def body(rank: int, link: Sockets) -> None:
        if rank == 0:
            link.close("\ud800" + "x" * 10_000_000)
        else:
            text = lost(link).ranks[0]
            assert text.startswith("\\ud800xxx")

    run(2, body)


def test_exceptions_are_described() -> None:
    assert farewell.describe(Unspeakable()) == "Unspeakable"
    assert farewell.describe(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert farewell.describe(ValueError("a b")) == "ValueError: a b"


@pytest.mark.parametrize(("size", "cores", "looks"), [(2, 1, True), (4, 1, True), (5, 1, False), (5, 2, True)])
def test_readers_look_before_they_sleep_unless_too_many_share_a_core(
    size: int, cores: int, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))

    def body(rank: int, link: Sockets) -> None:
        assert link._looking == (sockets.LOOKING if looks else 0)

    run(size, body)


# ---- compiled code


needs_compiled = pytest.mark.skipif(packets.swap is None, reason="the compiled part is not there")


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@needs_compiled
def test_how_far_an_exchange_got() -> None:
    assert packets.swap is not None
    frame = memoryview(bytes(range(16)))
    ends = [pair() for _ in range(3)]
    packed = packets.pack([mine.fileno() for mine, _ in ends])
    buffers = [memoryview(bytearray(64)) for _ in ends]
    for _, theirs in ends:
        theirs.send(bytes(reversed(range(16))))
    assert packets.swap(packed, frame, buffers, 0) is None
    assert all(buffer[:16] == bytes(reversed(range(16))) for buffer in buffers)
    assert all(theirs.recv(64) == frame for _, theirs in ends)
    ends[0][1].send(bytes(16))
    ends[1][1].send(bytes(24))  # of another length
    assert packets.swap(packed, frame, buffers, 1000) == (3, 1, 24)
    ends[2][1].close()
    assert packets.swap(packed, frame, buffers, 1000) == (2, 0, -1)  # nothing is read before all is written
    for mine, theirs in ends:
        mine.close()
        theirs.close()


@needs_compiled
def test_a_packet_that_is_late_is_left_to_the_poll() -> None:
    assert packets.swap is not None
    mine, theirs = pair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, (0).to_bytes(8, "little") + (50_000).to_bytes(8, "little"))
    began = time.monotonic()
    packed = packets.pack([mine.fileno()])
    assert packets.swap(packed, memoryview(bytes(8)), [memoryview(bytearray(64))], 10_000) == (1, 0, -1)
    assert 0.04 < time.monotonic() - began < 5
    mine.close()
    theirs.close()


@needs_compiled
@pytest.mark.parametrize(
    ("ends", "buffers"), [(1, 2), (2, 1), (0, 1)], ids=["more buffers", "fewer buffers", "no ends"]
)
def test_compiled_code_checks_what_it_is_given(ends: int, buffers: int) -> None:
    assert packets.swap is not None and packets.add_rows is not None
    frame = memoryview(bytes(8))
    with pytest.raises(ValueError, match="bytes of ends do not go with"):
        packets.swap(packets.pack([0] * ends), frame, [memoryview(bytearray(8))] * buffers, 0)
    with pytest.raises(BufferError, match="not writable"):
        packets.swap(packets.pack([0]), frame, [bytes(8)], 0)  # type: ignore[list-item]
    total = (ctypes.c_double * 4)()
    for start, step, count, width in [
        (0, 16, 3, 2),
        (8, 16, 2, 2),
        (-8, 8, 1, 1),
        (0, 8, 0, 1),
        (4, 8, 1, 1),
        (0, 8, 1, 5),
    ]:
        with pytest.raises(ValueError, match="are not in 32 bytes"):
            packets.add_rows(bytearray(32), start, step, count, ctypes.addressof(total), width)


@pytest.mark.parametrize("how", ["compiled", "python", "poll"])
def test_a_peer_that_sends_and_closes_while_it_is_looked_at(how: str) -> None:
    """The kernel may say that it closed before it shows the packet. That is rare: one in some ten thousand."""
    compiled = packets.swap
    if how == "compiled" and compiled is None:
        pytest.skip("the compiled part is not there")

    def answer(theirs: socket.socket) -> None:
        theirs.recv(64)
        theirs.send(bytes(8))
        theirs.send(b"f")
        theirs.shutdown(socket.SHUT_RDWR)
        theirs.close()

    buffer = memoryview(bytearray(64))
    for _ in range(3000):
        mine, theirs = pair()
        peer = threading.Thread(target=answer, args=(theirs,))
        peer.start()
        if how == "compiled":
            assert compiled is not None
            assert compiled(packets.pack([mine.fileno()]), memoryview(bytes(8)), [buffer], 10**9) is None
        else:
            mine.send(bytes(8))
            if how == "python":
                assert sockets._read_soon(mine.recv_into, buffer, 10**9) == 8
            else:
                rest = polling.Rest((1,), [handshake.Connection(mine, LONGEST)], buffer[:0], [buffer], 0)
                while (length := rest._get(0, [buffer])) < 0:
                    pass
                assert length == 8
        peer.join()
        mine.close()


def test_an_end_is_believed_when_it_is_told_twice() -> None:
    told = iter([0, 8, 0, 0])

    def read(*_: Any) -> int:
        return next(told)

    assert sockets._read_soon(read, memoryview(bytearray(8)), 10**9) == 8
    assert sockets._read_soon(read, memoryview(bytearray(8)), 0) == 0


@needs_compiled
def test_rows_are_added_in_order() -> None:
    assert packets.add_rows is not None
    rows = [[1e16, 1.0, -0.0], [1.0, 2.0, -0.0], [-1e16, 4.0, -0.0]]
    memory = bytearray(b"".join(struct.pack("5d", 7.0, *row, 9.0) for row in rows))
    total = (ctypes.c_double * 3)()
    packets.add_rows(memory, 8, 40, 3, ctypes.addressof(total), 3)
    assert list(total) == [(1e16 + 1.0) - 1e16, 7.0, 0.0]
    assert math.copysign(1.0, total[2]) == -1.0


@needs_compiled
def test_who_lost_a_core_sleeps_at_once_for_a_while() -> None:
    """A rank that looks and gets its core back late waits for somebody who computes: the note is in its ends."""
    assert packets.swap is not None
    packed = packets.pack([])
    packed[:4] = (3).to_bytes(4, sys.byteorder)
    for left in (2, 1, 0, 0):
        packets.swap(packed, memoryview(bytes(8)), [], 0)
        assert int.from_bytes(packed[:4], sys.byteorder) == left


def test_connections_that_another_thread_closes_while_they_are_in_use() -> None:
    """Their descriptors are closed by who uses them, lest a file that is opened meanwhile gets the number."""

    def body(rank: int, link: Sockets) -> None:
        if rank == 0:
            numbers = [end.socket.fileno() for end in link._ends]
            closer = threading.Timer(0.3, link.close, ["another thread had enough"])
            closer.start()
            error = lost(link)
            closer.join()
            assert error.ranks == {0: "another thread had enough"}
            assert all(end.socket.fileno() == -1 for end in link._ends), numbers
        else:
            time.sleep(0.6)
            assert lost(link).ranks == {0: "another thread had enough"}

    run(3, body)


# ---- processes


class Rank:
    """What a scenario gets: a rank in a process of its own."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.turn = 0
        self.link = Sockets.connect(rank, size, self.tell)
        assert len(self.link.peers) == size - 1
        swap(self.link, bytes(136))

    def tell(self, record: bytes) -> list[bytes]:
        self.turn += 1
        path = self.folder / f"{self.turn}-{self.rank}"
        path.with_suffix(".part").write_bytes(record)
        path.with_suffix(".part").rename(path)
        paths = [self.folder / f"{self.turn}-{rank}" for rank in range(self.size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.002)
        return [path.read_bytes() for path in paths]

    def lose(self, timeout: float = 10.0) -> dict[str, Any]:
        try:
            swap(self.link, bytes(136), timeout)
        except PeersLost as error:
            return {"ranks": error.ranks, "timed_out": error.timed_out, "moment": time.monotonic()}
        return {"ranks": {}, "moment": time.monotonic()}


def ends(rank: Rank, how: str, delivered: bool) -> dict[str, Any]:
    """The last rank ends; the one before is slow; the others wait for it."""
    if rank.rank < rank.size - 2:
        return rank.lose()
    if rank.rank == rank.size - 2:
        time.sleep(0.8)
        return rank.lose()
    time.sleep(0.3)
    if delivered:
        rank.link.send(memoryview(bytes(136)))
    report(rank, {"moment": time.monotonic()})
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "abort":
        os.abort()
    if how == "exit":
        os._exit(3)
    if how == "raise":
        raise ValueError("boom")
    sys.exit(0)


def interrupted(rank: Rank, how: str) -> dict[str, Any]:
    """Rank 0 is interrupted while it waits for the others."""
    if rank.rank:
        time.sleep(0.6 if rank.rank == 2 else 0.0)
        return rank.lose()
    kinds = {"KeyboardInterrupt": KeyboardInterrupt, "TimeoutError": TimeoutError, "SystemExit": SystemExit}

    def handler(*args: Any) -> None:
        raise kinds[how]("ring")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        rank.lose()
    except kinds[how] as error:
        found = {"raised": str(error), "moment": time.monotonic()}
    return {**found, "later": rank.lose()["ranks"]}


def stopped(rank: Rank) -> dict[str, Any]:
    """Rank 1 is stopped for longer than the deadline, and wakes up to find itself given up."""
    if rank.rank == 1:
        time.sleep(0.2)
        waker = os.fork()
        if waker == 0:
            time.sleep(1.5)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(waker, 0)
    return rank.lose(timeout=1.0)


def signals_that_return(rank: Rank) -> dict[str, Any]:
    """Handlers that return do not disturb an exchange."""
    seen = []
    signal.signal(signal.SIGALRM, lambda *args: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    for turn in range(30):
        if turn % 10 == rank.rank:
            time.sleep(0.15)
        assert swap(rank.link, content(rank.rank, turn, 136))[1 - rank.rank] == content(1 - rank.rank, turn, 136)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    swap(rank.link, bytes(136))
    return {"seen": len(seen)}


def forked(rank: Rank, how: str) -> dict[str, Any]:
    """A child of rank 0 cannot talk on the connections, and leaves them as they are when it ends."""
    found: dict[str, Any] = {}
    if rank.rank == 0:
        path = rank.folder / "child"
        child = os.fork()
        if child == 0:
            error = rank.lose()
            path.write_text(json.dumps([error["ranks"], len(rank.link._ends), len(open_sockets())]))
            if how == "leave":
                sys.exit(0)
            time.sleep(1.5)  # lives longer than its parent
            os._exit(0)
        if how == "leave":
            os.waitpid(child, 0)
            found["child"] = json.loads(path.read_text())
        else:
            time.sleep(0.3)
            report(rank, {"moment": time.monotonic()})
            os.kill(os.getpid(), signal.SIGKILL)
    elif how == "outlive":
        return rank.lose()
    for turn in range(5):
        assert swap(rank.link, content(rank.rank, turn, 136))[1 - rank.rank] == content(1 - rank.rank, turn, 136)
    return found


def report(rank: Rank, found: dict[str, Any]) -> None:
    (rank.folder / f"report-{rank.rank}").write_text(json.dumps(found))


kept: list[Rank] = []  # as groups are


def nursery() -> None:
    """Fork the ranks of one scenario after the other, as the tests ask for on the standard input."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, size, args, folder = json.loads(line)
        children = []
        for number in range(size):
            child = os.fork()
            if child == 0:
                rank = Rank(number, size, Path(folder))
                kept.append(rank)
                report(rank, globals()[name](rank, *args))
                rank.link.close("done")
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Run a scenario: reports of all ranks."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"  # busy machines take long to import

    def run_scenario(scenario: Callable[..., Any], size: int, *args: Any, dies: int | None = None) -> Any:
        folder = tmp_path_factory.mktemp("ranks")
        watch = threading.Timer(DEADLINE, os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        process.stdin.write(json.dumps([scenario.__name__, size, args, str(folder)]) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline() or '["a rank hung"]')
        watch.cancel()
        assert all(code == 0 for rank, code in enumerate(codes) if rank != dies), codes
        return [json.loads((folder / f"report-{rank}").read_text()) for rank in range(size)]

    yield run_scenario
    process.stdin.close()
    process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
    process.kill()
    process.wait()


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("kill", polling._KILLED),
        ("abort", polling._KILLED),
        ("exit", polling._KILLED),
        ("leave", "its process ended"),
        ("raise", "its process ended with ValueError: boom"),
    ],
)
def test_a_process_ends(play: Play, how: str, reason: str, size: int, delivered: bool) -> None:
    *others, dead = play(ends, size, how, delivered, dies=size - 1)
    for rank, found in enumerate(others):
        assert found["ranks"] == {str(size - 1): reason} and not found["timed_out"]
        slow = rank == size - 2
        assert found["moment"] - dead["moment"] < (0.5 if slow else 0.0) + soon()


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "TimeoutError", "SystemExit"])
def test_an_interrupt(play: Play, how: str) -> None:
    first, *others = play(interrupted, 3, how)
    reason = {"0": f"it was interrupted by {how}: ring"}
    assert first["raised"] == "ring" and first["later"] == reason
    for found in others:
        assert found["ranks"] == reason
    assert others[0]["moment"] - first["moment"] < soon()


def test_a_stopped_process(play: Play) -> None:
    for found in play(stopped, 3):
        assert found["timed_out"] and list(found["ranks"]) == ["1"]


def test_handlers_of_signals_that_return(play: Play) -> None:
    for found in play(signals_that_return, 2):
        assert found["seen"] > 3


def test_a_forked_child_leaves_the_connections_alone(play: Play) -> None:
    first, _ = play(forked, 2, "leave")
    assert first["child"] == [{"0": sockets._FORKED}, 1, 0]


def test_a_forked_child_does_not_hide_the_end_of_its_parent(play: Play) -> None:
    first, second = play(forked, 2, "outlive", dies=0)
    assert second["ranks"] == {"0": polling._KILLED}
    assert second["moment"] - first["moment"] < soon()


if __name__ == "__main__":
    nursery()
