"""How noisy the statistics of small groups of ranks are, and what sharing them costs.

A batch norm layer estimates mean and variance of each channel from the values at hand. Over k ranks it has k times as
many. ``measure_noise`` runs batches through a model with its weights held still and compares, per layer and group size
k, the statistics of groups of k with those of all that was measured::

    mean_noise(k) = RMS over groups g and channels c of  (mean_gc - mean_c) / sqrt(var_c + eps)
    std_noise(k)  = RMS over groups g and channels c of  log sqrt((var_gc + eps) / (var_c + eps))
    noise(k)      = sqrt(mean_noise(k)^2 + std_noise(k)^2)

``noise`` is, to first order, the RMS error of the normalized output: with y = (x - mean) / std, which has mean 0 and
variance 1, the group's statistics give ``y + y * log(std / std_g) - (mean_g - mean) / std``.

The estimator:

* **Reference** (mean_c, var_c): the population, all ranks over all measured batches, as the weights do not change. It
  contains the group, which understates the deviation: were values independent, ``Var(mean_g - mean)`` would be
  ``s^2 (1/n_g - 1/n)`` instead of ``s^2 / n_g``. Each squared deviation is multiplied by ``n / (n - n_g)``.
* **Groups**: the measurements form a line, in order of batch, then rank; groups are k neighbours in it. Where k divides
  the number of ranks W these are the groups of ``torch.distributed.new_subgroups(k)``. Where k is larger, groups take
  in the following batches: with the same weights they are what further ranks would have held. So one process alone can
  tell over how many ranks to synchronize. (Further ranks that see other kinds of data cannot be foreseen.)
* **No independence is assumed** of the values within a batch: neighbouring positions of an image say nearly the same,
  and ``1 / sqrt(n)`` would be too good. Only the measured statistics count.
* **Standard errors** are taken over groups; channels, which depend on each other, are averaged within a group first.

For independent Gaussian values, n per device and channel, ``mean_noise`` is ``1 / sqrt(n k)`` exactly, and
``std_noise`` within 4 % of ``1 / sqrt(2 n k)`` for n k of 64 and more, and larger below.

What a layer sees depends on how the layers before it normalize: the model is measured as it is, in the mode it is in.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import comm, kernels, uneven
from syncbn.comm import Link
from syncbn.convert import layer_name
from syncbn.groups import GroupHandle, resolve_group
from syncbn.header import NOISE, Call, PeerLostError, RankMismatchError
from syncbn.modules import SyncBatchNorm
from syncbn.recompute import recomputing, unseen
from syncbn.steps import group_device

THRESHOLD = 0.5
"""Noise up to which a group is large enough, unless another is given. Where it comes from: docs/diagnostics.md."""

MIN_GROUPS = 4
"""Fewest groups from which a noise is reported: below, its standard error means nothing."""

_EXCHANGES = 20  # timed, of which the median counts


@dataclasses.dataclass(frozen=True)
class NoiseRow:
    """The noise of one layer at one group size.

    Attributes:
        layer: qualified name; with ``[1]``, ``[2]``, ... for the second and further calls of a layer in one forward.
        channels: C.
        values: values per channel that a device has in a batch (N times positions), on average.
        group_size: k.
        groups: how many groups of k were measured.
        mean_noise, std_noise, noise: see the module; 1 is one standard deviation of the channel.
        mean_noise_error, std_noise_error, noise_error: their standard errors.
        sync_seconds: time of one exchange of this layer's 2C+1 float64 on its process group: median, slowest rank. A
            training step makes two. None without peers.
    """

    layer: str
    channels: int
    values: float
    group_size: int
    groups: int
    mean_noise: float
    mean_noise_error: float
    std_noise: float
    std_noise_error: float
    noise: float
    noise_error: float
    sync_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Over how many ranks a layer should synchronize.

    Attributes:
        layer: as in ``NoiseRow``.
        noise: at the smallest group size measured.
        smallest: that size: 1 unless others were asked for.
        group_size: smallest size whose noise is not above the threshold; None if statistics were not finite.
        measured: whether that size was measured, or extrapolated by ``noise ~ 1 / sqrt(k)`` from the largest that was.
    """

    layer: str
    noise: float
    smallest: int
    group_size: int | None
    measured: bool

    def __str__(self) -> str:
        alone = "per-device noise" if self.smallest == 1 else f"noise over {self.smallest}"
        if self.group_size is None:
            return f"{self.layer}: {alone} {self.noise:.2g}, statistics are not finite"
        if self.group_size == 1:
            return f"{self.layer}: {alone} {self.noise:.2g}, no need to synchronize"
        about = "at least" if self.measured else "about"
        source = "" if self.measured else " (extrapolated)"
        return f"{self.layer}: {alone} {self.noise:.2g}, synchronize over {about} {self.group_size}{source}"


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """Noise per layer and group size, equal on all ranks bit for bit. ``print`` it for a table.

    Attributes:
        rows: layers in the order in which they ran, group sizes ascending.
        threshold: noise up to which a group is large enough.
        world_size: W, the ranks that took part.
        batches: how many batches each rank measured.
        skipped: group sizes that were asked for and had fewer than ``MIN_GROUPS`` groups.
    """

    rows: tuple[NoiseRow, ...]
    threshold: float
    world_size: int
    batches: int
    skipped: tuple[int, ...] = ()

    @property
    def recommendations(self) -> list[Recommendation]:
        """One for each layer, in the order of ``rows``. Each prints as a sentence."""
        return [_recommend(rows, self.threshold) for rows in self._by_layer().values()]

    @property
    def group_size(self) -> int | None:
        """The smallest group size that serves all layers; None if some layer's statistics were not finite."""
        sizes = [each.group_size for each in self.recommendations]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    def to_csv(self, path: str | Path) -> None:
        """Write one line per row, with the names of ``NoiseRow``'s fields in the first."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(NoiseRow)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in self.rows)

    def to_json(self, path: str | Path) -> None:
        """Write everything as one object; numbers that are not finite as null."""
        content = dataclasses.asdict(self)
        content["group_size"] = self.group_size
        content["recommendations"] = [{**dataclasses.asdict(r), "text": str(r)} for r in self.recommendations]
        Path(path).write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw noise against group size, one line per layer with its standard error, and the threshold.

        Args:
            path: of the picture; the ending says which format (.png, .pdf, .svg).

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "NoiseReport.plot needs matplotlib: pip install matplotlib. (to_csv and to_json need nothing.)"
            ) from error
        import matplotlib

        layers = self._by_layer()
        columns = -(-len(layers) // 26)
        figure = Figure(figsize=(7 + 1.9 * columns, 4.8), layout="constrained")
        axis = figure.add_subplot()
        colours = matplotlib.colormaps["viridis"]
        handles: list[Any] = []
        for i, (layer, rows) in enumerate(layers.items()):
            colour = colours(0.92 * i / max(len(layers) - 1, 1))
            sizes, noises = [row.group_size for row in rows], [row.noise for row in rows]
            errors = [row.noise_error for row in rows]
            handles.append(axis.errorbar(sizes, noises, errors, fmt="o-", ms=3, lw=1.2, color=colour, label=layer))
        label = f"threshold {self.threshold:g}"
        handles.append(axis.axhline(self.threshold, color="tab:red", ls="--", lw=1.2, label=label))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row.group_size for row in self.rows})
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.set_xlabel("ranks that share statistics")
        axis.set_ylabel("noise (standard deviations of a channel)")
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        axis.set_title(f"Noise of batch statistics ({ranks}, {self.batches} batches each)")
        axis.grid(alpha=0.3, which="both")
        small = 8 if len(layers) <= 26 else 6.5
        figure.legend(
            handles=handles, loc="outside right upper", ncols=columns, fontsize=small, title="layer, first to last"
        )
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        sizes = sorted({row.group_size for row in self.rows})
        head = ["layer", "values", *(f"noise, k={k}" for k in sizes), "sync us", "group size"]
        lines = [head]
        for (layer, rows), advice in zip(self._by_layer().items(), self.recommendations, strict=True):
            at = {row.group_size: f"{row.noise:.3f} ± {row.noise_error:.3f}" for row in rows}
            seconds = rows[0].sync_seconds
            size = "?" if advice.group_size is None else f"{'' if advice.measured else 'about '}{advice.group_size}"
            cost = "-" if seconds is None else f"{1e6 * seconds:.0f}"
            lines.append([layer, f"{rows[0].values:g}", *(at.get(k, "-") for k in sizes), cost, size])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        text += f"\n{self.batches} batches on {ranks}; threshold {self.threshold:g}. {self._verdict()}"
        if self.skipped:
            listed = ", ".join(map(str, self.skipped))
            text += f"\nNot measured: group size {listed} (each takes {MIN_GROUPS} groups; give more batches)."
        return text

    def _verdict(self) -> str:
        size = self.group_size
        if size is None:
            return "Some statistics are not finite."
        if size == 1:
            return "No layer needs synchronization."
        worst = max(self.recommendations, key=lambda advice: advice.group_size or 0)
        few = f"; this job has {self.world_size} ranks" if 1 < self.world_size < size else ""
        return f"Synchronize over {size} ranks or more, as {worst.layer} asks for{few}."

    def _by_layer(self) -> dict[str, list[NoiseRow]]:
        layers: dict[str, list[NoiseRow]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, []).append(row)
        return layers


def measure_noise(
    model: nn.Module,
    batches: Iterable[Any],
    group_sizes: Sequence[int] | None = None,
    *,
    threshold: float = THRESHOLD,
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    process_group: Any = None,
) -> NoiseReport:
    """Measure, for each batch norm layer, how noisy the statistics of k ranks are, and what sharing them costs.

    Formulas and estimator are in the docstring of this module. Measured are all layers of ``nn.BatchNorm*`` and
    ``SyncBatchNorm`` in training mode that run. The forwards are those of training, without gradients; afterwards
    buffers (running statistics among them) and torch's random state are what they were, also after an error.

    All ranks call it together. Ranks may hold different numbers of samples; it ends with the first rank that has run
    out of batches. A rank that raises tells the others, which raise ``RankMismatchError``. (Not those that wait in a
    layer with a process group of its own: they wait until their timeout. See ``syncbn.steps.vote`` for what can be
    told over which backend.)

    Args:
        model: in training mode, on its device. Layers in eval mode use no batch statistics and are left out.
        batches: this rank's batches, of the size that it trains with, on the model's device. About 30 times W/k give
            the noise at k to a few percent.
        group_sizes: the k to measure; None for 1, 2, 4, ... while there are ``MIN_GROUPS`` groups.
        threshold: noise up to which a group is large enough.
        num_batches: take at most so many.
        forward: called as ``forward(model, batch)``. None: ``model(batch)`` for a tensor, ``model(batch[0])`` for a
            tuple or list, ``model(**batch)`` for a mapping.
        process_group: the ranks that take part; as in ``SyncBatchNorm``.

    Returns:
        ``NoiseReport``, the same on all ranks.

    Raises:
        ValueError: no batch norm layer in training mode, no batch, too few batches, or a group size below 1.
        RankMismatchError: another rank raised, or its model has other layers.
        PeerLostError: a rank did not take part.
        Whatever ``batches`` or ``forward`` raise, on this rank.

    Collectives:
        Per batch one exchange of 1 float64, and those of the model's own forward. Afterwards one of 3; one of
        T * (2C+1) for each layer and T batches (W times as long where only sums are seen); 22 of 2C+1 for each width,
        which are timed; and one for the times.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> report = measure_noise(nn.BatchNorm1d(8), (torch.randn(4, 8) for _ in range(256)), group_sizes=[1, 4, 16])
    >>> [round(row.mean_noise, 1) for row in report.rows]  # 1 / sqrt(4 k)
    [0.5, 0.2, 0.1]
    >>> print(report.recommendations[0])
    BatchNorm1d: per-device noise 0.76, synchronize over at least 4
    """
    sizes = _checked(group_sizes)
    layers = _layers(model)
    if not any(layer.training for layer in layers.values()):
        raise ValueError(
            f"the model has {len(layers)} batch norm layers, none of them in training mode, so there are no batch "
            "statistics to measure; call model.train() first"
        )
    group = resolve_group(process_group)
    link = comm.link(group, group_device(group))
    forward = forward or _forward
    recorder = _Recorder(layers)
    count = 0
    with _state_kept(model), _eager(model), torch.no_grad():
        for batch in _together(batches, link, num_batches):
            with recorder.attached():
                try:
                    forward(model, batch)
                except Exception as error:
                    if link is not None and not recorder.has_told(error, group):
                        _refuse(link, f"its forward raised {type(error).__name__}: {error}")
                    raise
            recorder.next()
            count += 1
    if not _same_layers(recorder, link, count):
        raise RankMismatchError(
            f"the ranks ran different batch norm layers, or different numbers of batches: this rank {count} batches of "
            f"{len(recorder.names)} layers. syncbn.check_ranks_agree(model) compares the layers."
        )
    report = _report(recorder, link, sizes, threshold)
    if not report.rows:
        least = min(sizes or [1])
        raise ValueError(
            f"{count} batches on {report.world_size} rank(s), in which {len(recorder.names)} batch norm layers ran, "
            f"are too few: a group size of {least} takes {MIN_GROUPS * least} measurements of a layer; give more"
        )
    seconds = _time_exchanges(recorder, link)
    rows = tuple(dataclasses.replace(row, sync_seconds=seconds[row.layer]) for row in report.rows)
    return dataclasses.replace(report, rows=rows)


class NoiseObserver:
    """Watch the noise of batch statistics while a model trains.

    In the last ``window`` of every ``every`` training forwards it looks at what goes into the batch norm layers, and
    reports the noise as ``measure_noise`` does, with these few forwards as the population: the weights hardly move in
    between. Training gives the same bits with and without it; other forwards cost one count. A measured forward reads
    the input of each layer once more; the last of a window exchanges what was measured::

        with NoiseObserver(model, every=50, writer=SummaryWriter() if rank == 0 else None):
            train(model)

    All ranks must attach it alike: they exchange in the same forward of ``model``. Forwards in eval mode do not count.
    For eager models only; attach it to the module that is called, or to that within DistributedDataParallel.

    Args:
        model: what is called in each step. Its layers are looked up once, here.
        every: forwards from one report to the next.
        window: how many of them are measured. There are W * window measurements of each layer, and a group size of k
            takes ``MIN_GROUPS * k``: a process alone needs a window of 16 to see k = 4.
        group_sizes, threshold, process_group: as in ``measure_noise``.
        writer: anything with ``add_scalar(tag, value, step)``, such as TensorBoard's ``SummaryWriter``; usually on one
            rank. Gets ``<tag>/<layer>/group_<k>`` with the noise, at the number of forwards.
        tag: the first part of these names.

    Raises:
        ValueError: no batch norm layer, a compiled model, a window longer than ``every``, too short a window for the
            smallest group size, or a group size below 1.

    Collectives:
        At the end of each window one exchange of 3 float64 and one of ``window * (2C+1)`` for each layer (W times as
        long where only sums are seen). A rank that fails in that forward, and votes (``syncbn.steps.vote``), is heard
        there as it is in a layer.

    >>> layer = nn.BatchNorm1d(8)
    >>> with NoiseObserver(layer, every=16, window=16) as observer:
    ...     for _ in range(16):
    ...         _ = layer(torch.randn(32, 8))
    >>> [row.group_size for row in observer.report.rows]
    [1, 2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        window: int = 4,
        group_sizes: Sequence[int] | None = None,
        threshold: float = THRESHOLD,
        writer: Any = None,
        tag: str = "syncbn_noise",
        process_group: Any = None,
    ) -> None:
        self._sizes = _checked(group_sizes)
        self._group = GroupHandle(process_group)
        group = self._group.resolve()
        world_size = 1 if group is None else group.size()
        least = MIN_GROUPS * min(self._sizes or [1])
        if not 1 <= window <= every:
            raise ValueError(f"window must be between 1 and every, got window={window}, every={every}")
        if window * world_size < least:
            raise ValueError(
                f"window={window} on {world_size} rank(s) gives {window * world_size} measurements of a layer, and the "
                f"smallest group size takes {least}; give a window of {-(-least // world_size)} or more"
            )
        if _is_compiled(model):
            raise ValueError("NoiseObserver watches eager models; measure_noise takes compiled ones as well")
        layers = _layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no batch norm layer to observe")
        self._model: nn.Module | None = model
        self._every, self._window, self._threshold = every, window, threshold
        self._writer, self._tag = writer, tag
        self._recorder = _Recorder(layers)
        self._layer_hooks: contextlib.ExitStack | None = None
        self._model_hooks: list[Any] = []
        self._warned = False
        self.forwards = 0
        """Training forwards so far."""
        self.report: NoiseReport | None = None
        """The latest report; equal on all ranks."""

    def attach(self) -> NoiseObserver:
        """Begin to watch. Returns itself. Collectives: none here."""
        assert self._model is not None
        if not self._model_hooks:
            self._model_hooks = [
                self._model.register_forward_pre_hook(self._before, with_kwargs=True),
                self._model.register_forward_hook(self._after),
                self._model.register_forward_hook(self._close, always_call=True),
            ]
        return self

    def detach(self) -> None:
        """Stop, drop a window that has begun, and leave no hook in the model."""
        for hook in self._model_hooks:
            hook.remove()
        self._model_hooks = []
        self._drop()

    def __enter__(self) -> NoiseObserver:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # A copy of the model, an average of its weights say, carries the hooks along, and is not to be counted.
    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseObserver:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_observer, ()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self._model or not module.training or recomputing():
            return
        self.forwards += 1
        if (self.forwards - 1) % self._every >= self._every - self._window:
            self._layer_hooks = contextlib.ExitStack()
            self._layer_hooks.enter_context(self._recorder.attached())
            self._recorder.watch_root(module, args, kwargs)

    def _after(self, module: nn.Module, *_: Any) -> None:
        if module is not self._model or self._layer_hooks is None or self.forwards % self._every:
            return
        self._recorder.next()
        group = self._group.resolve()
        link = comm.link(group, group_device(group))
        if _same_layers(self._recorder, link, self._window):
            self.report = _report(self._recorder, link, self._sizes, self._threshold)
            for row in self.report.rows if self._writer is not None else ():
                name = "/".join(filter(None, (self._tag, row.layer, f"group_{row.group_size}")))
                self._writer.add_scalar(name, row.noise, self.forwards)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                "NoiseObserver: the ranks ran different batch norm layers in the forwards up to number "
                f"{self.forwards}, so there is no report of them. (Said once.)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _close(self, module: nn.Module, *_: Any) -> None:
        """Also after a forward that raised. Such a forward counts, with what there was of it."""
        if module is not self._model or self._layer_hooks is None:
            return
        if self.forwards % self._every == 0:
            self._drop()
        else:
            self._layer_hooks.close()
            self._layer_hooks = None
            self._recorder.next()

    def _drop(self) -> None:
        if self._layer_hooks is not None:
            self._layer_hooks.close()
            self._layer_hooks = None
        self._recorder.clear()


