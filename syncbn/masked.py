"""Batch normalization whose statistics come from the valid positions of a padded batch.

With m the mask (1 where valid), sums over the positions of all ranks, and every position normalized::

    n = sum(m)        mean = sum(m * x) / n        var = sum(m * (x - mean)^2) / n
    y = act(weight * xhat + bias + residual)       xhat = (x - mean) * invstd

    dx      = weight * invstd * (g - m * (sum(g) / n + xhat * sum(g * xhat) / n))
    dweight = local sum(g * xhat)        dbias = local sum(g)

The sums of the backward run over all positions, for every output depends on the statistics; a loss that leaves the
padding out has g = 0 there. With m = 1 everywhere these are the formulas of ``autograd``, and the messages are the
same: ranks with and without a mask go together.

What is not finite at padded positions counts as zero, so that no garbage in the padding gets into sums with g = 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from syncbn import header, kernels
from syncbn.autograd import Plan, SumFunction, centred, compute_dtype, per_channel, refuse_vmap
from syncbn.moments import Moments
from syncbn.recompute import unseen


def sequence_mask(lengths: Tensor, length: int) -> Tensor:
    """The mask of a padded batch of sequences, for inputs of shape ``(N, C, length)``::

        mask[i, 0, t] = t < lengths[i]

    For inputs with more dimensions, add them: ``sequence_mask(lengths, height)[..., None]`` for ``(N, C, H, W)``.

    Args:
        lengths: shape ``(N,)``, any integer dtype: valid positions per sample. Values above ``length`` mean all, values
            below 1 none; they are not read back, so that nothing waits for a device.
        length: the padded length, of the input's last dimension.

    Returns:
        Boolean tensor of shape ``(N, 1, length)`` on the device of ``lengths``, True at valid positions.

    Raises:
        ValueError: lengths of another shape or dtype.

    Collectives:
        None.

    >>> sequence_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[[1, 0, 0]], [[1, 1, 1]]]
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be an integer tensor of shape (N,), got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None]


def mask_error(input: Tensor, mask: Tensor) -> ValueError | None:
    """What is wrong with a mask for ``input``, of shape ``(N, C, *)``; None if nothing is."""
    shape, wanted = tuple(mask.shape), (input.shape[0], 1, *input.shape[2:])
    if mask.dtype != torch.bool:
        return ValueError(
            f"mask must be boolean, True at valid positions, got {mask.dtype} of shape {shape}; positions have no "
            "weights here: use mask.bool(), or a comparison"
        )
    fits = len(shape) == len(wanted) and all(size in (1, full) for size, full in zip(shape, wanted, strict=True))
    if not fits:
        hint = "; mask.unsqueeze(1) has it" if shape == wanted[:1] + wanted[2:] else ""
        return ValueError(
            f"mask must have shape {wanted}, or 1 in place of any of these, for an input of shape "
            f"{tuple(input.shape)}; got {shape}{hint}. All channels share one mask"
        )
    if mask.device != input.device:
        return ValueError(
            f"mask must be on the input's device: mask of shape {shape} on {mask.device}, input of shape "
            f"{tuple(input.shape)} on {input.device}"
        )
    return None


def sync_batch_norm(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan
) -> Tensor:
    """Apply ``MaskedBatchNormFunction``; its output alone."""
    return MaskedBatchNormFunction.apply(x, mask, weight, bias, residual, plan)[0]


