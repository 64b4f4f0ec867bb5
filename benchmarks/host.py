"""What a layer costs the host on its path for GPUs: on a CPU, with stand-ins for what only a GPU can do.

    python benchmarks/host.py
    python benchmarks/host.py --against ../before      # another checkout of the package, measured in turn with this one
    python benchmarks/host.py --profile                # which functions take the time

A GPU waits for its host where a step launches faster than it computes, which is the rule for small layers. So here the
host alone is timed: the layer's forward and backward as for a CUDA tensor, in the code that would run there, with

* a launch: all of Triton's own Python, then ``--launch-us`` of waiting for its launcher in C and the driver;
* a collective: ``--collective-us`` of waiting for the process group's enqueueing;
* the copy of a message's check slots to the host, where the layer still makes one: a copy between CPU tensors, and
  ``--late-us`` of waiting for what pinned memory and events take.

Nothing is computed: kernels are compiled (for compute capability 9.0) and never run. Rows: everything; without what is
waited for in launches and collectives (``host``); and with launches that return at once (``ours``: without Triton). The
``frame`` is an autograd function that takes and saves as many tensors and does nothing, which PyTorch asks for itself.
Figures are medians over calls; those of two checkouts come from processes that take turns.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPE = (8, 64, 28, 28)
CASES = ("layer", "residual and relu")
HALVES = ("forward", "backward")
MODES = ("everything", "host", "ours", "frame")


def spend(seconds: float) -> None:
    """Wait as a call does that keeps the processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Costs:
    """What the stand-ins wait, in seconds; set to zero to leave it out."""

    launch = collective = late = 0.0


def start(*args: Any) -> None:
    """Stands for the launcher in C."""
    if Costs.launch:
        spend(Costs.launch)


