"""What a rank tells its peers before it leaves them: whom it lost, and why.

A farewell has an odd number of bytes, where frames are multiples of 8, so that the length alone tells them apart.
"""

from __future__ import annotations

import json
from typing import NamedTuple

LIMIT = 4095
"""Bytes of the longest farewell."""

_MAGIC = b"sbnF"


class Farewell(NamedTuple):
    """
    Attributes:
        lost: ranks of the group, and why each is lost.
        timed_out: whether they are lost because they came too late.
        exchanges: how many exchanges the sender had completed.
    """

    lost: dict[int, str]
    timed_out: bool
    exchanges: int


def encode(said: Farewell) -> bytes:
    """A packet that says so; long reasons are cut."""
    room = LIMIT
    while True:
        reasons = {rank: clean(reason, room) for rank, reason in said.lost.items()}
        packet = _MAGIC + json.dumps([reasons, said.timed_out, said.exchanges], ensure_ascii=False).encode()
        if len(packet) < LIMIT:
            return packet + b" " * (1 - len(packet) % 2)
        room //= 2


def decode(packet: bytes) -> Farewell | None:
    """What ``packet`` says, or None if it is no farewell."""
    if not packet.startswith(_MAGIC):
        return None
    try:
        lost, timed_out, exchanges = json.loads(packet[len(_MAGIC) :])
        return Farewell({int(rank): str(reason) for rank, reason in lost.items()}, bool(timed_out), int(exchanges))
    except (ValueError, TypeError, AttributeError):
        return None


def clean(text: str, limit: int) -> str:
    """``text`` as can be sent: without lone surrogates, and of at most ``limit`` bytes."""
    return text[:limit].encode(errors="backslashreplace")[: max(0, limit)].decode(errors="ignore")


def describe(error: BaseException) -> str:
    """``KeyboardInterrupt``, or ``ValueError: what it says``, whatever the exception's own methods do."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        return name
    return f"{name}: {text}" if text else name
