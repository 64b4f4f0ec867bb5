"""The per-rank arithmetic of synchronized batch normalization, as plain formulas in float64: the ground truth.

Shapes and formulas stand here alone; the functions of the same names in the other modules do the same. Everything is
computed in float64, and only the result is rounded to the dtype of the input. Nothing is tuned: tests compare the fast
kernels with this.

Shapes and dtypes, for all functions::

    x, grad, residual     (N, C, *), two or more dimensions, any strides, possibly empty; float16, bfloat16, float32
                          or float64; grad and residual may differ from x in dtype and strides
    mask                  boolean, (N, 1, *) or 1 in place of any of these, True at valid positions; None: all
    weight, bias          (C,) of any floating dtype; None for ones and zeros
    mean, invstd          float64 (C,); invstd is 1 / sqrt(var + eps)
    stats                 float64 (2C + 1,): mean, invstd and the count n of the global batch
    message, shared       see syncbn.messages

*Plain* forms are steps that know neither masks nor messages; ``aten`` and ``triton`` have them. *Fused* forms are what
a layer calls, two each way; ``native`` and ``triton`` have them, and ``composed`` makes them out of plain ones. All
fused forms take what is not finite in x at a position outside of the mask as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.channels import along_channels
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Shared, fill
from syncbn.moments import Moments

fuses_relu = True
"""Whether the fused forms of the backward, given ``relu``, cheaply recompute the output's sign themselves. Where it is
costly, ``passed_gradient`` is called once before them."""

# ---- plain forms


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """Local moments per channel, packed in a float64 vector of length ``2C + 1``; zeros if x is empty.

    ``(n, mean, m2)`` with ``mean = sum(x) / n`` and ``m2 = sum((x - mean)^2)``; with ``raw`` ``(n, sum(x), sum(x^2))``.
    """
    return _pack(_moments(_columns(x), _columns(torch.ones_like(x))), raw)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """``y = act((x - mean) * invstd * weight + bias + residual)``, in the dtype and memory layout of x."""
    y = (x.double() - _spread(mean, x)) * _spread(invstd, x)
    if weight is not None:
        y = y * _spread(weight, x)
    if bias is not None:
        y = y + _spread(bias, x)
    if residual is not None:
        y = y + residual.double()
    return torch.empty_like(x).copy_(y.relu() if relu else y)


def relu_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient before the rectifier: ``grad`` where the recomputed output is positive or NaN, else zero.

    In the dtype of grad and the layout of x. The sign is that of ``normalize``'s output to the last bit.
    """
    output = normalize(x, mean, invstd, weight, bias, residual)
    return torch.empty_like(x, dtype=grad.dtype).copy_(torch.where(output <= 0, 0, grad))


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """``(sum g, sum g * xhat)`` per channel with ``xhat = (x - mean) * invstd``.

    One float64 vector of length ``2C``; zeros if x is empty.
    """
    xhat = (_columns(x) - mean[:, None]) * invstd[:, None]
    g = _columns(grad)
    return torch.cat([g.sum(1), (g * xhat).sum(1)])


def input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """``dx = weight * invstd * (g - sum_g / n - xhat * sum_gxhat / n)``, in the dtype and layout of x.

    Args:
        sums: float64 ``(2C,)``, the result of ``gradient_sums`` summed over ranks.
        count: float64 scalar tensor: n, elements per channel over all ranks. Zero counts as one.
    """
    return _input_gradient(grad.double(), x, None, mean, invstd, weight, sums, count)


# ---- fused forms


def pack_moments(x: Tensor, mask: Tensor | None, message: Message) -> None:
    """Write the ``moments`` of the valid positions into a message, and the slots ahead of it, as in ``Message``."""
    valid = _columns(torch.ones_like(x) if mask is None else mask.expand_as(x))
    fill(message, _pack(_moments(_columns(_clean(x, mask)), valid), message.raw))


