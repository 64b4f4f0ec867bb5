"""What is measured of one layer: by itself, with its neighbours, its kernels, its host, its compiled form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from on_gpu.cases import EPS, WHATS, Case, Rows, head, layers
from on_gpu.clocks import assert_ours_ran, copy_time, counted, eager_time, graph_time, host_time
from syncbn import comm, kernels
from syncbn.messages import Message, Shared
from syncbn.wire import SLOTS

SPINS = (10, 20, 30)  # microseconds


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
