"""Frames by way of a leader on each host: the ranks' to it, a host's to every other leader, all of them to the ranks.

Three steps one after the other, however many ranks there are. A host's leader is its lowest rank. Its ranks reach it by
Unix socket; leaders reach each other over gloo, in one hop. Who has no connection to the leader of its host is its own.

A block is what leaders swap: the length in bytes of each rank's frame as int64, then the frames, in rank order. So are
frames of different lengths, of ranks that make different calls, seen by everybody. What a leader sends to its ranks is
the blocks of all hosts, in the order of the leaders. A leader that cannot go on sends a farewell as its block, behind
its length as a negative number.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.comm import farewell
from syncbn.comm.farewell import Farewell
from syncbn.comm.frames import Frames
from syncbn.comm.gloo import Gloo
from syncbn.comm.handshake import Host, all_of_host
from syncbn.comm.sockets import PeersLost, Sockets
from syncbn.comm.waiting import bury

SOCKETS_LIMIT = 64
"""Ranks of a host, all of the group, up to which each keeps a socket to each other and no leader is needed."""

_NUMBER = struct.Struct("<q")


def is_led(hosts: Sequence[Host | None]) -> bool:
    """Whether ranks on these hosts (None: off sockets) need leaders."""
    return len(hosts) > SOCKETS_LIMIT or None in hosts or len(set(hosts)) > 1


def leader_or_all(rank: int, hosts: Sequence[Host | None]) -> set[int]:
    """The ranks of its host with which a rank wants a connection."""
    others = all_of_host(rank, hosts)
    if not others or not is_led(hosts):
        return others
    leader = min(others | {rank})
    return others if leader == rank else {leader}


class TwoLevels:
    """One rank's part in the exchanges of a group whose hosts have leaders.

    Args:
        rank: of the group.
        pairs: the ranks to which each rank has a connection.
        sockets: this rank's connections.
        gloo: of the group.
    """

    def __init__(self, rank: int, pairs: Sequence[set[int]], sockets: Sockets, gloo: Gloo) -> None:
        self._rank, self._size = rank, len(pairs)
        self._sockets, self._gloo = sockets, gloo
        self._hosts: dict[int, list[int]] = {}  # by leader, in rank order
        for each, peers in enumerate(pairs):
            self._hosts.setdefault(min(peers | {each}), []).append(each)
        self._leads = rank in self._hosts
        self._others = [leader for leader in self._hosts if leader != rank]
        self._kept: _Room | None = None  # for the frames of most exchanges

    def swap(self, frames: Frames, length: int, collected: float, deadline: float, answered: float) -> None:
        """Send this rank's frame to all, and receive theirs.

        Args:
            frames: has this rank's frame, and room for those of the others.
            length: of this rank's frame in float64.
            collected: when a leader stops waiting for the ranks of its host, on the clock of ``time.monotonic``; so
                that its word of who did not come reaches the other leaders by the deadline.
            deadline: of the exchange.
            answered: when a rank stops waiting for its leader, who may have to find out who did not come.

        Raises:
            PeersLost: a rank is not there any more, or has not come by the deadline.
            RuntimeError: whatever gloo finds wrong.
        """
        if self._kept is None:
            self._kept = _Room(self._hosts if self._leads else {}, self._size, frames.length)
        room = self._kept
        if room.length != frames.length:
            room = _Room(self._hosts if self._leads else {}, self._size, frames.length)
        if not self._leads:
            self._follow(frames, length, room, answered)
            return
        try:
            self._lead(frames, length, room, collected, deadline)
        except BaseException as error:
            bury(room, self._gloo)  # gloo may still write there, and read
            self._tell_leaders(error)
            raise

    def _follow(self, frames: Frames, length: int, room: _Room, deadline: float) -> None:
        self._sockets.send(frames.views[self._rank][: 8 * length])
        self._sockets.receive([room.all], deadline, self._size * 8 * (1 + length))
        at = 0
        for ranks in self._hosts.values():
            at += _unpack(room.all[at:], ranks, frames)

    def _lead(self, frames: Frames, length: int, room: _Room, collected: float, deadline: float) -> None:
        blocks, mine = room.blocks, self._hosts[self._rank]
        lengths = [8 * length]
        if len(mine) > 1:
            lengths += self._sockets.collect(frames.of_peers(self._sockets.peers), collected, 8 * length)
        size = _pack(frames, mine, lengths, blocks[self._rank].bytes)
        if self._others:
            self._gloo.start(blocks[self._rank].tensor[: size // 8], {to: blocks[to].tensor for to in self._others})
            self._gloo.wait(
                deadline, functools.partial(self._hear, blocks)
            )  # who gave up does not take this rank's block
        if len(mine) > 1:
            end = 0
            for leader, ranks in self._hosts.items():
                size = _size_of(blocks[leader].bytes, len(ranks))
                room.all[end : end + size] = blocks[leader].bytes[:size]
                end += size
            self._sockets.deliver(room.all[:end], deadline)
        for leader in self._others:
            _unpack(blocks[leader].bytes, self._hosts[leader], frames)

    def _hear(self, blocks: Mapping[int, _Block]) -> None:
        """Raise what leaders say in place of their blocks."""
        lost: dict[int, str] = {}
        timed_out = False
        for leader in self._others:
            block = blocks[leader].bytes
            (size,) = _NUMBER.unpack_from(block)
            if size < 0:
                said = farewell.decode(bytes(block[_NUMBER.size : _NUMBER.size - size]))
                lost |= said.lost if said is not None else {leader: "it sent bytes that are no message"}
                timed_out |= said is not None and said.timed_out
        if lost:
            raise PeersLost(lost, timed_out)

    def _tell_leaders(self, error: BaseException) -> None:
        """Send the other leaders a farewell, for this exchange or, if they have this one's block, for the next."""
        timed_out = False
        if isinstance(error, PeersLost):
            lost, timed_out = error.ranks, error.timed_out
        elif isinstance(error, RuntimeError):
            broken, absent = self._gloo.missing()
            lost = dict.fromkeys(broken or absent or [self._rank], str(error))
        else:
            lost = {self._rank: f"it was interrupted by {farewell.describe(error)}"}
        last = farewell.encode(Farewell(lost, timed_out, 0))
        packet = _NUMBER.pack(-len(last)) + last
        with _torch.outside_modes():
            block = torch.frombuffer(bytearray(packet + b"\0" * (-len(packet) % 8)), dtype=torch.float64)
        self._gloo.send_last(block, [leader for leader in self._others if leader not in lost])


