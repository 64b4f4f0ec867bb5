"""Population statistics: the mean and variance of a whole data set in every batch norm layer.

The running statistics of training are an exponential average over the last batches, of a network that changed
meanwhile, and of the variances *within* batches. Here the final network sees the data once more, and the moments of all
batches of all ranks are merged (Chan, Golub and LeVeque, 1979; ``syncbn.moments``), per channel::

    n = sum n_b        mean = sum n_b * mean_b / n        m2 = sum (m2_b + n_b * (mean_b - mean)^2)
    running_mean <- mean        running_var <- m2 / (n - 1)

Two assumptions (those of precise batch norm: Wu and Johnson, 2021, arXiv 2105.07576, section 3). The layers normalize
with the statistics of each *batch* meanwhile, as in training, so that the input of a layer behind another one depends a
little on the batch size; only layers with no batch norm before them get numbers that no choice of batches can change.
And the batches are the population: a sample that comes twice counts twice.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncbn import _torch, kernels, moments, uneven
from syncbn._torch import BatchNormBase, is_lazy
from syncbn.comm import Link, link_of
from syncbn.convert import layer_name
from syncbn.dry_run import check_is_iterable, check_is_module, dry_run, first_batches, run_on_batch
from syncbn.groups import group_device, resolve_group
from syncbn.local import LocalBatchNorm
from syncbn.memory import Memory, Running
from syncbn.modules import SyncBatchNorm
from syncbn.moments import Moments
from syncbn.together import telling
from syncbn.wire import POPULATION, Call


def update_population_stats(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = False,
    process_group: Any = None,
) -> None:
    """Set the running statistics of every batch norm layer to the mean and variance of a data set, over all ranks.

    Per channel, over all values that a layer normalized, in all its uses, in all batches of all ranks::

        running_mean <- mean        running_var <- sum (x - mean)^2 / (n - 1)

    Measured in float64 and merged exactly, whatever the batch sizes: not an average over batches. All ranks get
    equal bits. Ranks may have different numbers of batches, or none: they take part with empty ones until all are done.

    Updated are the layers derived from ``nn.BatchNorm*d`` (``SyncBatchNorm`` and converted ones among them) that are in
    training mode and track running statistics, so call ``model.train()`` first. Those in eval mode count as frozen:
    they normalize with the statistics they have, and keep them. A layer that no batch reaches keeps its statistics as
    well, with a warning.

    Meanwhile layers in training mode normalize with the statistics of each batch, synchronized ones over all ranks'
    batches, and everything else runs in eval mode: no dropout, as at inference. No gradients are recorded, compiled
    models run in eager mode, and DistributedDataParallel broadcasts no buffers. Afterwards, also after an error, all is
    as before but the statistics: parameters, modes, momentum, ``num_batches_tracked`` (it counts batches of training),
    and torch's random numbers on the CPU and on the model's CUDA devices. After an error the statistics are as before,
    too.

    Args:
        model: any module, also wrapped in DistributedDataParallel or compiled. The same on all ranks.
        batches: this rank's share of the data, on the model's device. Any iterable; no sample should be in two ranks'
            share (a DistributedSampler repeats some unless ``drop_last``).
        num_batches: take so many batches of each rank at most; None for all.
        forward: called as ``forward(model, batch)``, with no gradients. None for ``model(batch)`` of a tensor,
            ``model(batch[0])`` of a tuple or list, ``model(**batch)`` of a mapping.
        progress: show the number of batches on stderr of rank 0: with tqdm if it is installed, else in a plain line.
        process_group: the ranks that share the data, as in ``SyncBatchNorm``; None for the default group. The groups of
            the synchronized layers must lie within it.

    Raises:
        ValueError: no batch norm layer that tracks statistics is in training mode, or one is lazy and has seen no input
            yet; ``num_batches`` below 1; no batch on any rank, or only empty ones; statistics that are not finite in
            the dtype of the running ones. Where the cause is one rank's alone, its peers raise RankMismatchError.
        RankMismatchError: the ranks' layers differ, or the loader or the forward of another rank raised.
        PeerLostError: a rank did not take part.
        Exception: whatever ``batches`` or ``forward`` raises, on this rank.

    Collectives:
        One exchange of 2 float64 first; those of ``uneven.joined``, one of 2 float64 a step; the layers' own; at the
        end one of L + 1 + sum(C), one of sum(C) float64 for L layers. None where there is no group.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> update_population_stats(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [7.0], [9.0]])])
    >>> model[0].running_mean, model[0].running_var
    (tensor([5.]), tensor([11.5000]))
    """
    group = resolve_group(process_group)
    layers = _tracking_layers(model)
    where = group_device(group, _device(model, layers))
    link = link_of(group, where)
    call = _call(layers)
    with telling(link, call, 2, "update_population_stats"):
        _check(model, layers, num_batches)
        check_is_iterable(batches)
        with _torch.outside_modes():
            link.sum(torch.ones(2, dtype=torch.float64, device=where), call)
        link.settle()
        steps = uneven.joined(first_batches(batches, num_batches), process_group=group, device=where, count=lambda _: 1)
        observers = [_Observer(layer) for layer in layers.values()]
        taken = 0
        show = progress and link.rank == 0
        with dry_run(model, trains=_is_batch_norm), _observing(observers):
            for step in _shown(steps, _length(batches, num_batches)) if show else steps:
                with contextlib.nullcontext() if step.count else uneven.empty_views():
                    (forward or run_on_batch)(model, step.data)
                taken += 1
        with _torch.outside_modes():
            used, merged = _merge(observers, link, call, where)
    # From here on all is decided from numbers that all ranks share.
    if taken == 0 or (used and not any(part.n.item() for part in merged)):
        raise ValueError(
            f"update_population_stats: {f'only empty batches in {taken} step(s)' if taken else 'no batch'} on any of "
            f"the {link.size} rank(s), so there are no statistics; is an iterator used up, or "
            "the share of each rank smaller than a batch that is dropped?"
        )
    _write(layers, merged)


def _tracking_layers(model: nn.Module) -> dict[str, Any]:
    """The batch norm layers to update, by their qualified names."""
    return {
        layer_name(name): layer
        for name, layer in _named_modules(model)
        if _is_batch_norm(layer) and layer.training and layer.track_running_stats and layer.running_mean is not None
    }


def _named_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Those of a module; of anything else none, for that error is to be told to the peers first."""
    return model.named_modules() if isinstance(model, nn.Module) else iter(())


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, BatchNormBase)


