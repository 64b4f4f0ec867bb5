"""Per-channel values beside a tensor of shape ``(N, C, *)``."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of element-wise work on x: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape ``(C,)`` as a view that broadcasts against x."""
    return values if x.dim() == 2 else values.view(-1, *[1] * (x.dim() - 2))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape ``(C,)`` in x's compute dtype, broadcasting against x."""
    return along_channels(values.to(compute_dtype(x)), x)


def reduced_dims(x: Tensor) -> list[int]:
    """The dimensions that a statistic per channel runs over: all but the second."""
    return [0, *range(2, x.dim())]


def centred(x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean`` in x's compute dtype, without the rounding error of a float32 mean; differentiable in both."""
    dtype = compute_dtype(x)
    coarse = mean.detach().to(dtype)
    return x.to(dtype) - per_channel(coarse, x) - per_channel(mean - coarse, x)


def has_columns(x: Tensor) -> bool | None:
    """Whether the channels are innermost in memory (2-D, channels_last): True; False for the default layout, None for
    strides that are neither.
    """
    if x.stride(1) == 1 and x.movedim(1, -1).is_contiguous():
        return True
    return False if x.is_contiguous() else None
