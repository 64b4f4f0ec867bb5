"""The format of a message between ranks: the one place that knows it. Standard library only.

A message is a vector of float64: a head, the payload, and padding. There are two heads, and one message has both.

Where each rank's message is seen separately (one hop)::

    bytes 0..127   the header: magic, kind, flags, number of the exchange, width, checksum and tail of the layer's name
    then           ``width`` float64 of payload; or, after a refusal, the reason as text

  A first frame carries at most ``FRAME`` float64 of payload. The rest of a wider one follows once all headers agree.

Where only the sum over ranks is seen (all-reduce)::

    slot 0, 1      t and t^2, t being 16 bits of a checksum of the header
    slot 2, 3      1 and this rank's number (from one) if it refuses its call, else 0
    slot 4, 5      1 and this rank's number if its payload is not finite, else 0
    then           the payload, and zeros up to ``BUCKET``, or to a multiple of it

  With sums over W ranks, ``W * sum(t^2) == (sum t)^2`` holds only if all t agree (Cauchy-Schwarz; exact in float64
  while t * W < 2^26). The padding lets ranks in layers of different widths make the same all-reduce, and find out:
  in one of different lengths gloo aborts the process, and MPI truncates or mixes without a word.

Where all ranks' messages are gathered on a device, each is a header and behind it a message as for a sum: kernels
compare the slots, and the host reads the headers where they say something. The header's number of the exchange is zero:
a constant needs no copy to the device. Of a rank that refuses it has the reason in place of the layer's name.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

_LAYOUT = struct.Struct("<4sHHqqII96s")
_MAGIC = b"sbn1"
HEADER_BYTES = _LAYOUT.size
HEAD = HEADER_BYTES // 8
"""Float64 in front of the payload where each rank's message is seen."""
assert HEADER_BYTES == 8 * HEAD == 128
_FLAGS_AT = 6  # where the low byte of the flags lies in a header
_NUMBER_AT = 8

FRAME = 16384
"""Widest payload, in float64, of a first frame."""
FRAME_BYTES = HEADER_BYTES + 8 * FRAME

_SLOTS = struct.Struct("<6d")
SLOTS = 6
"""Float64 in front of the payload where only sums are seen."""
FRONT = HEAD + SLOTS
"""Float64 in front of the payload where messages are gathered on a device."""

BUCKET = 1024
"""Summed messages have at least this length, in float64. On a host, where the slots are looked at before anything else
is sent, it is the length of all first messages, and the rest of a wider payload follows when all agree; on a device and
in its compiled graphs messages have a multiple of it."""

# The kinds of exchange.
FORWARD, BACKWARD, MOMENTS, MOMENTS_BACKWARD, SUM, VOTE, COUNT, POPULATION, NOISE = range(1, 10)
COVARIANCE, COVARIANCE_BACKWARD, STATISTICS, LOSS_SCALE = range(10, 14)
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
    COVARIANCE: "global_covariance",
    COVARIANCE_BACKWARD: "backward of global_covariance",
    STATISTICS: "Statistics.over_ranks",
    LOSS_SCALE: "loss_scale",
}
_OF_NO_LAYER = (VOTE, COUNT, NOISE, LOSS_SCALE)
_OF_ANY_SIZE = (COVARIANCE, COVARIANCE_BACKWARD, STATISTICS)

# The flags. REFUSED: the sender's own call is wrong, and it takes part only so that its peers need not wait. The
# others: which inputs of the call want a gradient.
REFUSED = 1
INPUT_GRAD, WEIGHT_GRAD, BIAS_GRAD = 2, 4, 8
_FLAGS = {INPUT_GRAD: "input", WEIGHT_GRAD: "weight", BIAS_GRAD: "bias"}


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
        if self.kind in _OF_ANY_SIZE:
            return f"{_KINDS[self.kind]} ({width} numbers, call {number})"
        layer = f" of layer {self.layer!r}" if self.layer else " of a layer without a name"
        wanted = [name for bit, name in _FLAGS.items() if self.flags & bit]
        details = [f"{width // 2} channels"]
        if self.kind == FORWARD:
            details.append("gradients for " + ", ".join(wanted) if wanted else "no gradients")
        details.append(f"call {number}")
        return f"{_KINDS.get(self.kind, 'unknown exchange')}{layer} ({', '.join(details)})"


# ---- messages that are seen one by one


def encode(call: Call, width: int, number: int) -> bytes:
    """The header of exchange ``number`` of a group, for a payload of ``width`` float64."""
    checksum, tail = _name(call.layer)
    return _LAYOUT.pack(_MAGIC, call.kind, call.flags, number, width, checksum, 0, tail)


@lru_cache(maxsize=4096)
def _name(layer: str) -> tuple[int, bytes]:
    """The checksum of a layer's whole name, and its last 96 bytes: the tail of a long name says more than its head."""
    name = layer.encode(errors="backslashreplace")
    return zlib.crc32(name), name[-96:]


def decode(header: bytes) -> tuple[Call, int, int] | None:
    """``(call, width, number)``, or None if these are not the bytes of a header."""
    magic, kind, flags, number, width, checksum, _, tail = _LAYOUT.unpack(header)
    if magic != _MAGIC:
        return None
    tail = tail.rstrip(b"\0")
    layer = tail.decode(errors="replace")
    if zlib.crc32(tail) != checksum:  # names that differ only in front of the tail are told apart all the same
        layer = f"...{layer} [{checksum:08x}]"
    return Call(kind, layer, flags), width, number


