"""Take a small float64 message over a process group, by the cheapest way for its backend and size.

The process group of torch.distributed is the only abstraction. A ``Link`` is what this rank keeps per group: buffers,
the number of exchanges made, and whether the group is still alive. Two ways:

* ``OneHop`` (gloo, up to ``ONE_HOP_LIMIT`` ranks): send to and receive from every peer under a reserved tag. One
  network hop instead of the 2(W-1) of gloo's ring; each peer's header is seen, so that ranks in different calls get an
  error that names both sides; a peer in some other collective gives a timeout and never mixed numbers.
* ``AllReduce`` (NCCL, MPI, larger worlds): one all-reduce, with check slots in the message.

Both give equal bits on all ranks. ``SYNCBN_CHECKS`` in the environment: ``on`` (default), ``off`` (headers still
travel, and only refusals are heard; may differ between ranks), ``sync`` (as on, and wait for a device to check in the
same call).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import header
from syncbn.groups import group_ranks
from syncbn.header import Call, PeerLostError, RankMismatchError

ONE_HOP_LIMIT = 32
"""World size above which gloo groups use one all-reduce instead of a message to every peer.

Not where the all-reduce gets quicker: measured up to 32 ranks, it takes 1.9 (W = 2) to 4.1 times (W = 32) as long. The
limit bounds the receive buffers, 131 kB a peer, and how many peers send to a rank at once (docs/transports.md).
"""

TAG = 0x53424E
"""Tag of our messages between two ranks ("SBN"): gloo keeps messages of different tags apart."""

_FRAME = 16384
"""Widest payload, in float64, of a first message; what is wider follows once all headers agree."""

_HEAD = header.SIZE // 8

_POST_MORTEM = 0.5  # seconds that a rank waits, after a failure, to hear which others are left

_checks = os.environ.get("SYNCBN_CHECKS", "on").lower()
if _checks not in ("on", "off", "sync"):
    raise ValueError(f"SYNCBN_CHECKS must be on, off or sync, got {_checks!r}")
_forced = 0  # how many are within forced(): ranks may be threads of one process
_forced_lock = threading.Lock()
_graveyard: list[Any] = []  # buffers that a lost peer may still write to: never freed


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Within it, layers take the synchronized path also on a group of one rank or without a group.

    For tests and benchmarks of that path on one rank; process-wide.
    """
    global _forced
    with _forced_lock:
        _forced += 1
    try:
        yield
    finally:
        with _forced_lock:
            _forced -= 1