class _Block:
    """Room for the block of a host, as bytes and as float64."""

    def __init__(self, ranks: int, length: int) -> None:
        raw = bytearray(max(ranks * 8 * (1 + length), _NUMBER.size + farewell.LIMIT + 1))
        self.bytes = memoryview(raw)
        with _torch.outside_modes():
            self.tensor: Tensor = torch.frombuffer(raw, dtype=torch.float64)


class _Room:
    """Where blocks go, for frames of up to ``length`` float64: one of each host on a leader, and all in one piece.

    The kernel gives memory to what is written only.
    """

    def __init__(self, hosts: dict[int, list[int]], size: int, length: int) -> None:
        self.length = length
        self.blocks = {leader: _Block(len(ranks), length) for leader, ranks in hosts.items()}
        self.all = memoryview(bytearray(max(size * 8 * (1 + length), farewell.LIMIT + 1)))


def _pack(frames: Frames, ranks: Sequence[int], lengths: Sequence[int], block: memoryview) -> int:
    """Write the block of these ranks; its size in bytes."""
    end = _NUMBER.size * len(ranks)
    struct.pack_into(f"<{len(ranks)}q", block, 0, *lengths)
    for rank, length in zip(ranks, lengths, strict=True):
        block[end : end + length] = frames.views[rank][:length]
        end += length
    return end


def _unpack(block: memoryview, ranks: Sequence[int], frames: Frames) -> int:
    """Read the block of these ranks; its size in bytes."""
    end = _NUMBER.size * len(ranks)
    for rank, length in zip(ranks, struct.unpack_from(f"<{len(ranks)}q", block), strict=True):
        frames.views[rank][:length] = block[end : end + length]
        end += length
    return end


def _size_of(block: memoryview, ranks: int) -> int:
    lengths = struct.unpack_from(f"<{ranks}q", block)
    return _NUMBER.size * ranks + sum(lengths)
