"""One sum over all ranks, with slots in front of the payload that show whether the ranks agree."""

from __future__ import annotations

import collections
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
from syncbn.messages import Message, Shared
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
    """Messages on a device. To check the slots at once would wait for it: they are copied to the host in the background
    and looked at in later exchanges, as soon as they have arrived; ``SYNCBN_CHECKS=sync`` checks at once. A warning of
    ranks whose statistics are not finite comes then, too.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._late: collections.deque[tuple[Any, Tensor, Call, int, int]] = collections.deque()

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)
        whole = torch.empty(wire.summed_length(width), dtype=torch.float64, device=self.device)
        return Message(whole, whole[SLOTS : SLOTS + width], True, _tag(call, width), self.rank + 1)

    def share(self, message: Message, call: Call) -> Shared:
        width = message.payload.numel()
        self._check_alive(call, width)
        self.broke_off = False
        capturing = _torch.is_capturing(self.device)
        if not capturing:
            self._check_late()
        try:
            self._reduce(message.whole, call, width)
            slots = message.whole[:SLOTS]
            if self._checks == "sync" and not capturing:
                self._check(slots.tolist(), call, width, self.exchanges)
            elif self._checks == "on" and not capturing:
                self._check_later(slots, call, width)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return Shared(message.payload[None], raw=True)

    def _first_length(self, width: int) -> int:
        return wire.summed_length(width)

    def settle(self) -> None:
        while self._late:
            self._late[0][0].synchronize()
            self._check_late()

    def _check_later(self, slots: Tensor, call: Call, width: int) -> None:
        if self.device.type != "cuda":
            return
        on_host = torch.empty(SLOTS, dtype=torch.float64, pin_memory=True)
        on_host.copy_(slots, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))
        self._late.append((arrived, on_host, call, width, self.exchanges))

    def _check_late(self) -> None:
        while self._late and self._late[0][0].query():
            _, slots, call, width, number = self._late.popleft()
            values = slots.tolist()
            self._check(values, call, width, number)
            if values[4] and call.kind in (FORWARD, MOMENTS):
                self.warn_broken(None, call.layer)


@lru_cache(maxsize=4096)
def _tag(call: Call, width: int) -> int:
    return wire.tag(call, width)