class Link:
    """One rank's end of a process group: makes exchanges, counts them, and dies with the group.

    Attributes:
        rank, size: in the group.
        sees_each_rank: whether ``exchange`` returns each rank's payload, or only their sum.
        in_place: whether ``exchange_in_place`` is there: messages live on the device, and are summed there.
        broke_off: whether the last exchange ended in a refusal or a mismatch, of which every rank knows then.
    """

    sees_each_rank: bool
    in_place = False

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._device = device
        self._ranks = group_ranks(group)
        self._number = 0
        self._dead: str | None = None
        self.broke_off = False
        self._warned: set[str] = set()

    def exchange(self, payload: Tensor, call: Call) -> list[Tensor]:
        """Give ``payload`` to all ranks of the group and get theirs.

        Args:
            payload: float64 vector of shape ``(width,)``, equal in width on all ranks.
            call: what this exchange is for; must be the same on all ranks.

        Returns:
            Payloads of all ranks in rank order where ``sees_each_rank``, else a list of one: their sum. Valid until
            the next exchange on this link.

        Raises:
            RankMismatchError: on every rank, if the ranks' calls differ.
            PeerLostError: a rank did not take part.

        Collectives:
            One exchange with every peer, or one all-reduce of ``width + 6`` float64.
        """
        raise NotImplementedError

    def exchange_in_place(self, write: Callable[[Tensor, int, int], None], width: int, call: Call) -> Tensor:
        """``exchange`` of a message that the caller writes where it lies, without a copy.

        Args:
            write: called with the message, a float64 vector with room for ``width`` payload behind six slots, the tag
                and this rank's number. It writes all of it: ``tag, tag^2, 0, 0, b, b * number``, where b is 1 if the
                payload is not finite, else 0; the payload; and zeros.
            width: of the payload.
            call: as in ``exchange``.

        Returns:
            The sum of all ranks' payloads, shape ``(width,)``.
        """
        raise NotImplementedError

    def refuse(self, call: Call, reason: str, width: int) -> None:
        """Take part in an exchange that this rank cannot make, so that no peer waits for it.

        Its peers raise RankMismatchError with ``reason``; the caller is to raise its own error after this returns.
        """
        raise NotImplementedError

    def broken_ranks(self, parts: Sequence[Tensor]) -> str:
        """Which ranks brought a payload that is not finite to the exchange that gave ``parts``, for a message."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait for the checks of all exchanges so far, and raise what they find. For a CPU they are done already."""

    def sum(self, payload: Tensor, call: Call) -> Tensor:
        """The sum of ``payload`` over all ranks, added in rank order: a new tensor, equal in bits on all ranks."""
        parts = self.exchange(payload, call)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def warn_broken(self, parts: Sequence[Tensor], layer: str) -> None:
        """Warn, once per layer, that statistics are not finite, and name the ranks that brought them."""
        if layer not in self._warned:
            self._warned.add(layer)
            warnings.warn(
                f"batch statistics of {f'layer {layer!r}' if layer else 'a layer without a name'} are not finite; they "
                f"came from {self.broken_ranks(parts)}. The output is not finite either; running statistics keep "
                "their last finite values. (Said once per layer.)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_alive(self, call: Call, width: int) -> None:
        if self._dead is not None:
            raise PeerLostError(
                f"{call.describe(width, self._number)}: this process group cannot be used any more: {self._dead}"
            )

    def _lost(self, error: BaseException, call: Call, width: int, waited: float, missing: Sequence[int]) -> NoReturn:
        who = ""
        if missing:
            ranks = ", ".join(self._name_rank(rank) for rank in missing)
            who = f" Not arrived: rank {ranks}."
        self._dead = f"it lost a peer in {call.describe(width, self._number)}"
        raise PeerLostError(
            f"{call.describe(width, self._number)}: lost a peer after {waited:.1f} s.{who} This is rank "
            f"{self._name_rank(self.rank)} of a group of {self.size} (global ranks {self._ranks}). "
            f"The process group cannot be used again: end this process, or restart the job. The backend said: {error}"
        ) from error

    def _name_rank(self, rank: int) -> str:
        return str(rank) if self._ranks[rank] == rank else f"{rank} (global {self._ranks[rank]})"


class OneHop(Link):
    """Send to and receive from every peer, under a reserved tag, into buffers sized for the widest message.

    gloo delivers a short message into a long buffer, and aborts the process for a long one in a short buffer: so all
    first messages go into buffers of one size, and the rest of a wider payload follows when all headers agree.
    """

    sees_each_rank = True

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._backend = _backend(group, device)
        self._group = weakref.ref(group)  # weak: links are kept per group
        self._bytes = bytearray((_HEAD + _FRAME) * 8 * self.size)
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}  # per width: what is sent, and all payloads

    # Tensors are made in the first exchange, not with the link: that may happen within a transform of torch.func, to
    # which they would belong.
    @functools.cached_property
    def _frames(self) -> Tensor:
        return torch.frombuffer(self._bytes, dtype=torch.float64).view(self.size, _HEAD + _FRAME)

    @functools.cached_property
    def _peers(self) -> list[tuple[int, list[Tensor]]]:
        return [(rank, [self._frames[rank]]) for rank in range(self.size) if rank != self.rank]

    def exchange(self, payload: Tensor, call: Call) -> list[Tensor]:
        width = payload.numel()
        self._check_alive(call, width)
        self.broke_off = False
        mine = header.encode(call, width, self._number)
        head = min(width, _FRAME)
        message, parts = self._view(head)
        self._bytes[self._offset(self.rank) : self._offset(self.rank) + header.SIZE] = mine
        parts[self.rank].copy_(payload[:head] if width > head else payload)
        self._swap(message, self._peers, call, width)
        if _checks != "off" or width > head:  # a rest of another length would abort the process
            self._compare(mine)
        else:
            self._hear_refusals()
        if width > head:
            parts = self._swap_rest(parts, payload, call)
        self._number += 1
        return parts if payload.device.type == "cpu" else [part.to(payload.device) for part in parts]

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        text = reason.encode()[: _FRAME * 8]
        text += b"\0" * (-len(text) % 8)
        refusal = call._replace(flags=call.flags | header.REFUSED)
        start = self._offset(self.rank)
        frame = header.encode(refusal, len(text) // 8, self._number) + text
        self._bytes[start : start + len(frame)] = frame
        self._swap(self._frames[self.rank, : len(frame) // 8], self._peers, call, width)
        self._number += 1
        self.broke_off = True

    def broken_ranks(self, parts: Sequence[Tensor]) -> str:
        broken = [rank for rank, part in enumerate(parts) if not torch.isfinite(part).all()]
        return "rank " + ", ".join(self._name_rank(rank) for rank in broken)

    def _swap(self, message: Tensor, peers: list[tuple[int, list[Tensor]]], call: Call, width: int) -> None:
        """Send ``message`` to every peer and receive each peer's into its buffer; wait for all."""
        started = time.monotonic()
        missing = [rank for rank, _ in peers]
        works: list[tuple[int, Any]] = []
        try:
            works = [(rank, self._backend.recv(buffer, rank, TAG)) for rank, buffer in peers]
            sends = [self._backend.send([message], rank, TAG) for rank, _ in peers]
            for rank, work in works:
                work.wait()
                missing.remove(rank)
            for work in sends:
                work.wait()
        except RuntimeError as error:
            for rank, work in works:  # those behind the one that failed may have come all the same
                if rank in missing and rank != missing[0] and work.is_completed() and work.exception() is None:
                    missing.remove(rank)
            _graveyard.append((self._bytes, self._frames, message, peers, works))
            waited = time.monotonic() - started
            if len(missing) > 1:  # some of them may have lost the same peer, and hung up before this rank
                missing = _silent_ranks(self._group(), self._number, missing) or missing
            else:
                _silent_ranks(self._group(), self._number, [])
            self._lost(error, call, width, waited, missing)

    def _swap_rest(self, heads: list[Tensor], payload: Tensor, call: Call) -> list[Tensor]:
        rest = payload[_FRAME:].to("cpu").contiguous()
        rests = [torch.empty_like(rest) for _ in range(self.size)]
        rests[self.rank] = rest
        peers = [(rank, [rests[rank]]) for rank, _ in self._peers]
        self._swap(rest, peers, call, payload.numel())
        return [torch.cat(both) for both in zip(heads, rests, strict=True)]

    def _compare(self, mine: bytes) -> None:
        for rank, _ in self._peers:
            start = self._offset(rank)
            if self._bytes[start : start + header.SIZE] != mine:
                self._raise_mismatch()

    def _hear_refusals(self) -> None:
        for rank, _ in self._peers:
            if self._bytes[self._offset(rank) + header.FLAGS_AT] & header.REFUSED:
                self._raise_mismatch()

    def _raise_mismatch(self) -> NoReturn:
        headers: dict[int, bytes] = {}
        reasons: dict[int, str] = {}
        for rank in range(self.size):
            start = self._offset(rank)
            body = start + header.SIZE
            headers[rank] = bytes(self._bytes[start:body])
            decoded = header.decode(headers[rank])
            if decoded is not None and decoded[0].flags & header.REFUSED:
                text = bytes(self._bytes[body : body + decoded[1] * 8])
                reasons[rank] = text.rstrip(b"\0").decode(errors="replace")
        self._number += 1  # the exchange took place, on every rank
        self.broke_off = True
        raise RankMismatchError(header.explain_mismatch(headers, reasons, self.rank), refused_by=tuple(reasons))

    def _offset(self, rank: int) -> int:
        return rank * (_HEAD + _FRAME) * 8

    def _view(self, width: int) -> tuple[Tensor, list[Tensor]]:
        view = self._views.get(width)
        if view is None:
            message = self._frames[self.rank, : _HEAD + width]
            view = message, [self._frames[rank, _HEAD : _HEAD + width] for rank in range(self.size)]
            self._views[width] = view
        return view


class AllReduce(Link):
    """One sum over all ranks, with slots in front of the payload that show whether the ranks agree.

    The slots: t and t^2 of the header's 16-bit digest t; how many ranks refused their call, and the sum of their
    numbers plus one; likewise for the ranks whose payload is not finite. Messages are padded to a multiple of
    ``_BUCKET``, so that ranks in layers of different widths get an error instead of an abort inside the collective
    (not for groups written in Python, whose collectives raise by themselves).

    On a CPU the slots are checked at once. On a device that would wait for it: there they are copied to the host in the
    background and looked at in later exchanges, as soon as they have arrived; ``SYNCBN_CHECKS=sync`` checks at once.
    A warning of ranks whose statistics are not finite comes then, too.
    """

    sees_each_rank = False
    _SLOTS = struct.Struct("<6d")
    _HEAD = 6
    _BUCKET = 1024

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._group = weakref.ref(group)  # weak: links are kept per group
        self._options = dist.AllreduceOptions()
        self._bucket = 1 if _is_python_group(group) else self._BUCKET
        self._messages: dict[int, tuple[bytearray, Tensor, Tensor]] = {}  # per width, for a CPU
        self._constants: dict[tuple[Call, int], Tensor] = {}  # slots on a device
        self._late: collections.deque[tuple[Any, Tensor, Call, int, int]] = collections.deque()
        self._broken = (0.0, 0.0)
        self.in_place = device.type != "cpu"

    def exchange(self, payload: Tensor, call: Call) -> list[Tensor]:
        self._check_alive(call, payload.numel())
        self.broke_off = False
        body = (self._on_cpu if self._device.type == "cpu" else self._on_device)(payload, call)
        self._number += 1
        return [body]

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        message = torch.zeros(self._length(width), dtype=torch.float64, device=self._device)
        message[2], message[3] = 1.0, self.rank + 1.0
        self._reduce(message, call, width)
        self._number += 1
        self.broke_off = True

    def settle(self) -> None:
        while self._late:
            self._late[0][0].synchronize()
            self._check_late()

    def broken_ranks(self, parts: Sequence[Tensor]) -> str:
        count, numbers = self._broken
        return f"rank {int(numbers) - 1}" if count == 1 else f"{int(count)} ranks of {self.size}"

    def _on_cpu(self, payload: Tensor, call: Call) -> Tensor:
        width = payload.numel()
        if width not in self._messages:
            raw = bytearray(self._length(width) * 8)
            message = torch.frombuffer(raw, dtype=torch.float64)
            self._messages[width] = raw, message, message[self._HEAD : self._HEAD + width]
        raw, message, body = self._messages[width]
        body.copy_(payload)
        t = float(header.digest(header.encode(call, width, self._number)))
        broken = 0.0 if math.isfinite(body.sum().item()) else 1.0
        self._SLOTS.pack_into(raw, 0, t, t * t, 0.0, 0.0, broken, broken * (self.rank + 1))
        self._reduce(message, call, width)
        slots = self._SLOTS.unpack_from(raw)
        self._broken = slots[4:]
        if _checks != "off" or slots[2]:
            self._check(slots, call, width, self._number)
        return body

    def exchange_in_place(self, write: Callable[[Tensor, int, int], None], width: int, call: Call) -> Tensor:
        self._check_alive(call, width)
        self.broke_off = False
        body = self._sum_on_device(write, width, call)
        self._number += 1
        return body

    def _on_device(self, payload: Tensor, call: Call) -> Tensor:
        width = payload.numel()

        def write(message: Tensor, tag: int, number: int) -> None:
            constant = self._constants.get((call, width))
            if constant is None:
                slots = [float(tag), float(tag) ** 2, 0.0, 0.0]
                constant = torch.tensor(slots, dtype=torch.float64, device=self._device)
                self._constants[call, width] = constant
            message.zero_()
            message[self._HEAD : self._HEAD + width].copy_(payload)
            message[:4] = constant
            broken = (~torch.isfinite(payload.sum())).to(torch.float64)
            message[4], message[5] = broken, broken * number

        return self._sum_on_device(write, width, call)

    def _sum_on_device(self, write: Callable[[Tensor, int, int], None], width: int, call: Call) -> Tensor:
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._check_late()
        message = torch.empty(self._length(width), dtype=torch.float64, device=self._device)
        write(message, _tag(call, width), self.rank + 1)
        self._reduce(message, call, width)
        if _checks == "sync" and not capturing:
            self._check(tuple(message[: self._HEAD].tolist()), call, width, self._number)
        elif _checks == "on" and not capturing:
            self._check_later(message[: self._HEAD], call, width)
        return message[self._HEAD : self._HEAD + width]

    def _check_later(self, slots: Tensor, call: Call, width: int) -> None:
        if self._device.type != "cuda":
            return
        on_host = torch.empty(self._HEAD, dtype=torch.float64, pin_memory=True)
        on_host.copy_(slots, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._late.append((arrived, on_host, call, width, self._number))

    def _check_late(self) -> None:
        while self._late and self._late[0][0].query():
            _, slots, call, width, number = self._late.popleft()
            values = tuple(slots.tolist())
            self._check(values, call, width, number)
            if values[4] and call.kind in (header.FORWARD, header.MOMENTS):
                self._broken = values[4:]
                self.warn_broken((), call.layer)

    def _length(self, width: int) -> int:
        return -(-(self._HEAD + width) // self._bucket) * self._bucket

    def _reduce(self, message: Tensor, call: Call, width: int) -> None:
        group = self._group()
        assert group is not None
        started = time.monotonic()
        try:
            group.allreduce([message], self._options).wait()
        except RuntimeError as error:
            _graveyard.append(message)
            waited = time.monotonic() - started
            others = [rank for rank in range(self.size) if rank != self.rank]
            self._lost(error, call, width, waited, _silent_ranks(group, self._number, others))

    def _check(self, slots: Sequence[float], call: Call, width: int, number: int) -> None:
        t, squares, refused, refused_ranks = slots[:4]
        if not refused and self.size * squares == t * t:
            return
        if number == self._number:
            self._number += 1  # the exchange took place, on every rank
        self.broke_off = True
        mine = call.describe(width, number)
        if refused:
            who = f"rank {refused_ranks - 1:.0f}" if refused == 1 else f"{refused:.0f} ranks"
            raise RankMismatchError(
                f"{who} could not make the call that rank {self.rank} made ({mine}); the error is raised there. "
                "Nothing was exchanged; the group stays usable.",
                refused_by=(int(refused_ranks) - 1,) if refused == 1 else (-1,) * int(refused),
            )
        raise RankMismatchError(
            f"ranks made different calls, so their statistics must not be mixed. This is rank {self.rank}: {mine}. "
            "All ranks must run the same layers in the same order and mode; "
            "syncbn.check_ranks_agree(model) compares the layers."
        )


@functools.lru_cache(maxsize=4096)
def _tag(call: Call, width: int) -> int:
    """What ranks on a device compare. The call's number is left out: a constant needs no copy from the host."""
    return header.digest(header.encode(call, width, 0))


def _silent_ranks(group: Any, number: int, among: Sequence[int]) -> list[int]:
    """After a failure: those ``among`` the ranks that do not say, through the group's store, that they failed in the
    same exchange as this rank, which says so here.

    Best effort, within ``_POST_MORTEM`` seconds, in a thread of its own: the store may have died with a rank.
    """
    silent: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            store = group.get_group_store()
            store.set(f"syncbn/failed/{number}/{group.rank()}", "1")
            deadline = time.monotonic() + 0.8 * _POST_MORTEM
            missing = list(among)
            while missing and time.monotonic() < deadline:
                time.sleep(0.02)
                missing = [r for r in missing if not store.check([f"syncbn/failed/{number}/{r}"])]
            silent.extend(missing)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_POST_MORTEM)
    return list(silent)


_links: weakref.WeakKeyDictionary[Any, dict[str, Link]] = weakref.WeakKeyDictionary()


def link(group: Any, device: torch.device) -> Link | None:
    """This rank's link of a group for tensors of a device, made at its first use; None where there are no peers.

    A link to a group of one rank exists only within ``forced()``.
    """
    if group is None:
        return None
    links = _links.setdefault(group, {})
    known = links.get(device.type)
    if known is None:
        gloo = "gloo" in str(_backend(group, device).name()).lower()
        if gloo and group.size() <= ONE_HOP_LIMIT:
            # One for all devices, that a message of one kind and one of another are two calls of the same link.
            known = next((other for other in links.values() if isinstance(other, OneHop)), None)
            known = links[device.type] = known or OneHop(group, device)
        else:
            known = links[device.type] = AllReduce(group, device)
    return known if known.size > 1 or _forced > 0 else None


def must_synchronize(link: Link | None) -> bool:
    """Whether a layer takes the synchronized path: there are peers, or a test asks for it (``forced``)."""
    return link is not None or _forced > 0


def must_synchronize_compiled(group: Any) -> bool:
    """``must_synchronize`` for a compiler, which cannot see links."""
    return _forced > 0 or (group is not None and group.size() > 1)


def _backend(group: Any, device: torch.device) -> Any:
    """The backend below a ProcessGroup: calling it directly saves the dispatcher's 10 us a call."""
    try:
        return group._get_backend(device)
    except (AttributeError, RuntimeError):  # it is a backend already, or has none for this device
        return group


def _is_python_group(group: Any) -> bool:
    """Whether the group is written in Python, as the mpi4py backend is."""
    return type(group) is not dist.ProcessGroup and isinstance(group, dist.ProcessGroup)
