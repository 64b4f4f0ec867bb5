"""The layer and its kernels on one GPU, against PyTorch's layers and against a copy of the same bytes.

    python benchmarks/gpu.py                     # what matters most first, for 400 seconds
    python benchmarks/gpu.py --budget 1500 --batches 32 --dtypes bfloat16 --parts layer step
    torchrun --nproc-per-node 8 benchmarks/gpu.py --parts exchange step        # the two that several ranks make real
    python benchmarks/gpu.py --interpret         # no GPU: tiny shapes in Triton's interpreter, results and launches

A group over NCCL, of one rank unless torchrun starts more. Compared are

* ``nn.BatchNorm2d`` (cuDNN or PyTorch's own kernels), which synchronizes nothing;
* the autograd function of ``nn.SyncBatchNorm``, applied directly, so that its synchronized path runs on one rank;
* ``syncbn.SyncBatchNorm`` within ``comm.forced()``, which runs ours: it is asserted that our kernels and one
  collective each way ran, by what was launched.

The parts: ``layer``, and ``chain`` with a residual and a rectifier; ``host``, the time until a call has returned, which
no device is waited for in; ``spin``, the layer with a kernel that keeps the device busy for 10, 20 and 30 us in place
of each sum, which is what the latency of a sum over many GPUs costs; ``exchange``, an all-reduce of float64 sums beside
an all-gather of the same; ``step``, a ResNet-50's forward and backward in DistributedDataParallel, with the layers on
its group or on one of their own; ``kernel``, each function; ``compiled``, the layer under torch.compile.

Everything is compared with float64 first. Times are medians of CUDA events, eager and as a CUDA graph, all on one
stream, on which autograd's nodes then run as well. The inputs rotate through more memory than the L2 cache holds.
Launches and host synchronizations are counted by the profiler. Rows are written as they come; one that fails says why,
and the next one follows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

if "--interpret" in sys.argv:  # Triton looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import timing
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions as torchs_functions

import syncbn
from syncbn import comm, kernels
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.messages import Message, Shared
from syncbn.wire import SLOTS, summed_length

STAGES = [(64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = {
    "forward": {"measure", "finish_moments", "normalize"},
    "backward": {"sum_gradients", "finish_gradients", "input_gradient"},
}
WHATS = ("forward", "backward", "both")
PARTS = ("layer", "host", "spin", "exchange", "step", "kernel", "chain", "compiled")
ONCE = ("host", "spin", "exchange", "step", "compiled")  # in the first setting alone
SPINS = (10, 20, 30)
EPS = 1e-5
Rows = list[dict[str, object]]


class TorchSync(nn.BatchNorm2d):
    """The synchronized path of nn.SyncBatchNorm, which that layer takes with peers only."""

    def forward(self, input: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return torchs_functions.SyncBatchNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
            dist.group.WORLD, 1,
        )  # fmt: skip


class Chain(nn.Module):
    """A layer, then the residual and the rectifier as operators of their own, if asked for."""

    def __init__(self, norm: nn.Module, fused: bool, follows: bool) -> None:
        super().__init__()
        self.norm, self.fused, self.follows = norm, fused, follows

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if self.fused:
            return self.norm(input, residual)
        y = self.norm(input)
        return torch.relu(y + residual) if self.follows else y


class Case:
    """Inputs of one shape, in as many copies as exceed the L2 cache, and what is done with a layer on each in turn."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
        torch.manual_seed(0)
        one = 3 * dtype.itemsize * int(torch.tensor(shape).prod())
        self.copies = 1 if device == "cpu" else max(2, min(32, -(-3 * l2_bytes() // one)))

        def tensors() -> list[Tensor]:
            made = (torch.randn(shape, device=device) for _ in range(self.copies))
            return [t.to(dtype).contiguous(memory_format=layout) for t in made]

        self.xs, self.grads, self.residuals = tensors(), tensors(), tensors()
        self.xs = [x.mul_(2).add_(1) for x in self.xs]
        self.shape, self.dtype, self.bytes = shape, dtype, one // 3

    def runs(self, layer: Chain) -> dict[str, Callable[[int], object]]:
        """Forward, backward on a kept graph, and both, for the i-th input."""
        xs = [x.detach().requires_grad_() for x in self.xs]
        residuals = [r.detach().requires_grad_(layer.fused or layer.follows) for r in self.residuals]
        parameters = list(layer.parameters())

        def wanted(i: int) -> list[Tensor]:
            return [xs[i], *([residuals[i]] if residuals[i].requires_grad else []), *parameters]

        outputs: dict[int, Tensor] = {}

        def forward(i: int) -> Tensor:
            return layer(xs[i], residuals[i])

        def backward(i: int) -> object:
            if i not in outputs:
                outputs[i] = forward(i)
            return torch.autograd.grad(outputs[i], wanted(i), self.grads[i], retain_graph=True)

        def both(i: int) -> object:
            return torch.autograd.grad(forward(i), wanted(i), self.grads[i])

        return {"forward": forward, "backward": backward, "both": both}

    def check(self, layer: Chain) -> None:
        """Output, gradients and running statistics of the layer against float64; raises if they differ."""
        x, r = self.xs[0].detach().requires_grad_(), self.residuals[0].detach().requires_grad_()
        exact_x, exact_r = x.detach().double().requires_grad_(), r.detach().double().requires_grad_()
        norm = layer.norm
        mean, var = norm.running_mean.double(), norm.running_var.double()
        weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
        exact = nn.functional.batch_norm(exact_x, mean, var, weight, bias, True, 0.1, EPS)
        y = layer(x, r)
        if layer.fused or layer.follows:
            exact = exact + exact_r
            # Where the output rounds to zero either side of the rectifier is right: the exact one follows ours.
            exact = exact * (y.detach() > 0)
        leaves = [x, norm.weight, norm.bias]
        ours = torch.autograd.grad(y, leaves, self.grads[0])
        theirs = torch.autograd.grad(exact, [exact_x, weight, bias], self.grads[0].double())
        scale = 4e-3 if self.dtype is torch.bfloat16 else 5e-4 if self.dtype is torch.float16 else 2e-6
        pairs = zip((y, *ours), (exact, *theirs), strict=True)
        for name, (our, their) in zip(("y", "dx", "dweight", "dbias"), pairs, strict=True):
            error = float((our.detach().double() - their.detach()).norm() / their.detach().norm())
            if layer.follows and not layer.fused:  # it rounds twice
                error /= 2
            if name in ("dweight", "dbias"):  # sums of values that mostly cancel
                error /= 25
            assert error <= 2 * scale, f"{name} of {type(norm).__name__} is off by {error:.2g} for {self.shape}"
        for name, exact_value in (("running_mean", mean), ("running_var", var)):
            torch.testing.assert_close(getattr(norm, name).double(), exact_value, rtol=2e-4, atol=2e-4)


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def eager_time(run: Callable[[int], object], copies: int, rounds: int) -> float:
    """Median seconds of one call, over passes through all inputs."""
    for i in range(copies):
        run(i)
    return _median_of_events(lambda: [run(i) for i in range(copies)], rounds) / copies


def graph_time(run: Callable[[int], object], copies: int, rounds: int) -> float:
    """The same for a graph that holds a pass through all inputs: what the device needs, without launching.

    Warmed up and captured on the current stream, where the forwards of kept graphs were: a backward runs on the stream
    of its forward, and one on another stream would not be captured.
    """
    for _ in range(2):
        for i in range(copies):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(copies):
            run(i)
    return _median_of_events(graph.replay, rounds) / copies


def host_time(run: Callable[[int], object], copies: int, rounds: int) -> float:
    """Median seconds until a call has returned; the device works it off between the rounds."""
    times = []
    for i in range(max(copies, 3)):
        run(i % copies)
    for turn in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            run(turn % copies)
        times.append((time.perf_counter() - started) / 5)
    return statistics.median(times)


def _median_of_events(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(3):
        run()
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copy_time(count: int, copies: int, rounds: int) -> float:
    """Seconds of a copy that reads and writes ``count`` bytes in all."""
    size = max(count // 2, 16)
    pairs = [tuple(torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)) for _ in range(copies)]
    return graph_time(lambda i: pairs[i][0].copy_(pairs[i][1]), copies, rounds)


def counted(run: Callable[[int], object]) -> tuple[list[str], int]:
    """Names of the kernels that a call launches, and how often the host waits for the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run(0)
    events = record.events()
    names = [e.name for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset"))]
    waits = sum(e.name.startswith(("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"))
                for e in events)  # fmt: skip
    return names, max(0, waits - 1)  # (one of them is the profiler's own)


@contextlib.contextmanager
def launches_seen() -> Iterator[list[str]]:
    """The names of our kernels and ``sum`` for each collective, as they are started from Python."""
    from syncbn.kernels import triton

    seen: list[str] = []
    launch, reduce = triton._launch, comm.AllReduce._reduce

    def counted_launch(layout: Any, like: Tensor, kernel: Any, *args: Any, **options: Any) -> None:
        seen.append(kernel.__name__)
        launch(layout, like, kernel, *args, **options)

    def counted_reduce(self: Any, *args: Any) -> None:
        seen.append("sum")
        reduce(self, *args)

    triton._launch, comm.AllReduce._reduce = counted_launch, counted_reduce  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        triton._launch, comm.AllReduce._reduce = launch, reduce  # type: ignore[method-assign]


def assert_ours_ran(runs: dict[str, Callable[[int], object]]) -> dict[str, int]:
    """Fails unless a call takes our kernels, three at most, and one collective each way; the number of kernels."""
    numbers = {}
    runs["backward"](0)
    for what, ours in OURS.items():
        with launches_seen() as seen:
            runs[what](0)
        assert seen.count("sum") == 1, f"{what} made {seen.count('sum')} collectives: {seen}"
        assert set(seen) - {"sum"} <= ours and len(seen) <= 4, f"{what} ran {seen}"
        numbers[what] = len(seen) - 1
        assert numbers[what] >= 2
    return numbers


def layers(channels: int, device: str, with_torch: bool, fused: bool) -> dict[str, Chain]:
    """The sides of the comparison, with the same parameters."""
    sides: dict[str, nn.Module] = {"syncbn": syncbn.SyncBatchNorm(channels, activation="relu" if fused else None)}
    if fused:
        sides["syncbn apart"] = syncbn.SyncBatchNorm(channels)
    sides["BatchNorm2d"] = nn.BatchNorm2d(channels)
    if with_torch:
        sides["SyncBatchNorm"] = TorchSync(channels)
    with torch.no_grad():
        for layer in sides.values():
            torch.manual_seed(1)
            layer.weight.normal_(1, 0.2)
            layer.bias.normal_(0, 0.2)
    return {name: Chain(norm, fused and name == "syncbn", fused).to(device) for name, norm in sides.items()}


def measure_layers(case: Case, layout: str, fused: bool, rounds: int, device: str) -> Rows:
    """One row for each of forward, backward and both: medians in microseconds, ratios, launches, waits."""
    interpreted = device == "cpu"
    sides = layers(case.shape[1], device, not interpreted, fused)
    for side in sides.values():
        case.check(side)
    runs = {name: case.runs(side) for name, side in sides.items()}
    ours = assert_ours_ran(runs["syncbn"])
    rows: Rows = []
    # Passes over the tensor: forward 2 reads and a write, backward 4 and a write; the residual, once a pass more.
    passes = {"forward": 4, "backward": 8, "both": 12} if fused else {"forward": 3, "backward": 5, "both": 8}
    for what in WHATS:
        row: dict[str, object] = {
            "part": "chain" if fused else "layer", "shape": "x".join(map(str, case.shape)), "layout": layout,
            "dtype": str(case.dtype).removeprefix("torch."), "what": what,
            "syncbn kernels": sum(ours.values()) if what == "both" else ours[what],
        }  # fmt: skip
        if not interpreted:
            copy = copy_time(passes[what] * case.bytes, case.copies, rounds)
            row["copy us"] = copy * 1e6
            for name, side_runs in runs.items():
                eager, graph = (time(side_runs[what], case.copies, rounds) for time in (eager_time, graph_time))
                row |= {f"{name} eager us": eager * 1e6, f"{name} graph us": graph * 1e6}
                if what == "both":
                    names, waits = counted(side_runs[what])
                    row |= {f"{name} launches": len(names), f"{name} waits": waits}
            for other in ("BatchNorm2d", "SyncBatchNorm"):
                for mode in ("eager", "graph"):
                    row[f"{mode} over {other}"] = number(row, f"syncbn {mode} us") / number(row, f"{other} {mode} us")
            row["graph over copy"] = number(row, "syncbn graph us") / number(row, "copy us")
        rows.append(row)
    return rows


def number(row: dict[str, object], name: str) -> float:
    value = row[name]
    assert isinstance(value, float)
    return value


def measure_kernels(case: Case, layout: str, rounds: int, device: str) -> Rows:
    """One row for each function: against the reference, and against a copy of the bytes that it must move."""
    ours = kernels.choose(case.xs[0], None, direct=True)
    assert kernels.name_of(ours) == "Triton", "the kernels are not used here"
    channels = case.shape[1]
    whole = torch.empty(SLOTS + 2 * channels + 1, dtype=torch.float64, device=device)
    message, backward = Message(whole, whole[SLOTS:], True, 7, 1), Message(whole[:-1], whole[SLOTS:-1], True, 7, 1)
    ours.pack_moments(case.xs[0], None, message)
    sums, exact = message.payload.clone(), case.xs[0].double()
    shared, shared_sums = Shared(sums[None], True), Shared(sums[None, :-1], True)
    assert sums[0] == exact.numel() // channels
    expected = torch.cat([exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3))])
    torch.testing.assert_close(sums[1:], expected, rtol=2e-6, atol=1e-6 * float(sums[0]))
    del exact
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    _, stats, _ = ours.normalize_shared(case.xs[0], None, shared, weight, bias, None, False, EPS, None)

    def vectors(i: int) -> Any:
        return ours.operands(case.grads[i], case.xs[i], None, stats, weight, bias, None, False)

    functions: dict[str, tuple[int, Callable[[int], object]]] = {
        "pack_moments": (1, lambda i: ours.pack_moments(case.xs[i], None, message)),
        "normalize_shared": (
            2, lambda i: ours.normalize_shared(case.xs[i], None, shared, weight, bias, None, False, EPS, None),
        ),
        "pack_gradient_sums": (2, lambda i: ours.pack_gradient_sums(vectors(i), backward, (None, None))),
        "shared_input_gradient": (3, lambda i: ours.shared_input_gradient(vectors(i), shared_sums, False)),
    }  # fmt: skip
    rows: Rows = []
    for name, (passes, run) in functions.items():
        run(0)
        row: dict[str, object] = {
            "part": "kernel", "shape": "x".join(map(str, case.shape)), "layout": layout,
            "dtype": str(case.dtype).removeprefix("torch."), "what": name,
        }  # fmt: skip
        if device != "cpu":
            time = graph_time(run, case.copies, rounds)
            copy = copy_time(passes * case.bytes, case.copies, rounds)
            row |= {"syncbn graph us": time * 1e6, "copy us": copy * 1e6, "graph over copy": time / copy}
            row["TB/s"] = passes * case.bytes / time * 1e-12
        rows.append(row)
    return rows


def measure_host(case: Case, layout: str, rounds: int, device: str) -> Rows:
    """The time until forward, backward and both have returned, of each side."""
    row = head("host", case, layout, "both")
    for name, side in layers(case.shape[1], device, device != "cpu", False).items():
        for what, run in case.runs(side).items():
            run(0)
            if device != "cpu":
                row[f"{name} {what} host us"] = host_time(run, case.copies, rounds) * 1e6
    return [row]


def measure_spins(case: Case, layout: str, rounds: int, device: str) -> Rows:
    """The layer with a kernel that takes so long in place of each sum."""
    rows: Rows = []
    side = layers(case.shape[1], device, False, False)["syncbn"]
    cycles = 0.0
    if device != "cpu":
        cycles = 1e5 / (graph_time(lambda i: torch.cuda._sleep(100_000), 1, rounds) * 1e6)  # in a microsecond
    reduce = comm.AllReduce._reduce
    for microseconds in (0, *SPINS):

        def spin(self: Any, message: Tensor, call: Any, width: int, length: int = microseconds) -> None:
            if cycles and length:
                torch.cuda._sleep(int(length * cycles))

        comm.AllReduce._reduce = spin  # type: ignore[method-assign]
        try:
            run = case.runs(side)["both"]
            run(0)
            row = head("spin", case, layout, f"both, sums of {microseconds} microseconds")
            if device != "cpu":
                row["syncbn eager us"] = eager_time(run, case.copies, rounds) * 1e6
                row["syncbn graph us"] = graph_time(run, case.copies, rounds) * 1e6
        finally:
            comm.AllReduce._reduce = reduce  # type: ignore[method-assign]
        rows.append(row)
    return rows


def measure_exchanges(rounds: int, device: str) -> Rows:
    """One message to all ranks: as a sum of float64, and as all ranks' float64, whose result grows with the ranks."""
    rows: Rows = []
    ranks = dist.get_world_size()
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    options = dist.AllreduceOptions()
    options.asyncOp = device == "cpu"
    for channels in (64, 256, 2048):
        width = 2 * channels + 1
        summed = torch.ones(summed_length(width), dtype=torch.float64, device=device)
        own = torch.ones(width, dtype=torch.float64, device=device)
        gathered = torch.zeros(ranks * width, dtype=torch.float64, device=device)

        def reduce(i: int, message: Tensor = summed) -> None:
            work = dist.group.WORLD.allreduce([message], options)
            if work is not None:
                work.wait()

        def gather(i: int, own: Tensor = own, gathered: Tensor = gathered) -> None:
            all_gather(gathered, own)

        for what, run in (("all-reduce", reduce), ("all-gather", gather)):
            row: dict[str, object] = {"part": "exchange", "shape": f"{channels} channels", "what": what, "ranks": ranks}
            run(0)
            if device != "cpu":
                row["syncbn eager us"] = eager_time(run, 1, rounds) * 1e6
                row["syncbn graph us"] = graph_time(run, 1, rounds) * 1e6
                row["syncbn host us"] = host_time(run, 1, rounds) * 1e6
            rows.append(row)
        assert bool((gathered == 1).all())
    return rows


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with a batch norm, and what goes around them."""

    def __init__(self, inputs: int, width: int, stride: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), make(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), make(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), make(outputs),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), make(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet(make: Callable[[int], nn.Module], width: int, blocks: Sequence[int], classes: int = 1000) -> nn.Module:
    """The residual network of bottlenecks (He et al., 2016); 64 and (3, 4, 6, 3) make a ResNet-50, of 53 norms."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), make(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1, make))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def measure_step(batch: int, dtype: torch.dtype, layout: str, rounds: int, device: str) -> Rows:
    """Forward and backward of a ResNet-50 under autocast, in DistributedDataParallel, with each sort of layers."""
    small = device == "cpu"
    shape = (2, 3, 32, 32) if small else (batch, 3, 224, 224)
    given = (4, (1, 1)) if small else (64, (3, 4, 6, 3))
    own = dist.new_group(list(range(dist.get_world_size())), **_in_a_hurry(device))
    makes: dict[str, Callable[[int], nn.Module]] = {
        "BatchNorm2d": nn.BatchNorm2d,
        "syncbn": syncbn.SyncBatchNorm,
        "syncbn own group": partial(syncbn.SyncBatchNorm, process_group=own),
    }
    if small:  # with the link of a device
        comm._links[own] = {torch.device("cpu"): AllReduceOnDevice(own, torch.device("cpu"))}
    else:
        makes["SyncBatchNorm"] = TorchSync
    x = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])
    row: dict[str, object] = {
        "part": "step", "shape": "x".join(map(str, shape)), "layout": layout,
        "dtype": str(dtype).removeprefix("torch."), "what": "both", "ranks": dist.get_world_size(),
    }  # fmt: skip
    for name, make in makes.items():
        torch.manual_seed(0)
        model = resnet(make, *given, classes=10 if small else 1000).to(device, memory_format=LAYOUTS[layout])
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

        def step(i: int, model: nn.Module = model) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=dtype is not torch.float32):
                loss = model(x).float().square().mean()
            loss.backward()

        step(0)
        if not small:
            row[f"{name} eager us"] = eager_time(step, 1, rounds) * 1e6
            row[f"{name} host us"] = host_time(step, 1, 5) * 1e6
        del model
    if not small:
        for name in makes:
            row[f"{name} over BatchNorm2d"] = number(row, f"{name} eager us") / number(row, "BatchNorm2d eager us")
    return [row]


def _in_a_hurry(device: str) -> dict[str, Any]:
    """Options of a group whose kernels run before others' that wait."""
    return {} if device == "cpu" else {"pg_options": dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)}