def _device(model: Any, layers: Mapping[str, Any]) -> torch.device | None:
    """That of the layers; if there are none to update, of the others: over it the peers are told of that."""
    every = itertools.chain(layers.values(), (layer for _, layer in _named_modules(model) if _is_batch_norm(layer)))
    return next((layer.running_mean.device for layer in every if layer.running_mean is not None), None)


def _check(model: nn.Module, layers: Mapping[str, Any], num_batches: int | None) -> None:
    check_is_module(model)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, or None for all batches, got {num_batches}")
    if not layers:
        every = [layer for layer in model.modules() if isinstance(layer, BatchNormBase)]
        raise ValueError(
            f"update_population_stats: of {len(every)} batch norm layer(s) in this {type(model).__name__}, "
            f"{sum(layer.training for layer in every)} in training mode, none is in training mode and tracks running "
            "statistics. Layers in eval mode count as frozen: call model.train() first."
        )
    for name, layer in layers.items():
        if is_lazy(layer.running_mean):
            raise ValueError(
                f"update_population_stats: layer {name!r} is a {type(layer).__name__} that has seen no input yet, so "
                "its number of channels is not known; run the model on one batch first"
            )


def _call(layers: Mapping[str, Any]) -> Call:
    """What ranks must have in common: the names and widths of all layers, as a digest that fits a header."""
    text = ", ".join(f"{name} {layer.num_features}" for name, layer in layers.items())
    names = list(layers) or [""]
    return Call(POPULATION, f"{len(layers)} layers, {names[0]!r} to {names[-1]!r}, digest {zlib.crc32(text.encode())}")


class _Observer:
    """Merges the moments of all that one layer normalizes on this rank."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.uses = 0
        zeros = torch.zeros(layer.num_features, dtype=torch.float64, device=layer.running_mean.device)
        self.moments = Moments(zeros.new_zeros(()), zeros, zeros)

    running = None

    def of_own_call(self, running: Running) -> Memory:
        """A subclass that calls ``F.batch_norm`` itself is observed as well."""
        return self

    def collect(self, total: Moments, x: Tensor, mask: Tensor | None) -> None:
        """Take in what the layer normalizes on this rank."""
        self.see(x, mask)

    def see(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch of shape ``(N, C, *)``, of which the values at the positions of the mask count."""
        self.uses += 1
        with torch.no_grad():
            self.moments = moments.merge([self.moments, kernels.statistics(input, mask, covariance=False)])


