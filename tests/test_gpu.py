"""The layer on a GPU: values, launches, no waiting, CUDA graphs, mixed precision.

Skipped where there is none. ``SYNCBN_TEST_DEVICE=cpu pytest tests/test_gpu.py`` runs what also makes sense on a CPU, to
see that these tests are in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers import commands
from helpers.commands import PROGRAMS, environment, must
from helpers.links import forced
from helpers.oracle import assert_matches, step, whole_batch
from helpers.ranks import run_ranks
from syncbn import comm, kernels

GPU = torch.cuda.is_available()
DEVICE = torch.device(os.environ.get("SYNCBN_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not GPU, reason="no CUDA device"),
]
needs_cuda = pytest.mark.skipif(not GPU, reason="no CUDA device")

SHAPES = [(6, 5), (4, 3, 7), (5, 6, 3, 3), (8, 64, 14, 14), (16, 130, 7, 7), (2, 3, 224, 224), (2, 3, 4, 5, 6)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def laid_out(x: Tensor, columns: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if columns else x


def assert_on_gpu_matches(results: list[dict[str, Any]], expected: Any, dtype: torch.dtype) -> None:
    on_cpu = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()} for result in results]
    assert_matches(on_cpu, expected, dtype)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A default group of one rank, over NCCL where there is a GPU, on which layers synchronize."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with forced():
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_rank(world: dist.ProcessGroup, shape: tuple[int, ...], dtype: torch.dtype, columns: bool) -> None:
    x, g, r = (laid_out(torch.randn(shape).mul(2).add(1).to(dtype), columns) for _ in range(3))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for options in ({}, {"activation": "relu", "momentum": None}):
        residual = r if options else None
        layer = syncbn.SyncBatchNorm(shape[1], device=DEVICE, dtype=wide, **options)
        result = step(layer, x.to(DEVICE), g.to(DEVICE), None if residual is None else residual.to(DEVICE))
        expected = whole_batch(
            [x], [g], momentum=options.get("momentum", 0.1), relu=bool(options),
            residuals=None if residual is None else [residual],
        )  # fmt: skip
        assert_on_gpu_matches([result], expected, dtype)
        assert result["y"].stride() == x.stride()


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0, 3)], ids=str)
def test_several_ranks_on_one_device(sizes: tuple[int, ...], dtype: torch.dtype, columns: bool) -> None:
    """Over gloo, which sees each rank: the functions one by one."""
    xs, gs = ([laid_out(torch.randn(n, 20, 9, 7).add(1).to(dtype), columns) for n in sizes] for _ in range(2))

    def body(rank: int, group: Any) -> Any:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        layer = syncbn.SyncBatchNorm(20, process_group=group, device=DEVICE, dtype=wide)
        # A backward on a GPU runs in one thread for all ranks of this process, in which they would wait for each other.
        with torch.autograd.set_multithreading_enabled(False):
            return step(layer, xs[rank].to(DEVICE), gs[rank].to(DEVICE))

    assert_on_gpu_matches(run_ranks(len(sizes), body), whole_batch(xs, gs), dtype)


@needs_cuda
@pytest.mark.parametrize("what", ["kernels", "layer"])
def test_the_kernels(what: str) -> None:
    """All tests of programs/device, as the interpreter runs them on a CPU."""
    variables = environment(SYNCBN_TEST_DEVICE="cuda")
    variables.pop("TRITON_INTERPRET", None)
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", PROGRAMS / "device" / f"{what}.py"
    must(commands.run(sys.executable, *command, deadline=1100.0, env=variables))


@needs_cuda
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (1 << 16, 4, 1, 9000)], ids=str)
def test_large_inputs_agree_with_torch(shape: tuple[int, ...], form: torch.memory_format) -> None:
    """Many programs, of which some take several runs; and offsets beyond 32 bits."""
    if torch.cuda.mem_get_info()[0] < 10 * torch.Size(shape).numel():
        pytest.skip("not enough memory on this device")
    x, grad = (torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=form) for _ in range(2))
    x.normal_(3), grad.normal_(1)
    packed = kernels.moments(x)
    channels, count = shape[1], x.numel() // shape[1]
    assert packed[0] == count
    pieces = list(zip(x.split(1024), grad.split(1024), strict=True))
    exact = torch.stack([part.double().sum((0, 2, 3)) for part, _ in pieces]).sum(0) / count
    mean, invstd = packed[1 : channels + 1], (packed[channels + 1 :] / count + 1e-5).rsqrt()
    torch.testing.assert_close(mean, exact, rtol=1e-6, atol=0)
    vectors = mean.view(1, -1, 1, 1), invstd.view(1, -1, 1, 1)
    y = kernels.plain(x).normalize(x, mean, invstd, None, None)
    sums = kernels.plain(x).gradient_sums(grad, x, mean, invstd)
    exact_sums = torch.zeros_like(sums)
    for part, g in pieces:
        products = g.double() * (part.double() - vectors[0]) * vectors[1]
        exact_sums += torch.cat([g.double().sum((0, 2, 3)), products.sum((0, 2, 3))])
        del products
    torch.testing.assert_close(sums[:channels], exact_sums[:channels], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[channels:], exact_sums[channels:], rtol=1e-4, atol=1e-5 * count**0.5)
    dx = kernels.plain(x).input_gradient(grad, x, mean, invstd, None, sums, packed[0])
    level, slope = (v.view(1, -1, 1, 1) / count for v in sums.chunk(2))
    for piece in (slice(0, 2), slice(-2, None)):
        normal = (x[piece].double() - vectors[0]) * vectors[1]
        torch.testing.assert_close(y[piece].double(), normal, rtol=1e-2, atol=1e-4)
        expected = vectors[1] * (grad[piece].double() - level - normal * slope)
        torch.testing.assert_close(dx[piece].double(), expected, rtol=1e-2, atol=1e-4)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(world: dist.ProcessGroup) -> None:
    """A model on the second device, in a program that sets none: values, late checks and a graph."""
    assert torch.cuda.current_device() == 0
    x, g = torch.randn(8, 12, 5, 7), torch.randn(8, 12, 5, 7)
    layer = syncbn.SyncBatchNorm(12, device="cuda:1")
    given = x.to("cuda:1").requires_grad_(), g.to("cuda:1")
    result = step(layer, *given)
    assert_on_gpu_matches([result], whole_batch([x], [g]), x.dtype)
    for _ in range(2):
        step(layer, *given)
    comm.link_of(world, given[0].device).settle()
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(given[0])
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(y.detach().cpu(), result["y"].cpu())
    assert torch.cuda.current_device() == 0


@needs_cuda
def test_results_do_not_change_from_run_to_run(world: dist.ProcessGroup) -> None:
    x, g = (torch.randn(16, 96, 28, 28, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    results = [step(syncbn.SyncBatchNorm(96, device="cuda", activation="relu"), x, g) for _ in range(5)]
    for result in results[1:]:
        for name in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
            assert torch.equal(result[name], results[0][name]), name


@needs_cuda
@pytest.mark.nccl
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_step_waits_for_nothing_and_launches_little(world: dist.ProcessGroup, momentum: float | None) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    layer = syncbn.SyncBatchNorm(64, device="cuda", momentum=momentum)
    x = torch.randn(8, 64, 28, 28, device="cuda", requires_grad=True)
    g = torch.randn_like(x)
    for _ in range(3):
        layer(x).backward(g)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            layer(x).backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    y = layer(x)
    for run in (lambda: layer(x), lambda: torch.autograd.grad(y, [x, layer.weight, layer.bias], g, retain_graph=True)):
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            run()
            torch.cuda.synchronize()
        names = [e.name for e in record.events() if e.device_type == DeviceType.CUDA]
        ours = [n for n in names if not n.startswith(("Memcpy", "Memset")) and "nccl" not in n.lower()]
        assert len(ours) <= 3, names


@needs_cuda
@pytest.mark.nccl
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_training_step_in_a_cuda_graph(world: dist.ProcessGroup, columns: bool) -> None:
    layer = syncbn.SyncBatchNorm(12, device="cuda", activation="relu", momentum=None)
    x, g = (laid_out(torch.randn(6, 12, 5, 7, device="cuda"), columns) for _ in range(2))
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).backward(g)
    torch.cuda.current_stream().wait_stream(stream)
    before = int(layer.num_batches_tracked)
    x.grad = layer.weight.grad = layer.bias.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(g)
    assert layer.num_batches_tracked == before
    for turn in range(1, 4):
        values = laid_out(torch.randn(6, 12, 5, 7).add(turn), columns)
        with torch.no_grad():
            x.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        expected = whole_batch([values], [g.cpu()], relu=True)
        torch.testing.assert_close(y.detach().cpu().double(), expected.y[0], rtol=1e-5, atol=1e-5)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.cpu().double(), expected.dx[0], rtol=1e-5, atol=1e-5)
        assert layer.num_batches_tracked == before + turn
        x.grad.zero_(), layer.weight.grad.zero_(), layer.bias.grad.zero_()


def test_mixed_precision_and_channels_last(world: dist.ProcessGroup) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model = syncbn.convert_sync_batchnorm(model).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
    x = torch.randn(16, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target = (x.sum((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            loss = nn.functional.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model[1].running_mean.dtype is torch.float32 and model[1].running_var.isfinite().all()


def test_double_backward(world: dist.ProcessGroup) -> None:
    layer, plain = syncbn.SyncBatchNorm(4, device=DEVICE), nn.BatchNorm1d(4, device=DEVICE)
    x = torch.randn(6, 4, 5, device=DEVICE, requires_grad=True)
    results = []
    for module in (layer, plain):
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        results.append((dx, *torch.autograd.grad(dx.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_global_moments(world: dist.ProcessGroup) -> None:
    x = torch.randn(5, 3, 4, device=DEVICE, requires_grad=True)
    count, mean, var = syncbn.functional.global_moments(x)
    assert count == 20
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2), correction=0))
    var.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
