"""Connect the ranks of a group that run on one host, pair by pair, over Unix sockets.

All ranks make the same four rounds of ``tell``, whatever fails on them, so that nobody waits for a connection that
never comes:

1. each says on which host it is, under which name it listens, and its part of the group's token;
2. the higher rank of each pair has connected to the lower one, and sent the token and a nonce; it says to whom;
3. the lower one has taken the connections that are there by now, and answered the nonce; it says whose;
4. the higher one has read the answer; it says whose. A pair that got so far is connected, and both know it.

Names are random and in Linux's abstract namespace: nothing lies in the file system, and a name ends with its socket.
Whoever else connects has another uid, or does not know the token, which travels over the group itself; it is dropped
without a wait. Nothing listens after the last round.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import resource
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

SWITCH = "SYNCBN_SOCKETS"
"""Name of the environment variable that keeps a rank off sockets, with the value ``off``. Ranks may differ."""

PACKET = 128 + 16384 * 8 + 4
"""Bytes of the longest packet: the longest first frame, and room for a mark."""

BUFFER = 212992
"""Bytes of a socket's send buffer to ask for, Linux's limit where nobody changed it. The kernel gives the double."""

PATIENCE = 0.1
"""Seconds that a read blocks before the reader looks at its other peers."""

Tell = Callable[[bytes], Sequence[bytes]]
Host = tuple[bytes, int, int]
"""Boot id, and device and inode of the network namespace."""
Wanted = Callable[[int, Sequence[Host | None]], set[int]]

_ABOUT = struct.Struct("<?36sQQ16s16s")
_HELLO = struct.Struct("<4s16sII16s")
_ANSWER = struct.Struct("<4s16s")
_CREDENTIALS = struct.Struct("iII")
_SYSTEM_CALLS = (__name__, "syncbn.comm.sockets", "syncbn.comm.polling", "syncbn.comm.board", "socket")
_STRANGERS = 64  # connections of others that fit the listener's queue


class Connection(NamedTuple):
    """One rank's end of a connected pair.

    Attributes:
        socket: blocks for ``PATIENCE`` seconds in a read.
        packet: bytes of the longest packet to send.
    """

    socket: socket.socket
    packet: int


class Met(NamedTuple):
    """What ranks know after a handshake.

    Attributes:
        ends: this rank's connections by rank.
        pairs: the ranks to which each rank is connected; the same on all ranks.
        hosts: of all ranks, None for one that stays off sockets; the same on all ranks.
    """

    ends: dict[int, Connection]
    pairs: list[set[int]]
    hosts: list[Host | None]


class _About(NamedTuple):
    """What a rank says of itself in the first round."""

    listens: bool
    boot: bytes
    device: int
    inode: int
    name: bytes
    secret: bytes

    def host(self) -> Host:
        return self.boot, self.device, self.inode


def all_of_host(rank: int, hosts: Sequence[Host | None]) -> set[int]:
    """The other ranks on the host of a rank."""
    mine = hosts[rank]
    return {other for other, host in enumerate(hosts) if mine is not None and host == mine and other != rank}


def connect_pairs(
    rank: int, size: int, tell: Tell, wanted: Wanted = all_of_host, ends: dict[int, Connection] | None = None
) -> Met:
    """Connections to ranks of this host, as far as both ends agree.

    Args:
        rank, size: in the group.
        tell: gives a record to all ranks and returns all ranks' records, of one length, in rank order.
        wanted: the ranks of its host with which a rank wants a connection, from the hosts of all ranks (None for one
            that stays off sockets). Both ends must want it.
        ends: where connections are put as they are made. If ``tell`` raises, they are left to the caller to close: a
            peer that has come further uses them already, and wants to hear why.

    Returns:
        What came of it; no connections if none can be had, and nothing is raised for that.

    Raises:
        Whatever ``tell`` raises.

    Collectives:
        ``tell`` once if no two ranks share a host, else four times.
    """
    handshake = _Handshake(rank, size, tell, wanted, {} if ends is None else ends)
    try:
        pairs = handshake.run()
    except BaseException:
        handshake.close_others(ends or {})
        raise
    kept = {peer: handshake.ends[peer] for peer in sorted(pairs[rank])}
    handshake.close_others(kept)
    return Met(kept, pairs, handshake.hosts)


class _Handshake:
    def __init__(self, rank: int, size: int, tell: Tell, wanted: Wanted, ends: dict[int, Connection]) -> None:
        self._rank, self._size, self._tell, self._wanted = rank, size, tell, wanted
        self.hosts: list[Host | None] = []
        self.ends = ends
        self._opened: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._token = b""
        self._nonces: dict[int, bytes] = {}

    def run(self) -> list[set[int]]:
        """The ranks to which each rank is connected."""
        me = self._listen()
        ranks = [_About(*_ABOUT.unpack(record)) for record in self._tell(_ABOUT.pack(*me))]
        self.hosts = [about.host() if about.listens else None for about in ranks]
        pairs: list[set[int]] = [set() for _ in ranks]
        known = [host for host in self.hosts if host is not None]
        if len(set(known)) == len(known):
            return pairs
        self._token = hashlib.sha256(b"".join(about.secret for about in ranks)).digest()[:16]
        if me.listens:
            self._connect([r for r in sorted(self._wanted(self._rank, self.hosts)) if r < self._rank], ranks)
        connected = self._tell_ranks(self._nonces)
        self._accept([r for r in range(self._rank + 1, self._size) if self._rank in connected[r]])
        accepted = self._tell_ranks(set(self.ends) - set(self._nonces))
        confirmed = self._tell_ranks(r for r in self._nonces if self._rank in accepted[r] and self._is_answered(r))
        for higher, lowers in enumerate(confirmed):
            pairs[higher] |= lowers
            for lower in lowers:
                pairs[lower].add(higher)
        return pairs

    def close_others(self, ends: Mapping[int, Connection]) -> None:
        kept = [end.socket for end in ends.values()]
        for opened in self._opened:
            if opened not in kept:
                opened.close()

    def _tell_ranks(self, ranks: Iterable[int]) -> list[set[int]]:
        """Give all ranks a set of ranks; each one's set."""
        mask = sum(1 << rank for rank in ranks)
        masks = self._tell(mask.to_bytes(self._size // 8 + 1, "little"))
        bits = [int.from_bytes(mask, "little") for mask in masks]
        return [{rank for rank in range(self._size) if bit >> rank & 1} for bit in bits]

    def _listen(self) -> _About:
        name, secret = secrets.token_bytes(16), secrets.token_bytes(16)
        me = _About(False, b"", 0, 0, name, secret)
        with attempt():
            if os.environ.get(SWITCH, "").lower() == "off":  # another value is refused by way of this very connection
                return me
            boot, device, inode = this_host()
            self._listener = self._socket()
            self._listener.bind(_address(name))
            self._listener.listen(self._size + _STRANGERS)
            me = _About(True, boot, device, inode, name, secret)
        return me

    def _connect(self, lower: Sequence[int], ranks: Sequence[_About]) -> None:
        for other in lower:
            with attempt():
                end = self._socket()
                end.connect(_address(ranks[other].name))
                if _uid(end) != os.geteuid():
                    continue
                packet = _prepare(end)
                nonce = secrets.token_bytes(16)
                end.send(_HELLO.pack(b"sbnH", self._token, self._rank, other, nonce), socket.MSG_NOSIGNAL)
                self.ends[other] = Connection(end, packet)
                self._nonces[other] = nonce

    def _accept(self, expected: Sequence[int]) -> None:
        """Take the connections that are there; those of peers are among the first that the queue can hold."""
        if self._listener is None:
            return
        with attempt():  # ends when there are no more, or no descriptor is left
            for _ in range(self._size + _STRANGERS + 1):
                end = self._listener.accept()[0]
                self._opened.append(end)
                with attempt():
                    self._welcome(end, expected)

    def _welcome(self, end: socket.socket, expected: Sequence[int]) -> None:
        end.setblocking(False)
        _check_room(end)
        hello = end.recv(_HELLO.size + 1) if _uid(end) == os.geteuid() else b""
        if len(hello) == _HELLO.size:
            magic, token, other, target, nonce = _HELLO.unpack(hello)
            known = magic == b"sbnH" and hmac.compare_digest(token, self._token) and target == self._rank
            if known and other in expected and other not in self.ends:
                packet = _prepare(end)
                end.send(_ANSWER.pack(b"sbnA", nonce), socket.MSG_NOSIGNAL)
                self.ends[other] = Connection(end, packet)
                return
        end.close()

    def _is_answered(self, other: int) -> bool:
        answer = b""
        with attempt():
            answer = self.ends[other].socket.recv(_ANSWER.size + 1, socket.MSG_DONTWAIT)
        return hmac.compare_digest(answer, _ANSWER.pack(b"sbnA", self._nonces[other]))

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._opened.append(made)
        made.setblocking(False)
        _check_room(made)
        return made


def chosen() -> str:
    """``SYNCBN_SOCKETS`` in the environment: ``on`` (default) or ``off``.

    Raises:
        ValueError: anything else.
    """
    value = os.environ.get(SWITCH, "").lower() or "on"
    if value not in ("on", "off"):
        raise ValueError(f"the environment variable {SWITCH} must be on or off, got {value!r}")
    return value


def this_host() -> Host:
    """The host that this thread is on: two are one if they were booted together and share a network."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        boot = file.read().strip()
    space = os.stat("/proc/thread-self/ns/net")
    return boot, space.st_dev, space.st_ino


@contextlib.contextmanager
def attempt() -> Iterator[None]:
    """Leave the block where a system call fails: a pair that cannot be connected goes without."""
    try:
        yield
    except OSError as error:
        if not is_of_kernel(error):
            raise


def _address(name: bytes) -> bytes:
    return b"\0syncbn-" + name.hex().encode()


def _check_room(made: socket.socket) -> None:
    """Leave half of the descriptors to others; the kernel numbers them from below."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and made.fileno() >= limit // 2:
        raise OSError(errno.EMFILE, "half of the descriptors are in use")


def pid_of_peer(end: socket.socket) -> int:
    """Of who connected to, or listens at, the other end; 0 in a process namespace that is not seen from here."""
    return _credentials(end)[0]


def _uid(end: socket.socket) -> int:
    """Of who connected to, or listens at, the other end."""
    return _credentials(end)[1]


def _credentials(end: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def _prepare(end: socket.socket) -> int:
    """Set the buffer and the timeout of a connection; bytes of the longest packet to send.

    The buffer takes two packets, one of the next exchange, without waiting. A third of what the kernel would give is
    left for a farewell.
    """
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    room = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room // 2 * 7 // 10)
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(PATIENCE * 1e6)))
    return min(PACKET, room // 3)


def is_of_kernel(error: BaseException) -> bool:
    """Whether a system call failed, and not the handler of a signal that came meanwhile.

    Handlers raise what they like, a TimeoutError for instance, which is an OSError too. The frame tells them apart.
    """
    if not isinstance(error, OSError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_globals.get("__name__") in _SYSTEM_CALLS
