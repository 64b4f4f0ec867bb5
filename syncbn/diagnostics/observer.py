"""Watch the noise of a model that trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from syncbn import _torch
from syncbn.checkpointing import recomputing
from syncbn.comm import link_of
from syncbn.diagnostics.gathered import checked_sizes, report_of, same_layers
from syncbn.diagnostics.recorder import Recorder, batch_norm_layers
from syncbn.diagnostics.report import MIN_GROUPS, THRESHOLD, NoiseReport
from syncbn.groups import GroupHandle, group_device


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

    >>> import torch
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
        self._sizes = checked_sizes(group_sizes)
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
        if _torch.is_compiled(model):
            raise ValueError("NoiseObserver watches eager models; measure_noise takes compiled ones as well")
        layers = batch_norm_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no batch norm layer to observe")
        self._model: nn.Module | None = model
        self._every, self._window, self._threshold = every, window, threshold
        self._writer, self._tag = writer, tag
        self._recorder = Recorder(layers)
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
        link = link_of(group, group_device(group))
        if same_layers(self._recorder, link):
            self.report = report_of(self._recorder, link, self._sizes, self._threshold)
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