def _idle_observer() -> NoiseObserver:
    observer = object.__new__(NoiseObserver)
    observer._model = None
    return observer


# ---- measuring


class _Recorder:
    """What goes into the layers: (n, mean, M2) of each call of each layer, step by step.

    Attributes:
        steps: how many are complete.
        names: of the calls, in the order in which they first ran.
        inside: the layer that is running, or that raised.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers
        self.inside: _BatchNorm | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.steps = 0
        self._calls: dict[str, int] = {}
        self._samples: dict[str, dict[int, Tensor]] = {}
        self._layer_of: dict[str, _BatchNorm] = {}
        self.device_of: dict[str, torch.device] = {}

    def next(self) -> None:
        """A step is complete."""
        self.steps += 1
        self._calls = {}

    @property
    def names(self) -> list[str]:
        return list(self._samples)

    def layer(self, name: str) -> _BatchNorm:
        return self._layer_of[name]

    def samples(self, name: str) -> Tensor:
        """Shape ``(steps, 2C+1)``, float64, on the CPU; zeros for a step without this call."""
        found = self._samples[name]
        width = next(iter(found.values())).numel()
        empty = torch.zeros(width, dtype=torch.float64)
        return torch.stack(
            [found[step].to("cpu", torch.float64) if step in found else empty for step in range(self.steps)]
        )

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the layers are watched."""
        self.inside = None
        with contextlib.ExitStack() as stack:
            for name, layer in self._layers.items():
                watch = functools.partial(self._watch, name)
                stack.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self._leave).remove)
            yield

    def watch_root(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at the input of a model that is a layer itself: a hook that is added in a forward sees only the next."""
        for name, layer in self._layers.items():
            if layer is model:
                self._watch(name, layer, args, kwargs)

    def _watch(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        self.inside = layer
        x = args[0] if args else kwargs.get("input")
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
            return  # (what the layer cannot take, it refuses itself)
        if x.shape[1] != layer.num_features:
            return
        call = self._calls[name] = self._calls.get(name, -1) + 1
        key = f"{name}[{call}]" if call else name
        with torch.no_grad(), unseen():
            self._samples.setdefault(key, {})[self.steps] = kernels.moments(x.detach())
        self._layer_of[key] = layer
        self.device_of[key] = x.device

    def _leave(self, *_: Any) -> None:
        self.inside = None

    def has_told(self, error: Exception, group: Any) -> bool:
        """Whether the peers of ``group`` know of an error: if it comes from a layer that synchronizes over it."""
        layer = self.inside
        here = isinstance(layer, SyncBatchNorm) and layer._group.resolve() is group
        if isinstance(error, RankMismatchError | PeerLostError):
            return here or layer is None
        return here and isinstance(error, ValueError)


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        layer_name(name) or type(layer).__name__: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
    }


def _checked(group_sizes: Sequence[int] | None) -> list[int] | None:
    if group_sizes is None:
        return None
    sizes = sorted(set(group_sizes))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"group_sizes must be numbers of ranks, 1 or more, got {list(group_sizes)}")
    return sizes


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


_DONE = object()


def _together(batches: Iterable[Any], link: Link | None, limit: int | None) -> Iterator[Any]:
    """This rank's batches, as long as every rank has one."""
    iterator: Iterator[Any] | None = None
    for number in itertools.count():
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = _DONE if number == limit else next(iterator, _DONE)
        except Exception as error:
            if link is not None:
                _refuse(link, f"its batches raised {type(error).__name__}: {error}")
            raise
        ready = 0 if batch is _DONE else 1
        if link is not None:
            ready = int(sum(part.item() for part in _gather(link, torch.tensor([float(ready)], dtype=torch.float64))))
        if ready < (1 if link is None else link.size):
            return
        yield batch


def _refuse(link: Link, reason: str) -> None:
    with contextlib.suppress(PeerLostError):  # the error at hand is what there is to mend
        link.refuse(Call(NOISE), reason, 1)


def _gather(link: Link | None, payload: Tensor, layer: str = "") -> list[Tensor]:
    """The ``payload`` of every rank, in rank order, on the CPU; its own where there are no peers."""
    if link is None:
        return [payload]
    call = Call(NOISE, layer)
    there = payload.to(link._device)
    if link.sees_each_rank:
        parts = [part.to("cpu", copy=True) for part in link.exchange(there, call)]
    else:
        slots = torch.zeros(link.size, payload.numel(), dtype=torch.float64, device=link._device)
        slots[link.rank] = there
        parts = list(link.exchange(slots.flatten(), call)[0].to("cpu", copy=True).view(link.size, -1))
    link.settle()
    return parts


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it, a compiled model runs as it is written: a compiler would see the hooks, and compile anew."""
    return torch.compiler.set_stance("force_eager") if _is_compiled(model) else contextlib.nullcontext()


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers and torch's random state are what they were."""
    kept = []
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if isinstance(buffer, nn.UninitializedBuffer):
                raise ValueError(f"layer {name!r} does not know its number of channels yet; run one batch first")
            if buffer is not None:
                kept.append((module, key, buffer, buffer.detach().clone()))
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type == "cuda"}
    generators = torch.random.fork_rng(sorted(device.index for device in devices))
    with generators, uneven.without_broadcasts(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, key, buffer, before in kept:
                    buffer.copy_(before)
                    module._buffers[key] = buffer


def _time_exchanges(recorder: _Recorder, link: Link | None) -> dict[str, float | None]:
    """Median seconds of an exchange per layer, that of the slowest rank."""
    if link is None:
        return dict.fromkeys(recorder.names)
    known: dict[tuple[int, int], float] = {}
    local = []
    for name in recorder.names:
        layer = recorder.layer(name)
        own = comm.link(layer._group.resolve(), recorder.device_of[name]) if isinstance(layer, SyncBatchNorm) else link
        width = 2 * layer.num_features + 1
        if own is not None and (id(own), width) not in known:
            known[id(own), width] = _time_exchange(own, width, name)
        local.append(0.0 if own is None else known[id(own), width])
    every = torch.stack(_gather(link, torch.tensor(local, dtype=torch.float64)))
    slowest = every.max(0).values.tolist()
    return {name: seconds or None for name, seconds in zip(recorder.names, slowest, strict=True)}


def _time_exchange(link: Link, width: int, layer: str) -> float:
    payload = torch.zeros(width, dtype=torch.float64, device=link._device)
    times = []
    for _ in range(_EXCHANGES + 2):
        start = time.perf_counter()
        link.exchange(payload, Call(NOISE, layer))
        if link._device.type == "cuda":
            torch.cuda.synchronize(link._device)
        times.append(time.perf_counter() - start)
    link.settle()
    return statistics.median(times[2:])


# ---- estimating


def _same_layers(recorder: _Recorder, link: Link | None, count: int) -> bool:
    """Whether all ranks have measured the same calls, equally often: the same answer on all of them."""
    widths = [recorder.layer(name).num_features for name in recorder.names]
    digest = zlib.crc32(json.dumps([recorder.names, widths]).encode())
    mine = torch.tensor([len(widths), digest, count], dtype=torch.float64)
    return len({tuple(part.tolist()) for part in _gather(link, mine)}) == 1


def _report(recorder: _Recorder, link: Link | None, sizes: list[int] | None, threshold: float) -> NoiseReport:
    world_size = 1 if link is None else link.size
    measurements = recorder.steps * world_size
    if sizes is None:
        sizes = [2**i for i in range(max(1, measurements // MIN_GROUPS).bit_length())]
    kept = [k for k in sizes if measurements >= MIN_GROUPS * k]
    rows = []
    for name in recorder.names:
        layer = recorder.layer(name)
        own = recorder.samples(name)
        ranks = _gather(link, own.flatten(), name)
        line = torch.stack([part.view_as(own) for part in ranks], 1).flatten(0, 1)
        values = line[:, 0].mean().item()
        for k in kept:
            groups, numbers = _noise(line, k, layer.eps)
            rows.append(NoiseRow(name, layer.num_features, values, k, groups, *numbers))
    return NoiseReport(tuple(rows), threshold, world_size, recorder.steps, tuple(k for k in sizes if k not in kept))


def _noise(line: Tensor, k: int, eps: float) -> tuple[int, list[float]]:
    """The noise of groups of k neighbours.

    Args:
        line: shape ``(measurements, 2C+1)``: count, mean, M2 of each.

    Returns:
        How many groups there are, and the mean, std and total noise, each followed by its standard error.
    """
    channels = line.shape[1] // 2
    n, mean, m2 = line[:, :1], line[:, 1 : channels + 1], line[:, channels + 1 :]
    total = n.sum().clamp(min=1.0)
    centre = (n * mean).sum(0) / total
    off = mean - centre  # about the centre, so that a far mean costs no digits
    scale = (m2 + n * off * off).sum(0) / total + eps
    number = len(line) // k
    n, off, m2 = (t[: number * k].unflatten(0, (number, k)) for t in (n, off, m2))
    size = n.sum(1)
    shift = (n * off).sum(1) / size.clamp(min=1.0)
    var = (m2 + n * (off - shift.unsqueeze(1)) ** 2).sum(1) / size.clamp(min=1.0)
    weight = total / (total - size).clamp(min=1.0)
    of_mean = (weight * shift * shift / scale).mean(1)
    of_std = (weight * (0.5 * torch.log((var + eps) / scale)) ** 2).mean(1)
    there = size.squeeze(1) > 0  # nobody normalizes with the statistics of an empty group
    numbers: list[float] = []
    for squares in (of_mean[there], of_std[there], (of_mean + of_std)[there]):
        rms = math.sqrt(squares.mean().item()) if len(squares) else math.nan
        spread = squares.std().item() / math.sqrt(len(squares)) if len(squares) > 1 else math.nan
        numbers += [rms, spread / (2 * rms) if rms > 0 else spread]
    return int(there.sum()), numbers


def _recommend(rows: list[NoiseRow], threshold: float) -> Recommendation:
    first, last = rows[0], rows[-1]
    advise = functools.partial(Recommendation, first.layer, first.noise, first.group_size)
    if not all(math.isfinite(row.noise) for row in rows):
        return advise(None, True)
    for row in rows:
        if row.noise <= threshold:
            return advise(row.group_size, True)
    needed = last.group_size * (last.noise / threshold) ** 2
    return advise(2 ** math.ceil(math.log2(needed)), False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
