"""The layer and its kernels on one GPU, against PyTorch's layers and against a copy of the same bytes.

    python benchmarks/gpu.py                     # ResNet-50's shapes; minutes
    python benchmarks/gpu.py --batches 32 --dtypes bfloat16 --parts layer
    python benchmarks/gpu.py --interpret         # no GPU: tiny shapes in Triton's interpreter, results and launches

One process with a group of one rank over NCCL. Compared are

* ``nn.BatchNorm2d`` (cuDNN or PyTorch's own kernels), which synchronizes nothing;
* the autograd function of ``nn.SyncBatchNorm``, applied directly, so that its synchronized path runs on one rank;
* ``syncbn.SyncBatchNorm`` within ``comm.forced()``, which runs ours: it is asserted that our kernels and one
  collective each way ran, by what was launched.

Everything is compared with float64 first. Times are medians of CUDA events, eager and as a CUDA graph. The inputs
rotate through more memory than the L2 cache holds. Launches and host synchronizations are counted by the profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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
from syncbn.wire import SLOTS

STAGES = [(64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = {
    "forward": {"measure", "finish_moments", "normalize"},
    "backward": {"sum_gradients", "finish_gradients", "input_gradient"},
}
WHATS = ("forward", "backward", "both")
PARTS = ("kernel", "layer", "chain")
EPS = 1e-5


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
            error = float((our.double() - their).norm() / their.norm())
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
    """The same for a graph that holds a pass through all inputs: what the device needs, without launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for i in range(copies):
                run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return _median_of_events(graph.replay, rounds) / copies


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


def measure_layers(case: Case, layout: str, fused: bool, rounds: int, device: str) -> list[dict[str, object]]:
    """One row for each of forward, backward and both: medians in microseconds, ratios, launches, waits."""
    interpreted = device == "cpu"
    sides = layers(case.shape[1], device, not interpreted, fused)
    for side in sides.values():
        case.check(side)
    runs = {name: case.runs(side) for name, side in sides.items()}
    ours = assert_ours_ran(runs["syncbn"])
    rows: list[dict[str, object]] = []
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
                names, waits = counted(side_runs[what])
                row |= {f"{name} eager us": eager * 1e6, f"{name} graph us": graph * 1e6}
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


def measure_kernels(case: Case, layout: str, rounds: int, device: str) -> list[dict[str, object]]:
    """One row for each function: against the reference, and against a copy of the bytes that it must move."""
    ours = kernels.choose(case.xs[0], None, raw=True)
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
    rows: list[dict[str, object]] = []
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


def show(rows: Sequence[dict[str, object]]) -> None:
    for row in rows:
        numbers = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float) and " us" not in key]
        times = [f"{key} {value:.0f}" for key, value in row.items() if isinstance(value, float) and " us" in key]
        counts = [f"{key} {value}" for key, value in row.items() if isinstance(value, int)]
        head = " ".join(str(row[key]) for key in ("part", "shape", "layout", "dtype", "what"))
        print(f"{head:<58} {'  '.join(times + numbers + counts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="syncbn.SyncBatchNorm on a GPU")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU; no times")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument(
        "--parts", choices=("kernel", "layer", "chain"), nargs="+", default=["kernel", "layer", "chain"]
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", default="gpu.csv", help="name of the file below benchmarks/results; empty for none")
    args = parser.parse_args()
    device = "cpu" if args.interpret else "cuda"
    if not args.interpret and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --interpret checks results and launches without one")
    dist.init_process_group("gloo" if args.interpret else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    stages, batches = (STAGES, args.batches) if not args.interpret else ([(20, 9, 9), (3, 5, 7)], [4])
    if args.interpret:
        from syncbn.kernels import triton

        kernels._interpreted = True
        triton.SIZES = triton.SIZES._replace(whole=0)
        cpu = torch.device("cpu")  # with the link of a device
        comm._links[dist.group.WORLD] = {cpu: AllReduceOnDevice(dist.group.WORLD, cpu)}
    rows: list[dict[str, object]] = []
    with comm.forced():
        for batch in batches:
            for stage in stages:
                for layout in args.layouts:
                    for dtype in args.dtypes:
                        case = Case((batch, *stage), DTYPES[dtype], LAYOUTS[layout], device)
                        found: list[dict[str, object]] = []
                        if "kernel" in args.parts:
                            found += measure_kernels(case, layout, args.rounds, device)
                        for fused in (False, True):
                            if ("chain" if fused else "layer") in args.parts:
                                found += measure_layers(case, layout, fused, args.rounds, device)
                        show(found)
                        rows += found
    if args.interpret:
        print(f"{len(rows)} rows: results agree with float64, and our kernels ran; nothing was timed")
    elif args.csv:
        columns = {key: "" for row in rows for key in row}
        name = torch.cuda.get_device_name()
        print(f"written: {timing.write_csv(args.csv, [columns | row | {'device': name} for row in rows])}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
