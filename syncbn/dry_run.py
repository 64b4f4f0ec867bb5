"""Run a model without training it: to measure it, and to leave it as it was."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import _torch


@contextlib.contextmanager
def dry_run(model: nn.Module, *, trains: Callable[[nn.Module], bool] | None = None) -> Iterator[None]:
    """Within it the model runs without gradients, in eager mode, and afterwards it is as it was, also after an error.

    As it was: modes, buffers (values and identity), and torch's random numbers on the CPU and on the model's CUDA
    devices. DistributedDataParallel broadcasts no buffers meanwhile.

    Args:
        model: compiled or not. Lazy buffers, which have no value yet, are left as they come out.
        trains: modules for which it is false are in eval mode meanwhile, and leave their state alone: spectral norms,
            codebooks, averages. None: all are in the mode they have.
    """
    with _restored(model), _torch.without_broadcasts(model), eager(), torch.no_grad():
        for module in model.modules() if trains is not None else ():
            if not trains(module):  # type: ignore[misc]
                module.training = False  # not by module.eval(): some classes do more in it, or less
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, buffers and random numbers are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not _torch.is_lazy(buffer)
    ]
    devices = {t.device.index for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    module._buffers[name] = buffer


_eager_lock = threading.Lock()
_eager_stances: list[Any] = []


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Within it, compiled modules run as they are written: a graph compiled before lets nobody look at its layers.

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


def check_is_module(model: Any) -> None:
    """Raise TypeError unless ``model`` is one module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}: {model!r:.100}")


def check_is_iterable(batches: Any) -> None:
    """Raise TypeError unless ``batches`` can be batches, one after the other."""
    if isinstance(batches, str | os.PathLike):
        raise TypeError(f"batches must be an iterable of batches, got {batches!r:.80}; load the file first")
    if isinstance(batches, Tensor):
        shape = tuple(batches.shape)
        raise TypeError(f"batches must be an iterable of batches, got one tensor of shape {shape}; put it into a list")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        what = f"a {type(batches).__name__}: {batches!r:.80}{'; call it first' if callable(batches) else ''}"
        raise TypeError(f"batches must be an iterable of batches, got {what}")


def first_batches(batches: Iterable[Any], number: int | None) -> Iterator[Any]:
    """So many batches at most, None for all; no more than these are taken from an iterator."""
    yield from itertools.islice(batches, number)


def run_on_batch(model: nn.Module, batch: Any) -> object:
    """``model(batch)`` of a tensor, ``model(batch[0])`` of a tuple or list, ``model(**batch)`` of a mapping.

    Raises:
        ValueError: an empty tuple or list, or a mapping whose keys are no argument names.
        TypeError: a text, such as the name of a file.

    >>> run_on_batch(nn.Identity(), (1.0, "label"))
    1.0
    """
    if isinstance(batch, str | bytes | os.PathLike):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, {batch!r:.80}: if that names a file, load it (batches are what the "
            "model takes); else say by forward= how the model takes it"
        )
    if isinstance(batch, Mapping):
        if not all(isinstance(key, str) for key in batch):
            raise ValueError(f"a batch is a mapping, of which the keys {list(batch)!r:.100} are to be argument names")
        return model(**batch)
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError(f"a batch is an empty sequence, {batch!r}; its first entry is the model's input")
        return model(batch[0])
    return model(batch)
