"""Frames by way of a leader on each host: the ranks' to it, a host's to every other leader, and back to all ranks.

Three steps one after the other, however many ranks there are. A host's leader is its lowest rank. Its ranks reach it by
Unix socket; leaders reach each other over gloo, in one hop. Who has no connection to the leader of its host is its own.

A block is what leaders swap: the length in bytes of each rank's frame as int64, then the frames, in rank order. So are
frames of different lengths, of ranks that make different calls, seen by everybody. The blocks of all hosts lie on the
leader's board (``board``), where its ranks read them when it says so. Nobody writes there before all ranks of the host
have read: they have when they send their next frame. A leader that cannot go on sends a farewell as its block, behind
its length as a negative number.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

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
_READY = memoryview(b"sbnReady")


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


def hosts_of(pairs: Sequence[set[int]]) -> dict[int, list[int]]:
    """The ranks of each host, by its leader, in rank order; from the ranks to which each is connected."""
    hosts: dict[int, list[int]] = {}
    for each, peers in enumerate(pairs):
        hosts.setdefault(min(peers | {each}), []).append(each)
    return hosts


def board_size(pairs: Sequence[set[int]], length: int) -> int:
    """Bytes of a board with a block of each host, for frames of so many float64. The kernel gives what is written."""
    return sum(_block_size(len(ranks), length) for ranks in hosts_of(pairs).values())


def _block_size(ranks: int, length: int) -> int:
    return max(ranks * 8 * (1 + length), _NUMBER.size + farewell.LIMIT + 1)


class TwoLevels:
    """One rank's part in the exchanges of a group whose hosts have leaders.

    Args:
        rank: of the group.
        pairs: the ranks to which each rank has a connection.
        sockets: this rank's connections.
        gloo: of the group.
        board: of this rank's host, of ``board_size`` bytes; None for a rank that leads itself alone.
        length: float64 that fit a frame on the board. Longer frames go in parts.
    """

    def __init__(
        self,
        rank: int,
        pairs: Sequence[set[int]],
        sockets: Sockets,
        gloo: Gloo,
        board: memoryview | None,
        length: int,
    ) -> None:
        self._rank = rank
        self._sockets, self._gloo = sockets, gloo
        self._hosts = hosts_of(pairs)
        self._leads = rank in self._hosts
        self._others = [leader for leader in self._hosts if leader != rank]
        self._length = length
        whole = board if board is not None else memoryview(bytearray(board_size(pairs, length)))
        self._blocks: dict[int, memoryview] = {}
        end = 0
        for leader, ranks in self._hosts.items():
            start, end = end, end + _block_size(len(ranks), length)
            self._blocks[leader] = whole[start:end]
        self._word = memoryview(bytearray(farewell.LIMIT + 1))  # of the leader

    @functools.cached_property
    def _tensors(self) -> dict[int, Tensor]:
        """The blocks as float64, on a leader."""
        with _torch.outside_modes():
            return {leader: torch.frombuffer(block, dtype=torch.float64) for leader, block in self._blocks.items()}

    def swap(self, frames: Frames, length: int, collected: float, deadline: float, answered: float) -> None:
        """Send this rank's frame to all, and receive theirs.

        Args:
            frames: has this rank's frame, and room for those of the others.
            length: of this rank's frame in float64; the same on all ranks if it is more than fits the board.
            collected: when a leader stops waiting for the ranks of its host, on the clock of ``time.monotonic``; so
                that its word of who did not come reaches the other leaders by the deadline.
            deadline: of the exchange.
            answered: when a rank stops waiting for its leader, who may have to find out who did not come.

        Raises:
            PeersLost: a rank is not there any more, or has not come by the deadline.
            RuntimeError: whatever gloo finds wrong.
        """
        for start in range(0, length, self._length):
            part = min(length - start, self._length)
            whole = frames.length <= self._length
            rows = frames.views if whole else [view[8 * start : 8 * (start + part)] for view in frames.views]
            if not self._leads:
                self._follow(rows, part, answered)
                continue
            try:
                self._lead(rows, part, collected, deadline)
            except BaseException as error:
                bury(self._blocks, self._gloo)  # gloo may still write there, and read
                self._tell_leaders(error)
                raise

    def _follow(self, rows: Sequence[memoryview], length: int, deadline: float) -> None:
        self._sockets.send(rows[self._rank][: 8 * length])
        self._sockets.receive([self._word], deadline, len(_READY))
        for leader, ranks in self._hosts.items():
            _unpack(self._blocks[leader], ranks, rows)

    def _lead(self, rows: Sequence[memoryview], length: int, collected: float, deadline: float) -> None:
        mine = self._hosts[self._rank]
        lengths = [8 * length]
        if len(mine) > 1:
            lengths += self._sockets.collect([rows[peer] for peer in self._sockets.peers], collected, 8 * length)
        size = _pack(rows, mine, lengths, self._blocks[self._rank])
        if self._others:
            tensors = self._tensors
            self._gloo.start(tensors[self._rank][: size // 8], {leader: tensors[leader] for leader in self._others})
            self._gloo.wait(deadline, self._hear)  # who gave up does not take this rank's block
        if len(mine) > 1:
            self._sockets.deliver(_READY, deadline)
        for leader in self._others:
            _unpack(self._blocks[leader], self._hosts[leader], rows)

    def _hear(self) -> None:
        """Raise what leaders say in place of their blocks."""
        lost: dict[int, str] = {}
        timed_out = False
        for leader in self._others:
            block = self._blocks[leader]
            (size,) = _NUMBER.unpack_from(block)
            if size < 0:
                said = farewell.decode(bytes(block[_NUMBER.size : _NUMBER.size - size]))
                lost |= said.lost if said is not None else {leader: "it sent bytes that are no message"}
                timed_out |= said is not None and said.timed_out
        if lost:
            raise PeersLost(lost, timed_out)

    def _tell_leaders(self, error: BaseException) -> None:
        """Send the other leaders a farewell, for this exchange or, if they have this one's block, for the next."""
        if self._gloo.raised(error):
            return  # the other leaders see for themselves
        timed_out = False
        if isinstance(error, PeersLost):
            lost, timed_out = error.ranks, error.timed_out
        else:
            lost = {self._rank: f"it was interrupted by {farewell.describe(error)}"}
        last = farewell.encode(Farewell(lost, timed_out, 0))
        packet = _NUMBER.pack(-len(last)) + last
        with _torch.outside_modes():
            block = torch.frombuffer(bytearray(packet + b"\0" * (-len(packet) % 8)), dtype=torch.float64)
        self._gloo.send_last(block, [leader for leader in self._others if leader not in lost])


def _pack(rows: Sequence[memoryview], ranks: Sequence[int], lengths: Sequence[int], block: memoryview) -> int:
    """Write the block of these ranks; its size in bytes."""
    end = _NUMBER.size * len(ranks)
    struct.pack_into(f"<{len(ranks)}q", block, 0, *lengths)
    for rank, length in zip(ranks, lengths, strict=True):
        block[end : end + length] = rows[rank][:length]
        end += length
    return end


def _unpack(block: memoryview, ranks: Sequence[int], rows: Sequence[memoryview]) -> None:
    """Read the block of these ranks."""
    end = _NUMBER.size * len(ranks)
    for rank, length in zip(ranks, struct.unpack_from(f"<{len(ranks)}q", block), strict=True):
        rows[rank][:length] = block[end : end + length]
        end += length
