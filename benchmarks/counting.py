"""What a layer costs, counted and not timed: calls of operators, and bytes. The tests count with it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(run: Callable[[], Any]) -> int:
    """How many operators reach ATen while ``run`` runs."""
    run()
    with _Calls() as mode:
        run()
    return mode.count


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes allocated at one time while ``run`` runs, above what was there before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    level = highest = 0
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def kept_bytes(run: Callable[[], Tensor], known: Sequence[Tensor]) -> int:
    """Bytes of storages saved for the backward of ``run``, other than those of ``known`` tensors, which live anyway."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # alive while its storages are told apart by their addresses
    for tensor in known:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(sizes.values())
