"""The per-rank arithmetic of synchronized batch normalization on any ATen device."""

import torch
from torch import Tensor

__all__ = ["gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]


def _opmath(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(_opmath(x)).view(-1, *[1] * (x.dim() - 2))


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """Local moments per channel: `(count, mean, m2)`, or `(count, sum x, sum x^2)` with `raw`."""
    channels = x.shape[1]
    packed = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel() == 0:
        return packed
    count = x.numel() // channels
    dims = [0, *range(2, x.dim())]
    mean = x.sum(dims, dtype=torch.float64) / count
    pivot = mean.to(_opmath(x))
    centred = x - pivot.view(-1, *[1] * (x.dim() - 2))
    m2 = centred.square().sum(dims, dtype=torch.float64) - count * (mean - pivot).square()
    packed[0] = count
    packed[1 : channels + 1] = count * mean if raw else mean
    packed[channels + 1 :] = m2 + count * mean.square() if raw else m2
    return packed


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`y = act((x - mean) * invstd * weight + bias + residual)`, in the dtype and memory layout of x."""
    scale = invstd if weight is None else invstd * weight
    pivot = mean.to(_opmath(x))
    shift = (pivot - mean) * scale
    if bias is not None:
        shift = shift + bias
    y = torch.addcmul(_spread(shift, x), x - _spread(pivot, x), _spread(scale, x))
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    return torch.empty_like(x).copy_(y)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """`(sum g, sum g * xhat)` per channel, with `xhat = (x - mean) * invstd`."""
    dims = [0, *range(2, x.dim())]
    pivot = mean.to(_opmath(x))
    sum_g = grad.sum(dims, dtype=torch.float64)
    dot = (grad * (x - _spread(pivot, x))).sum(dims, dtype=torch.float64)
    return torch.cat([sum_g, (dot + (pivot - mean) * sum_g) * invstd])


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """`dx = weight * invstd * (g - sum_g / n - xhat * sum_gxhat / n)`, in the dtype and layout of x."""
    sum_g, sum_gxhat = (sums / count.clamp(min=1)).chunk(2)
    scale = invstd if weight is None else invstd * weight
    pivot = mean.to(_opmath(x))
    slope = -scale * invstd * sum_gxhat
    shift = (pivot - mean) * slope - scale * sum_g
    dx = torch.addcmul(_spread(shift, x), x - _spread(pivot, x), _spread(slope, x))
    return torch.empty_like(x).copy_(dx.addcmul_(grad.to(_opmath(x)), _spread(scale, x)))


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gradient before the rectifier: `grad` where the recomputed output is positive or NaN, else zero."""
    output = normalize(x, mean, invstd, weight, bias, residual)
    return torch.ops.aten.threshold_backward(grad, output, 0)
