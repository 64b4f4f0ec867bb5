"""All ranks' messages side by side, by an all-gather: each rank's header and payload are seen, as in one hop."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn import _torch, wire
from syncbn.comm import pairs
from syncbn.comm.collective import Collective
from syncbn.comm.on_device import OnDevice, summed_length, tag
from syncbn.errors import RankMismatchError
from syncbn.messages import Message, Shared, fill
from syncbn.wire import BUCKET, FRONT, HEAD, HEADER_BYTES, SLOTS, Call


class AllGather(Collective):
    """What both links of an all-gather do: every rank sees every message, so triples travel, and errors name ranks."""

    raw = False

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._options = _torch.gather_options(in_order=device.type != "cpu")

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        message = self.message(payload.numel(), call)
        fill(message, payload)
        parts = [part.to("cpu", copy=True) for part in self.share(message, call).parts.unbind()]
        self.settle()
        return parts

    def _gather(self, own: Tensor, call: Call, width: int) -> Tensor:
        """Each rank's vector in a row, new memory."""
        gathered = own.new_empty(self.size * own.shape[0])
        self._call(_torch.all_gather, gathered, own, self._options, keeps=gathered, call=call, width=width)
        return gathered.view(self.size, -1)

    def _compare(self, headers: list[bytes], reasons: dict[int, str], number: int) -> None:
        """Raise RankMismatchError if a rank refused, or if headers differ and anybody asks."""
        if reasons or (self._checks != "off" and headers.count(headers[0]) < len(headers)):
            self._raise_mismatch(headers, reasons, number)

    def _raise_mismatch(self, headers: list[bytes], reasons: dict[int, str], number: int) -> NoReturn:
        if number == self.exchanges:
            self.exchanges += 1  # the exchange took place, on every rank
        self.broke_off = True
        raise RankMismatchError(
            wire.explain_mismatch(dict(enumerate(headers)), reasons, self.rank), refused_by=tuple(reasons)
        )

    def _note_broken(self, ranks: list[int]) -> None:
        self._broken = "rank " + ", ".join(self._name_rank(rank) for rank in ranks)


class AllGatherOnDevice(OnDevice, AllGather):
    """Messages on a device, float64: a header, and behind it what a message for a sum has. See ``OnDevice``."""

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self.fronts = self.size * FRONT
        self._headers: dict[tuple[Call, int], Tensor] = {}

    def way(self) -> str:
        return "one all-gather"

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)
        if self._like is None:
            self._prepare()
        assert self._like is not None
        length = summed_length(width)
        whole = self._like.new_empty(HEAD + length)
        header = self._headers.get((call, width))
        if header is None:
            header = self._headers[call, width] = self._on_device(wire.encode(call, width, 0))
        return Message(
            whole.as_strided((length,), (1,), HEAD),
            whole.as_strided((width,), (1,), FRONT),
            False,
            tag(call, width),
            self.rank + 1,
            header,
        )

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        slots = bytearray(8 * SLOTS)
        wire.pack_slots(slots, 0, refused=self.rank + 1)
        front = self._on_device(wire.refusal_on_device(call, reason, width) + slots)
        own = front.new_zeros(HEAD + summed_length(width))
        own[:FRONT] = front
        try:
            self._gather(own, call, width)
            self.exchanges += 1
            self.broke_off = True
        except BaseException as error:
            self._leave(error, call, width)
            raise

    def _on_device(self, data: bytes) -> Tensor:
        """A constant that is kept or sent, without waiting for the device."""
        with _torch.outside_modes():
            values = torch.frombuffer(bytearray(data), dtype=torch.float64)
            if self.device.type == "cpu":
                return values
            if self.device.type == "cuda":
                values = values.pin_memory()
            return values.to(self.device, non_blocking=True)

    def _carry(self, message: Message, call: Call, width: int) -> tuple[Tensor, Tensor]:
        length = HEAD + message.whole.shape[0]
        gathered = self._gather(message.whole.as_strided((length,), (1,), 0), call, width)
        return gathered, gathered.as_strided((self.size, width), (length, 1), FRONT)

    def _front(self, whole: Tensor) -> Tensor:
        return whole[:, :FRONT]

    def _examine(self, front: Tensor, call: Call, width: int, number: int) -> bool:
        data = bytes(front.reshape(-1).view(torch.uint8).tolist())
        rows = [data[start : start + 8 * FRONT] for start in range(0, len(data), 8 * FRONT)]
        headers = [wire.numbered(row[:HEADER_BYTES], number) for row in rows]
        slots = [wire.read_slots(row[HEADER_BYTES:]) for row in rows]
        broken = [rank for rank, values in enumerate(slots) if values[4]]
        if broken:
            self._note_broken(broken)
        reasons = {}
        for rank, header in enumerate(headers):
            if wire.is_refusal(header):
                decoded = wire.decode(header)
                reasons[rank] = decoded[0].layer if decoded else ""
        self._compare(headers, reasons, number)
        return bool(broken)


