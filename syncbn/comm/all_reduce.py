"""One sum over all ranks, with slots in front of the payload that show whether the ranks agree."""

from __future__ import annotations

import collections
import ctypes
import time
import weakref
from collections.abc import Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _torch, wire
from syncbn.comm.base import Link
from syncbn.comm.gloo import Gloo, is_gloo
from syncbn.comm.post_mortem import Note, culprits
from syncbn.comm.waiting import bury, interruptible, is_of_backend
from syncbn.errors import RankMismatchError
from syncbn.messages import Message, Report, Shared
from syncbn.wire import BUCKET, FORWARD, MOMENTS, SLOTS, Call


class AllReduce(Link):
    """One all-reduce: for NCCL, MPI, and worlds above the limit of one hop. Subclasses say where messages live."""

    raw = True

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._group = weakref.ref(group)  # weak: links are kept per group
        self._options = dist.AllreduceOptions()
        self._broken = "no rank"

    def way(self) -> str:
        return "one all-reduce"

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        """Each rank in columns of its own of a sum that is W times as wide."""
        columns = torch.zeros(self.size, payload.numel(), dtype=torch.float64, device=self.device)
        columns[self.rank] = payload
        parts = list(self.sum(columns.flatten(), call).to("cpu").view(self.size, -1))
        self.settle()
        return parts

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        slots = bytearray(8 * SLOTS)
        wire.pack_slots(slots, 0, refused=self.rank + 1)
        message = torch.zeros(self._first_length(width), dtype=torch.float64)
        message[:SLOTS] = torch.frombuffer(slots, dtype=torch.float64)
        message = message.to(self.device)
        try:
            self._reduce(message, call, width)
            self.exchanges += 1
            self.broke_off = True
        except BaseException as error:
            self._leave(error, call, width)
            raise

    def _first_length(self, width: int) -> int:
        """Length of the first all-reduce for a payload of ``width``."""
        raise NotImplementedError

    def _broken_ranks(self, shared: Shared | None) -> str:
        return self._broken

    def _reduce(self, message: Tensor, call: Call, width: int) -> None:
        group = self._group()
        assert group is not None
        started = time.monotonic()
        try:
            self._wait(group.allreduce([message], self._options))
        except BaseException as error:
            backend = _torch.backend_of(group, self.device)
            if not is_of_backend(error, backend):
                bury(message, group, backend)
                raise
            bury(message)
            waited = time.monotonic() - started
            others = [rank for rank in range(self.size) if rank != self.rank]
            know = Gloo(group, self.device).is_broken if is_gloo(group, self.device) else lambda rank: False
            broken = [rank for rank in others if know(rank)]
            absent = [rank for rank in others if rank not in broken]
            missing = culprits(group, Note(broken=broken, absent=absent))
            self._lost(str(error), call, width, waited, missing)

    def _leave(self, error: BaseException, call: Call, width: int) -> None:
        """An exception came out of an exchange. Unless it is one of ours, the peers cannot know how far it got."""
        if not isinstance(error, RankMismatchError) and self._dead is None:
            self._interrupted(error, call, width)

    def _wait(self, work: Any) -> None:
        work.wait()

    def _check(self, slots: Sequence[float], call: Call, width: int, number: int) -> None:
        """Raise what the summed slots of exchange ``number`` say; note who brought a payload that is not finite."""
        t, squares, refused, _, broken, _ = slots
        if not refused and not broken and self.size * squares == t * t:
            return
        verdict = wire.judge(slots, self.size) or wire.Verdict(False, 0, -1, 0, -1)
        if verdict.broken:
            one = verdict.broken == 1
            self._broken = f"rank {verdict.broken_by}" if one else f"{verdict.broken} ranks of {self.size}"
        if not verdict.refused and (verdict.agree or self._checks == "off"):
            return
        if number == self.exchanges:
            self.exchanges += 1  # the exchange took place, on every rank
        self.broke_off = True
        raise RankMismatchError(
            wire.explain_disagreement(verdict, call.describe(width, number), self.rank),
            refused_by=(verdict.refused_by,) if verdict.refused == 1 else (-1,) * verdict.refused,
        )


