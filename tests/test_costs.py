"""What a layer costs, counted and not timed: calls of operators, exchanges, bytes. A guard against slow regressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from helpers.ranks import run_ranks
from syncbn import comm

IMAGE = (8, 64, 56, 56)  # 6.4 MB in float32: several slices of the cache
FLAT = (64, 256)


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with comm.forced():
        yield


class Calls(TorchDispatchMode):
    """Counts the operators that reach ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(run: Callable[[], Any]) -> int:
    run()
    with Calls() as mode:
        run()
    return mode.count


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes allocated at one time while ``run`` runs, above what was there before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    level = highest = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def kept_bytes(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes saved for the backward, without the tensors that live anyway."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in known:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_a_small_layer_makes_few_calls() -> None:
    layer = syncbn.SyncBatchNorm(FLAT[1])
    x, grad = torch.randn(FLAT, requires_grad=True), torch.randn(FLAT)
    assert calls(lambda: layer(x)) <= FORWARD_CALLS
    y = layer(x)
    leaves = [x, layer.weight, layer.bias]
    assert calls(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)) <= BACKWARD_CALLS


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_large_layer_works_in_slices_of_the_cache(form: torch.memory_format) -> None:
    layer = syncbn.SyncBatchNorm(IMAGE[1])
    x, grad = (torch.randn(IMAGE).contiguous(memory_format=form) for _ in range(2))
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    size = 4 * x.numel()
    vectors = 1 << 18  # and no temporary of the input's size beside the result
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x)) <= size + vectors
    y = layer(x)
    assert peak_bytes(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)) <= size + vectors


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_only_the_input_is_kept(options: dict[str, Any]) -> None:
    layer = syncbn.SyncBatchNorm(IMAGE[1], **options)
    x, residual = torch.randn(IMAGE, requires_grad=True), torch.randn(IMAGE, requires_grad=True)
    vectors = 8 * 8 * IMAGE[1]  # some vectors of C float64
    known = [x, residual, layer.weight, layer.bias]
    assert kept_bytes(lambda: layer(x), known) <= vectors
    assert kept_bytes(lambda: layer(x, residual), known) <= vectors
    assert kept_bytes(lambda: layer(x, residual), [x]) <= vectors + (4 * x.numel() if options else 0)


def test_one_exchange_each_way() -> None:
    def body(rank: int, group: dist.ProcessGroup) -> tuple[int, int, int]:
        layer = syncbn.SyncBatchNorm(FLAT[1], process_group=group)
        x = torch.randn(FLAT, requires_grad=True)
        y = layer(x)
        link = comm.link(group, x.device)
        assert link is not None
        forward = link._number
        y.sum().backward()
        both = link._number
        layer.eval()(x)
        return forward, both, link._number

    assert run_ranks(2, body) == [(1, 2, 2)] * 2


# As counted with PyTorch 2.13; a smaller number is always welcome.
FORWARD_CALLS = 36
BACKWARD_CALLS = 31
