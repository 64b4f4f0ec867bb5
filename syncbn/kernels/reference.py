"""The per-rank arithmetic of synchronized batch normalization, as plain formulas in float64: the ground truth.

Every function takes and returns what its namesake in `syncbn.kernels.aten` does, or for the fused forms on CUDA devices
in `syncbn.kernels.triton`; these modules document the shapes once. Here each line is the formula of the mathematics,
everything is computed in float64, and only the result is rounded to the dtype of the input. Nothing is tuned: tests
compare the fast kernels with this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
    "normalize_shared",
    "pack_gradient_sums",
    "pack_moments",
    "relu_gradient",
    "shared_input_gradient",
]


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


def pack_moments(x: Tensor, message: Tensor, tag: int, number: int) -> None:
    """Write `tag, tag^2, 0, 0, broken, broken * number`, then the raw moments of x, then zeros.

    Args:
        x: Input of shape `(N, C, *)`.
        message: float64 vector of at least `2C + 7` elements.
        tag, number: Of the call, and of this rank.
    """
    _pack(message, moments(x, raw=True), tag, number)


def _pack(message: Tensor, payload: Tensor, tag: int, number: int, may_break: bool = True) -> None:
    broken = float(may_break and not payload.isfinite().all())
    head = torch.tensor([tag, tag**2, 0, 0, broken, broken * number], dtype=torch.float64)
    message.zero_()
    message[: len(head) + len(payload)] = torch.cat([head, payload])


def normalize_shared(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    running: Sequence[Any] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`normalize` by `mean = S / n` and `var = Q / n - mean^2`, and the running statistics moved towards these.

    `running <- (1 - momentum) * running + momentum * (mean, or var * n / (n - 1))`, but for an empty batch, and for
    channels that are not finite; with momentum None, `1 / (batches counted, this one included)`.

    Args:
        x: Input of shape `(N, C, *)`.
        sums: float64 `(2C + 1,)`: `(n, S, Q)`.
        weight, bias, residual, relu: As in `normalize`.
        eps: Added to the variance.
        running: `(running_mean, running_var, momentum, num_batches_tracked)`, any of them None, or None.

    Returns:
        `(y, mean, invstd, count)`.
    """
    channels = x.shape[1]
    count, total, squares = sums[0].clone(), sums[1 : channels + 1], sums[channels + 1 :]
    mean = total / count.clamp(min=1)
    m2 = (squares - mean * total).clamp(min=0)
    invstd = (m2 / count.clamp(min=1) + eps).rsqrt()
    if running is not None:
        _move(running, count, mean, m2 / (count - 1).clamp(min=1))
    return normalize(x, mean, invstd, weight, bias, residual, relu), mean, invstd, count


def _move(running: Sequence[Any], count: Tensor, mean: Tensor, var: Tensor) -> None:
    running_mean, running_var, momentum, batches = running
    if batches is not None:
        batches += count > 0
    if momentum is None:
        momentum = 0.0 if batches is None else 1 / max(int(batches), 1)
    if running_mean is not None and running_var is not None:
        fits = mean.to(running_mean.dtype).isfinite() & var.to(running_var.dtype).isfinite() & (count > 0)
        for old, new in ((running_mean, mean), (running_var, var)):
            old.copy_(torch.where(fits, (1 - momentum) * old.double() + momentum * new, old.double()))


def pack_gradient_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    message: Tensor | None,
    tag: int,
    number: int,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Write `tag, tag^2, 0, 0, 0, 0`, then `(sum g, sum g * xhat)`, then zeros; g is what passes the rectifier.

    Args:
        grad, x, mean, invstd, weight, bias, residual: As in `relu_gradient`.
        relu: Whether there is a rectifier.
        message: float64 vector of at least `2C + 6` elements, or None.
        tag, number: As in `pack_moments`.
        dtypes: Of the gradients of weight and bias; None for those that are not wanted.

    Returns:
        `(dweight, dbias)`: `sum g * xhat` and `sum g`.
    """
    g = relu_gradient(grad, x, mean, invstd, weight, bias, residual) if relu else grad
    sums = gradient_sums(g, x, mean, invstd)
    if message is not None:
        _pack(message, sums, tag, number, may_break=False)
    total, dot = sums.chunk(2)
    return None if dtypes[0] is None else dot.to(dtypes[0]), None if dtypes[1] is None else total.to(dtypes[1])


def shared_input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    sums: Tensor,
    count: Tensor,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """`input_gradient` for the g that passes the rectifier, and with `masked` that g.

    Args:
        grad, x, mean, invstd, weight, bias, residual: As in `relu_gradient`.
        relu: Whether there is a rectifier.
        sums, count: As in `input_gradient`.
        masked: Whether the second result is wanted.

    Returns:
        `(dx, g)`: the first in the dtype of x, the second in that of grad, or None.
    """
    g = relu_gradient(grad, x, mean, invstd, weight, bias, residual) if relu else grad
    return input_gradient(g, x, mean, invstd, weight, sums, count), g if masked else None


def _columns(x: Tensor) -> Tensor:
    """x as float64 of shape `(C, elements per channel)`."""
    return x.double().movedim(1, 0).flatten(1)


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """A per-channel vector as float64 that broadcasts against x."""
    return vector.double().view(-1, *[1] * (x.dim() - 2))
