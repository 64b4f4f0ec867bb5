"""The synchronized training forward as torch.compile sees it: one operator, made of plain formulas and exchanges.

The compiler meets ``syncbn::batch_norm`` in the program and traces through it when it makes its graph: the formulas of
the eager path (``autograd.py``), without kernels of ours, so that they fuse: both sums in one loop over x, and
normalization, residual and ReLU in another. What differs from the eager path:

* the statistics are measured about a pivot near the data, the mean of the first sample, in one read;
* running statistics are computed out of place and then copied;
* no double backward (AOTAutograd has none, and says so).

**Exchanges.** On a CPU the operator ``syncbn::exchange``, opaque to the compiler, makes the exchange of the eager path,
over the same link: compiled and eager ranks go together, with the same errors. On other devices it is an all-reduce
that compilers know (a functional collective) of raw sums in float64, and errors are those of ``torch._assert_async``.

**Order.** Ranks must exchange in one order, and a compiler orders a graph as suits it, by shapes that differ between
ranks. So within a graph each exchange depends on the result of the one before, in the order of the program. And what a
forward has received is kept for the backward, never exchanged again: where a checkpoint computes a part of the
forward anew, a partitioner would place its exchanges between those of the backward as it likes.
"""

from __future__ import annotations

import itertools
import time
import weakref
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy

from syncbn import _torch, wire
from syncbn.channels import along_channels, compute_dtype, reduced_dims
from syncbn.comm import link_of
from syncbn.errors import PeerLostError
from syncbn.memory import Memory
from syncbn.messages import fill
from syncbn.moments import Moments, look, unpack, unpack_raw
from syncbn.wire import Call

_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define("exchange(Tensor payload, Tensor after, str group, int kind, str layer, int flags) -> Tensor")
_library.define(
    "batch_norm(Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, "
    "str group, str layer, int flags, int source) -> (Tensor, Tensor, Tensor, Tensor)"
)

# torch keeps compiled graphs on disk by the names of their operators, and does not know what this one is made of.
_SOURCE = zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("compiled", "moments")))

_ONE_VALUE = "batch normalization needs more than 1 value per channel when training, and the global batch"


def batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    group: dist.ProcessGroup | None,
    memory: Memory | None,
    call: Call,
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` with the statistics of all ranks.

    Arguments as in ``functional.batch_norm``; ``group`` None measures this rank alone; ``call`` is the forward's.

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward (on a device all-reduces of equal length).
    """
    name = "" if group is None else group.group_name
    y, n, mean, m2 = torch.ops.syncbn.batch_norm(
        x, mask, weight, bias, residual, eps, relu, name, call.layer, call.flags, _SOURCE
    )
    if memory is not None:
        memory.collect(Moments(n, mean, m2), x, mask)
    return y


@torch.library.impl(_library, "batch_norm", "CompositeImplicitAutograd")
def _batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    group: str,
    layer: str,
    flags: int,
    source: int,
) -> tuple[Tensor, ...]:
    if mask is not None:  # as kernels.clean_padding
        x = torch.where(mask | torch.isfinite(x), x, 0)
    outputs: tuple[Tensor, ...] = _Formulas.apply(x, weight, bias, residual, mask, eps, relu, group, layer, flags)
    return outputs


class _Formulas(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        relu: bool,
        group: str,
        layer: str,
        flags: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, mean, m2 = _exchange_moments(_local_moments(x, mask), group, Call(wire.FORWARD, layer, flags))[:3]
        invstd = (m2 / n.clamp(min=1.0) + eps).rsqrt()
        coarse = mean.to(compute_dtype(x))  # its rounding error goes into the shift
        scale = invstd if weight is None else invstd * weight
        shift = (coarse - mean) * scale
        vectors = _vectors(x, coarse, scale, shift if bias is None else shift + bias)
        y = _affine(x, vectors, residual)
        if relu:
            y = y.clamp(min=0)
        ctx.save_for_backward(x, weight, residual if relu else None, mask, vectors, mean, invstd, n)
        ctx.mark_non_differentiable(n, mean, m2)
        ctx.relu, ctx.group, ctx.call = relu, group, Call(wire.BACKWARD, layer, flags)
        return y.to(x.dtype), n, mean, m2

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, residual, mask, vectors, mean, invstd, n = ctx.saved_tensors
        dtype = compute_dtype(x)
        g = grad.to(dtype)
        if ctx.relu:
            g = torch.where(_affine(x, vectors, residual) > 0, g, 0)
        coarse = vectors[0]
        centred = x.to(dtype) - along_channels(coarse, x)
        total = _total(g)
        dot = (_total(g * centred) + (coarse - mean) * total) * invstd
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([total, dot])
            if ctx.group:
                sums = _in_order(sums, ctx.group, ctx.call)
            mean_g, mean_dot = (sums / n.clamp(min=1.0)).chunk(2)
            scale = invstd if weight is None else invstd * weight
            slope = mean_dot * invstd
            level = mean_g + slope * (coarse - mean)
            scales, slopes, levels = _spread(_vectors(x, scale, -slope * scale, -level * scale), x)
            through = centred * slopes + levels
            dx = (g * scales + (through if mask is None else torch.where(mask, through, 0))).to(x.dtype)
        dweight = dot.to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = total if ctx.needs_input_grad[2] else None
        dresidual = g.to(grad.dtype) if ctx.needs_input_grad[3] else None
        return dx, dweight, dbias, dresidual, None, None, None, None, None, None


# ---- formulas


def _local_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(n, mean[C], m2[C])`` in float64, measured in one read about the mean of the first sample (0 if there is none).

    With a mask about the mean of all valid positions, which the first sample may have none of: two reads.
    """
    positions = x.numel() // x.shape[1]
    if mask is None:
        first = x[:1].to(compute_dtype(x))
        pivot = first.sum(reduced_dims(x)) / torch.sym_max(first.numel() // x.shape[1], 1)
        centred = x.to(compute_dtype(x)) - along_channels(pivot, x)
        n = torch.full((1,), positions, dtype=torch.float64, device=x.device)
    else:
        n = mask.sum(dtype=torch.float64).view(1) * (positions / torch.sym_max(mask.numel(), 1))
        pivot = (_total(torch.where(mask, x, 0).to(compute_dtype(x))) / n.clamp(min=1.0)).to(compute_dtype(x))
        centred = torch.where(mask, x.to(compute_dtype(x)) - along_channels(pivot, x), 0)
    sums, squares = _total(centred), _total(centred * centred)
    offset = sums / n.clamp(min=1.0)
    return torch.cat([n, pivot.double() + offset, (squares - offset * sums).clamp(min=0.0)])


def _total(values: Tensor) -> Tensor:
    """Per-channel sum: in the compute dtype within a sample, in float64 over samples."""
    if values.dim() > 2:
        values = values.sum(list(range(2, values.dim())))
    return values.sum(0, dtype=torch.float64)


def _affine(x: Tensor, vectors: Tensor, residual: Tensor | None) -> Tensor:
    """The output before the activation, in the compute dtype; the backward computes it again for the ReLU's mask."""
    coarse, scale, shift = _spread(vectors, x)
    y = (x.to(coarse.dtype) - coarse) * scale + shift
    return y if residual is None else y + residual.to(y.dtype)


def _vectors(x: Tensor, *values: Tensor) -> Tensor:
    """Per-channel values in the compute dtype, as rows of one matrix that is computed before it is used.

    Left to itself, inductor computes them (in float64) anew for each element of the loop that uses them, and forward
    and backward together take 1.6 times as long, 2.4 times in channels_last.
    """
    matrix = torch.stack([value.to(compute_dtype(x)) for value in values])
    return _torch.not_fused_across(matrix)


def _spread(vectors: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(along_channels(vector, x) for vector in vectors.unbind())


# ---- exchanges


def _exchange_moments(local: Tensor, group: str, call: Call) -> Moments:
    """The moments of all ranks, for those of this rank in one vector."""
    if not group or _on_host(local):
        return unpack(_in_order(local, group, call) if group else local)
    n, mean, m2 = unpack(local)[:3]
    total = unpack_raw(_in_order(torch.cat([n.view(1), _sums(n, mean, m2)]), group, call))
    _torch.assert_async(total.n != 1, f"{_ONE_VALUE} has 1: {_describe(call, local.shape[0])}")
    return total


def _sums(n: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """``(S[C], Q[C])``, which add up over ranks."""
    return torch.cat([n * mean, m2 + n * mean * mean])


def _describe(call: Call, width: int) -> str:
    return call.describe(width, 0).replace(", call 0)", ")")  # a graph does not count its calls


# Per graph that is being traced, what its last exchange came to.
_last: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


def _in_order(payload: Tensor, group: str, call: Call) -> Tensor:
    """Exchange after the last exchange of the graph that is being traced, if there is one, and keep what comes of it.

    Where a checkpoint runs a part of the program again while the backward is traced, it looks up what each operator
    gave before, by their number: so the operators are the same with and without an exchange before.
    """
    graph = _torch.traced_graph()
    exchange = _exchange_on_host if _on_host(payload) else _all_reduce
    if graph is None:
        return exchange(payload, None, group, call)[0]
    known = len(graph.nodes)
    result, token = exchange(payload, _last.get(graph), group, call)
    new = itertools.islice(reversed(graph.nodes), len(graph.nodes) - known)
    exchanges = [node for node in new if node.target in _EXCHANGES]
    for node in exchanges:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if exchanges:  # and was not looked up
        _last[graph] = token
    return result


_EXCHANGES = (
    torch.ops.syncbn.exchange.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
)


def _on_host(payload: Tensor) -> bool:
    return payload.device.type == "cpu"


def _exchange_on_host(payload: Tensor, after: Tensor | None, group: str, call: Call) -> tuple[Tensor, Tensor]:
    result = torch.ops.syncbn.exchange(payload, payload if after is None else after, group, *call)
    return result, result


@torch.library.register_fake("syncbn::exchange", lib=_library)  # type: ignore[untyped-decorator, unused-ignore]
def _exchange_of_shapes(payload: Tensor, after: Tensor, group: str, kind: int, layer: str, flags: int) -> Tensor:
    return torch.empty_like(payload)


@torch.library.impl(_library, "exchange", "CPU")
def _exchange(payload: Tensor, after: Tensor, group: str, kind: int, layer: str, flags: int) -> Tensor:
    """What runs in the graph: ``(n, mean[C], m2[C])`` of all ranks for those of this one; backward, sums over ranks."""
    started = time.monotonic()
    link = link_of(_torch.group_named(group), payload.device)
    link.broke_off = False  # by an exchange before
    call = Call(kind, layer, flags)
    try:
        message = link.message(payload.numel(), call)
        if kind == wire.FORWARD and message.raw:
            n, mean, m2 = unpack(payload)[:3]
            payload = torch.cat([n.view(1), _sums(n, mean, m2)])
        fill(message, payload)
        shared = link.share(message, call)
    except PeerLostError as error:
        timeout = _torch.timeout_of(_torch.group_named(group), payload.device).total_seconds()
        if time.monotonic() - started < 0.9 * timeout:
            raise
        raise PeerLostError(f"{error} {_COMPILING}") from error
    if kind == wire.BACKWARD:
        return shared.sum().clone()
    total = look(shared.moments())
    if total.size == 1:
        raise ValueError(f"{_ONE_VALUE} over {link.size} rank(s) has 1: {_describe(call, payload.numel())}")
    if total.finite is False:
        link.warn_broken(shared, layer)
    return torch.cat([total.n.view(1), total.mean, total.m2])


_COMPILING = (
    "Or it was compiling: torch.compile compiles on each rank by itself, at the first step and for new shapes. The "
    "timeout of the process group must be longer than the longest compilation."
)


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