class MaskedBatchNormFunction(torch.autograd.Function):
    """``y = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, statistics of all ranks' valid positions.

    Apply to ``(x, mask, weight, bias, residual, plan)``; returns ``(y, mean, invstd, count)``, of which only ``y`` has
    a gradient. Saves x, the mask and per-channel vectors (and the residual under a ReLU). Differentiable twice.

    Collectives: one exchange of 2C+1 float64 forward; one of 2C backward if x needs a gradient, none otherwise.
    """

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with unseen():
            total = _share(x, mask, plan)
            plan.refuse_one(total, x)  # (how many of this rank's positions are valid, only reading would tell)
            if plan.remember is not None:
                plan.remember(total)
            invstd = total.invstd(plan.eps)
            y = kernels.normalize(finite_padding(x, mask), total.mean, invstd, weight, bias, residual, plan.relu)
        return y, total.mean, invstd, total.n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, weight, bias, residual, plan = inputs
        _, mean, invstd, count = output
        if not plan.relu:
            bias = residual = None
        ctx.save_for_backward(x, mask, weight, bias, residual, mean, invstd, count)
        ctx.mark_non_differentiable(mean, invstd, count)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.bias_dtype = None if inputs[3] is None else inputs[3].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, mask, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        if grad is None:
            grad = torch.zeros_like(x)  # this rank uses no output, but its peers wait for its sums
        clean = finite_padding(x, mask)
        g = grad
        if ctx.plan.relu:
            statistics = clean.detach(), mean, invstd
            parameters = (None if t is None else t.detach() for t in (weight, bias, residual))
            if torch.is_grad_enabled():
                g = grad * kernels.relu_gradient(torch.ones_like(x), *statistics, *parameters)
            else:
                g = kernels.relu_gradient(grad, *statistics, *parameters)
        dx: Tensor | None = None
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        if torch.is_grad_enabled():
            dx, dweight, dbias = _differentiable_backward(ctx.plan, g, x, mask, weight)
        elif needs_x or needs_weight or needs_bias:
            sums = kernels.gradient_sums(g, clean, mean, invstd)
            dbias, dweight = sums[: mean.numel()], sums[mean.numel() :]
            if needs_x:
                total = ctx.plan.sum(sums, header.BACKWARD)
                dx = kernels.input_gradient(g, clean, mean, invstd, weight, total, count)
                scale = per_channel(invstd if weight is None else invstd * weight, x)
                direct = (g * scale).to(dx.dtype)  # the statistics do not depend on a padded position
                if clean is not x:
                    direct = torch.where(clean == x, direct, 0)
                torch.where(mask, dx, direct, out=dx)
        return (
            dx,
            None,
            dweight.to(weight.dtype) if needs_weight and dweight is not None else None,
            dbias.to(ctx.bias_dtype) if needs_bias and dbias is not None else None,
            g if needs_residual else None,
            None,
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refuses: see ``autograd.refuse_vmap``."""
        refuse_vmap()


class MaskedMomentsFunction(torch.autograd.Function):
    """Mean and biased variance of the valid positions of all ranks, as functions of this rank's ``x``.

    Apply to ``(x, mask, plan)``; returns float64 ``(mean, var, count)``. With the loss being the sum of the ranks'
    losses,

        dx = m * (sum_r dmean_r + 2 * (x - mean) * sum_r dvar_r) / n

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward. Differentiable any number of times.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        with unseen():
            total = _share(x, mask, plan)
            return total.mean, total.var, total.n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.plan = inputs
        mean, _, count = output
        ctx.save_for_backward(x, mask, mean, count)
        ctx.mark_non_differentiable(count)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: None) -> tuple[Tensor, None, None]:
        x, mask, mean, count = ctx.saved_tensors
        total = SumFunction.apply(torch.cat([grad_mean, grad_var]), replace(ctx.plan, kind=header.MOMENTS_BACKWARD))
        level, slope = (total / count.clamp(min=1.0)).chunk(2)
        x = torch.where(mask, x, 0)  # here already: zero times NaN is NaN in a second derivative as well
        dx = centred(x, mean) * per_channel(2.0 * slope, x) + per_channel(level, x)
        return torch.where(mask, dx, 0).to(x.dtype), None, None

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refuses: see ``autograd.refuse_vmap``."""
        refuse_vmap()


def _differentiable_backward(
    plan: Plan, g: Tensor, x: Tensor, mask: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias)`` out of differentiable steps; ``g`` is the gradient behind the ReLU."""
    given, x = x, finite_padding(x, mask)
    mean, var, count = MaskedMomentsFunction.apply(x, mask, replace(plan, kind=header.MOMENTS))
    dims = _reduced(x)
    invstd = (var + plan.eps).rsqrt()
    xhat = centred(x, mean) * per_channel(invstd, x)
    sums = torch.cat([g.sum(dims, dtype=torch.float64), (g * xhat).sum(dims, dtype=torch.float64)])
    dbias, dweight = sums.chunk(2)
    total = SumFunction.apply(sums, replace(plan, kind=header.SUM)) / count.clamp(min=1.0)
    level, slope = (per_channel(vector, x) for vector in total.chunk(2))
    scale = invstd if weight is None else invstd * weight
    dx = (g - torch.where(mask, level + xhat * slope, 0)) * per_channel(scale, x)
    if x is not given:
        dx = torch.where(mask | (x == given), dx, 0)
    return dx.to(x.dtype), dweight, dbias


def _share(x: Tensor, mask: Tensor, plan: Plan) -> Moments:
    """Measure the valid positions of ``x`` and merge with all ranks' moments."""
    return plan.merge(local_moments(x, mask, raw=plan.wants_raw))


def local_moments(x: Tensor, mask: Tensor, *, raw: bool) -> Tensor:
    """What ``kernels.moments`` packs, of the valid positions.

    The padding is filled with the mean of the valid positions, so it adds nothing to the sums of deviations from it.
    Two reads: a pivot from a part of the data, as without a mask, may be a part without valid positions.
    """
    channels = x.shape[1]
    positions = math.prod((x.shape[0], *x.shape[2:]))
    n = mask.sum(dtype=torch.float64) * (positions / max(mask.numel(), 1))
    divisor = n.clamp(min=1.0)
    may_multiply = _is_finite(x)  # a third of the time of where, but zero times NaN is NaN
    valid = x * mask if may_multiply else torch.where(mask, x, 0)
    pivot = (valid.sum(_reduced(x), dtype=compute_dtype(x)) / divisor).to(compute_dtype(x))
    del valid
    deviations = x - per_channel(pivot, x)
    deviations = deviations.mul_(mask) if may_multiply else torch.where(mask, deviations, 0)
    packed = kernels.moments(deviations, raw=True)
    total, square = packed[1 : channels + 1], packed[channels + 1 :]
    mean = pivot + total / divisor
    m2 = (square - total * total / divisor).clamp_(min=0.0)
    if raw:
        return torch.cat([n.view(1), n * mean, m2 + n * mean * mean])
    return torch.cat([n.view(1), mean, m2])


def finite_padding(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with zeros for what is not finite at padded positions: itself, where looking is cheap and finds nothing."""
    return x if _is_finite(x) else torch.where(mask, x, torch.nan_to_num(x, 0.0, 0.0, 0.0))


def _is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` is known to be finite: where looking is cheap, on a CPU."""
    return x.is_cpu and math.isfinite(x.detach().sum(dtype=compute_dtype(x)).item())


def _reduced(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]
