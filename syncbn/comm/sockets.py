"""Swap frames between the ranks of one host over Unix sockets: one write and one read for each peer.

Each pair of ranks has a connection of its own (see ``handshake``). A frame is a packet, or several: all but the last
carry a mark behind their data. A packet's length says what it is:

    0 mod 8: a frame, or the last part of one; 4 mod 8: a part, and a mark; odd: a farewell; none: the peer is gone.

A rank writes to all its peers without waiting, then reads from each. Unless too many ranks share a core, it
looks for a while before it sleeps, as a wake-up takes longer than a message, and lets others have the core in between.
A read blocks: that takes no time of a core. After ``PATIENCE`` seconds the reader looks at all its peers at once
(``polling``), so that it hears of one that died while it waits for another. As far as all goes smoothly, an exchange is
one call of compiled code (``packets.c``).

An exchange that does not end as it should on a rank ends all of that rank's connections: it tells its peers whom it
lost and why (``farewell``), and closes. So does a rank that is interrupted, drops the group, or exits. The kernel
closes for one that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from syncbn.comm import farewell, packets
from syncbn.comm.farewell import Farewell
from syncbn.comm.handshake import BUFFER, Connection, Tell, connect_pairs, is_of_kernel, pid_of_peer
from syncbn.comm.polling import LENGTH, READ_NOW, SEND_NOW, Rest

LOOKING = 300_000
"""Nanoseconds that a reader looks before it sleeps, and gives its core to others in between: some wake-ups long."""

PER_CORE = 4
"""Where there are more ranks than so many for each core, a reader does not look: they take turns too slowly."""

_FORKED = "this is a forked child, which cannot use its parent's connections; make a process group of its own"
_UNFINISHED = "it left an exchange unfinished"


class PeersLost(Exception):
    """An exchange could not be completed.

    Attributes:
        ranks: the ranks of the group that are to blame, and why. This rank may be among them.
        timed_out: whether they came too late, for this rank or for the one that told it.
        expired: whether for this rank. They may have lost others themselves, and not have said so yet.
    """

    def __init__(self, ranks: Mapping[int, str], timed_out: bool = False, expired: bool = False) -> None:
        super().__init__("; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(ranks.items())))
        self.ranks = dict(ranks)
        self.timed_out = timed_out
        self.expired = expired


class Sockets:
    """One rank's connections to those ranks of its group with which it shares a host.

    Each exchange is one ``send`` and one ``receive``, or both in a ``swap``. An exception out of any, of any kind,
    closes all connections, and the peers know; later calls raise ``PeersLost`` with the same ranks.

    Args:
        rank: of the group.
        connections: by rank.
        alone: whether the group has no other ranks. Else who comes too late may wait for one of these: it is left to
            the caller to find out, and to ``give_up``.

    Attributes:
        peers: the ranks of the group at the other ends, in order. Both ends agree on it.
    """

    def __init__(self, rank: int, connections: Mapping[int, Connection], alone: bool = True) -> None:
        self.peers = tuple(sorted(connections))
        self._alone = alone
        self._rank = rank
        self._ends = [connections[peer] for peer in self.peers]
        self._sends = [end.socket.send for end in self._ends]
        self._reads = [end.socket.recv_into for end in self._ends]
        self._looking = LOOKING if len(connections) < PER_CORE * len(_cores(self._ends)) else 0
        self._packet = min((end.packet for end in self._ends), default=0)
        self._packed = packets.pack([end.socket.fileno() for end in self._ends])
        self._in_use = False  # their descriptors, by ``swap``: not to be closed meanwhile, lest another file gets them
        self._frame: memoryview | None = None  # that of the exchange that is under way
        self._sent = 0  # to how many peers
        self._exchanges = 0
        self._dead: PeersLost | None = None
        _all.add(self)

    @classmethod
    def connect(cls, rank: int, size: int, tell: Tell) -> Sockets:
        """See ``connect_pairs``."""
        return cls(rank, connect_pairs(rank, size, tell).ends)

    def swap(self, frame: memoryview, buffers: list[memoryview], deadline: float) -> None:
        """``send`` and ``receive``, in one call of compiled code as far as all goes smoothly.

        Args:
            frame: as in ``send``.
            buffers, deadline: as in ``receive``.

        Raises:
            PeersLost: as in ``send`` and ``receive``.
        """
        swap = packets.swap
        if swap is None or len(frame) > self._packet or not buffers or len(buffers[0]) < farewell.LIMIT:
            self.send(frame)
            self.receive(buffers, deadline)
            return
        self._in_use = True
        try:
            if self._dead is not None or self._frame is not None:
                self._refuse()
            self._frame, self._sent = frame, 0
            course = swap(self._packed, frame, buffers, self._looking)
            if course is not None:
                self._sent, read, other = course
                self._complete(buffers, len(frame), read, other, deadline)
            self._frame = None
        except PeersLost:
            raise
        except BaseException as error:
            self._interrupt(error)
            raise
        finally:
            self._in_use = False
            if self._dead is not None:
                self._close()
        self._exchanges += 1

    def send(self, frame: memoryview) -> None:
        """Write ``frame`` to all peers, without waiting; what cannot be written now is left to ``receive``.

        Args:
            frame: bytes, in a multiple of 8, not empty. Must not change before ``receive`` returns.

        Raises:
            PeersLost: this rank's connections are closed already.
        """
        if self._dead is not None or self._frame is not None:
            self._refuse()
        self._frame = frame
        self._sent = 0
        try:
            if len(frame) <= self._packet:
                for send in self._sends:
                    send(frame, SEND_NOW)
                    self._sent += 1
        except BaseException as error:
            if not is_of_kernel(error):  # else full, or closed by the peer: receive() finds out
                self._interrupt(error)
                raise

    def receive(self, buffers: Sequence[memoryview], deadline: float, expected: int = 0) -> None:
        """Read the frame of each peer into its buffer.

        Args:
            buffers: bytes, in the order of ``peers``, each with room for the longest frame that may come.
            deadline: of the exchange, on the clock of ``time.monotonic``.
            expected: bytes that a peer's frame is likely to have; as many as this rank's where it is not given.

        Raises:
            PeersLost: a peer is not there any more, or its frame has not come by the deadline.
        """
        if self._dead is not None or self._frame is None:
            self._refuse()
        self._finish(buffers, expected or len(self._frame), deadline)
        self._exchanges += 1

    def collect(self, buffers: Sequence[memoryview], deadline: float, expected: int) -> list[int]:
        """Read the frame of each peer, where they wait for an answer to it: ``deliver``. The two are one exchange.

        Args:
            buffers, deadline, expected: as in ``receive``.

        Returns:
            Bytes of each frame.

        Raises:
            PeersLost: as in ``receive``.
        """
        if self._dead is not None or self._frame is not None:
            self._refuse()
        self._frame, self._sent = memoryview(b""), len(self._ends)
        return self._finish(buffers, expected, deadline)

    def deliver(self, frame: memoryview, deadline: float) -> None:
        """Write ``frame`` to all peers, and wait until it is written.

        Args:
            frame: bytes, in a multiple of 8, not empty.
            deadline: as in ``receive``.

        Raises:
            PeersLost: as in ``receive``.
        """
        self.send(frame)
        self._finish(None, 0, deadline)
        self._exchanges += 1

    def close(self, reason: str) -> None:
        """Tell the peers that this rank leaves, and why, and close all connections. The second time, nothing."""
        self.give_up({self._rank: reason})

    def give_up(self, lost: Mapping[int, str], timed_out: bool = False) -> None:
        """Tell the peers that these ranks are lost, and why, and close all connections. The second time, nothing.

        For ranks that this one lost in some other way; an exchange cannot be completed without them.
        """
        if self._dead is not None:
            return
        reasons = {rank: farewell.clean(reason, farewell.LIMIT) for rank, reason in lost.items()}
        self._dead = PeersLost(reasons, timed_out)
        try:
            last = farewell.encode(Farewell(reasons, timed_out, self._exchanges))
            for end in self._ends:
                _say(end.socket, last)
        finally:
            self._close()

    def _finish(self, buffers: Sequence[memoryview] | None, expected: int, deadline: float) -> list[int]:
        """Write what is left of the frame, and read a frame of each peer if there are buffers; bytes of each."""
        try:
            read, other = (len(self._ends), -1) if buffers is None else self._read_each(buffers, expected)
            lengths = self._complete(buffers or (), expected, read, other, deadline)
        except PeersLost:
            raise
        except BaseException as error:
            self._interrupt(error)
            raise
        self._frame = None
        return lengths

    def _complete(
        self, buffers: Sequence[memoryview], expected: int, read: int, other: int, deadline: float
    ) -> list[int]:
        """The rest of an exchange, if there is one, after so many frames of that length were read; bytes of each.

        Args:
            other: length of a packet that was read from the next peer as well, or -1.
        """
        count = len(self._ends)
        if read == count and self._sent == count:
            return [expected] * count
        assert self._frame is not None
        rest = Rest(self.peers, self._ends, self._frame, buffers, self._exchanges)
        rest.run(self._sent, read, other, deadline)
        if rest.lost and rest.expired and not self._alone:
            raise PeersLost(rest.lost, True, expired=True)
        if rest.lost:
            self.give_up(rest.lost, rest.timed_out)
            self._refuse()
        return [expected] * read + [rest.lengths[place] for place in range(read, count)]

    def _read_each(self, buffers: Sequence[memoryview], length: int) -> tuple[int, int]:
        """Read one packet of each peer, as long as they come and have this length.

        Returns:
            How many peers' packets are read, and the length of one more, of another length; -1 if there is none.
        """
        done = 0
        if self._sent < len(self._ends) or (buffers and len(buffers[0]) < farewell.LIMIT):  # would cut a farewell
            return 0, -1
        try:
            for read, buffer in zip(self._reads, buffers, strict=True):
                got = _read_soon(read, buffer, self._looking)
                if got != length:
                    return done, got
                done += 1
        except OSError as error:
            if not is_of_kernel(error):  # else nothing came for a while, or the peer closed
                raise
        return done, -1

    def _refuse(self) -> NoReturn:
        if self._dead is None:
            self.close(_UNFINISHED)
        assert self._dead is not None
        raise PeersLost(self._dead.ranks, self._dead.timed_out)

    def _interrupt(self, error: BaseException) -> None:
        self.close(f"it was interrupted by {farewell.describe(error)}")

    def _close(self) -> None:
        if self._in_use:  # by another thread, which finds them shut down, and closes them
            return
        for end in self._ends:
            end.socket.close()

    def _forget(self) -> None:
        """Leave the connections to the parent, in a forked child."""
        self._in_use = False  # by a thread that the child does not have
        if self._dead is None:
            self._dead = PeersLost({self._rank: _FORKED}, False)
            self._close()

    def __del__(self) -> None:
        if hasattr(self, "_dead"):
            self.close("it dropped the group")


def _cores(ends: Sequence[Connection]) -> set[int]:
    """The cores that this rank and its peers may use. A peer in another process namespace counts for none."""
    cores = os.sched_getaffinity(0)
    for end in ends:
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(pid_of_peer(end.socket))
    return cores


def _read_soon(read: Callable[..., int], buffer: memoryview, looking: int) -> int:
    """Length of the next packet: look for so many nanoseconds whether it is there, then sleep until it comes."""
    enough = time.monotonic_ns() + looking if looking else 0
    while looking and time.monotonic_ns() < enough:
        try:
            return read(buffer, 0, READ_NOW) or _read_again(read, buffer)
        except BlockingIOError as error:
            if not is_of_kernel(error):
                raise
            os.sched_yield()
    return read(buffer, 0, LENGTH) or _read_again(read, buffer)


def _read_again(read: Callable[..., int], buffer: memoryview) -> int:
    """Length of the next packet after the kernel said that the peer has closed.

    It looks for a packet first, and then whether the peer has closed: one that sent its packet and closed in between
    seems to have sent nothing. So its end is believed when it is told twice.
    """
    return read(buffer, 0, READ_NOW)


def _say(end: socket.socket, last: bytes) -> None:
    """Send a peer the last packet, and wake it."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # for a peer that has not read for a while
        end.send(last, SEND_NOW)
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


_all: weakref.WeakSet[Sockets] = weakref.WeakSet()


def _leave() -> None:
    """Say farewell on all connections of this process, which ends."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # its name before Python 3.12
    reason = "its process ended" + (f" with {farewell.describe(error)}" if error is not None else "")
    for sockets in list(_all):
        sockets.close(reason)


def _forget_all() -> None:
    for sockets in list(_all):
        sockets._forget()


atexit.register(_leave)
os.register_at_fork(after_in_child=_forget_all)
