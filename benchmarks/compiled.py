"""Compiled SyncBatchNorm + ReLU against eager nn.BatchNorm2d + ReLU: forward and backward.

    python benchmarks/compiled.py
    python -m syncbn.launch --engine mpi -n 2 benchmarks/compiled.py --backend mpi4py

In turn in one process, on the same input; the compiled layer is compared with float64 before anything is timed. In one
process it takes its synchronized path without peers. "Formulas" is the layer as it is compiled where the package has no
loops of its own: inductor makes them.

    python benchmarks/compiled.py --first-step

times the first training step of a network of six layers instead, most of which is compilation; each in a process of its
own, with an empty cache on disk (cold), and again (warm).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import bars
import ranks
import timing
import torch
import torch.distributed as dist
from layer import Side, check
from torch import nn

import syncbn
from syncbn import comm, kernels

SHAPES = [(8, 64, 56, 56), (8, 256, 14, 14)]


def measure(
    shape: tuple[int, ...], layout: torch.memory_format, rounds: int, group: dist.ProcessGroup | None
) -> dict[str, object]:
    """One row: medians in microseconds, and the ratio to PyTorch's eager layer without synchronization."""
    torch._dynamo.reset()
    torch.manual_seed(group.rank() if group is not None else 0)
    x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    plain_layer = torch.compile(syncbn.SyncBatchNorm(shape[1]), fullgraph=True)
    check(plain_layer, x, grad, group)
    ours = torch.compile(syncbn.SyncBatchNorm(shape[1], activation="relu"), fullgraph=True)
    eager = syncbn.SyncBatchNorm(shape[1], activation="relu")
    formulas = torch.compile(syncbn.SyncBatchNorm(shape[1], activation="relu"), fullgraph=True)
    nn_layer = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU())
    torch.testing.assert_close(ours(x), eager(x), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    with mock.patch.object(kernels, "loops_for", lambda dtype: False):
        torch.testing.assert_close(formulas(x), eager(x), rtol=1e-5, atol=1e-5)  # compiles the training graph
    clone = {"clone": x.detach().clone}
    first: dict[str, Callable[[], object]] = {
        "nn eager": Side(nn_layer, x, grad).both,
        "syncbn compiled": Side(ours, x, grad).both,
    }
    times = timing.in_turn(first | clone, rounds, group)
    # Apart, for sides that take turns evict each other's data.
    times |= timing.in_turn({"formulas compiled": Side(formulas, x, grad).both} | clone, rounds, group)
    times |= timing.in_turn({"syncbn eager": Side(eager, x, grad).both} | clone, rounds, group)
    row: dict[str, object] = {
        "shape": "x".join(map(str, shape)),
        "layout": "channels_last" if layout is torch.channels_last else "contiguous",
        "ranks": 1 if group is None else group.size(),
        "backend": "none" if group is None else dist.get_backend(group),
    }
    row |= {f"{name} us": seconds * 1e6 for name, seconds in times.items()}
    return row | {"ratio": times["syncbn compiled"] / times["nn eager"]}


def plot(path: Path) -> Path:
    """Eager and compiled, relative to PyTorch's layer in eager mode."""
    rows = timing.read_csv(path)
    peers = f"{rows[0]['ranks']} ranks over {rows[0]['backend']}" if rows[0]["ranks"] > 1 else "without peers"
    title = f"SyncBatchNorm and ReLU, forward and backward, {peers}: {timing.where(rows)}"
    sides = {
        name: {f"{row['shape']}, {row['layout']}": row[f"syncbn {name} us"] / row["nn eager us"] for row in rows}
        for name in ("eager", "compiled")
    }
    return bars.draw(path, title, {"time relative to nn.BatchNorm2d and ReLU, eager": sides})


# ---- the first step

COMPILERS = {  # backend, and dynamic
    "aot_eager": ("aot_eager", None),
    "aot_eager, dynamic": ("aot_eager", True),
    "inductor": ("inductor", None),
}


def six_layers() -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels, out in ((3, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)):
        parts += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*parts)


def first_step(side: str, compiler: str) -> float:
    """Seconds of the first forward and backward, in this process."""
    backend, dynamic = COMPILERS[compiler]
    x = torch.randn(4, 3, 8, 8)
    net = six_layers()
    with comm.forced() if side == "syncbn" else contextlib.nullcontext():
        if side == "syncbn":
            syncbn.convert_sync_batchnorm(net)
        net(x).sum().backward()  # what an eager step imports and makes is not compilation
        run = torch.compile(net, fullgraph=True, backend=backend, dynamic=dynamic)
        started = time.perf_counter()
        run(x).sum().backward()
        return time.perf_counter() - started


def measure_first_steps(rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for compiler in COMPILERS:
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for side in ("nn", "syncbn"):
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("cold", "warm"):
                        seconds.setdefault((side, state), []).append(_in_child(side, compiler, folder))
        for state in ("cold", "warm"):
            plain, ours = (statistics.median(seconds[side, state]) for side in ("nn", "syncbn"))
            row = {"compiler": compiler, "cache": state, "nn s": plain, "syncbn s": ours, "ratio": ours / plain}
            rows.append(row)
            print(
                f"{compiler:>20} {state}: nn {plain:5.2f} s  syncbn {ours:5.2f} s  ratio {ours / plain:.2f}", flush=True
            )
    return rows


def _in_child(side: str, compiler: str, cache: str) -> float:
    command = [sys.executable, __file__, "--first-step", f"{side}:{compiler}"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="compiled SyncBatchNorm + ReLU")
    parser.add_argument("--backend", choices=ranks.BACKENDS, default="none")
    parser.add_argument("--rounds", type=int, help="default: 30, and 3 of first steps")
    parser.add_argument(
        "--first-step", nargs="?", const="all", metavar="SIDE:COMPILER", help="time the first step, of all or of one"
    )
    args = parser.parse_args()
    if args.first_step not in (None, "all"):
        torch.set_num_threads(1)
        print(first_step(*args.first_step.split(":")))
        return
    if args.first_step:
        first_steps = measure_first_steps(args.rounds or 3)
        print(f"{timing.machine()}\nwritten: {timing.write_csv('first-compiled-step.csv', first_steps)}")
        return
    if args.backend == "none":
        timing.keep_freed_memory()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with ranks.joined(args.backend) as group, comm.forced() if group is None else contextlib.nullcontext():
        for shape in SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                rows.append(measure(shape, layout, args.rounds or 30, group))
                if ranks.is_first(group):
                    row = rows[-1]
                    print(
                        f"{row['shape']:>16} {row['layout']:<14} nn eager {row['nn eager us']:7.0f} us  syncbn eager "
                        f"{row['syncbn eager us']:7.0f} us  compiled {row['syncbn compiled us']:7.0f} us  formulas "
                        f"{row['formulas compiled us']:7.0f} us  "
                        f"compiled / nn eager {row['ratio']:.2f}",
                        flush=True,
                    )
    if ranks.is_first(group):
        path = timing.write_csv(f"compiled-{args.backend}.csv", rows)
        print(f"{timing.machine()}\nwritten: {path}, {plot(path)}")


if __name__ == "__main__":
    main()
