"""The recorder: what goes into the layers of this rank, call by call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import kernels
from syncbn._torch import BatchNormBase
from syncbn.checkpointing import unseen
from syncbn.convert import layer_name


def batch_norm_layers(model: nn.Module) -> dict[str, BatchNormBase]:
    """The layers to record, by their qualified names."""
    return {
        layer_name(name) or type(layer).__name__: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNormBase)
    }


class Recorder:
    """What goes into the layers: (n, mean, M2) of each call of each layer, step by step.

    Attributes:
        steps: how many are complete.
        names: of the calls, in the order in which they first ran.
    """

    def __init__(self, layers: Mapping[str, BatchNormBase]) -> None:
        self._layers = layers
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.steps = 0
        self._calls: dict[str, int] = {}
        self._samples: dict[str, dict[int, Tensor]] = {}
        self._layer_of: dict[str, BatchNormBase] = {}
        self.device_of: dict[str, torch.device] = {}

    def next(self) -> None:
        """A step is complete."""
        self.steps += 1
        self._calls = {}

    @property
    def names(self) -> list[str]:
        return list(self._samples)

    def layer(self, name: str) -> BatchNormBase:
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
        with contextlib.ExitStack() as stack:
            for name, layer in self._layers.items():
                watch = functools.partial(self._watch, name)
                stack.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
            yield

    def watch_root(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at the input of a model that is a layer itself: a hook that is added in a forward sees only the next."""
        for name, layer in self._layers.items():
            if layer is model:
                self._watch(name, layer, args, kwargs)

    def _watch(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, BatchNormBase)
        x = args[0] if args else kwargs.get("input")
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
            return  # what the layer cannot take, it refuses itself
        if x.shape[1] != layer.num_features:
            return
        call = self._calls[name] = self._calls.get(name, -1) + 1
        key = f"{name}[{call}]" if call else name
        with torch.no_grad(), unseen():
            self._samples.setdefault(key, {})[self.steps] = kernels.moments(x.detach())
        self._layer_of[key] = layer
        self.device_of[key] = x.device
