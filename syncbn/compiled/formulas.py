"""The synchronized training forward as plain formulas, which a compiler fuses: for tensors without compiled loops.

The formulas of the eager path (``autograd.py``). What differs:

* the statistics are measured about a pivot near the data, the mean of the first sample, in one read;
* no double backward (AOTAutograd has none, and says so).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn import _torch, wire
from syncbn.channels import along_channels, compute_dtype, reduced_dims
from syncbn.compiled import exchange
from syncbn.wire import Call


class Formulas(torch.autograd.Function):
    """Apply to the arguments of ``forward``; returns ``(y, moments)``, of which only ``y`` has a gradient.

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward if x needs a gradient.
    """

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
    ) -> tuple[Tensor, Tensor]:
        n, mean, m2 = exchange.share_moments(_local_moments(x, mask), group, Call(wire.FORWARD, layer, flags))[:3]
        invstd = (m2 / n.clamp(min=1.0) + eps).rsqrt()
        coarse = mean.to(compute_dtype(x))  # its rounding error goes into the shift
        scale = invstd if weight is None else invstd * weight
        shift = (coarse - mean) * scale
        vectors = _vectors(x, coarse, scale, shift if bias is None else shift + bias)
        y = _affine(x, vectors, residual)
        if relu:
            y = y.clamp(min=0)
        ctx.save_for_backward(x, weight, residual if relu else None, mask, vectors, mean, invstd, n)
        moments = torch.cat([n.view(1), mean, m2])
        ctx.mark_non_differentiable(moments)
        ctx.relu, ctx.group, ctx.call = relu, group, Call(wire.BACKWARD, layer, flags)
        return y.to(x.dtype), moments

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
                sums = exchange.share_sums(sums, ctx.group, ctx.call)
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
