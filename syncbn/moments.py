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
from dataclasses import dataclass
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
    # (clamp would turn NaN into NaN as well: non-finite statistics stay visible.)
    m2 = torch.addcmul(squares, mean, total, value=-1.0).clamp_(min=0.0)
    return Moments(count.clone(), mean, m2)


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of the union of ``parts``, merged in the order given (so equal on all ranks, bit for bit).

    Returns:
        New tensors, also for a single part: parts may lie in a buffer that the next exchange overwrites.
    """
    n, mean, m2 = parts[0][:3]
    if len(parts) == 1:
        return Moments(n.clone(), mean.clone(), m2.clone())
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
    """Whether reading a value costs nothing: on a CPU."""
    return tensor.device.type == "cpu"


def update_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    moments: Moments,
    momentum: float | Tensor,
) -> None:
    """Move the running statistics towards those of a batch, in place::

        running_mean <- (1 - momentum) * running_mean + momentum * mean
        running_var  <- (1 - momentum) * running_var  + momentum * m2 / (n - 1)

    An empty batch changes nothing. A channel whose batch statistics are not finite, or not in the dtype of the running
    ones, keeps its last values.

    Args:
        running_mean, running_var: shape ``(C,)``, any float dtype, or None to skip.
        moments: of the global batch.
        momentum: weight of the new observation, as in PyTorch; a number or a 0-dim tensor.
    """
    if running_mean is None or running_var is None:
        return
    mean, var = moments.mean, moments.unbiased_var
    if moments.size == 0:
        return
    keep = None
    if moments.bound is None or not moments.bound < torch.finfo(running_var.dtype).max:
        rounded = mean.to(running_mean.dtype), var.to(running_var.dtype)
        keep = ~(torch.isfinite(rounded[0]) & torch.isfinite(rounded[1]) & (moments.n > 0))
    for running, batch in ((running_mean, mean), (running_var, var)):
        if keep is not None:
            batch = torch.where(keep, running.to(batch.dtype), batch)
        _lerp_(running, batch, momentum)


@dataclass  # (neither frozen nor with slots, which the compiler of torch 2.12 cannot look into)
class Running:
    """The running statistics of a layer, and how the moments of a batch move them: as data, for a kernel to carry out.

    Attributes:
        mean, var: shape ``(C,)``, any float dtype, or None for none.
        momentum: weight of the new observation; None for the average over all batches that were counted.
        batches: their number, a 0-dim integer tensor, or None where nobody counts.
    """

    mean: Tensor | None
    var: Tensor | None
    momentum: float | None
    batches: Tensor | None = None

    def __call__(self, moments: Moments | None) -> None:
        """Count a batch, and move the statistics; with None they have been moved already. An empty batch is none."""
        if self.batches is not None:
            counts: Tensor | int = 1
            if moments is not None and moments.size is not None:
                counts = 1 if moments.size > 0 else 0
            elif moments is not None:
                counts = moments.n > 0  # reading the count would wait
            self.batches.add_(counts)
        if moments is not None:
            update_running_stats(self.mean, self.var, moments, self._weight())

    def _weight(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.batches is None else self.batches.clamp(min=1).double().reciprocal_()


def _lerp_(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """``running += momentum * (batch - running)``, at least in float32 (half would drop small updates)."""
    if running.dtype in (torch.float32, torch.float64):
        if isinstance(momentum, Tensor):
            momentum = momentum.to(running.dtype)
        running.lerp_(batch.to(running.dtype), momentum)
    else:
        if isinstance(momentum, Tensor):
            momentum = momentum.to(batch.dtype)
        running.copy_(running.to(batch.dtype).lerp_(batch, momentum))
