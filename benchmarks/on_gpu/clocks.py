"""Times on the device and on the host, and what was launched."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from syncbn import comm

OURS = {
    "forward": {"measure", "finish_moments", "normalize"},
    "backward": {"sum_gradients", "finish_gradients", "input_gradient"},
}


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

    triton._launch, comm.AllReduce._reduce = counted_launch, counted_reduce  # type: ignore[method-assign, assignment]
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
