"""Frames to and from every rank of a group: over Unix sockets where both share a host, over gloo to the others.

In large groups, on the way through a leader of each host (``two_levels``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from syncbn import _torch
from syncbn.comm.board import share_boards
from syncbn.comm.frames import Frames
from syncbn.comm.gloo import Gloo
from syncbn.comm.handshake import Connection, all_of_host, connect_pairs
from syncbn.comm.polling import LATE
from syncbn.comm.post_mortem import PATIENCE, SECONDS, Note, culprits
from syncbn.comm.sockets import PeersLost, Sockets
from syncbn.comm.two_levels import TwoLevels, board_size, is_led, leader_or_all
from syncbn.comm.waiting import bury
from syncbn.wire import FRAME, HEAD

_MARGIN = 1.0
"""Seconds at most, of the group's timeout, that are left for a leader to say who did not come."""


class Lost(NamedTuple):
    """How an exchange failed.

    Attributes:
        reason: what is known of why.
        waited: seconds that this rank was in the exchange.
        missing: ranks that had not arrived.
    """

    reason: str
    waited: float
    missing: list[int]


class Carrier:
    """Swaps one frame with every rank of a group.

    In their first exchange the ranks find out together, over gloo, who is reached by socket; each pair agrees on it.
    ``SYNCBN_SOCKETS=off`` in the environment of a rank keeps it to gloo.

    Args:
        group: over gloo.
        device: by which its backend is found.
        levels: whether frames go through the leaders of hosts where the ranks are not all on one.
    """

    def __init__(self, group: Any, device: torch.device, levels: bool = False) -> None:
        self._group = weakref.ref(group)  # weak: links are kept per group
        self._rank: int = group.rank()
        self._size: int = group.size()
        self._timeout = _torch.timeout_of(group, device).total_seconds()
        self._gloo = Gloo(group, device)
        self._sockets: Sockets | None = None
        self._wanted = leader_or_all if levels else all_of_host
        self._levels: TwoLevels | None = None
        self._others: Sequence[int] = [rank for rank in range(self._size) if rank != self._rank]  # by gloo

    @property
    def by_socket(self) -> tuple[int, ...]:
        """The ranks that are reached by socket; known from the first exchange on."""
        return () if self._sockets is None else self._sockets.peers

    def swap(self, frames: Frames, length: int) -> Lost | None:
        """Send this rank's frame to every peer, and receive theirs; wait for all.

        Args:
            frames: has this rank's frame, and room for those of the others.
            length: of this rank's frame in float64.

        Returns:
            None, or how it failed; then the group cannot be used again.
        """
        started = time.monotonic()
        try:
            if self._sockets is None:
                self._connect()
            self._exchange(frames, length, started + self._timeout)
        except PeersLost as lost:
            waited = time.monotonic() - started
            missing = [rank for rank in sorted(lost.ranks) if rank != self._rank]
            if len(self.by_socket) < self._size - 1:  # there are others, whom the store reaches
                note = Note(absent=missing) if lost.expired else Note(gone=missing)
                missing = culprits(self._group(), note, PATIENCE if self._levels is None else 0.0)
            ranks = {rank: lost.ranks.get(rank, LATE) for rank in missing} or lost.ranks
            self.give_up(ranks, lost.timed_out)
            return Lost(str(PeersLost(ranks)), waited, missing)
        except BaseException as error:
            if not self._gloo.raised(error):
                bury(frames, self._gloo, self._group())
                raise
            waited = time.monotonic() - started
            broken, absent = self._gloo.missing()
            bury(frames, self._gloo)
            missing = culprits(self._group(), Note(broken=broken, absent=absent))
            self.give_up(dict.fromkeys(missing or [self._rank], str(error)))
            return Lost(str(error), waited, missing)
        return None

    def close(self, reason: str) -> None:
        """Tell the peers at the other ends of sockets that this rank is gone, and close these."""
        self.give_up({self._rank: reason})

    def give_up(self, lost: Mapping[int, str], timed_out: bool = False) -> None:
        """Tell the peers at the other ends of sockets that these ranks are lost, and why, and close these."""
        if self._sockets is not None:
            self._sockets.give_up(lost, timed_out)

    def _exchange(self, frames: Frames, length: int, deadline: float) -> None:
        sockets = self._sockets
        assert sockets is not None
        if self._levels is not None:
            margin = min(_MARGIN, self._timeout / 10)
            self._levels.swap(frames, length, deadline - margin, deadline, deadline + margin + SECONDS)
            return
        mine, theirs = frames.views[self._rank][: 8 * length], frames.of_peers(sockets.peers)
        if not self._others:
            sockets.swap(mine, theirs, deadline)
            return
        sockets.send(mine)
        self._start(frames, length)
        sockets.receive(theirs, deadline)
        self._gloo.wait(deadline)

    def _start(self, frames: Frames, length: int) -> None:
        rows = frames.tensor
        self._gloo.start(rows[self._rank, :length], {peer: rows[peer] for peer in self._others})

    def _connect(self) -> None:
        ends: dict[int, Connection] = {}
        board = None
        try:
            met = connect_pairs(self._rank, self._size, self._tell, self._wanted, ends)
            pairs = met.pairs
            led = self._wanted is leader_or_all and any(pairs) and is_led(met.hosts)
            if led:
                size = board_size(pairs, HEAD + FRAME)
                board, pairs = share_boards(self._rank, pairs, met.ends, self._tell, size)
        except BaseException:
            self._sockets = Sockets(self._rank, ends, alone=False)  # for whoever gives up to say why
            raise
        ends = {peer: end for peer, end in met.ends.items() if peer in pairs[self._rank]}
        for peer in set(met.ends) - set(ends):
            met.ends[peer].socket.close()
        self._sockets = Sockets(self._rank, ends, alone=len(ends) == self._size - 1)
        self._others = [rank for rank in self._others if rank not in ends]
        if led:
            self._levels = TwoLevels(self._rank, pairs, self._sockets, self._gloo, board, HEAD + FRAME)

    def _tell(self, record: bytes) -> list[bytes]:
        """Every rank's record, over gloo."""
        frames = Frames(self._size, -(-len(record) // 8))
        frames.views[self._rank][: len(record)] = record
        self._start(frames, frames.length)
        self._gloo.wait(time.monotonic() + self._timeout)
        return [bytes(view[: len(record)]) for view in frames.views]