def refusal(call: Call, reason: str, number: int) -> bytes:
    """The frame of a rank that cannot make its call: a header that says so, then the reason as text, cut to a frame."""
    text = reason[: 8 * FRAME].encode(errors="backslashreplace")[: 8 * FRAME]
    text += b"\0" * (-len(text) % 8)
    return encode(call._replace(flags=call.flags | REFUSED), len(text) // 8, number) + text


def refusal_on_device(call: Call, reason: str, width: int) -> bytes:
    """The header of a rank that cannot make its call, where there is no room for the reason but that of the name."""
    said = reason.encode(errors="backslashreplace")[:96].decode(errors="ignore")
    return encode(Call(call.kind, said, call.flags | REFUSED), width, 0)


def numbered(header: bytes, number: int) -> bytes:
    """A header, with the number of the exchange filled in."""
    return header[:_NUMBER_AT] + struct.pack("<q", number) + header[_NUMBER_AT + 8 :]


def is_refusal(frame: Any) -> bool:
    """Whether the first bytes of a frame are the header of a refusal."""
    return bool(frame[_FLAGS_AT] & REFUSED)


def reason_in(frame: bytes) -> str | None:
    """Why the rank that sent this frame refused its call; None if it did not."""
    decoded = decode(frame[:HEADER_BYTES])
    if decoded is None or not decoded[0].flags & REFUSED:
        return None
    return frame[HEADER_BYTES : HEADER_BYTES + 8 * decoded[1]].rstrip(b"\0").decode(errors="replace")


def explain_mismatch(headers: Mapping[int, bytes], reasons: Mapping[int, str], me: int) -> str:
    """The text of a RankMismatchError where each rank's header was seen.

    Args:
        headers: per rank of the group, the header that it sent.
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
    advice = _GRADIENTS if _differ_in_gradients_alone(list(headers.values())) else _ADVICE
    return f"ranks made different calls, so their statistics must not be mixed: {sides}. This is rank {me}. {advice}"


_ADVICE = (
    "All ranks must run the same layers in the same order and mode; "
    "syncbn.check_ranks_agree(model) compares the layers."
)


_GRADIENTS = (
    "Only the gradients that are wanted differ: a rank feeds an input that needs none, such as a constant in place of "
    "an empty batch. Call requires_grad_() on it, or let syncbn.uneven.joined feed the ranks that have no data left; "
    "and freeze the same parameters on all ranks."
)


def _differ_in_gradients_alone(headers: Sequence[bytes]) -> bool:
    found = [decode(header) for header in headers]
    calls = {(call._replace(flags=0), *rest) for call, *rest in (one for one in found if one is not None)}
    return None not in found and len(calls) == 1


def _describe(header: bytes) -> str:
    decoded = decode(header)
    if decoded is None:
        return "bytes that are no syncbn message"
    call, width, number = decoded
    return call.describe(width, number)


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(str(rank) for rank in ranks) if len(ranks) < 3 else ", ".join(map(str, ranks))


# ---- messages that are seen as a sum


def tag(call: Call, width: int, number: int = 0) -> int:
    """t: 16 bits of a checksum of the header. On a device the number is left out: a constant is not copied there."""
    return zlib.crc32(encode(call, width, number)) & 0xFFFF


def summed_length(width: int) -> int:
    """Length of a summed message with a payload of ``width``, in float64: a multiple of ``BUCKET``."""
    return -(-(SLOTS + width) // BUCKET) * BUCKET


def pack_slots(message: Any, t: int, *, refused: int = 0, broken: int = 0) -> None:
    """Write the slots at the head of a message.

    Args:
        message: a writable buffer of bytes.
        t: of the call.
        refused, broken: this rank's number, counted from one, if it refuses, or if its payload is not finite; else 0.
    """
    _SLOTS.pack_into(message, 0, t, t * t, refused > 0, refused, broken > 0, broken)


def read_slots(message: Any) -> tuple[float, ...]:
    """The slots at the head of a message."""
    return _SLOTS.unpack_from(message)


class Verdict(NamedTuple):
    """What the summed slots of all ranks say.

    Attributes:
        agree: all made the same call.
        refused, refused_by: how many ranks refused, and who if it was one, else -1.
        broken, broken_by: likewise for payloads that are not finite.
    """

    agree: bool
    refused: int
    refused_by: int
    broken: int
    broken_by: int


def judge(slots: Sequence[float], size: int) -> Verdict | None:
    """Read the sums of the slots of ``size`` ranks; None where they cannot be sums of slots: a corrupted exchange."""
    if not all(math.isfinite(value) and value == int(value) and value >= 0 for value in slots):
        return None
    t, squares, refused, refused_sum, broken, broken_sum = map(int, slots)
    for count, numbers in ((refused, refused_sum), (broken, broken_sum)):
        if not (count <= size and count <= numbers <= count * size):
            return None
    return Verdict(
        size * squares == t * t,
        refused, refused_sum - 1 if refused == 1 else -1,
        broken, broken_sum - 1 if broken == 1 else -1,
    )  # fmt: skip


def explain_disagreement(verdict: Verdict, mine: str, me: int) -> str:
    """The text of a RankMismatchError where only sums were seen; ``mine`` describes this rank's call."""
    if verdict.refused:
        who = f"rank {verdict.refused_by}" if verdict.refused == 1 else f"{verdict.refused} ranks"
        return (
            f"{who} could not make the call that rank {me} made ({mine}); the error is raised there. "
            "Nothing was exchanged; the group stays usable."
        )
    return f"ranks made different calls, so their statistics must not be mixed. This is rank {me}: {mine}. {_ADVICE}"
