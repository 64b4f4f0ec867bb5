"""The statistics of a batch as a value: how many, their mean, their squared deviations.

For the values x of one channel on one rank

    count = n        mean = sum(x) / n        m2 = sum((x - mean)^2)

Two such triples merge into the triple of the union (Chan, Golub and LeVeque, 1979):

    n = n_a + n_b        d = mean_b - mean_a
    mean = mean_a + d * n_b / n
    m2 = m2_a + m2_b + d^2 * n_a * n_b / n

``m2`` may as well be the scatter matrix sum((x - mean) (x - mean)^T) over all pairs of channels, with d d^T for d^2.

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
        m2: shape ``(C,)``, sum of squared deviations from ``mean``; zero where the count is zero. Or ``(C, C)``: the
            scatter matrix, with these on its diagonal.
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
        """Biased variance ``m2 / n`` (or covariance matrix), of the shape of ``m2``; zero for an empty batch."""
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
    """Read ``(count, S[C], Q[C])``, packed in one vector of length ``2C + 1``, as moments."""
    return from_raw(unpack(packed))


def from_raw(sums: Moments) -> Moments:
    """The moments that raw sums ``(n, S, Q)`` stand for.

    ``m2 = Q - S^2 / n`` is clamped at zero: rounding may take it below. (Not in a matrix, where zero is no bound.)
    """
    count, total, squares = sums[:3]
    mean = total / count.clamp(min=1.0)
    if squares.dim() == 2:
        return Moments(count, mean, squares - torch.outer(total, total) / count.clamp(min=1.0))
    # clamp would turn NaN into NaN as well: non-finite statistics stay visible
    m2 = torch.addcmul(squares, mean, total, value=-1.0).clamp_(min=0.0)
    return Moments(count, mean, m2)


def scatter_width(channels: int) -> int:
    """Length of ``pack_scatter``: ``1 + C + C (C + 1) / 2``."""
    return 1 + channels + channels * (channels + 1) // 2


def pack_scatter(moments: Moments, raw: bool) -> Tensor:
    """Moments with a scatter matrix in one vector: ``(count, mean[C], m2)``, of which the upper triangle travels.

    Args:
        moments: with ``m2`` of shape ``(C, C)``.
        raw: pack ``(count, S, S S^T / n + m2)`` instead, which add up.
    """
    n, mean, m2 = moments[:3]
    if raw:
        m2 = m2 + torch.outer(mean, mean) * n
        mean = mean * n
    return torch.cat([n[None], mean, upper_triangle(m2)])


def unpack_scatter(packed: Tensor, channels: int) -> Moments:
    """Read what ``pack_scatter`` wrote; raw sums as they are, see ``from_raw``."""
    return Moments(packed[0], packed[1 : channels + 1], symmetric(packed[channels + 1 :], channels))


def upper_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a ``(C, C)`` matrix, row by row, shape ``(C (C + 1) / 2,)``. Differentiable."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def symmetric(triangle: Tensor, channels: int) -> Tensor:
    """The symmetric ``(C, C)`` matrix of an upper triangle. Differentiable."""
    rows, columns = torch.triu_indices(channels, channels, device=triangle.device)
    index = rows.new_empty(channels, channels)
    index[rows, columns] = index[columns, rows] = torch.arange(len(rows), device=triangle.device)
    return triangle[index]


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
        squares = delta.square_() if m2.dim() == 1 else torch.outer(delta, delta)
        m2 = (m2 + other.m2).add_(squares.mul_(total * share))
        total = union
    return Moments(total if isinstance(total, Tensor) else mean.new_tensor(total), mean, m2)


def look(moments: Moments) -> Moments:
    """The same, with a bound on its values, where looking costs nothing: on a CPU."""
    if not _may_read(moments.mean):
        return moments
    # One sum finds any NaN or infinity; finite values whose sum overflows float64 are as useless as these.
    squares = moments.m2 if moments.m2.dim() == 1 else moments.m2.diagonal()  # what is not finite shows there
    bound = moments.mean.abs().add_(squares).sum().item()
    return moments._replace(bound=bound, size=moments.n.item())


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1.0) if isinstance(count, Tensor) else max(count, 1.0)


def _may_read(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on a CPU, where the tensor has values."""
    return tensor.is_cpu and type(tensor) is Tensor
