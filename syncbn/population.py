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
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from syncbn import comm, groups, kernels, moments, uneven
from syncbn.comm import Link
from syncbn.convert import LocalBatchNorm, layer_name
from syncbn.header import POPULATION, Call, PeerLostError
from syncbn.modules import SyncBatchNorm
from syncbn.moments import Moments
from syncbn.steps import group_device

_PIECE = 1 << 22  # values that are converted to float64 at a time


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
    group = groups.resolve_group(process_group)
    layers = _tracking_layers(model)
    where = group_device(group, next((layer.running_mean.device for layer in layers.values()), None))
    link = comm.link(group, where)
    with _told_to_peers(link, layers):
        _check(model, layers, num_batches)
        if link is not None:
            link.sum(torch.ones(2, dtype=torch.float64, device=where), _call(layers))
            link.settle()
        steps = uneven.joined(_first(batches, num_batches), process_group=group, device=where, count=lambda _: 1)
        observers = [_Observer(layer) for layer in layers.values()]
        with _as_before(model, layers.values()), _eager(), _observing(observers), torch.no_grad():
            taken = 0
            show = progress and (link is None or link.rank == 0)
            for step in _shown(steps, _length(batches, num_batches)) if show else steps:
                with contextlib.nullcontext() if step.count else uneven.empty_views():
                    (forward or _forward)(model, step.data)
                taken += 1
        used, merged = _merge(observers, link, _call(layers), where)
    # From here on all is decided from numbers that all ranks share.
    if taken == 0 or (used and not any(part.n.item() for part in merged)):
        raise ValueError(
            f"update_population_stats: {f'only empty batches in {taken} step(s)' if taken else 'no batch'} on any of "
            f"the {1 if link is None else link.size} rank(s), so there are no statistics; is an iterator used up, or "
            "the share of each rank smaller than a batch that is dropped?"
        )
    _write(layers, merged)


def _tracking_layers(model: nn.Module) -> dict[str, Any]:
    """The batch norm layers to update, by their qualified names."""
    return {
        layer_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.training
        and layer.track_running_stats
        and layer.running_mean is not None
    }


def _check(model: nn.Module, layers: Mapping[str, Any], num_batches: int | None) -> None:
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, or None for all batches, got {num_batches}")
    if not layers:
        every = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
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


@contextlib.contextmanager
def _told_to_peers(link: Link | None, layers: Mapping[str, Any]) -> Iterator[None]:
    """An error within it is told to the other ranks, wherever they wait for this one, unless they know of it."""
    if link is not None:
        link.broke_off = False  # by an exchange before this call: what happens here nobody knows of yet
    try:
        yield
    except Exception as error:
        # What a layer raises it has told already, over the link of its own group, which mostly is this one.
        if link is not None and not link.broke_off:
            with contextlib.suppress(PeerLostError):  # this rank's own error is what there is to mend
                link.refuse(_call(layers), f"update_population_stats: {type(error).__name__}: {error}", 2)
        raise


@contextlib.contextmanager
def _as_before(model: nn.Module, layers: Iterable[Any]) -> Iterator[None]:
    """Batch norm stays in the mode it has, all else is in eval mode; in the end all is as it was, random numbers too.

    In eval mode other modules leave their state alone as well: spectral norms, codebooks, averages.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        buffer
        for layer in layers
        for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        if buffer is not None
    ]
    values = [buffer.clone() for buffer in buffers]
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        generators = torch.random.fork_rng([device for device in devices if device.type == "cuda"])
        with generators, uneven.without_broadcasts(model):
            for module, _ in modes:  # not by module.eval(): some classes do more in it, or less
                if not isinstance(module, _BatchNorm):
                    module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


_eager_lock = threading.Lock()
_eager_stances: list[Any] = []


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules run in eager mode: a graph that was compiled before would not let anyone look at its inputs.

    The stance is that of the process, and ranks may be threads of one: the first sets it, the last takes it back.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    with _eager_lock:
        _eager_stances.append(None if _eager_stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            first = _eager_stances[0]
            _eager_stances.pop()
            if not _eager_stances:
                first.__exit__(None, None, None)


class _Observer:
    """Merges the moments of all that one layer normalizes on this rank."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.uses = 0
        zeros = torch.zeros(layer.num_features, dtype=torch.float64, device=layer.running_mean.device)
        self.moments = Moments(zeros.new_zeros(()), zeros, zeros)

    def see(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch of shape ``(N, C, *)``, of which the values at the positions of the mask count."""
        self.uses += 1
        with torch.no_grad():
            values = input.detach()
            if mask is not None:
                values = values.movedim(1, -1)[mask.expand_as(values[:, :1]).squeeze(1)]
            rows = max(1, _PIECE * len(values) // max(values.numel(), 1))
            for piece in values.split(rows):
                part = moments.unpack(kernels.moments(piece.double()))
                self.moments = moments.merge([self.moments, part])


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
                observer.layer._on_normalized = observer.see
                stack.callback(observer.layer.__dict__.pop, "_on_normalized")
                others.append(observer)  # on one rank a subclass's own F.batch_norm is not redirected
            elif isinstance(observer.layer, nn.SyncBatchNorm | LocalBatchNorm):  # not always by F.batch_norm
                stack.enter_context(_hooked(observer))
            else:
                others.append(observer)
        stack.enter_context(_Observation(others))
        yield


def _hooked(observer: _Observer) -> Any:
    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        observer.see(args[0] if args else kwargs["input"], kwargs.get("mask"))

    return observer.layer.register_forward_hook(see, with_kwargs=True)


def _first(batches: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
    yield from itertools.islice(batches, num_batches)


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("update_population_stats: a batch is an empty sequence; its first entry is the input")
        return model(batch[0])
    return model(batch)


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


def _merge(
    observers: Sequence[_Observer], link: Link | None, call: Call, where: torch.device
) -> tuple[float, list[Moments]]:
    """How often any layer was used on any rank, and the moments of all ranks, per layer.

    Chan's formula for all ranks at once: squared deviations about the mean of all are what each rank adds, so that
    nothing cancels, and sums serve every way that a message can travel.
    """
    uses = float(sum(observer.uses for observer in observers))
    own = [Moments(m.n.to(where), m.mean.to(where), m.m2.to(where)) for m in (each.moments for each in observers)]
    if link is None:
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
