"""The per-rank arithmetic of synchronized batch normalization, as plain formulas in float64: the ground truth.

Every function takes and returns what its namesake in `syncbn.kernels.aten` does; that module documents the
shapes once. Here each line is the formula of the mathematics, everything is computed in float64, and only
the result is rounded to the dtype of the input. Nothing is tuned: tests compare the fast kernels with this.
"""

import torch
from torch import Tensor

__all__ = ["gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """Local moments per channel: `(count, mean, m2)`, or `(count, sum x, sum x^2)` with `raw`.

    Args:
        x: Input of shape `(N, C, *)`, any floating dtype and layout, possibly empty.
        raw: Pack raw sums, which add up over ranks, instead of the mean and the centred sum of squares.

    Returns:
        float64 vector of length `2C + 1`: the elements per channel, then two values per channel. Zeros if empty.
    """
    columns = _columns(x)
    count = columns.new_full((), columns.shape[1])
    divisor = count.clamp(min=1)
    mean = columns.sum(1) / divisor
    m2 = (columns - mean[:, None]).square().sum(1)
    if raw:
        return torch.cat([count[None], count * mean, m2 + count * mean.square()])
    return torch.cat([count[None], mean, m2])


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`y = act((x - mean) * invstd * weight + bias + residual)`, in the dtype and memory layout of x.

    Args:
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`, `1 / sqrt(var + eps)`.
        weight: `(C,)` of any floating dtype, or None for ones.
        bias: `(C,)` of any floating dtype, or None for zeros.
        residual: Added before the activation; same shape as x, or None.
        relu: Whether `act` is the rectifier instead of the identity.

    Returns:
        Tensor with the shape, dtype and layout of x.
    """
    y = (x.double() - _spread(mean, x)) * _spread(invstd, x)
    if weight is not None:
        y = y * _spread(weight, x)
    if bias is not None:
        y = y + _spread(bias, x)
    if residual is not None:
        y = y + residual.double()
    return torch.empty_like(x).copy_(y.relu() if relu else y)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """`(sum g, sum g * xhat)` per channel, with `xhat = (x - mean) * invstd`.

    Args:
        grad: Gradient of the loss with respect to the normalized output, shape of x.
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`.

    Returns:
        float64 vector of length `2C`. Zeros if empty.
    """
    xhat = (_columns(x) - mean[:, None]) * invstd[:, None]
    g = _columns(grad)
    return torch.cat([g.sum(1), (g * xhat).sum(1)])


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """`dx = weight * invstd * (g - sum_g / n - xhat * sum_gxhat / n)`, in the dtype and layout of x.

    Args:
        grad: Gradient of the loss with respect to the normalized output, shape of x.
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`.
        weight: `(C,)` of any floating dtype, or None for ones.
        sums: float64 `(2C,)`, the result of `gradient_sums` summed over ranks.
        count: float64 scalar tensor, elements per channel over all ranks. Zero counts as one.

    Returns:
        Tensor with the shape, dtype and layout of x.
    """
    sum_g, sum_gxhat = (sums / count.clamp(min=1)).chunk(2)
    xhat = (x.double() - _spread(mean, x)) * _spread(invstd, x)
    dx = grad.double() - _spread(sum_g, x) - xhat * _spread(sum_gxhat, x)
    dx = dx * _spread(invstd if weight is None else invstd * weight.double(), x)
    return torch.empty_like(x).copy_(dx)


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gradient before the rectifier: `grad` where the recomputed output is positive or NaN, else zero.

    Args:
        grad: Gradient of the loss with respect to the rectified output, shape of x.
        x: Input of shape `(N, C, *)`; the other arguments are those of `normalize`.

    Returns:
        Tensor with the shape and dtype of grad and the layout of x.
    """
    output = normalize(x, mean, invstd, weight, bias, residual)
    return torch.empty_like(x, dtype=grad.dtype).copy_(torch.where(output <= 0, 0, grad))


def _columns(x: Tensor) -> Tensor:
    """x as float64 of shape `(C, elements per channel)`."""
    return x.double().movedim(1, 0).flatten(1)


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """A per-channel vector as float64 that broadcasts against x."""
    return vector.double().view(-1, *[1] * (x.dim() - 2))
