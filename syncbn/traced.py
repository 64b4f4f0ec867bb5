"""The synchronized training forward as torch.compile sees it: plain formulas and one traceable all-reduce a way.

The mathematics of the eager path (``autograd.py``), without kernels of ours, so that the compiler fuses it: both sums
in one loop over x, and normalization, residual and ReLU in another. What differs from the eager path:

* the statistics are measured about a pivot near the data, the mean of the first sample, in one read;
* always an all-reduce (a functional collective) of raw sums in float64, on any backend; ranks must compile alike;
* errors that depend on values are RuntimeErrors of ``torch._assert_async``;
* running statistics are computed out of place and then copied;
* no double backward (AOTAutograd has none, and says so).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import header
from syncbn.header import Call
from syncbn.moments import Moments, unpack_raw

_HEAD = 2  # slots t and t^2 in front of the payload: see header.digest


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    relu: bool,
    group: dist.ProcessGroup | None,
    remember: Callable[[Moments], None] | None,
    layer: str,
    flags: int,
    mask: Tensor | None = None,
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` with the statistics of all ranks.

    Arguments as in ``functional.batch_norm``; ``group`` None measures this rank alone.

    Collectives: one all-reduce of 2C+3 float64 forward, one of 2C+2 backward.
    """
    if mask is not None:  # (as masked.finite_padding)
        x = torch.where(mask | torch.isfinite(x), x, 0)
    # Views, so that no tensor is passed twice, as x with itself as the residual: the compiler loses one gradient of it.
    bias, residual = (None if tensor is None else tensor.view_as(tensor) for tensor in (bias, residual))
    y, n, mean, m2 = _Traced.apply(x, weight, bias, residual, mask, eps, relu, group, layer, flags)
    if remember is not None:
        remember(Moments(n, mean, m2))
    return y


class _Traced(torch.autograd.Function):
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
        group: dist.ProcessGroup | None,
        layer: str,
        flags: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw = _sum_over_ranks(_raw_moments(x, mask), group, Call(header.FORWARD, layer, flags))
        n, mean, m2 = unpack_raw(raw)[:3]
        torch._assert_async(n != 1, "batch normalization needs more than 1 value per channel in the global batch")
        invstd = (m2 / n.clamp(min=1.0) + eps).rsqrt()
        coarse = mean.to(_compute_dtype(x))  # its rounding error goes into the shift
        scale = invstd if weight is None else invstd * weight
        shift = (coarse - mean) * scale
        vectors = _vectors(x, coarse, scale, shift if bias is None else shift + bias)
        y = _affine(x, vectors, residual)
        if relu:
            y = y.clamp(min=0)
        ctx.save_for_backward(x, weight, residual if relu else None, mask, vectors, mean, invstd, n)
        ctx.mark_non_differentiable(n, mean, m2)
        ctx.relu, ctx.group, ctx.call = relu, group, Call(header.BACKWARD, layer, flags)
        # Without a `to` that gives y itself: the compiler of torch 2.11 also returns all that is computed on the way,
        # and the gradient of a tensor that is returned twice is lost.
        return y if y.dtype == x.dtype else y.to(x.dtype), n, mean, m2

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, residual, mask, vectors, mean, invstd, n = ctx.saved_tensors
        dtype = _compute_dtype(x)
        g = grad.to(dtype)
        if ctx.relu:
            g = torch.where(_affine(x, vectors, residual) > 0, g, 0)
        coarse = vectors[0]
        centred = x.to(dtype) - coarse.view(_shape(x))
        total = _total(g)
        dot = (_total(g * centred) + (coarse - mean) * total) * invstd
        dx = None
        if ctx.needs_input_grad[0]:
            sums = _sum_over_ranks(torch.cat([total, dot]), ctx.group, ctx.call) / n.clamp(min=1.0)
            mean_g, mean_dot = sums.chunk(2)
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


def _raw_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(n, S[C], Q[C])`` in float64, measured in one read about the mean of the first sample (0 if there is none).

    With a mask about the mean of all valid positions, which the first sample may have none of: two reads.
    """
    positions = x.numel() // x.shape[1]
    if mask is None:
        first = x[:1].to(_compute_dtype(x))
        pivot = first.sum(_reduced(x)) / max(first.numel() // x.shape[1], 1)
        centred = x.to(_compute_dtype(x)) - pivot.view(_shape(x))
        n = torch.full((1,), positions, dtype=torch.float64, device=x.device)
    else:
        n = mask.sum(dtype=torch.float64).view(1) * (positions / max(mask.numel(), 1))
        pivot = (_total(torch.where(mask, x, 0).to(_compute_dtype(x))) / n.clamp(min=1.0)).to(_compute_dtype(x))
        centred = torch.where(mask, x.to(_compute_dtype(x)) - pivot.view(_shape(x)), 0)
    sums, squares = _total(centred), _total(centred * centred)
    mean = pivot.double() + sums / n.clamp(min=1.0)
    # m2 about the mean, then raw: shifting the squares about the pivot straight to zero would cancel twice.
    m2 = squares - sums * sums / n.clamp(min=1.0)
    return torch.cat([n, n * mean, m2 + n * mean * mean])


def _sum_over_ranks(payload: Tensor, group: dist.ProcessGroup | None, call: Call) -> Tensor:
    if group is None:
        return payload
    size = group.size()
    t = _digest(call.kind, call.layer, call.flags, payload.shape[0])
    slots = torch.full((_HEAD,), t, dtype=payload.dtype, device=payload.device)
    slots = slots.cumprod(0)  # t, t^2
    message = torch.ops._c10d_functional.all_reduce(torch.cat([slots, payload]), "sum", group.group_name)
    message = torch.ops._c10d_functional.wait_tensor(message)
    torch._assert_async(message[1] * size == message[0] * message[0], f"ranks made different calls: {call}")
    return message[_HEAD:]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _digest(kind: int, layer: str, flags: int, width: int) -> float:
    return float(header.digest(header.encode(Call(kind, layer, flags), width, 0)))


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
    and backward together take 1.6 times as long, 2.4 times in channels_last. ``wait_tensor`` does nothing to a tensor
    that no collective is working on, except that a compiler may not move computations across it.
    """
    matrix = torch.stack([value.to(_compute_dtype(x)) for value in values])
    return torch.ops._c10d_functional.wait_tensor(matrix)


def _spread(vectors: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(vector.view(_shape(x)) for vector in vectors.unbind())


def _shape(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
