"""What a rank says of an exchange it makes, so that ranks that disagree find out.

Every message carries the identity of its call: which layer, which direction, how wide, with which gradient flags, and
the how-manieth exchange on this group it is. Two encodings:

* ``encode``: 128 bytes, compared byte for byte where each peer's message is seen separately;
* ``digest``: a 16-bit number t of those bytes, where only sums over ranks are seen: with slots (t, t^2) summed over W
  ranks, ``W * sum(t^2) == (sum t)^2`` holds only if all agree (Cauchy-Schwarz; exact in float64 while t * W < 2^26).

Nothing here communicates; the errors that ranks raise when they disagree or get lost are defined here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_LAYOUT = struct.Struct("<4sHHqqII96s")
_MAGIC = b"sbn1"
SIZE = _LAYOUT.size  # 128 bytes: sixteen float64
assert SIZE == 128
FLAGS_AT = 6  # where the low byte of the flags lies

# The kinds of exchange.
FORWARD, BACKWARD, MOMENTS, MOMENTS_BACKWARD, SUM, VOTE, COUNT, POPULATION, NOISE = range(1, 10)
_KINDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    MOMENTS: "global_moments",
    MOMENTS_BACKWARD: "backward of global_moments",
    SUM: "sum in a double backward",
    VOTE: "vote",
    COUNT: "count of samples",
    POPULATION: "population statistics",
    NOISE: "noise report",
}
_OF_NO_LAYER = (VOTE, COUNT, NOISE)

# The flags: what of this call wants a gradient, and "my own call is wrong, I only keep my peers from waiting".
REFUSED = 1
INPUT_GRAD, WEIGHT_GRAD, BIAS_GRAD = 2, 4, 8
_FLAGS = {INPUT_GRAD: "input", WEIGHT_GRAD: "weight", BIAS_GRAD: "bias"}


class RankMismatchError(RuntimeError):
    """The ranks of a process group made different calls: other layers, directions, widths or gradient flags, or one of
    them could not make its call at all. Every rank of the group raises in the same call; the group stays usable.

    Attributes:
        refused_by: the ranks of the group that could not make their call or gave up their step (see
            ``syncbn.steps.vote``); -1 for each whose number is not known. Empty if the calls differ.
    """

    def __init__(self, message: str = "", *, refused_by: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.refused_by = tuple(refused_by)


class PeerLostError(RuntimeError):
    """A rank of the process group did not take part in an exchange: it died, left, or came too late.
    The group cannot be used again."""


class Call(NamedTuple):
    """One kind of exchange that a layer makes.

    Attributes:
        kind: FORWARD, BACKWARD, ...
        layer: qualified name of the layer, "" when it has none; for POPULATION a digest of all layers.
        flags: bits of INPUT_GRAD, WEIGHT_GRAD, BIAS_GRAD, REFUSED.
    """

    kind: int
    layer: str = ""
    flags: int = 0

    def describe(self, width: int, number: int) -> str:
        """For an error message: ``forward of layer 'bn1' (64 channels, gradients for input and weight, call 12)``."""
        if self.kind in _OF_NO_LAYER:
            return f"{_KINDS[self.kind]} (call {number})"
        if self.kind == POPULATION:
            return f"{_KINDS[self.kind]} of {self.layer} (call {number})"
        layer = f" of layer {self.layer!r}" if self.layer else " of a layer without a name"
        wanted = [name for bit, name in _FLAGS.items() if self.flags & bit]
        details = [f"{width // 2} channels"]
        if self.kind == FORWARD:
            details.append("gradients for " + ", ".join(wanted) if wanted else "no gradients")
        details.append(f"call {number}")
        return f"{_KINDS.get(self.kind, 'unknown exchange')}{layer} ({', '.join(details)})"


def encode(call: Call, width: int, number: int) -> bytes:
    """The 128 bytes that identify exchange ``number`` on its group, with a payload of ``width`` float64."""
    name = call.layer.encode()
    # The tail of a long name says more than its head; the checksum covers the whole.
    return _LAYOUT.pack(_MAGIC, call.kind, call.flags, number, width, zlib.crc32(name), 0, name[-96:])


def decode(header: bytes) -> tuple[Call, int, int] | None:
    """``(call, width, number)``, or None if these are not the bytes of a header."""
    magic, kind, flags, number, width, _, _, name = _LAYOUT.unpack(header)
    if magic != _MAGIC:
        return None
    return Call(kind, name.rstrip(b"\0").decode(errors="replace"), flags), width, number


def digest(header: bytes) -> int:
    """16 bits of the header, for transports that only sum."""
    return zlib.crc32(header) & 0xFFFF


def explain_mismatch(headers: Mapping[int, bytes], reasons: Mapping[int, str], me: int) -> str:
    """The text of a RankMismatchError where each rank's header was seen.

    Args:
        headers: per rank of the group, the 128 bytes that it sent.
        reasons: per rank that refused its own call, what it said.
        me: this rank.
    """
    if reasons:
        said = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))
        return (
            f"rank {_ranks(sorted(reasons))} could not make the call that rank {me} made "
            f"({_describe(headers[me])}): {said}. Nothing was exchanged; the group stays usable."
        )
    groups: dict[str, list[int]] = {}
    for rank, header in sorted(headers.items()):
        groups.setdefault(_describe(header), []).append(rank)
    sides = "; ".join(f"rank {_ranks(ranks)}: {what}" for what, ranks in groups.items())
    return (
        f"ranks made different calls, so their statistics must not be mixed: {sides}. This is rank {me}. "
        "All ranks must run the same layers in the same order and mode; "
        "syncbn.check_ranks_agree(model) compares the layers."
    )


def _describe(header: bytes) -> str:
    decoded = decode(header)
    if decoded is None:
        return "bytes that are no syncbn message"
    call, width, number = decoded
    return call.describe(width, number)


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(str(rank) for rank in ranks) if len(ranks) < 3 else ", ".join(map(str, ranks))
