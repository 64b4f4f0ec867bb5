"""The frames of all ranks of a group in one exchange."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.comm.packets import add_rows


class Frames:
    """A frame of every rank in one piece of memory, as bytes and as float64.

    Args:
        size: ranks of the group.
        length: of a frame, in float64.
    """

    def __init__(self, size: int, length: int) -> None:
        self.length = length
        self.bytes = bytearray(8 * length * size)
        self._size = size
        view = memoryview(self.bytes)
        self.views = [view[8 * length * rank : 8 * length * (rank + 1)] for rank in range(size)]
        """Per rank, the bytes of its frame."""
        self._of_peers: dict[tuple[int, ...], list[memoryview]] = {}

    # Made when it is first used, and not with the link: that may happen within a transform of torch.func.
    @functools.cached_property
    def tensor(self) -> Tensor:
        """Shape ``(size, length)``, float64, of the same memory."""
        with _torch.outside_modes():
            return torch.frombuffer(self.bytes, dtype=torch.float64).view(self._size, self.length)

    def of_peers(self, peers: tuple[int, ...]) -> list[memoryview]:
        """The bytes of the frames of some ranks."""
        known = self._of_peers.get(peers)
        if known is None:
            known = self._of_peers[peers] = [self.views[peer] for peer in peers]
        return known

    def sum(self, start: int, width: int) -> Tensor:
        """The sum over ranks of ``width`` float64 from ``start`` on in each frame, in rank order: a new tensor."""
        if add_rows is None:
            total = self.tensor[0, start : start + width].clone()
            for part in self.tensor[1:, start : start + width]:
                total += part
            return total
        total = torch.empty(width, dtype=torch.float64)
        add_rows(self.bytes, 8 * start, 8 * self.length, self._size, total.data_ptr(), width)
        return total
