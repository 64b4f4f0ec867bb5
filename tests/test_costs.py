"""What a layer costs, counted and not timed: calls of operators, exchanges, bytes. A guard against slow regressions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import syncbn
from helpers.commands import ROOT, load
from helpers.links import exchanges_made, forced
from helpers.ranks import run_ranks

IMAGE = (8, 64, 56, 56)  # 6.4 MB in float32: several slices of the cache
FLAT = (64, 256)

counting = load(ROOT / "benchmarks" / "counting.py")


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with forced():
        yield


def test_a_small_layer_makes_few_calls() -> None:
    layer = syncbn.SyncBatchNorm(FLAT[1])
    x, grad = torch.randn(FLAT, requires_grad=True), torch.randn(FLAT)
    assert counting.calls(lambda: layer(x)) <= FORWARD_CALLS
    y = layer(x)
    leaves = [x, layer.weight, layer.bias]
    assert counting.calls(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)) <= BACKWARD_CALLS


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_large_layer_works_in_slices_of_the_cache(form: torch.memory_format) -> None:
    layer = syncbn.SyncBatchNorm(IMAGE[1])
    x, grad = (torch.randn(IMAGE).contiguous(memory_format=form) for _ in range(2))
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    size = 4 * x.numel()
    vectors = 1 << 18  # and no temporary of the input's size beside the result
    with torch.no_grad():
        assert counting.peak_bytes(lambda: layer(x)) <= size + vectors
    y = layer(x)
    assert counting.peak_bytes(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)) <= size + vectors


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_only_the_input_is_kept(options: dict[str, Any]) -> None:
    layer = syncbn.SyncBatchNorm(IMAGE[1], **options)
    x, residual = torch.randn(IMAGE, requires_grad=True), torch.randn(IMAGE, requires_grad=True)
    vectors = 8 * 8 * IMAGE[1]  # some vectors of C float64
    known = [x, residual, layer.weight, layer.bias]
    assert counting.kept_bytes(lambda: layer(x), known) <= vectors
    assert counting.kept_bytes(lambda: layer(x, residual), known) <= vectors
    assert counting.kept_bytes(lambda: layer(x, residual), [x]) <= vectors + (4 * x.numel() if options else 0)


def test_one_exchange_each_way() -> None:
    def body(rank: int, group: dist.ProcessGroup) -> tuple[int, int, int]:
        layer = syncbn.SyncBatchNorm(FLAT[1], process_group=group)
        x = torch.randn(FLAT, requires_grad=True)
        y = layer(x)
        forward = exchanges_made(group)
        y.sum().backward()
        both = exchanges_made(group)
        layer.eval()(x)
        return forward, both, exchanges_made(group)

    assert run_ranks(2, body) == [(1, 2, 2)] * 2


# As counted with PyTorch 2.13; a smaller number is always welcome.
FORWARD_CALLS = 42
BACKWARD_CALLS = 36
