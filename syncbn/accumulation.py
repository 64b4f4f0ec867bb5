"""Running statistics of whole steps, where a step accumulates the gradients of several micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from syncbn.dry_run import check_is_module
from syncbn.memory import Memory, Running
from syncbn.modules import SyncBatchNorm, running_statistics
from syncbn.moments import Moments


@contextlib.contextmanager
def step_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, forwards collect moments; its end moves the running statistics, once.

    For the micro-batches i of a step, each with the moments (n_i, mean_i, var_i) of all ranks::

        n    = sum_i n_i
        mean = sum_i n_i * mean_i / n
        var  = sum_i n_i * (var_i + (mean_i - mean)^2) / n
        running_mean <- (1 - momentum) * running_mean + momentum * mean
        running_var  <- (1 - momentum) * running_var  + momentum * var * n / (n - 1)

    and ``num_batches_tracked`` grows by one: what one forward with all values of the step would do, and not what k
    updates do, each from a k-th of them. The values are those that the layer has seen. Every micro-batch is still
    normalized with its own statistics, so a layer behind another one has not seen quite what it would see in the whole
    batch, and the gradients are not those of the whole batch either::

        for batches in loader:
            with step_statistics(model):
                for x, target in batches:
                    (criterion(model(x), target) / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()

    Layers in evaluation mode and layers without running statistics are as ever. So are subclasses that call
    ``F.batch_norm`` themselves and update their running statistics there, and layers that are not synchronized ones:
    convert the model, which needs no process group.

    Args:
        model: whose ``SyncBatchNorm`` layers collect.

    Returns:
        A context manager. If its body raises, the running statistics stay as they were before.

    Raises:
        RuntimeError: a layer of the model collects already.
        ValueError: a lazy layer has not seen its first input.

    Collectives:
        None of its own: the moments are shared in the forwards.

    >>> layer = SyncBatchNorm(1, momentum=1.0)
    >>> with step_statistics(layer):
    ...     y = layer(torch.tensor([[1.0], [3.0]])), layer(torch.tensor([[5.0], [7.0]]))
    >>> layer.running_mean.item(), layer.num_batches_tracked.item()
    (4.0, 1)
    """
    check_is_module(model)
    sums: list[tuple[SyncBatchNorm, _Sums]] = []
    try:
        for name, layer in model.named_modules():
            if isinstance(layer, SyncBatchNorm) and layer.running_mean is not None:
                if layer._memory is not None:
                    raise RuntimeError(f"layer {name!r} collects the statistics of a step already: end that one first")
                if isinstance(layer.running_mean, nn.parameter.UninitializedBuffer):
                    raise ValueError(f"layer {name!r} has not seen its first input yet: run the model once before")
                collector = _Sums(layer.running_mean)
                layer._memory = collector
                sums.append((layer, collector))
        yield
    finally:
        for layer, _ in sums:
            del layer._memory
    for layer, collector in sums:
        running_statistics(layer).move(Moments(collector.n[0], collector.mean, collector.m2))


class _Sums:
    """Moments that others are merged into, in place: the same tensors in every forward, which a compiler needs."""

    def __init__(self, like: torch.Tensor) -> None:
        self.n = torch.zeros(1, dtype=torch.float64, device=like.device)  # a 0-dim one stays zero in compiled code
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.m2 = torch.zeros_like(like, dtype=torch.float64)

    running = None

    def of_own_call(self, running: Running) -> Memory:
        """A subclass that calls ``F.batch_norm`` itself moves its own statistics, in every forward."""
        return running

    def collect(self, total: Moments, x: Tensor, mask: Tensor | None) -> None:
        """Merge a batch."""
        share = total.n / (self.n + total.n).clamp(min=1.0)
        delta = total.mean - self.mean
        self.m2.add_(total.m2 + delta * delta * (self.n * share))
        self.mean.add_(delta * share)
        self.n.add_(total.n)
