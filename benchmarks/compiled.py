"""Compiled SyncBatchNorm + ReLU against eager nn.BatchNorm2d + ReLU: forward and backward.

    python benchmarks/compiled.py
    python -m syncbn.launch --engine mpi -n 2 benchmarks/compiled.py --backend mpi4py

In turn in one process, on the same input; the compiled layer is compared with float64 before anything is timed. In one
process it takes its synchronized path without peers.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

import bars
import ranks
import timing
import torch
import torch.distributed as dist
from layer import Side, check
from torch import nn

import syncbn
from syncbn import comm

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
    nn_layer = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU())
    torch.testing.assert_close(ours(x), eager(x), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    clone = {"clone": x.detach().clone}
    first: dict[str, Callable[[], object]] = {
        "nn eager": Side(nn_layer, x, grad).both,
        "syncbn compiled": Side(ours, x, grad).both,
    }
    times = timing.in_turn(first | clone, rounds, group)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="compiled SyncBatchNorm + ReLU")
    parser.add_argument("--backend", choices=ranks.BACKENDS, default="none")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if args.backend == "none":
        timing.keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    with ranks.joined(args.backend) as group, comm.forced() if group is None else contextlib.nullcontext():
        for shape in SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                rows.append(measure(shape, layout, args.rounds, group))
                if ranks.is_first(group):
                    row = rows[-1]
                    print(
                        f"{row['shape']:>16} {row['layout']:<14} nn eager {row['nn eager us']:7.0f} us  syncbn eager "
                        f"{row['syncbn eager us']:7.0f} us  compiled {row['syncbn compiled us']:7.0f} us  "
                        f"compiled / nn eager {row['ratio']:.2f}",
                        flush=True,
                    )
    if ranks.is_first(group):
        path = timing.write_csv(f"compiled-{args.backend}.csv", rows)
        print(f"{timing.machine()}\nwritten: {path}, {plot(path)}")


if __name__ == "__main__":
    main()