def measure_compiled(case: Case, layout: str, rounds: int, device: str) -> Rows:
    """Forward and backward under torch.compile, which traces plain formulas and uses none of the kernels."""
    side = layers(case.shape[1], device, False, False)["syncbn"]
    compiled = torch.compile(side, backend="eager" if device == "cpu" else "inductor")
    x, r = case.xs[0].detach().requires_grad_(), case.residuals[0]

    def run(i: int) -> object:
        return torch.autograd.grad(compiled(x, r), x, case.grads[0])

    run(0)
    row = head("compiled", case, layout, "both")
    if device != "cpu":
        row["syncbn eager us"] = eager_time(run, 1, rounds) * 1e6
    return [row]


def head(part: str, case: Case, layout: str, what: str) -> dict[str, object]:
    return {
        "part": part, "shape": "x".join(map(str, case.shape)), "layout": layout,
        "dtype": str(case.dtype).removeprefix("torch."), "what": what,
    }  # fmt: skip


class Table:
    """The rows, shown and written as they come."""

    COMMON = ("part", "shape", "layout", "dtype", "what", "ranks", "device", "machine", "error")

    def __init__(self, name: str, device: str) -> None:
        self.count = self.failed = 0
        self.given = {"device": device, "machine": timing.machine()}
        self.file = None
        if name:
            timing.OUT.mkdir(parents=True, exist_ok=True)
            self.file = (timing.OUT / name).open("w", newline="")
            # One value to a line, since parts have different ones.
            self.writer = csv.writer(self.file, lineterminator="\n")
            self.writer.writerow([*self.COMMON, "name", "value"])

    def add(self, row: dict[str, object]) -> None:
        self.count += 1
        self.failed += "error" in row
        show(row)
        if self.file is None:
            return
        known = [(row | self.given).get(key, "") for key in self.COMMON]
        values = {key: value for key, value in row.items() if key not in self.COMMON} or {"": ""}
        for key, value in values.items():
            self.writer.writerow([*known, key, f"{value:.4g}" if isinstance(value, float) else value])
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def show(row: dict[str, object]) -> None:
    names = ("part", "shape", "layout", "dtype", "what")
    numbers = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float) and " us" not in key]
    times = [f"{key} {value:.0f}" for key, value in row.items() if isinstance(value, float) and " us" in key]
    counts = [f"{key} {value}" for key, value in row.items() if isinstance(value, int)]
    error = [str(row["error"])] if "error" in row else []
    head = " ".join(str(row[key]) for key in names if key in row)
    print(f"{head:<58} {'  '.join(times + numbers + counts + error)}", flush=True)