def stand_in_for_the_driver(launch: Callable[..., None] = start) -> None:
    """Make Triton believe in a GPU of compute capability 9.0, where ``launch`` starts a kernel; its own Python runs."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    nvidia.PyKernelArg = lambda nested_tuple, type: type  # made by a module in C that needs the driver's library
    nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = 0, 1, 2
    if hasattr(nvidia, "compile_module_from_src"):  # an older Triton compiles a launcher for each kernel

        def parted(*args: Any) -> None:
            launch(*args[:7], *args[9:13], *args[7:9], None, None, args[13:])

        nvidia.compile_module_from_src = lambda **given: SimpleNamespace(launch=parted)
        nvidia.library_dirs = list
    utils = SimpleNamespace(
        launch=launch,
        build_signature_metadata=lambda signature: b"",
        load_binary=lambda name, code, *args: (1, zlib.crc32(code), 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
    )
    active = SimpleNamespace(
        utils=utils,
        launcher_cls=nvidia.CudaLauncher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        allocate_default_profile_scratch=lambda *args: None,
        map_python_to_cpp_type=nvidia.ty_to_cpp,
    )
    driver.set_active(active)


class Group:
    """As much of a process group of two ranks as the link of a device asks for; its sums change nothing."""

    bound_device_id = None

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: Any, options: Any) -> Any:
        if Costs.collective:
            spend(Costs.collective)
        return None if getattr(options, "asyncOp", True) is False else self

    def wait(self) -> None:
        """Of the work of a sum."""


class Arrived:
    """The event behind a copy that has arrived."""

    def query(self) -> bool:
        return True


def worker(calls: int, costs: dict[str, float], profile: bool) -> None:
    """Time rounds, one for each line of standard input, and write the medians of each as a line of JSON."""
    import torch
    from torch import Tensor

    import syncbn
    from syncbn import functional, kernels
    from syncbn.comm.all_reduce import AllReduceOnDevice
    from syncbn.kernels import triton

    torch.set_num_threads(1)
    stand_in_for_the_driver()
    if hasattr(triton, "_direct"):  # what is done for CUDA tensors alone is done for these
        triton._direct.add("cpu")
    kernels._interpreted = True
    launch = triton._launch
    group = Group()

    class Link(AllReduceOnDevice):
        def _check_later(self, slots: Tensor, call: Any, width: int, *number: int) -> None:
            on_host = torch.zeros(len(slots), dtype=torch.float64)
            on_host.copy_(agreeing, non_blocking=True)
            if Costs.late:
                spend(Costs.late)
            self._late.append((Arrived(), on_host, call, width, self.exchanges))

    agreeing = torch.zeros(6, dtype=torch.float64)
    link = Link(group, torch.device("cpu"))
    functional.link_of = lambda *args: link  # type: ignore[attr-defined]

    def tensor() -> Tensor:
        t = torch.zeros(SHAPE, dtype=torch.bfloat16)
        return t.contiguous(memory_format=torch.channels_last)

    class Frame(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
            return torch.empty_like(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight, bias, _ = ctx.saved_tensors
            return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), None

    x, grad, residual = tensor().requires_grad_(), tensor(), tensor().requires_grad_()
    stats = torch.zeros(2 * SHAPE[1] + 1, dtype=torch.float64)
    runs: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    frames: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    for case in CASES:
        relu = case != "layer"
        layer = syncbn.SyncBatchNorm(SHAPE[1], activation="relu" if relu else None)
        layer.layer_name = "layer"
        given = (x, residual) if relu else (x,)
        runs[case] = (lambda layer=layer, given=given: layer(*given)), [*given, layer.weight, layer.bias]
        frames[case] = (
            (lambda layer=layer: super(torch.autograd.Function, Frame).apply(x, layer.weight, layer.bias, stats)),
            [x, layer.weight, layer.bias],
        )

    def nothing(*args: Any, **constants: Any) -> None:
        """Stands for a launch that takes no time."""

    def once(mode: str, case: str, count: int) -> dict[str, float]:
        """Median microseconds of both halves."""
        waits = mode == "everything"
        Costs.launch, Costs.collective, Costs.late = (costs[name] * waits for name in ("launch", "collective", "late"))
        triton._launch = nothing if mode == "ours" else launch
        run, leaves = (frames if mode == "frame" else runs)[case]
        times: dict[str, list[float]] = {half: [] for half in HALVES}
        clock = time.perf_counter
        for _ in range(count):
            first = clock()
            y = run()
            second = clock()
            torch.autograd.grad(y, leaves, grad)
            third = clock()
            times["forward"].append(second - first)
            times["backward"].append(third - second)
            del y
        return {half: statistics.median(values) * 1e6 for half, values in times.items()}

    for case in CASES:
        once("everything", case, 20)  # compiles
    if profile:
        for case in CASES[:1]:
            recorder = cProfile.Profile()
            recorder.enable()
            once("host", case, calls)
            recorder.disable()
            pstats.Stats(recorder).sort_stats("tottime").print_stats(40)
        return
    print("ready", flush=True)
    for _ in sys.stdin:
        found = {mode: {case: once(mode, case, calls) for case in CASES} for mode in MODES}
        print(json.dumps(found), flush=True)


class Side:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(HERE / "host.py"), "--worker", *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
        )
        self.rounds: list[dict[str, dict[str, dict[str, float]]]] = []

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the measuring process ended with {self.process.wait()}")
        return line

    def measure(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(json.loads(self.line()))

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def median(self, mode: str, case: str, half: str) -> float:
        return statistics.median(found[mode][case][half] for found in self.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="host time of a layer on its path for GPUs, without one")
    parser.add_argument("--against", type=Path, help="another checkout of the package, measured in turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=200, help="of each mode, in a round")
    parser.add_argument("--launch-us", type=float, default=3.0)
    parser.add_argument("--collective-us", type=float, default=10.0)
    parser.add_argument("--late-us", type=float, default=8.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--csv", default="", help="name of a file to write, in $BENCHMARKS_OUT or out/benchmarks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    costs = {name: getattr(args, f"{name}_us") * 1e-6 for name in ("launch", "collective", "late")}
    if args.worker or args.profile:
        worker(args.calls, costs, args.profile)
        return
    import timing

    given = [f"--calls={args.calls}", *(f"--{name}-us={value * 1e6}" for name, value in costs.items())]
    sides = {"now": Side(HERE.parent, given)}
    if args.against:
        sides = {"before": Side(args.against.resolve(), given)} | sides
    for side in sides.values():
        assert side.line() == "ready\n"
    for _ in range(args.rounds):
        for side in sides.values():
            side.measure()
    for side in sides.values():
        side.finish()
    rows: list[dict[str, object]] = []
    for case in CASES:
        for mode in MODES:
            row: dict[str, object] = {"case": case, "what": mode}
            for name, side in sides.items():
                halves = [side.median(mode, case, half) for half in HALVES]
                row |= {f"{name} {half} us": value for half, value in zip(HALVES, halves, strict=True)}
                row[f"{name} both us"] = sum(halves)
            rows.append(row)
            print("  ".join(f"{key} {v:.0f}" if isinstance(v, float) else f"{v:<18}" for key, v in row.items()))
    print(
        f"a launch counts {args.launch_us:g} us beside Triton's Python, a collective {args.collective_us:g} us, "
        f"a copied check {args.late_us:g} us; {timing.machine()}"
    )
    if args.csv:
        print(f"written: {timing.write_csv(args.csv, rows)}")


if __name__ == "__main__":
    main()
