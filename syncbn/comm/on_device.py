"""Messages that live on a device, for which the host never waits: what they say of ranks that differ it reads later."""

from __future__ import annotations

import collections
import ctypes
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from syncbn import _torch, wire
from syncbn.comm.collective import Collective
from syncbn.messages import Message, Report, Shared
from syncbn.wire import FORWARD, MOMENTS, Call


class OnDevice(Collective):
    """To check what is in front of the payloads at once would wait for the device (``SYNCBN_CHECKS=sync`` does). Else
    a kernel that reads the payloads looks at it too, and writes to memory of the host if it says anything (``Report``);
    the host looks at one word of that in each exchange. Where no kernel looked, what is in front is copied in the
    background, and read in later exchanges, as soon as it has arrived. A warning of ranks whose statistics are not
    finite comes then.

    Attributes:
        fronts: how many float64 there are to look at in an exchange.
    """

    direct = True
    fronts: int

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._late: collections.deque[tuple[Any, Tensor, Call, int, int]] = collections.deque()
        self._like: Tensor | None = None  # a tensor like messages
        self._record: Tensor | None = None
        self._word = ctypes.c_double()  # the first of the record
        self._latest: list[tuple[Call, int, int] | None] = [None] * _LATEST
        self._captured: list[tuple[Call, int, int]] = []  # in CUDA graphs, which are run any number of times
        self._unread: tuple[Report, Tensor, Call, int, int] | None = None  # of the last exchange

    def share(self, message: Message, call: Call) -> Shared:
        width = message.payload.shape[0]
        self._check_alive(call, width)
        self.broke_off = False
        capturing = _torch.is_capturing(self.device)
        if not capturing:
            self._look()
        report = None
        try:
            whole, parts = self._carry(message, call, width)
            if self._checks == "on":
                report = self._expect(whole, call, width, capturing)
            elif self._checks == "sync" and not capturing:
                self._examine(self._front(whole).cpu(), call, width, self.exchanges)
            self.exchanges += 1
        except BaseException as error:
            self._leave(error, call, width)
            raise
        return Shared(parts, self.raw, report)

    def settle(self) -> None:
        self._look()
        if self._record is not None:
            _torch.wait_for(self.device)
            self._look()
        while self._late:
            self._late[0][0].synchronize()
            self._check_late()

    def _carry(self, message: Message, call: Call, width: int) -> tuple[Tensor, Tensor]:
        """Exchange a message: what all ranks wrote, and in it the payloads (or their sum), as in ``Shared``."""
        raise NotImplementedError

    def _front(self, whole: Tensor) -> Tensor:
        """Of the first result of ``_carry``, what ``_examine`` looks at."""
        raise NotImplementedError

    def _examine(self, front: Tensor, call: Call, width: int, number: int) -> bool:
        """Raise what the front of exchange ``number`` says; whether a payload is not finite, and note whose.

        Args:
            front: on the host, ``fronts`` float64.
        """
        raise NotImplementedError

    def _prepare(self) -> None:
        """Make what is kept, outside of modes and of graphs, which would keep it for themselves."""
        with _torch.outside_modes():
            self._like = torch.empty(1, dtype=torch.float64, device=self.device)
            if self.device.type in ("cpu", "cuda") and not _torch.is_capturing(self.device):
                self._record = torch.zeros(2 + self.fronts, dtype=torch.float64, pin_memory=self.device.type == "cuda")
                self._word = ctypes.c_double.from_address(self._record.data_ptr())

    def _expect(self, whole: Tensor, call: Call, width: int, capturing: bool) -> Report | None:
        """Ask whoever reads the payloads to look at what is in front of them."""
        number = self.exchanges
        if self._record is None:
            if not capturing:
                self._check_later(self._front(whole), call, width, number)
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
                self._check_later(self._front(whole), call, width, number)
        if self._word.value:
            self._read_record()
        if self._late:
            self._check_late()

    def _read_record(self) -> None:
        assert self._record is not None
        time.sleep(0.001)  # the front was stored first, but may arrive a little later
        record = self._record.clone()
        self._record.zero_()
        index = int(record[0]) - 1
        known = self._captured[index - _LATEST] if index >= _LATEST else self._latest[index]
        assert known is not None
        self._judge(record[1 : 1 + self.fronts], *known)

    def _check_later(self, front: Tensor, call: Call, width: int, number: int) -> None:
        if self.device.type != "cuda":
            return
        with _torch.on_device(self.device):
            on_host = torch.empty(front.shape, dtype=torch.float64, pin_memory=True)
            on_host.copy_(front, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        self._late.append((arrived, on_host, call, width, number))

    def _check_late(self) -> None:
        while self._late and self._late[0][0].query():
            _, front, call, width, number = self._late.popleft()
            self._judge(front, call, width, number)

    def _judge(self, front: Tensor, call: Call, width: int, number: int) -> None:
        if self._examine(front, call, width, number) and call.kind in (FORWARD, MOMENTS):
            self.warn_broken(None, call.layer)


_LATEST = 4096  # exchanges whose calls are remembered: a device is never so many behind its host

summed_length = lru_cache(maxsize=4096)(wire.summed_length)


@lru_cache(maxsize=4096)
def tag(call: Call, width: int) -> int:
    """``wire.tag`` without a number, kept."""
    return wire.tag(call, width)