class _Observation(TorchFunctionMode):
    """Sees the inputs of ``F.batch_norm`` in training, told apart by whose running statistics it is to update.

    So a subclass may do what it likes before and after the normalization.
    """

    def __init__(self, observers: Iterable[_Observer]) -> None:
        super().__init__()
        self.observers = {id(observer.layer.running_mean): observer for observer in observers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and look at what it was given."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.batch_norm:
            self._look(*args, **kwargs)
        return output

    def _look(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        observer = self.observers.get(id(running_mean))
        if training and observer is not None:
            observer.see(input)


@contextlib.contextmanager
def _observing(observers: Sequence[_Observer]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        others = []
        for observer in observers:
            if isinstance(observer.layer, SyncBatchNorm):
                stack.enter_context(_remembering(observer))
                others.append(observer)  # on one rank a subclass's own F.batch_norm is not redirected
            elif isinstance(observer.layer, nn.SyncBatchNorm | LocalBatchNorm):  # not always by F.batch_norm
                stack.enter_context(_hooked(observer))
            else:
                others.append(observer)
        stack.enter_context(_Observation(others))
        yield


@contextlib.contextmanager
def _remembering(observer: _Observer) -> Iterator[None]:
    """Within it, a layer's batches go to its observer, and not to what else remembers them."""
    attributes = observer.layer.__dict__
    before = attributes.get("_memory")
    attributes["_memory"] = observer
    try:
        yield
    finally:
        del attributes["_memory"]  # not set to None: a compiler looks whether it is there
        if before is not None:
            attributes["_memory"] = before


def _hooked(observer: _Observer) -> Any:
    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        observer.see(args[0] if args else kwargs["input"], kwargs.get("mask"))

    return observer.layer.register_forward_hook(see, with_kwargs=True)


def _length(batches: Any, num_batches: int | None) -> int | None:
    try:
        length = len(batches)
    except TypeError:  # an iterator, or a loader over one
        return num_batches
    return length if num_batches is None else min(length, num_batches)


def _shown(steps: Iterator[Any], total: int | None) -> Iterator[Any]:
    """The steps, with their number on stderr."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, step in enumerate(steps, 1):
            yield step
            print(f"\rpopulation statistics: batch {number}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    else:
        yield from tqdm(steps, "population statistics", total, unit="batch")


def _merge(observers: Sequence[_Observer], link: Link, call: Call, where: torch.device) -> tuple[float, list[Moments]]:
    """How often any layer was used on any rank, and the moments of all ranks, per layer.

    Chan's formula for all ranks at once: squared deviations about the mean of all are what each rank adds, so that
    nothing cancels, and sums serve every way that a message can travel.
    """
    uses = float(sum(observer.uses for observer in observers))
    own = [Moments(m.n.to(where), m.mean.to(where), m.m2.to(where)) for m in (each.moments for each in observers)]
    if link.size == 1:
        return uses, own
    used = torch.tensor([uses], dtype=torch.float64, device=where)
    sums = link.sum(torch.cat([used, *(torch.cat([m.n.view(1), m.n * m.mean]) for m in own)]), call)
    widths = [len(part.mean) for part in own]
    counts, means = [], []
    for part in sums[1:].split([1 + width for width in widths]):
        counts.append(part[0])
        means.append(part[1:] / part[0].clamp(min=1.0))
    squares = [m.m2 + m.n * (m.mean - mean).square() for m, mean in zip(own, means, strict=True)]
    m2s = link.sum(torch.cat(squares), call).split(widths)
    link.settle()
    return sums[0].item(), [Moments(n, mean, m2) for n, mean, m2 in zip(counts, means, m2s, strict=True)]


def _write(layers: Mapping[str, Any], merged: Sequence[Moments]) -> None:
    """Give the layers their statistics, all or none, and name those that no batch has reached."""
    new = []
    unreached = []
    for (name, layer), part in zip(layers.items(), merged, strict=True):
        if part.n.item() == 0:
            unreached.append(name)
            continue
        for buffer, value in ((layer.running_mean, part.mean), (layer.running_var, part.unbiased_var)):
            rounded = value.to(buffer)
            broken = int((~torch.isfinite(rounded)).sum())
            if broken:
                raise ValueError(
                    f"update_population_stats: the statistics of {broken} of {len(rounded)} channels of layer {name!r} "
                    f"are not finite in {buffer.dtype}; is there a NaN or an infinity in the data? Running statistics "
                    "are as before."
                )
            new.append((buffer, rounded))
    with torch.no_grad():
        for buffer, rounded in new:
            buffer.copy_(rounded)
    if unreached:
        warnings.warn(
            f"update_population_stats: no batch has reached {len(unreached)} of {len(merged)} batch norm layers, which "
            f"keep their statistics: {', '.join(unreached)}",
            UserWarning,
            stacklevel=3,
        )
