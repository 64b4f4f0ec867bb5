"""Statistics as a value that people keep: of batches, of layers, of ranks; merged exactly, saved and loaded.

Two values merge into that of the union of their data (``syncbn.moments`` has the formula), in any order and number, so
that a data set may be seen in batches, on ranks, or by clients that never meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from syncbn import kernels, masked
from syncbn.comm import link_of
from syncbn.groups import resolve_group
from syncbn.moments import Moments, merge, pack_scatter, unpack, unpack_scatter
from syncbn.wire import STATISTICS, Call


@dataclass(frozen=True, eq=False)
class Statistics:
    """Count, mean and squared deviations per channel of the values seen so far. Float64, without gradients.

    ::

        count = n        mean = sum x / n        m2 = sum (x - mean)^2,  or the matrix sum (x - mean) (x - mean)^T

    Attributes:
        count: how many values there are per channel, a 0-dim tensor.
        mean: shape ``(C,)``.
        m2: shape ``(C,)``, or ``(C, C)`` where covariances are kept.

    >>> first, second = Statistics.of(torch.tensor([[1.0], [3.0]])), Statistics.of(torch.tensor([[5.0]]))
    >>> both = first.merge(second)
    >>> both.count.item(), both.mean.item(), both.unbiased_var.item()
    (3.0, 3.0, 4.0)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, input: Tensor, *, mask: Tensor | None = None, covariance: bool = False) -> Statistics:
        """Those of one batch on this rank. Nothing communicates.

        Args:
            input: shape ``(N, C, *)``, any float dtype; N may be 0.
            mask: boolean, of the positions to take, as in ``functional.sync_batch_norm``.
            covariance: keep the ``(C, C)`` matrix, not its diagonal alone.

        Raises:
            ValueError: an input of fewer dimensions or no float dtype, or a mask that does not fit.
        """
        if input.dim() < 2 or not input.is_floating_point():
            raise ValueError(
                f"expected a floating point tensor of shape (N, C, *), got {input.dtype} of shape {tuple(input.shape)}"
            )
        error = None if mask is None else masked.mask_error(input, mask)
        if error is not None:
            raise error
        with torch.no_grad():
            return cls(*kernels.statistics(input, mask, covariance)[:3])

    @classmethod
    def of_layer(cls, layer: Any, count: float | Tensor) -> Statistics:
        """Those that the running statistics of a batch norm stand for.

        Exact for running statistics that are the mean and unbiased variance of ``count`` values per channel, as after
        ``update_population_stats``. (A moving average weights late batches more, and is of no count.)

        Args:
            layer: with ``running_mean`` and ``running_var``.
            count: values per channel that they were taken over: samples times positions.
        """
        return cls._of_running(layer.running_mean, layer.running_var, count)

    @classmethod
    def _of_running(cls, mean: Tensor, var: Tensor, count: float | Tensor) -> Statistics:
        n = torch.as_tensor(count, dtype=torch.float64, device=mean.device).detach()
        return cls(n, mean.detach().double().clone(), var.detach().double() * (n - 1).clamp(min=0.0))

    @property
    def var(self) -> Tensor:
        """Biased variance, shape ``(C,)``; zero where the count is zero."""
        return self._diagonal() / self.count.clamp(min=1.0)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance, shape ``(C,)``; defined as zero for counts below 2."""
        return self._diagonal() / (self.count - 1.0).clamp(min=1.0)

    @property
    def covariance(self) -> Tensor:
        """Biased covariance, shape ``(C, C)``.

        Raises:
            ValueError: it was not kept.
        """
        if self.m2.dim() != 2:
            raise ValueError(
                "these statistics hold variances alone; Statistics.of(x, covariance=True) keeps covariances"
            )
        return self.m2 / self.count.clamp(min=1.0)

    def _diagonal(self) -> Tensor:
        return self.m2 if self.m2.dim() == 1 else self.m2.diagonal()

    def merge(self, *others: Statistics) -> Statistics:
        """Those of the union of the data: exact whatever the counts, and for counts of zero.

        Raises:
            ValueError: other channels, or covariances here and variances there.
        """
        for other in others:
            if other.m2.shape != self.m2.shape:
                raise ValueError(
                    f"cannot merge statistics of {_kind(self)} with those of {_kind(other)}: they must have the same "
                    "channels, all with covariances or all without"
                )
        parts = [Moments(one.count, one.mean, one.m2) for one in (self, *others)]
        return Statistics(*merge(parts)[:3])

    def over_ranks(self, process_group: Any = None) -> Statistics:
        """Those of the data of all ranks, equal in bits on all of them.

        Args:
            process_group: as in ``SyncBatchNorm``.

        Raises:
            RankMismatchError: ranks with other numbers of channels, or in another call.
            PeerLostError: a rank did not take part.

        Collectives:
            One exchange of 2C+1 float64, or 1 + C + C(C+1)/2 with covariances. None without peers.
        """
        group = resolve_group(process_group)
        link = link_of(group, self.mean.device)
        channels, with_matrix = len(self.mean), self.m2.dim() == 2
        moments = Moments(self.count, self.mean, self.m2)
        packed = pack_scatter(moments, raw=False) if with_matrix else torch.cat([self.count[None], self.mean, self.m2])
        parts = [part.to(self.mean.device) for part in link.gather(packed, Call(STATISTICS))]
        every = [unpack_scatter(part, channels) if with_matrix else unpack(part) for part in parts]
        return Statistics(*(value.clone() for value in merge(every)[:3]))

    def to_layer(self, layer: Any) -> None:
        """Set a batch norm's running mean and (unbiased) variance to these.

        Raises:
            ValueError: another number of channels, no running statistics, or nothing was seen.
        """
        mean = layer.running_mean
        if mean is None or mean.shape != self.mean.shape or self.count < 1:
            shape = None if mean is None else tuple(mean.shape)
            raise ValueError(
                f"cannot give statistics of {_kind(self)} over {self.count.item():g} value(s) to a layer whose running "
                f"mean has shape {shape}"
            )
        with torch.no_grad():
            layer.running_mean.copy_(self.mean)
            layer.running_var.copy_(self.unbiased_var)

    def state_dict(self) -> dict[str, Tensor]:
        """``{"count", "mean", "m2"}``: copies, to save with ``torch.save`` or send."""
        return {field.name: getattr(self, field.name).clone() for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Statistics:
        """What ``state_dict`` returned.

        Raises:
            KeyError: one of its entries is missing.
        """
        return cls(*(torch.as_tensor(state[field.name]).double().clone() for field in fields(cls)))


def _kind(statistics: Statistics) -> str:
    return f"{len(statistics.mean)} channels {'with' if statistics.m2.dim() == 2 else 'without'} covariances"


def merge_running_statistics(
    states: Sequence[Mapping[str, Tensor]], counts: Sequence[float | Mapping[str, float]]
) -> dict[str, Tensor]:
    """The running statistics of models that saw different data, merged into those of all the data.

    For federated clients, or checkpoints of parts of a data set: an average of variances would miss what lies between
    the means. Exact where the running statistics are those of ``counts`` values, as in ``Statistics.of_layer``.

    Args:
        states: the ``state_dict`` of each model: of the same layers.
        counts: for each model, over how many values per channel (samples times positions) its statistics were taken:
            a number for all layers, or one for each by its name ("" for a model that is a layer). A model with 0 counts
            for nothing.

    Returns:
        The entries ``running_mean``, ``running_var`` and ``num_batches_tracked`` (their sum) of all layers that have
        them, under their names, in the dtypes of the first model: for ``load_state_dict(merged, strict=False)``.

    Raises:
        ValueError: no model, not as many counts as models, no layer with running statistics, models of other layers,
            or nothing but counts of 0.

    >>> one = {"running_mean": torch.tensor([1.0]), "running_var": torch.tensor([0.0])}
    >>> other = {"running_mean": torch.tensor([4.0]), "running_var": torch.tensor([0.0])}
    >>> merge_running_statistics([one, other], [1, 2])
    {'running_mean': tensor([3.]), 'running_var': tensor([3.])}
    """
    if not states or len(states) != len(counts):
        raise ValueError(f"expected a count for each model, got {len(counts)} count(s) for {len(states)} model(s)")
    layers = [_layers(state) for state in states]
    if not layers[0] or any(found != layers[0] for found in layers):
        raise ValueError(f"the models must have the same layers with running statistics, got {layers}")
    merged: dict[str, Tensor] = {}
    for prefix in layers[0]:
        name = prefix.removesuffix(".")
        parts = [
            Statistics._of_running(
                state[f"{prefix}running_mean"],
                state[f"{prefix}running_var"],
                count[name] if isinstance(count, Mapping) else count,
            )
            for state, count in zip(states, counts, strict=True)
        ]
        total = parts[0].merge(*parts[1:])
        if total.count < 1:
            raise ValueError(f"no model has seen a value of layer {name!r}: all counts are 0")
        first = states[0]
        merged[f"{prefix}running_mean"] = total.mean.to(first[f"{prefix}running_mean"])
        merged[f"{prefix}running_var"] = total.unbiased_var.to(first[f"{prefix}running_var"])
        batches = f"{prefix}num_batches_tracked"
        if batches in first:
            merged[batches] = torch.stack([state[batches] for state in states]).sum()
    return merged


def _layers(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the layers that have running statistics."""
    names = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return [name for name in names if f"{name}running_var" in state]
