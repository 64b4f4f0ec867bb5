"""The statistics of a batch as a value: how many, their mean, their squared deviations.

For the values x of one channel on one rank

    count = n        mean = sum(x) / n        m2 = sum((x - mean)^2)

Two such triples merge into the triple of the union (Chan, Golub and LeVeque, 1979):

    n = n_a + n_b        d = mean_b - mean_a
    mean = mean_a + d * n_b / n
    m2 = m2_a + m2_b + d^2 * n_a * n_b / n

The triple never cancels, whatever the offset of the data, so it is what travels wherever each rank's message is seen
separately. Where only a sum over ranks is seen, the raw sums travel instead, in float64:

    S = n * mean        Q = m2 + n * mean^2

and coming back (``m2 = Q - S^2 / n``) costs about 1e-16 * (mean/std)^2 of relative accuracy of the variance.

Everything here is float64 (float32 where a device has no float64), and pure: equal bits in, equal bits out.
Nothing here knows of process groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Count n, mean and sum of squared deviations per channel.

    Attributes:
        n: number of values per channel, a 0-dim float64 tensor (a tensor, never a Python number: reading it would
            wait for the device).
        mean: shape ``(C,)``; zero where the count is zero.
        m2: shape ``(C,)``, sum of squared deviations from ``mean``; zero where the count is zero.
        bound: no ``|mean|`` and no variance exceeds it; infinite or NaN if one of them is not finite; None where nobody
            looked, because that would wait for the device.
        size: ``n`` as a number, where somebody looked.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    bound: float | None = None
    size: float | None = None

    @property
    def finite(self) -> bool | None:
        """Whether all is finite; None where nobody looked."""
        return None if self.bound is None else math.isfinite(self.bound)

    @property
    def var(self) -> Tensor:
        """Biased variance ``m2 / n``, shape ``(C,)``; zero for an empty batch."""
        return self.m2 / _at_least_one(self.n if self.size is None else self.size)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance ``m2 / (n - 1)``, shape ``(C,)``; defined as ``m2`` for counts below 2."""
        return self.m2 / _at_least_one((self.n if self.size is None else self.size) - 1.0)

    def invstd(self, eps: float) -> Tensor:
        """``1 / sqrt(var + eps)`` with the biased variance, shape ``(C,)``."""
        return self.var.add_(eps).rsqrt_()


def unpack(packed: Tensor) -> Moments:
    """Read ``(count, mean[C], m2[C])``, packed in one vector of length ``2C + 1``. Returns views."""
    channels = packed.numel() // 2
    return Moments(packed[0], packed[1 : channels + 1], packed[channels + 1 :])


def unpack_raw(packed: Tensor) -> Moments:
    """Read ``(count, S[C], Q[C])``, packed in one vector of length ``2C + 1``, as moments.

    ``m2 = Q - S^2 / n`` is clamped at zero: rounding may take it below.
    """
    count, total, squares = unpack(packed)[:3]
    mean = total / count.clamp(min=1.0)
    # clamp would turn NaN into NaN as well: non-finite statistics stay visible
    m2 = torch.addcmul(squares, mean, total, value=-1.0).clamp_(min=0.0)
    return Moments(count, mean, m2)


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of the union of ``parts``, merged in the order given (so equal on all ranks, bit for bit).

    Returns:
        New tensors, but for a single part, which is returned itself.
    """
    if len(parts) == 1:
        return parts[0]
    _, mean, m2 = parts[0][:3]
    # Numbers instead of 0-dim tensors, where they may be read: fewer calls.
    counts = [part.n.item() if _may_read(mean) else part.n for part in parts]
    total = counts[0]
    for other, count in zip(parts[1:], counts[1:], strict=True):
        union = total + count
        share = count / _at_least_one(union)
        delta = other.mean - mean
        mean = mean + delta * share
        m2 = (m2 + other.m2).add_(delta.square_().mul_(total * share))
        total = union
    return Moments(total if isinstance(total, Tensor) else mean.new_tensor(total), mean, m2)


def look(moments: Moments) -> Moments:
    """The same, with a bound on its values, where looking costs nothing: on a CPU."""
    if not _may_read(moments.mean):
        return moments
    # One sum finds any NaN or infinity; finite values whose sum overflows float64 are as useless as these.
    bound = moments.mean.abs().add_(moments.m2).sum().item()
    return moments._replace(bound=bound, size=moments.n.item())


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1.0) if isinstance(count, Tensor) else max(count, 1.0)


def _may_read(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on a CPU, where the tensor has values."""
    return tensor.is_cpu and type(tensor) is Tensor