def tasks(args: argparse.Namespace, stages: Sequence[tuple[int, ...]], device: str) -> Iterator[tuple[str, Any]]:
    """What is measured, in the order of its worth: a name and a function that makes rows."""
    settings = list(itertools.product(args.batches, args.dtypes, args.layouts))
    settings.sort(
        key=lambda s: args.batches.index(s[0]) + 2 * args.dtypes.index(s[1]) + args.layouts.index(s[2])
    )  # stable
    for place, (batch, dtype_name, layout) in enumerate(settings):
        dtype = DTYPES[dtype_name]
        for part in PARTS:
            if part not in args.parts or (place and part in ONCE):
                continue
            if part == "exchange":
                yield "exchange", partial(measure_exchanges, args.rounds, device)
            elif part == "step":
                yield "step", partial(measure_step, batch, dtype, layout, args.rounds, device)
            else:
                for stage in stages[1:3] if part in ONCE and len(stages) > 2 else stages:
                    yield (
                        f"{part} {(batch, *stage)} {layout} {dtype_name}",
                        partial(_of_case, part, (batch, *stage), dtype, layout, args.rounds, device),
                    )


def _of_case(part: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, rounds: int, device: str) -> Rows:
    case = Case(shape, dtype, LAYOUTS[layout], device)
    if part in ("layer", "chain"):
        return measure_layers(case, layout, part == "chain", rounds, device)
    measure = {
        "kernel": measure_kernels, "host": measure_host, "spin": measure_spins, "compiled": measure_compiled,
    }[part]  # fmt: skip
    return measure(case, layout, rounds, device)


