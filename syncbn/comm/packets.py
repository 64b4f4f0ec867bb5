"""The compiled part of exchanges over sockets (``packets.c``): what is done in Python where it is not there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

try:
    from syncbn.comm import _packets
except ImportError:  # no compiler, or not Linux
    _packets = None  # type: ignore[assignment]

Course = tuple[int, int, int]

swap: Callable[[bytearray, memoryview, list[memoryview], int], Course | None] | None = getattr(_packets, "swap", None)
"""``swap(ends, frame, buffers, looking)``: write a frame to all ends (``pack``) and read a packet of each into its
buffer, looking for so many nanoseconds before it sleeps.

Returns None if all packets are as long as the frame. Else how many peers were written to, how many packets were read,
and the length of one more that has another length, or -1.
"""

add_rows: Callable[[bytearray, int, int, int, int, int], None] | None = getattr(_packets, "add_rows", None)
"""``add_rows(rows, start, step, count, total, width)``: write to the address ``total`` the sum of ``count`` rows of
``width`` float64, in order; they begin at byte ``start`` of ``rows``, ``step`` bytes apart."""


def pack(descriptors: Sequence[int]) -> bytearray:
    """The ends that ``swap`` writes to and reads from; it keeps notes of its own with them."""
    return bytearray(struct.pack(f"2i{len(descriptors)}i", 0, 0, *descriptors))