class AllReduceOnHost(AllReduce):
    """Messages in memory of the host, whose slots are checked at once.

    All first messages have one length, so that ranks in whatever different calls make the same all-reduce. A payload
    that it does not hold goes on in a second one, once all agree.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._messages: dict[int, tuple[bytearray, Message, Shared]] = {}  # per width

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)  # before anybody writes over what peers may still read
        return self._prepared(width)[1]

    def share(self, message: Message, call: Call) -> Shared:
        width = message.payload.numel()
        self._check_alive(call, width)
        self.broke_off = False
        raw, own, shared = self._prepared(width)
        if message is not own:
            own.payload.copy_(message.payload)
        finite = bool(torch.isfinite(own.payload.sum()))
        t = wire.tag(call, width, self.exchanges)
        wire.pack_slots(raw, t, broken=0 if finite else self.rank + 1)
        try:
            self._reduce(own.whole[:BUCKET], call, width)
            self._check(wire.read_slots(raw), call, width, self.exchanges)
            if len(own.whole) > BUCKET:
                self._reduce(own.whole[BUCKET:], call, width)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return shared

    def _first_length(self, width: int) -> int:
        return BUCKET

    def _wait(self, work: Any) -> None:
        if isinstance(type(work).wait, FunctionType):  # in Python, where signals are heard
            work.wait()
        else:
            interruptible(work.wait)

    def _prepared(self, width: int) -> tuple[bytearray, Message, Shared]:
        known = self._messages.get(width)
        if known is None:
            with _torch.outside_modes():
                raw = bytearray(8 * max(SLOTS + width, BUCKET))
                whole = torch.frombuffer(raw, dtype=torch.float64)
                payload = whole[SLOTS : SLOTS + width]
                known = self._messages[width] = raw, Message(whole, payload, raw=True), Shared(payload[None], raw=True)
        return known


class AllReduceOnDevice(AllReduce):
    """Messages on a device. To check the slots at once would wait for it (``SYNCBN_CHECKS=sync`` does). Else a kernel
    that reads the sum looks at them too, and writes to memory of the host if they say anything (``Report``); the host
    looks at one word of it in each exchange. Where no kernel looked, the slots are copied in the background, and read
    in later exchanges, as soon as they have arrived. A warning of ranks whose statistics are not finite comes then.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._options.asyncOp = False  # on the current stream: nothing is to run beside the sum, which is waited for
        self._late: collections.deque[tuple[Any, Tensor, Call, int, int]] = collections.deque()
        self._like: Tensor | None = None  # a tensor like messages
        self._record: Tensor | None = None
        self._word = ctypes.c_double()  # the first of the record
        self._latest: list[tuple[Call, int, int] | None] = [None] * _LATEST
        self._captured: list[tuple[Call, int, int]] = []  # in CUDA graphs, which are run any number of times
        self._unread: tuple[Report, Tensor, Call, int, int] | None = None  # of the last exchange

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)
        if self._like is None:
            self._prepare()
        assert self._like is not None
        whole = self._like.new_empty(_summed_length(width))
        return Message(whole, whole.as_strided((width,), (1,), SLOTS), True, _tag(call, width), self.rank + 1)

    def share(self, message: Message, call: Call) -> Shared:
        width = message.payload.shape[0]
        self._check_alive(call, width)
        self.broke_off = False
        capturing = _torch.is_capturing(self.device)
        if not capturing:
            self._look()
        report = None
        try:
            self._reduce(message.whole, call, width)
            if self._checks == "on":
                report = self._expect(message.whole, call, width, capturing)
            elif self._checks == "sync" and not capturing:
                self._check(message.whole[:SLOTS].tolist(), call, width, self.exchanges)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return Shared(message.payload[None], True, report)

    def settle(self) -> None:
        self._look()
        if self._record is not None:
            _torch.wait_for(self.device)
            self._look()
        while self._late:
            self._late[0][0].synchronize()
            self._check_late()

    def _first_length(self, width: int) -> int:
        return _summed_length(width)

    def _wait(self, work: Any) -> None:
        if work is not None:  # as some backends return for what is in order on the stream
            work.wait()

    def _prepare(self) -> None:
        """Make what is kept, outside of modes and of graphs, which would keep it for themselves."""
        with _torch.outside_modes():
            self._like = torch.empty(1, dtype=torch.float64, device=self.device)
            if self.device.type in ("cpu", "cuda") and not _torch.is_capturing(self.device):
                self._record = torch.zeros(8, dtype=torch.float64, pin_memory=self.device.type == "cuda")
                self._word = ctypes.c_double.from_address(self._record.data_ptr())

    def _expect(self, whole: Tensor, call: Call, width: int, capturing: bool) -> Report | None:
        """Ask whoever reads the sum to look at the slots in front of it."""
        number = self.exchanges
        if self._record is None:
            if not capturing:
                self._check_later(whole[:SLOTS], call, width, number)
            return None
        if capturing:
            self._captured.append((call, width, number))
            return Report(self._record, _LATEST + len(self._captured), self.size)
        self._latest[number % _LATEST] = call, width, number
        report = Report(self._record, number % _LATEST + 1, self.size)
        self._unread = report, whole, call, width, number
        return report

    def _look(self) -> None:
        """See what is known of exchanges so far, without waiting."""
        if self._unread is not None:
            report, whole, call, width, number = self._unread
            self._unread = None
            if report.unread:
                self._check_later(whole[:SLOTS], call, width, number)
        if self._word.value:
            self._read_record()
        if self._late:
            self._check_late()

    def _read_record(self) -> None:
        assert self._record is not None
        time.sleep(0.001)  # the slots were stored first, but may arrive a little later
        exchange, *slots = self._record[: SLOTS + 1].tolist()
        self._record.zero_()
        index = int(exchange) - 1
        known = self._captured[index - _LATEST] if index >= _LATEST else self._latest[index]
        assert known is not None
        self._judge(slots, *known)

    def _check_later(self, slots: Tensor, call: Call, width: int, number: int) -> None:
        if self.device.type != "cuda":
            return
        with _torch.on_device(self.device):
            on_host = torch.empty(SLOTS, dtype=torch.float64, pin_memory=True)
            on_host.copy_(slots, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        self._late.append((arrived, on_host, call, width, number))

    def _check_late(self) -> None:
        while self._late and self._late[0][0].query():
            _, slots, call, width, number = self._late.popleft()
            self._judge(slots.tolist(), call, width, number)

    def _judge(self, slots: list[float], call: Call, width: int, number: int) -> None:
        self._check(slots, call, width, number)
        if slots[4] and call.kind in (FORWARD, MOMENTS):
            self.warn_broken(None, call.layer)


_LATEST = 4096  # exchanges whose calls are remembered: a device is never so many behind its host

_summed_length = lru_cache(maxsize=4096)(wire.summed_length)


@lru_cache(maxsize=4096)
def _tag(call: Call, width: int) -> int:
    return wire.tag(call, width)
