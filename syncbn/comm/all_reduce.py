"""One sum over all ranks, with slots in front of the payload that show whether the ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _torch, wire
from syncbn.comm.collective import Collective
from syncbn.comm.on_device import OnDevice, summed_length, tag
from syncbn.comm.waiting import interruptible
from syncbn.errors import RankMismatchError
from syncbn.messages import Message, Shared
from syncbn.wire import BUCKET, SLOTS, Call


class AllReduce(Collective):
    """One all-reduce: for NCCL, MPI, and worlds above the limit of one hop. Subclasses say where messages live."""

    raw = True
    direct = True

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._options = dist.AllreduceOptions()

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

    def _reduce(self, message: Tensor, call: Call, width: int) -> None:
        self._call(_all_reduce, message, self._options, keeps=message, call=call, width=width)

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


class AllReduceOnDevice(OnDevice, AllReduce):
    """Messages on a device; see ``OnDevice``."""

    fronts = SLOTS

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._options.asyncOp = False  # on the current stream: nothing is to run beside the sum, which is waited for

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)
        if self._like is None:
            self._prepare()
        assert self._like is not None
        whole = self._like.new_empty(summed_length(width))
        return Message(whole, whole.as_strided((width,), (1,), SLOTS), True, tag(call, width), self.rank + 1)

    def _carry(self, message: Message, call: Call, width: int) -> tuple[Tensor, Tensor]:
        self._reduce(message.whole, call, width)
        whole = message.whole
        return whole, whole.as_strided((1, width), (width, 1), SLOTS)  # (quicker than an index)

    def _front(self, whole: Tensor) -> Tensor:
        return whole[:SLOTS]

    def _first_length(self, width: int) -> int:
        return summed_length(width)

    def _examine(self, front: Tensor, call: Call, width: int, number: int) -> bool:
        slots = front.tolist()
        self._check(slots, call, width, number)
        return bool(slots[4])


def _all_reduce(group: Any, message: Tensor, options: Any) -> Any:
    return group.allreduce([message], options)
