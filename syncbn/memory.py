"""What remembers a training forward: running statistics that move, or somebody who collects moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from syncbn.moments import Moments


class Memory(Protocol):
    """Remembers the batches that a layer normalizes in training.

    Attributes:
        running: running statistics as data, for a kernel to move; None for a memory that ``collect``s.
    """

    @property
    def running(self) -> Running | None: ...

    def collect(self, total: Moments, x: Tensor, mask: Tensor | None) -> None:
        """Take note of a batch, where ``running`` is None.

        Args:
            total: the moments of the global batch.
            x, mask: this rank's input of shape ``(N, C, *)``, and its mask.
        """

    def of_own_call(self, running: Running) -> Memory:
        """What remembers a call of ``F.batch_norm`` that a subclass makes itself, to move these running statistics."""


@dataclass  # neither frozen nor with slots, which the compiler of torch 2.12 cannot look into
class Running:
    """The running statistics of a layer, and how the moments of a batch move them: the usual memory.

    Attributes:
        mean, var: shape ``(C,)``, any float dtype, or None for none.
        momentum: weight of the new observation; None for the average over all batches that were counted.
        batches: their number, a 0-dim integer tensor, or None where nobody counts.
    """

    mean: Tensor | None
    var: Tensor | None
    momentum: float | None
    batches: Tensor | None = None

    @property
    def running(self) -> Running:
        """Itself."""
        return self

    def state(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
        """``(mean, var, batches, momentum)``."""
        return self.mean, self.var, self.batches, self.momentum

    def collect(self, total: Moments, x: Tensor, mask: Tensor | None) -> None:
        """Move the statistics: for those who do not look at ``running``."""
        self.move(total)

    def of_own_call(self, running: Running) -> Memory:
        """Those of the call: a subclass moves its own."""
        return running

    def move(self, total: Moments) -> None:
        """Count a batch, and move the statistics towards its moments, in place. An empty batch is none."""
        if self.batches is not None:
            # reading the count of a batch that nobody has looked at would wait for the device
            self.batches.add_(total.n > 0 if total.size is None else int(total.size > 0))
        update_running_stats(self.mean, self.var, total, self._weight())

    def count(self) -> None:
        """Count a batch whose statistics somebody else moves."""
        if self.batches is not None:
            self.batches.add_(1)

    def _weight(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.batches is None else self.batches.clamp(min=1).double().reciprocal_()


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