class AllGatherOfPairs(AllGather):
    """Messages on the host, which travel by a device without float64 as pairs of float32, and are waited for.

    As in ``AllReduceOnHost``, all first messages have one length, and the rest of a wider payload follows when all
    agree.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._options = _torch.gather_options(in_order=False)
        self.device, self._by = torch.device("cpu"), device

    def way(self) -> str:
        return f"one all-gather of pairs of float32 on {self._by}"

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)
        with _torch.outside_modes():
            whole = torch.empty(width, dtype=torch.float64)
        return Message(whole, whole, False)

    def share(self, message: Message, call: Call) -> Shared:
        payload = message.payload
        width = payload.numel()
        self._check_alive(call, width)
        self.broke_off = False
        try:
            with _torch.outside_modes():
                parts = self._swap(wire.encode(call, width, self.exchanges), payload, call)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return Shared(parts, False)

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        frame = wire.refusal(call, reason[: 2 * BUCKET], self.exchanges)
        try:
            with _torch.outside_modes():
                self._gather(self._frame(frame), call, width)
            self.exchanges += 1
            self.broke_off = True
        except BaseException as error:
            self._leave(error, call, width)
            raise

    def _broken_ranks(self, shared: Shared | None) -> str:
        assert shared is not None
        self._note_broken([rank for rank, part in enumerate(shared.parts) if not torch.isfinite(part).all()])
        return self._broken

    def _swap(self, header: bytes, payload: Tensor, call: Call) -> Tensor:
        width = payload.numel()
        first = pairs.split(payload[:BUCKET]).view(-1)
        frames = self._gather(self._frame(header, first), call, width)
        rows = [bytes(row) for row in frames.view(torch.uint8).tolist()]
        headers = [row[:HEADER_BYTES] for row in rows]
        reasons = {rank: reason for rank, row in enumerate(rows) if (reason := wire.reason_in(row)) is not None}
        self._compare(headers, reasons, self.exchanges)
        behind = frames[:, 2 * HEAD : 2 * HEAD + first.numel()]
        parts = pairs.join(behind.reshape(self.size, 2, -1).movedim(1, 0))
        if width <= BUCKET:
            return parts
        if headers.count(header) < self.size:  # a rest of another length would not be found out
            self._raise_mismatch(headers, reasons, self.exchanges)
        rest = self._gather(pairs.split(payload[BUCKET:]).view(-1).to(self._by), call, width).to("cpu")
        return torch.cat([parts, pairs.join(rest.reshape(self.size, 2, -1).movedim(1, 0))], 1)

    def _frame(self, head: bytes, values: Tensor | None = None) -> Tensor:
        """The first message, as float32: bytes, and values behind them."""
        frame = torch.zeros(2 * (HEAD + BUCKET), dtype=torch.float32)
        frame[: len(head) // 4] = torch.frombuffer(bytearray(head), dtype=torch.float32)
        if values is not None:
            frame[2 * HEAD : 2 * HEAD + len(values)] = values
        return frame.to(self._by)

    def _gather(self, own: Tensor, call: Call, width: int) -> Tensor:
        return super()._gather(own, call, width).to("cpu")