def work_off(
    todo: Iterator[tuple[str, Callable[[], Rows]]], table: Table | None, is_late: Callable[[], bool], keeps: bool
) -> list[str]:
    """Measure one thing after the other, as long as there is time; what was left out.

    Args:
        table: takes the rows as they come; None on ranks that write none.
        keeps: make a row of an error, and go on.
    """
    left_out = []
    for what, measure in todo:
        if is_late():
            left_out.append(what)
            continue
        try:
            rows = measure()
        except Exception as error:
            if not keeps:
                raise
            rows = [{"part": what, "what": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())}]
        for row in rows if table is not None else []:
            table.add(row)
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description="syncbn.SyncBatchNorm on a GPU")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU; no times")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing new is begun")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 2, 128], help="the most important first")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=["NHWC", "NCHW"])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--csv", default="gpu.csv", help="name of the file in $BENCHMARKS_OUT or out/benchmarks; empty for none"
    )
    args = parser.parse_args()
    ends = time.monotonic() + args.budget
    device = "cpu" if args.interpret else "cuda"
    if not args.interpret and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --interpret checks results and launches without one")
    if "WORLD_SIZE" in os.environ and not args.interpret:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    else:
        dist.init_process_group("gloo" if args.interpret else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    stages = STAGES if not args.interpret else [(20, 9, 9), (3, 5, 7)]
    if args.interpret:
        from syncbn.kernels import triton

        args.batches = [4]
        kernels._interpreted = True
        triton.SIZES = triton.SIZES._replace(whole=0)
        torch.autograd.set_multithreading_enabled(False)
        cpu = torch.device("cpu")  # with the link of a device
        comm._links[dist.group.WORLD] = {cpu: AllReduceOnDevice(dist.group.WORLD, cpu)}
    else:
        torch.cuda.set_stream(torch.cuda.Stream())
    first = dist.get_rank() == 0
    name = args.csv if first and not args.interpret else ""
    table = Table(name, "cpu" if args.interpret else torch.cuda.get_device_name())

    def is_late() -> bool:
        # Ranks that measured different things would wait for each other: the first one's clock counts for all.
        late = torch.tensor([time.monotonic() > ends], dtype=torch.int32, device=device)
        dist.broadcast(late, 0)
        return bool(late)

    # (where several ranks are, the others may wait in the middle of what failed)
    keeps = not args.interpret and dist.get_world_size() == 1
    with comm.forced():
        left_out = work_off(tasks(args, stages, device), table if first else None, is_late, keeps)
    if left_out:
        print(f"no time was left for {len(left_out)} of the rest: {', '.join(left_out)}")
    if args.interpret:
        print(f"{table.count} rows: results agree with float64, and our kernels ran; nothing was timed")
    elif table.file is not None:
        print(f"written: {table.file.name}, {table.count} rows, {table.failed} failed")
    table.close()
    dist.destroy_process_group()
    if table.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
