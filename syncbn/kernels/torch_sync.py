"""The plain forms of ``reference`` on the operators below torch's own SyncBatchNorm: CUDA and HIP devices.

For where Triton's kernels cannot work: ROCm, compute capability below 8.0, float64. Each form is one pass of one
kernel, and a few operations on vectors, where ``aten`` takes some ten calls. PyTorch has these operators on such
devices alone, and does not document them, so ``check`` compares them with ``aten`` before they are used on one.

They take means and deviations in float32 (float64 for float64 input). What a mean loses by that is put back by way of
the shift, or of the sums. Statistics come in float32 as well: the mean is off by up to 6e-8 of itself, as in
``torch.nn.SyncBatchNorm``. For half types that is little beside the distance of two values of theirs. For float32 it is
not, where the mean is many deviations from zero: so another pass sums deviations from that mean, in which nothing
cancels, and the result is as exact as that of ``aten``.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from syncbn.channels import along_channels, compute_dtype, has_columns
from syncbn.kernels import aten

__all__ = ["check", "gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]

_EPS = 1e-30  # keeps a variance of zero apart from one that is infinite, for which the deviation's inverse is zero


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """See ``reference``."""
    channels = x.shape[1]
    if x.numel() == 0:
        return torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    count = x.numel() // channels
    x = _canonical(x)
    mean, invstd = torch.batch_norm_stats(x, _EPS)
    if x.dtype is mean.dtype:
        d = _like(x - along_channels(mean, x), x)
        one = torch.ones_like(mean)
        total, square = (
            v.double() for v in torch.batch_norm_backward_reduce(d, x, mean, one, None, True, False, False)[:2]
        )
        mean = total.div(count).add_(mean)
        m2 = square.addcmul_(total, total, value=-1 / count).clamp_(min=0.0)
    else:
        mean, invstd = mean.double(), invstd.double()
        m2 = invstd.square_().reciprocal_().sub_(_EPS).clamp_(min=0.0).mul_(count)
    if raw:
        total = mean * count
        mean, m2 = total, m2.addcmul_(total, mean)
    return torch.cat([torch.full((1,), count, dtype=torch.float64, device=x.device), mean, m2])


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """See ``reference``; before a residual is added, the output is rounded once more."""
    if x.numel() == 0:
        return torch.empty_like(x)
    pivot, rest, scale = _rounded(mean, invstd, x)
    factor = _factor(weight, pivot)
    shift = rest * invstd * factor
    if bias is not None:
        shift += bias
    y = torch.batch_norm_elemt(_canonical(x), factor, shift.to(pivot.dtype), pivot, scale, _EPS)
    y = _like(y, x)
    if residual is not None:
        y = (y + residual).to(y.dtype)
    return y.relu_() if relu else y


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``reference``."""
    y = normalize(x, mean, invstd, weight, bias, residual)
    return torch.where(y <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See ``reference``."""
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1], dtype=torch.float64, device=x.device)
    pivot, rest, scale = _rounded(mean, invstd, x)
    x = _canonical(x)
    sums = torch.batch_norm_backward_reduce(_like(grad, x), x, pivot, scale, None, True, False, False)
    total, dot = sums[0].double(), sums[1].double()
    return torch.cat([total, dot.addcmul_(rest, total).mul_(invstd)])


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """See ``reference``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    pivot, rest, scale = _rounded(mean, invstd, x)
    total, dot = sums.chunk(2)
    total = torch.addcmul(total, rest * invstd, dot).to(pivot.dtype)
    dot = (dot / invstd).to(pivot.dtype)
    counts = count.clamp(min=1.0).to(torch.int32).view(1)
    factor, data = _factor(weight, pivot), _canonical(x)
    dx = torch.batch_norm_backward_elemt(_like(grad, data), data, pivot, scale, factor, total, dot, counts)
    return _like(dx, x)


def _rounded(mean: Tensor, invstd: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the operators take for mean and inverse deviation; between them what the mean has lost by it, in float64."""
    pivot = mean.to(compute_dtype(x))
    return pivot, pivot - mean, invstd.to(pivot.dtype)


def _factor(weight: Tensor | None, pivot: Tensor) -> Tensor:
    return torch.ones_like(pivot) if weight is None else weight.to(pivot.dtype)


def _canonical(x: Tensor) -> Tensor:
    """x in a layout that the operators know."""
    return x.contiguous() if has_columns(x) is None else x


def _like(t: Tensor, x: Tensor) -> Tensor:
    """A tensor in the dtype and the layout of x, which the operators take for granted."""
    return t if t.dtype is x.dtype and t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compare all forms with ``aten`` on a device, which is waited for.

    Raises:
        Exception: whatever stands in the way of the operators; RuntimeError if their results are others.
    """
    positions = torch.arange(2 * 3 * 4 * 5, device=device, dtype=torch.float64).view(2, 3, 4, 5)
    values = (positions * 1.7).sin().add(positions.view(2, 3, -1).mean(-1)[..., None, None] / 60).to(dtype)
    grad = (positions * 0.9).cos().to(dtype)
    for form in (torch.contiguous_format, torch.channels_last):
        x, g = values.contiguous(memory_format=form), grad.contiguous(memory_format=form)
        results = []
        for module in (sys.modules[__name__], aten):
            count, mean, m2 = module.moments(x).split((1, 3, 3))
            invstd = (m2 / count + 1e-5).rsqrt()
            weight, bias = mean + 1, invstd * 0.5
            sums = module.gradient_sums(g, x, mean, invstd)
            y = module.normalize(x, mean, invstd, weight, bias, g, True)
            dx = module.input_gradient(g, x, mean, invstd, weight, sums, count)
            results.append([count, mean, m2, sums, y, dx, module.relu_gradient(g, x, mean, invstd, weight, bias, g)])
        tolerance = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
        for ours, theirs in zip(*results, strict=True):
            if ours.dtype is not theirs.dtype or not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
                raise RuntimeError(f"the operators of torch's SyncBatchNorm compute something else for {dtype} here")
