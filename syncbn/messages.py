"""The two forms of a message that kernels see: one to fill in, and one that all ranks have filled in.

A link hands out a ``Message``, a kernel writes this rank's numbers into it, the link shares it and returns ``Shared``.
So a kernel knows nothing of process groups, and a link nothing of batch norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import Moments, from_raw, merge, unpack


class Message(NamedTuple):
    """Room for the numbers of this rank.

    Attributes:
        whole: float64 vector: head, payload and padding. Where the kernel writes the head (see ``number``), all of it
            is to be written.
        payload: float64 vector of shape ``(width,)``, a view of ``whole``: what the kernel writes.
        raw: whether moments are written as ``(n, sum x, sum x^2)``, which add up over ranks, and not as
            ``(n, mean, m2)``, which merge.
        tag: of the call, below 2^26; see ``number``.
        number: this rank's, counted from one, where the kernel writes the slots in front of the payload as well (and
            zeros behind it), because the message lives on a device; 0 where the link does that.
        header: float64 whose bytes the kernel writes in front of ``whole``, where it writes the slots too; None for
            nothing.
    """

    whole: Tensor
    payload: Tensor
    raw: bool
    tag: int = 0
    number: int = 0
    header: Tensor | None = None


class Report:
    """Where a kernel that reads what all ranks wrote on a device tells the host what the check slots there say.

    Attributes:
        record: float64 in memory of the host that kernels write to: where the slots say that ranks differ, refuse or
            are not finite, ``exchange`` and behind it the summed slots, or each rank's header and slots; 0 in front
            where there is nothing to tell.
        exchange: the link's number for the exchange, above 0.
        ranks: how many there are.
        unread: whether no kernel has been asked to look so far.
    """

    __slots__ = ("exchange", "ranks", "record", "unread")

    def __init__(self, record: Tensor, exchange: int, ranks: int) -> None:
        self.record, self.exchange, self.ranks, self.unread = record, exchange, ranks, True

    def taken(self) -> tuple[Tensor, int, int]:
        """``(record, exchange, ranks)``, for a kernel that looks at the slots."""
        self.unread = False
        return self.record, self.exchange, self.ranks


class Shared(NamedTuple):
    """The numbers of all ranks.

    Attributes:
        parts: float64, shape ``(W, width)`` with the payload of each rank in rank order, or ``(1, width)`` with their
            sum. Rows are contiguous, their distance is any. Valid until the next exchange of the link.
        raw: as in ``Message``.
        report: on a device, for a kernel to say what the check slots say: they lie in front of each part.
    """

    parts: Tensor
    raw: bool
    report: Report | None = None

    def on(self, device: torch.device) -> Shared:
        """The same on a device."""
        return self if self.parts.device == device else Shared(self.parts.to(device), self.raw)

    def sum(self) -> Tensor:
        """The sum over ranks, shape ``(width,)``, added in rank order: equal in bits on all ranks. Perhaps a view."""
        if len(self.parts) == 1:
            return self.parts[0]
        total = self.parts[0].clone()
        for part in self.parts[1:]:
            total += part
        return total

    def moments(self, read: Callable[[Tensor], Moments] = unpack) -> Moments:
        """The moments of the global batch, equal in bits on all ranks. Perhaps views.

        Args:
            read: how they are packed in a payload.
        """
        return from_raw(read(self.sum())) if self.raw else merge([read(part) for part in self.parts.unbind()])


def fill(message: Message, payload: Tensor) -> None:
    """Write a payload into a message, and what goes around it where the kernel writes that too."""
    message.payload.copy_(payload)
    if message.number:
        write_around(message)


def write_around(message: Message) -> None:
    """Write the slots in front of a message's payload, and the zeros behind it."""
    payload, whole = message.payload, message.whole
    start = payload.storage_offset() - whole.storage_offset()
    broken = (~torch.isfinite(payload.sum())).double()
    if message.header is not None:
        length = message.header.shape[0]
        whole.as_strided((length,), (1,), whole.storage_offset() - length).copy_(message.header)
    whole[:start].zero_()
    whole[start + payload.numel() :].zero_()
    for slot, value in ((0, message.tag), (1, message.tag**2), (4, broken), (5, broken * message.number)):
        whole[slot] = value