def normalize_shared(
    x: Tensor, mask: Tensor | None, shared: Shared, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, relu: bool, eps: float, running: Running | None,
) -> tuple[Tensor, Tensor, bool | None]:  # fmt: skip
    """``normalize`` by the moments of all ranks; and ``running``, if there is one, moves towards these, in place.

    Returns:
        ``(y, stats, finite)``: y in dtype and layout of x; ``finite`` says whether all statistics are, or is None where
        looking would wait for a device.
    """
    total = shared.moments()
    if running is not None:
        running.move(total)
    invstd = total.invstd(eps)
    y = normalize(_clean(x, mask), total.mean, invstd, weight, bias, residual, relu)
    finite = bool(torch.isfinite(total.mean).all() and torch.isfinite(total.m2).all())
    return y, torch.cat([total.mean, invstd, total.n.view(1)]), finite


operands = Operands
"""What the three functions of the backward take: from the arguments of ``Operands``."""


def pack_gradient_sums(
    operands: Operands, message: Message | None, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Write ``gradient_sums`` over all positions, valid or not, into a message's payload, if there is one.

    The gradient is what passes the rectifier, if ``relu``.

    Args:
        dtypes: of the gradients of weight and bias; None for those that are not wanted.

    Returns:
        ``(dweight, dbias)``: ``sum g * xhat`` and ``sum g``, each of shape ``(C,)`` or None.
    """
    g = passed_gradient(operands) if operands.relu else operands.grad
    sums = gradient_sums(g, _clean(operands.x, operands.mask), *_mean_and_invstd(operands.stats))
    if message is not None:
        fill(message, sums)
    total, dot = sums.chunk(2)
    return None if dtypes[0] is None else dot.to(dtypes[0]), None if dtypes[1] is None else total.to(dtypes[1])


def shared_input_gradient(operands: Operands, shared: Shared, wants_g: bool) -> tuple[Tensor, Tensor | None]:
    """``dx = weight * invstd * (g - m * (sum_g / n + xhat * sum_gxhat / n))`` with the sums of all ranks; m the mask.

    It is zero where x is not finite and not valid.

    Returns:
        ``(dx, g)``: dx in dtype and layout of x; g, what passes the rectifier, as from ``passed_gradient``, or None
        where it is not wanted.
    """
    g = passed_gradient(operands) if operands.relu else operands.grad
    _, x, mask, stats, weight, *_ = operands
    dx = _input_gradient(g.double(), _clean(x, mask), mask, *_mean_and_invstd(stats), weight, shared.sum(), stats[-1])
    if mask is not None:
        dx = torch.where(mask | x.isfinite(), dx, 0)
    return dx, g if wants_g else None


def passed_gradient(operands: Operands) -> Tensor:
    """``relu_gradient``, where x may have padding that is not finite. For operands with ``relu``."""
    grad, x, mask, stats, weight, bias, residual, _ = operands
    return relu_gradient(grad, _clean(x, mask), *_mean_and_invstd(stats), weight, bias, residual)


def _moments(columns: Tensor, valid: Tensor) -> Moments:
    n = valid[0].sum() if len(valid) else valid.new_zeros(())
    values = torch.where(valid > 0, columns, 0)
    mean = values.sum(1) / n.clamp(min=1)
    return Moments(n, mean, (valid * (values - mean[:, None])).square().sum(1))


def _pack(moments: Moments, raw: bool) -> Tensor:
    n, mean, m2 = moments[:3]
    return torch.cat([n[None], n * mean, m2 + n * mean.square()] if raw else [n[None], mean, m2])


def _input_gradient(
    g: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor,
    count: Tensor,
) -> Tensor:  # fmt: skip
    sum_g, sum_gxhat = (sums / count.clamp(min=1)).chunk(2)
    xhat = (x.double() - _spread(mean, x)) * _spread(invstd, x)
    through = _spread(sum_g, x) + xhat * _spread(sum_gxhat, x)
    dx = g - (through if mask is None else torch.where(mask, through, 0))
    return torch.empty_like(x).copy_(dx * _spread(invstd if weight is None else invstd * weight.double(), x))


def _clean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.empty_like(x).copy_(torch.where(mask | x.isfinite(), x, 0))


def _mean_and_invstd(stats: Tensor) -> tuple[Tensor, Tensor]:
    channels = len(stats) // 2
    return stats[:channels], stats[channels:-1]


def _columns(x: Tensor) -> Tensor:
    """x as float64 of shape ``(C, elements per channel)``."""
    return x.double().movedim(1, 0).flatten(1)


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """A per-channel vector as float64 that broadcasts against x."""
    return along_channels(vector.double(), x)
