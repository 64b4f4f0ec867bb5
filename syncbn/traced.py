"""The synchronized training forward as torch.compile sees it: plain formulas and one traceable all-reduce each way.

The same mathematics as the eager path (``autograd.py``), written without kernels of ours, so that the compiler fuses it:
both sums in one loop over x, and normalization, residual and ReLU in another. What differs from the eager path:

* the statistics are measured about a pivot near the data, the mean of the first sample, in one read;
* always an all-reduce (a functional collective), on every backend, of raw sums in float64; ranks must be compiled alike;
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
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` with the statistics of all ranks.

    Arguments as in ``functional.batch_norm``; ``group`` None measures this rank alone.

    Collectives: one all-reduce of 2C+3 float64 forward, one of 2C+2 backward.
    """
    y, n, mean, m2 = _Traced.apply(x, weight, bias, residual, eps, relu, group, layer, flags)
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
        eps: float,
        relu: bool,
        group: dist.ProcessGroup | None,
        layer: str,
        flags: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw = _raw_moments(x)
        n, mean, m2, _ = unpack_raw(_sum_over_ranks(raw, group, Call(header.FORWARD, layer, flags)))
        torch._assert_async(n != 1, "batch normalization needs more than 1 value per channel in the global batch")
        invstd = (m2 / n.clamp(min=1.0) + eps).rsqrt()
        y = _affine(x, mean, invstd, weight, bias, residual)
        if relu:
            y = y.clamp(min=0)
        ctx.save_for_backward(x, weight, bias if relu else None, residual if relu else None, mean, invstd, n)
        ctx.mark_non_differentiable(n, mean, m2)
        ctx.relu, ctx.group, ctx.call = relu, group, Call(header.BACKWARD, layer, flags)
        return y.to(x.dtype), n, mean, m2

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mean, invstd, n = ctx.saved_tensors
        dtype, dims, channels = _compute_dtype(x), _reduced(x), x.shape[1]
        g = grad.to(dtype)
        if ctx.relu:
            g = torch.where(_affine(x, mean, invstd, weight, bias, residual) > 0, g, 0)
        xhat = _centred(x, mean) * _spread(invstd, x)
        sums = torch.cat([g.sum(dims, dtype=torch.float64), (g * xhat).sum(dims, dtype=torch.float64)])
        dx = None
        if ctx.needs_input_grad[0]:
            means = _sum_over_ranks(sums, ctx.group, ctx.call) / n.clamp(min=1.0)
            scale = invstd if weight is None else invstd * weight
            dx = (g - _spread(means[:channels], x) - xhat * _spread(means[channels:], x)) * _spread(scale, x)
            dx = dx.to(x.dtype)
        dweight = sums[channels:].to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sums[:channels] if ctx.needs_input_grad[2] else None
        dresidual = g.to(grad.dtype) if ctx.needs_input_grad[3] else None
        return dx, dweight, dbias, dresidual, None, None, None, None, None


def _raw_moments(x: Tensor) -> Tensor:
    """``(n, S[C], Q[C])`` in float64, measured in one read about the mean of the first sample (zero if there is none)."""
    dims, channels = _reduced(x), x.shape[1]
    first = x[:1].to(_compute_dtype(x))
    pivot = first.sum(dims) / max(first.numel() // channels, 1)
    centred = x.to(_compute_dtype(x)) - pivot.view(_shape(x))
    sums = centred.sum(dims, dtype=torch.float64)
    squares = (centred * centred).sum(dims, dtype=torch.float64)
    n = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
    mean = pivot.double() + sums / n.clamp(min=1.0)
    # m2 about the mean, then raw: shifting the squares about the pivot straight to zero would cancel twice.
    m2 = squares - sums * sums / n.clamp(min=1.0)
    return torch.cat([n, n * mean, m2 + n * mean * mean])


def _sum_over_ranks(payload: Tensor, group: dist.ProcessGroup | None, call: Call) -> Tensor:
    if group is None:
        return payload
    size = group.size()
    t = _digest(call.kind, call.layer, call.flags)
    slots = torch.full((_HEAD,), t, dtype=payload.dtype, device=payload.device)
    slots = slots.cumprod(0)  # t, t^2
    message = torch.ops._c10d_functional.all_reduce(torch.cat([slots, payload]), "sum", group.group_name)
    message = torch.ops._c10d_functional.wait_tensor(message)
    torch._assert_async(message[1] * size == message[0] * message[0], f"ranks made different calls: {call}")
    return message[_HEAD:]


@torch.compiler.assume_constant_result
def _digest(kind: int, layer: str, flags: int) -> float:
    return float(header.digest(header.encode(Call(kind, layer, flags), 0, 0)))


def _affine(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The output before the activation, in the compute dtype; the backward computes it again for the ReLU's mask."""
    y = _centred(x, mean) * _spread(invstd if weight is None else invstd * weight, x)
    if bias is not None:
        y = y + _spread(bias, x)
    return y if residual is None else y + residual.to(y.dtype)


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean`` without the rounding error of a float32 mean."""
    dtype = _compute_dtype(x)
    coarse = mean.to(dtype)
    return (x.to(dtype) - coarse.view(_shape(x))) - _spread(mean - coarse, x)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    return values.to(_compute_dtype(x)).view(_shape(x))


def _shape(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
