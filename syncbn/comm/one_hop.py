"""One hop: send to and receive from every peer, so that each rank's header and payload are seen."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn import _torch, wire
from syncbn.comm import farewell
from syncbn.comm.base import Link
from syncbn.comm.carrier import Carrier
from syncbn.comm.frames import Frames
from syncbn.errors import RankMismatchError
from syncbn.messages import Message, Shared, fill
from syncbn.wire import FRAME, HEAD, HEADER_BYTES, Call


class OneHop(Link):
    """Frames of one size at most go to every peer; the rest of a wider payload follows when all headers agree.

    With ``levels``, by way of a leader on each host where there are several.

    Ranks in different calls get an error that names both sides; a peer in some other collective gives a timeout and
    never mixed numbers. Payloads are summed or merged in rank order, so results are equal in bits on all ranks.
    """

    def __init__(self, group: Any, device: torch.device, levels: bool = False) -> None:
        super().__init__(group, torch.device("cpu"))  # that of the messages, also for inputs on others
        self._frames = Frames(self.size, HEAD + FRAME)
        self._heads = [view[:HEADER_BYTES] for view in self._frames.views]
        self._carrier = Carrier(group, device, levels)
        self._messages: dict[int, tuple[Message, Shared]] = {}  # per width: what is sent, and the payloads of all

    def way(self) -> str:
        peers, reached = self.size - 1, len(self._carrier.by_socket)
        ways = {"sockets": reached, "gloo": peers - reached}
        return ", ".join(f"{name} to {count} of {peers} peers" for name, count in ways.items() if count)

    def message(self, width: int, call: Call) -> Message:
        self._check_ready(call, width)  # before anybody writes over what peers may still read
        if width <= FRAME:
            return self._prepared(width)[0]
        whole = torch.empty(width, dtype=torch.float64)
        return Message(whole, whole, raw=False)

    def share(self, message: Message, call: Call) -> Shared:
        payload = message.payload
        width = payload.numel()
        self._check_alive(call, width)
        try:
            self.broke_off = False
            own, shared = self._prepared(min(width, FRAME))
            if message is not own:
                own.payload.copy_(payload[:FRAME])
            mine = wire.encode(call, width, self.exchanges)
            self._heads[self.rank][:] = mine
            self._swap(self._frames, HEAD + min(width, FRAME), call, width)
            if self._checks != "off" or width > FRAME:  # a rest of another length would abort the process
                self._compare(mine)
            else:
                self._hear_refusals()
            if width > FRAME:
                shared = self._swap_rest(shared, payload, call)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return shared

    def refuse(self, call: Call, reason: str, width: int) -> None:
        self._check_alive(call, width)
        frame = wire.refusal(call, reason, self.exchanges)
        self._frames.views[self.rank][: len(frame)] = frame
        try:
            self._swap(self._frames, len(frame) // 8, call, width)
            self.exchanges += 1
            self.broke_off = True
        except BaseException as error:
            self._leave(error, call, width)
            raise

    def sum(self, payload: Tensor, call: Call) -> Tensor:
        width = payload.numel()
        if width > FRAME:
            return super().sum(payload, call)
        message = self.message(width, call)
        fill(message, payload)
        self.share(message, call)
        return self._frames.sum(HEAD, width).to(payload.device)

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        message = self.message(payload.numel(), call)
        fill(message, payload)
        return [part.to("cpu", copy=True) for part in self.share(message, call).parts.unbind()]

    def _broken_ranks(self, shared: Shared | None) -> str:
        assert shared is not None
        broken = [rank for rank, part in enumerate(shared.parts) if not torch.isfinite(part).all()]
        return "rank " + ", ".join(self._name_rank(rank) for rank in broken)

    def _swap(self, frames: Frames, length: int, call: Call, width: int) -> None:
        lost = self._carrier.swap(frames, length)
        if lost is not None:
            self._lost(lost.reason, call, width, lost.waited, lost.missing)

    def _leave(self, error: BaseException, call: Call, width: int) -> None:
        """An exception came out of an exchange. Unless it is one of ours, the peers cannot know how far it got."""
        if isinstance(error, RankMismatchError) or self._dead is not None:
            return
        self._interrupted(error, call, width)
        self._carrier.close(f"it was interrupted by {farewell.describe(error)}")

    def _swap_rest(self, heads: Shared, payload: Tensor, call: Call) -> Shared:
        rest = payload[FRAME:]
        rests = Frames(self.size, len(rest))
        rests.tensor[self.rank] = rest
        self._swap(rests, len(rest), call, payload.numel())
        return Shared(torch.cat([heads.parts, rests.tensor], 1), raw=False)

    def _compare(self, mine: bytes) -> None:
        for head in self._heads:
            if head != mine:
                self._raise_mismatch()

    def _hear_refusals(self) -> None:
        for view in self._frames.views:
            if wire.is_refusal(view):
                self._raise_mismatch()

    def _raise_mismatch(self) -> NoReturn:
        frames = [bytes(view) for view in self._frames.views]
        headers = {rank: frame[:HEADER_BYTES] for rank, frame in enumerate(frames)}
        reasons = {rank: reason for rank, frame in enumerate(frames) if (reason := wire.reason_in(frame)) is not None}
        self.exchanges += 1  # the exchange took place, on every rank
        self.broke_off = True
        raise RankMismatchError(wire.explain_mismatch(headers, reasons, self.rank), refused_by=tuple(reasons))

    def _prepared(self, width: int) -> tuple[Message, Shared]:
        known = self._messages.get(width)
        if known is None:
            frames = self._frames.tensor
            with _torch.outside_modes():
                own = frames[self.rank, : HEAD + width]
                shared = Shared(frames[:, HEAD : HEAD + width], raw=False)
                known = self._messages[width] = Message(own, own[HEAD:], raw=False), shared
        return known
