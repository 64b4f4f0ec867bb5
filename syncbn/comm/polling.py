"""The rest of an exchange over sockets that does not go smoothly: all peers at once, as they are ready."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from syncbn.comm import farewell
from syncbn.comm.farewell import Farewell
from syncbn.comm.handshake import PATIENCE, Connection, is_of_kernel

LATE = "it did not come in time"

GRACE = PATIENCE / 2
"""Seconds until a peer that closed without a word, after its frame was read, is lost to that exchange."""

SEND_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
LENGTH = socket.MSG_TRUNC  # a read returns the length of the packet, also of one that is longer than the buffer
READ_NOW = socket.MSG_DONTWAIT | LENGTH
_MARK = b"more"
_LONGEST = 3600.0  # seconds: poll() takes no infinity
_KILLED = "its process ended without a word: it was killed, or it crashed"


class Rest:
    """The rest of an exchange: writes to and reads from all peers at once, as they are ready.

    Peers are numbered by their place in ``ends``.

    Attributes:
        lost: ranks that are to blame for the end of the exchange, and why.
        timed_out: whether they came too late.
        expired: whether they are just those who have not come by the deadline.
        lengths: bytes of the frames that were read here.
    """

    def __init__(
        self,
        peers: Sequence[int],
        ends: Sequence[Connection],
        frame: memoryview,
        buffers: Sequence[memoryview],
        exchanges: int,
    ) -> None:
        self.lost: dict[int, str] = {}
        self.timed_out = self.expired = False
        self.lengths: dict[int, int] = {}
        self._peers, self._ends, self._frame, self._buffers = peers, ends, frame, buffers
        self._exchanges = exchanges
        self._unsent: dict[int, int] = {}  # bytes written so far
        self._unread: dict[int, int] = {}  # bytes read so far
        self._closed: set[int] = set()  # closed by the peer before all was written to it
        self._silent: dict[int, float] = {}  # closed without a word after its frame was read: when that is a loss
        self._spill = bytearray(farewell.LIMIT)
        self._poll = select.poll()

    def run(self, sent: int, read: int, other: int, deadline: float) -> None:
        """Go on after so many peers were written to and read from, in order.

        Args:
            other: length of a packet that was read from the next peer as well, or -1.
        """
        count = len(self._ends)
        self._unsent = dict.fromkeys(range(sent, count), 0)
        self._unread = dict.fromkeys(range(read, count), 0)
        if other >= 0:
            self._take(read, other, self._buffers[read])
        places = {end.socket.fileno(): place for place, end in enumerate(self._ends)}
        for place in range(count):
            self._watch(place)
        while (self._unsent or self._unread) and not self.lost:
            # Of several, some may wait for another in the exchange before. Their time is over, too: they will say so.
            end = deadline + (GRACE if len(self._unsent | self._unread) > 1 else 0.0)
            wait = min([end, *self._silent.values()]) - time.monotonic()
            ready = self._poll.poll(min(max(0.0, wait), _LONGEST) * 1000)
            for number, events in ready:
                self._serve(places[number], events)
            if not ready:
                self._expire(end)

    def _watch(self, place: int) -> None:
        """A peer that has done its part is watched for its end only; one of whose end it is known, no more."""
        wanted = select.POLLIN if place in self._unread else select.POLLRDHUP
        if place in self._unsent:
            wanted |= select.POLLOUT
        self._poll.register(self._ends[place].socket, wanted)

    def _serve(self, place: int, events: int) -> None:
        if place in self._unsent and events & select.POLLOUT:
            self._write(place)
        ended = bool(events & ~select.POLLOUT)
        if place in self._unread and ended:
            self._read(place)
            ended = False
        if place not in self._unread and (ended or place in self._closed):
            self._part(place)
        else:
            self._watch(place)

    def _write(self, place: int) -> None:
        """Write to a peer until its buffer is full."""
        end = self._ends[place]
        start = self._unsent[place]
        try:
            while len(self._frame) - start > end.packet:
                part = end.packet // 16 * 8  # small parts leave room for a farewell
                end.socket.sendmsg([self._frame[start : start + part], _MARK], (), SEND_NOW)
                start += part
            end.socket.send(self._frame[start:], SEND_NOW)
            del self._unsent[place]
        except BlockingIOError as error:
            if not is_of_kernel(error):
                raise
            self._unsent[place] = start
        except OSError as error:
            if not is_of_kernel(error):
                raise
            del self._unsent[place]
            self._closed.add(place)

    def _read(self, place: int) -> None:
        rest = self._buffers[place][self._unread[place] :]
        length = self._get(place, [rest, self._spill])
        if length >= 0:
            self._take(place, length, rest)

    def _get(self, place: int, buffers: Sequence[memoryview | bytearray], flags: int = READ_NOW) -> int:
        """Length of the next packet from a peer; 0 if it closed, which is told twice, -1 if there is none yet."""
        read = self._ends[place].socket.recvmsg_into
        while True:
            try:
                return read(buffers, 0, flags)[0] or read(buffers, 0, flags)[0]  # as in sockets._read_again
            except OSError as error:
                if not is_of_kernel(error):
                    raise
                if isinstance(error, BlockingIOError):
                    return -1
                if not isinstance(error, ConnectionResetError):  # said once, before what the peer had sent
                    return 0

    def _take(self, place: int, length: int, data: memoryview) -> None:
        """Account for a packet: its bytes are in ``data``, and in the spill what does not fit there."""
        if length == 0:
            self._lose(place, _KILLED)
        elif length % 2:
            self._hear(place, farewell.decode((bytes(data[:length]) + self._spill)[:length]))
        else:
            marked = length % 8 == len(_MARK)
            size = length - len(_MARK) if marked else length
            if size > len(data):
                self._lose(place, f"it sent {length} bytes where {len(data)} were awaited")
            elif marked:
                self._unread[place] += size
            else:
                self.lengths[place] = self._unread.pop(place) + size

    def _part(self, place: int) -> None:
        """Look why a peer closed whose frame was read: it may have completed the exchange and left."""
        self._poll.unregister(self._ends[place].socket)
        closed = place in self._closed
        length = self._get(place, [self._spill], READ_NOW | socket.MSG_PEEK)
        if length % 2 and length > 0:
            said = farewell.decode(bytes(self._spill[:length]))
            if closed or said is None or said.exchanges <= self._exchanges:
                self._hear(place, said)
        elif closed:
            self._lose(place, _KILLED)
        elif length == 0:
            self._silent[place] = time.monotonic() + GRACE
        # Else there is a frame of the next exchange: it completed this one.

    def _hear(self, place: int, said: Farewell | None) -> None:
        if said is None:
            self._lose(place, "it sent bytes that are no message")
        else:
            self.lost |= said.lost
            self.timed_out |= said.timed_out

    def _lose(self, place: int, reason: str) -> None:
        self.lost.setdefault(self._peers[place], reason)

    def _expire(self, deadline: float) -> None:
        now = time.monotonic()
        for place, end in self._silent.items():
            if now >= end:
                self._lose(place, _KILLED)
        if now >= deadline and not self.lost:
            self.timed_out = self.expired = True
            for place in self._unsent | self._unread:
                self._lose(place, LATE)
