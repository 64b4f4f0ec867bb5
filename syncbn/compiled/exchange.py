"""Exchanges in a compiled graph, in the order of the program.

On a CPU operators that are opaque to the compiler make the exchanges of the eager path, over the same link: compiled
and eager ranks go together, with the same errors. On other devices an exchange is an all-reduce that compilers know (a
functional collective) of raw sums in float64, and errors are those of ``torch._assert_async``.

Ranks must exchange in one order, and a compiler orders a graph as suits it, by shapes that differ between ranks. So
within a graph each exchange depends on the result of the one before, in the order of the program. And what a forward
has received is kept for the backward, never exchanged again: where a checkpoint computes a part of the forward anew, a
partitioner would place its exchanges between those of the backward as it likes.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from syncbn import _torch, wire
from syncbn.comm import Link, link_of
from syncbn.errors import PeerLostError
from syncbn.messages import Message, Shared, fill
from syncbn.moments import Moments, look, unpack, unpack_raw
from syncbn.wire import Call

library = torch.library.Library("syncbn", "FRAGMENT")
library.define("exchange(Tensor payload, Tensor? after, str group, int kind, str layer, int flags) -> Tensor")

_ONE_VALUE = "batch normalization needs more than 1 value per channel when training, and the global batch"


def share_moments(local: Tensor, group: str, call: Call) -> Moments:
    """The moments of all ranks, for those of this rank in one vector."""
    if not group:
        return unpack(local)
    if on_host(local):
        return unpack(share_sums(local, group, call))
    n, mean, m2 = unpack(local)[:3]
    total = unpack_raw(share_sums(torch.cat([n.view(1), _sums(n, mean, m2)]), group, call))
    _torch.assert_async(total.n != 1, f"{_ONE_VALUE} has 1: {_describe(call, local.shape[0])}")
    return total


def share_sums(payload: Tensor, group: str, call: Call) -> Tensor:
    """The sum of a vector over ranks; on a host, of moments in a forward, their union."""
    if not on_host(payload):
        return in_order(lambda after: _all_reduce(payload, after, group, call))

    def exchange(after: Tensor | None) -> tuple[Tensor, Tensor]:
        result = torch.ops.syncbn.exchange(payload, after, group, *call)
        return result, result

    return in_order(exchange)


def on_host(tensor: Tensor) -> bool:
    """Whether the exchanges for a tensor are those of the eager path."""
    return tensor.device.type == "cpu"


# ---- order

# Per graph that is being traced, what its last exchange came to.
_last: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


def in_order(exchange: Callable[[Tensor | None], tuple[Any, Tensor]]) -> Any:
    """Exchange after the last exchange of the graph that is being traced, if there is one, and keep what comes of it.

    Where a checkpoint runs a part of the program again while the backward is traced, it looks up what each operator
    gave before, by their number: so the operators are the same with and without an exchange before.

    Args:
        exchange: runs the operators, for what came of the exchange before; its result, and what the next one gets.
    """
    graph = _torch.traced_graph()
    if graph is None:
        return exchange(None)[0]
    known = len(graph.nodes)
    result, token = exchange(_last.get(graph))
    new = itertools.islice(reversed(graph.nodes), len(graph.nodes) - known)
    exchanges = [node for node in new if node.target in OPERATORS]
    for node in exchanges:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if exchanges:  # and was not looked up
        _last[graph] = token
    return result


OPERATORS = {
    torch.ops.syncbn.exchange.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
}
"""What exchanges in a graph."""


# ---- what runs in the graph


@torch.library.register_fake("syncbn::exchange", lib=library)  # type: ignore[untyped-decorator, unused-ignore]
def _exchange_of_shapes(payload: Tensor, after: Tensor | None, group: str, kind: int, layer: str, flags: int) -> Tensor:
    return torch.empty_like(payload)


@torch.library.impl(library, "exchange", "CPU")
def _exchange(payload: Tensor, after: Tensor | None, group: str, kind: int, layer: str, flags: int) -> Tensor:
    """``(n, mean[C], m2[C])`` of all ranks for those of this one; backward, sums over ranks."""
    call = Call(kind, layer, flags)

    def write(message: Message) -> None:
        if kind == wire.FORWARD and message.raw:
            n, mean, m2 = unpack(payload)[:3]
            fill(message, torch.cat([n.view(1), _sums(n, mean, m2)]))
        else:
            fill(message, payload)

    link, shared = share(write, payload.numel(), group, payload.device, call)
    return shared.sum().clone() if kind == wire.BACKWARD else total(link, shared, call)


def share(
    write: Callable[[Message], None], width: int, group: str, device: torch.device, call: Call
) -> tuple[Link, Shared]:
    """One exchange of the eager path: the link, and what all ranks have written.

    Raises:
        PeerLostError: also says what compiling has to do with it, where the timeout of the group has run out.
    """
    started = time.monotonic()
    link = link_of(_torch.group_named(group) if group else None, device)
    link.broke_off = False  # by an exchange before
    try:
        message = link.message(width, call)
        write(message)
        return link, link.share(message, call)
    except PeerLostError as error:
        timeout = _torch.timeout_of(_torch.group_named(group), device).total_seconds()
        if time.monotonic() - started < 0.9 * timeout:
            raise
        raise PeerLostError(f"{error} {_COMPILING}") from error


def total(link: Link, shared: Shared, call: Call) -> Tensor:
    """``(n, mean[C], m2[C])`` of all ranks, new.

    Raises:
        ValueError: one value per channel.
    """
    union = look(shared.moments())
    if union.size == 1:
        width = shared.parts.shape[1]
        raise ValueError(f"{_ONE_VALUE} over {link.size} rank(s) has 1: {_describe(call, width)}")
    if union.finite is False:
        link.warn_broken(shared, call.layer)
    return torch.cat([union.n.view(1), union.mean, union.m2])


_COMPILING = (
    "Or it was compiling: torch.compile compiles on each rank by itself, at the first step and for new shapes. The "
    "timeout of the process group must be longer than the longest compilation."
)


def _sums(n: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """``(S[C], Q[C])``, which add up over ranks."""
    return torch.cat([n * mean, m2 + n * mean * mean])


def _describe(call: Call, width: int) -> str:
    return call.describe(width, 0).replace(", call 0)", ")")  # a graph does not count its calls


def _all_reduce(payload: Tensor, after: Tensor | None, group: str, call: Call) -> tuple[Tensor, Tensor]:
    resolved = _torch.group_named(group)
    if _torch.is_fake(resolved):
        return payload, payload
    width = payload.shape[0]
    t = float(wire.tag(call, width))
    slots = torch.full((2,), t, dtype=payload.dtype, device=payload.device).cumprod(0)  # t, t^2
    none = payload.new_zeros(1)
    rest = payload.new_zeros(wire.SLOTS - 3)
    padding = payload.new_zeros(wire.summed_length(width) - wire.SLOTS - width)
    # Slot 2 counts refusals. Nobody refuses in a graph: it is zero, and comes out of the exchange before.
    summed = torch.cat([slots, none if after is None else after, rest, payload, padding])
    message = _torch.traced_sum(summed, resolved)
    agree = message[1] * resolved.size() == message[0] * message[0]
    _torch.assert_async(agree, f"ranks made different calls; this is rank {resolved.rank()}: {_describe(call, width)}")
    return message[wire.SLOTS : wire.SLOTS + width], message[2:3]
