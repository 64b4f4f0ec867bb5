"""The fused forms of ``reference`` out of plain ones: statistics and element-wise work are calls of another module.

Masks are composed here. The padding is filled with values that add nothing, so the plain forms need not know of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from syncbn.channels import compute_dtype, per_channel, reduced_dims
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Shared, fill
from syncbn.moments import look


class Composed:
    """A module of fused forms, made of one with the plain forms (``aten``, or ``triton`` for a masked input).

    Attributes:
        fuses_relu: False: to compute the gradient behind a rectifier once, and give that instead, costs less.
    """

    fuses_relu = False

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def pack_moments(self, x: Tensor, mask: Tensor | None, message: Message) -> None:
        """See ``reference``."""
        raw = message.raw
        fill(message, self.plain.moments(x, raw=raw) if mask is None else self._valid_moments(x, mask, raw))

    def normalize_shared(
        self, x: Tensor, mask: Tensor | None, shared: Shared, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, relu: bool, eps: float, running: Running | None,
    ) -> tuple[Tensor, Tensor, bool | None]:  # fmt: skip
        """See ``reference``."""
        total = look(shared.on(x.device).moments())
        if running is not None:
            running.move(total)
        invstd = total.invstd(eps)
        y = self.plain.normalize(_clean(x, mask), total.mean, invstd, weight, bias, residual, relu)
        return y, torch.cat([total.mean, invstd, total.n.view(1)]), total.finite

    operands = Operands

    def pack_gradient_sums(
        self, operands: Operands, message: Message | None, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """See ``reference``."""
        grad, x, mask, stats, weight, bias, residual, relu = operands
        mean, invstd, _ = _parts(stats)
        x = _clean(x, mask)
        if relu:
            grad = self.plain.relu_gradient(grad, x, mean, invstd, weight, bias, residual)
        sums = self.plain.gradient_sums(grad, x, mean, invstd)
        if message is not None:
            fill(message, sums)
        total, dot = sums.chunk(2)
        return tuple(None if d is None else v.to(d) for v, d in zip((dot, total), dtypes, strict=True))

    def shared_input_gradient(self, operands: Operands, shared: Shared, wants_g: bool) -> tuple[Tensor, Tensor | None]:
        """See ``reference``."""
        grad, x, mask, stats, weight, bias, residual, relu = operands
        mean, invstd, count = _parts(stats)
        given, x = x, _clean(x, mask)
        if relu:
            grad = self.plain.relu_gradient(grad, x, mean, invstd, weight, bias, residual)
        sums = shared.on(x.device).sum()
        dx = self.plain.input_gradient(grad, x, mean, invstd, weight, sums, count)
        if mask is not None:
            direct = (grad * per_channel(invstd if weight is None else invstd * weight, x)).to(dx.dtype)
            if given is not x:
                direct = torch.where(given == x, direct, 0)
            torch.where(mask, dx, direct, out=dx)  # the statistics do not depend on a padded position
        return dx, grad if wants_g else None

    def passed_gradient(self, operands: Operands) -> Tensor:
        """See ``reference``."""
        grad, x, mask, stats, weight, bias, residual, _ = operands
        mean, invstd, _ = _parts(stats)
        return self.plain.relu_gradient(grad, _clean(x, mask), mean, invstd, weight, bias, residual)

    def _valid_moments(self, x: Tensor, mask: Tensor, raw: bool) -> Tensor:
        """``plain.moments`` of the valid positions.

        The padding is filled with the mean of the valid positions, so it adds nothing to the sums of deviations from
        it. Two reads: a pivot from a part of the data, as without a mask, may be a part without valid positions.
        """
        positions = math.prod((x.shape[0], *x.shape[2:]))
        n = mask.sum(dtype=torch.float64) * (positions / max(mask.numel(), 1))
        divisor = n.clamp(min=1.0)
        may_multiply = _is_finite(x)  # a third of the time of where, but zero times NaN is NaN
        valid = x * mask if may_multiply else torch.where(mask, x, 0)
        pivot = (valid.sum(reduced_dims(x), dtype=compute_dtype(x)) / divisor).to(compute_dtype(x))
        del valid
        deviations = x - per_channel(pivot, x)
        deviations = deviations.mul_(mask) if may_multiply else torch.where(mask, deviations, 0)
        total, square = self.plain.moments(deviations, raw=True)[1:].chunk(2)
        mean = pivot + total / divisor
        m2 = (square - total * total / divisor).clamp_(min=0.0)
        if raw:
            return torch.cat([n.view(1), n * mean, m2 + n * mean * mean])
        return torch.cat([n.view(1), mean, m2])


def clean_padding(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with zeros for what is not finite at padded positions: itself, where looking is cheap and finds nothing."""
    return x if _is_finite(x) else torch.where(mask, x, torch.nan_to_num(x, 0.0, 0.0, 0.0))


def _clean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else clean_padding(x, mask)


def _is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` is known to be finite: where looking is cheap, on a CPU."""
    return x.is_cpu and math.isfinite(x.detach().sum(dtype=compute_dtype(x)).item())


def _parts(stats: Tensor) -> tuple[Tensor, ...]:
    channels = stats.numel() // 2
    return stats.split((channels, channels, 1))
