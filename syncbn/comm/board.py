"""Memory that the leader of a host writes and its ranks read: so it need not send each of them everything.

It has no name anywhere: the leader hands its descriptor to its ranks over their Unix sockets.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping, Sequence

from syncbn.comm.handshake import Connection, Tell, attempt

_HANDED = b"sbnBoard"
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def share_boards(
    rank: int, pairs: Sequence[set[int]], ends: Mapping[int, Connection], tell: Tell, size: int
) -> tuple[memoryview | None, list[set[int]]]:
    """A board for each host.

    Args:
        rank: of the group.
        pairs: the ranks to which each rank is connected; the lowest of a host leads it.
        ends: this rank's connections.
        tell: gives a record to all ranks and returns all ranks' records, in rank order.
        size: bytes of a board.

    Returns:
        That of this rank's host, writable on its leader; None if it has none. And the pairs again, without those of
        hosts where it could not be had; the same on all ranks.

    Raises:
        Whatever ``tell`` raises.

    Collectives:
        ``tell`` twice.
    """
    leader = min(pairs[rank] | {rank})
    board: memoryview | None = None
    ready = not pairs[rank]
    if pairs[rank] and leader == rank:
        with attempt():
            board = _hand_out(list(ends.values()), size)
            ready = True
    tell(bytes([ready]))
    if pairs[rank] and leader != rank:
        with attempt():
            board = _take(ends[leader].socket, size)
            ready = True
    told = [record[0] for record in tell(bytes([ready]))]
    works = [all(told[other] for other in peers | {each}) for each, peers in enumerate(pairs)]
    leaders = [min(peers | {each}) for each, peers in enumerate(pairs)]
    kept = [peers if works[leaders[each]] else set() for each, peers in enumerate(pairs)]
    return board if kept[rank] else None, kept


def _hand_out(ends: Sequence[Connection], size: int) -> memoryview:
    descriptor = os.memfd_create("syncbn", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        board = memoryview(mmap.mmap(descriptor, size))
        for end in ends:
            socket.send_fds(end.socket, [_HANDED], [descriptor], _NOW)
    finally:
        os.close(descriptor)
    return board


def _take(end: socket.socket, size: int) -> memoryview:
    """What the leader has handed out by now."""
    said, descriptors, _, _ = socket.recv_fds(end, len(_HANDED), 1, _NOW | socket.MSG_CMSG_CLOEXEC)
    try:
        if said != _HANDED or len(descriptors) != 1 or os.fstat(descriptors[0]).st_size != size:
            raise OSError("the leader of this host has no memory to share")
        return memoryview(mmap.mmap(descriptors[0], size, prot=mmap.PROT_READ))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
