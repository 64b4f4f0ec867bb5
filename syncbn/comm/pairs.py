"""float64 as pairs of float32, for devices without it: ``high = float32(v)``, ``low = float32(v - high)``.

Together they keep 48 bits of v, from 1e-30 to 3e38 (below, the low part loses bits, and then the high one). Pairs of
different ranks must not be added up part by part: high parts would be rounded, and no low part would know.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(values: Tensor) -> Tensor:
    """High and low parts of float64, as float32 of shape ``(2, *)``. What is beyond float32 becomes infinite."""
    high = values.float()
    low = torch.where(high.isfinite(), values - high, 0.0)
    return torch.stack([high, low.float()])


def join(parts: Tensor) -> Tensor:
    """The float64 that ``split`` made shape ``(2, *)`` of."""
    return parts[0].double() + parts[1].double()
