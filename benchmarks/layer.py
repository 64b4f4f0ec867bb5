"""The layer alone: forward, backward and both, against nn.BatchNorm2d without synchronization.

    python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py
    python -m syncbn.launch -n 2 benchmarks/layer.py --backend gloo
    python benchmarks/layer.py                        # one process, the synchronized path without peers

For each shape and layout the sides run in turn in one process. Printed and written to a CSV: medians in microseconds,
the ratio of syncbn (synchronization included) to PyTorch's layer (without any), and to the copy floor: forward must
read x twice and write y, backward must read x and dy twice and write dx, at the speed of a clone of x in the same run
(one read and one write). Results are compared with float64 before anything is timed.

With ``--rivals``, on two or more ranks, fairscale's layer (where it is installed) and a naive one made of
differentiable all-reduces take their turns too, forward + backward.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import rivals
import timing
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn import comm

TARGETS: list[tuple[int, ...]] = [(8, 64, 56, 56), (2, 64, 112, 112), (8, 256, 14, 14), (8, 512, 7, 7)]
TARGETS += [(2, 64, 56, 56), (2, 256, 14, 14), (2, 512, 7, 7), (1024, 64), (16384, 256)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "targets": TARGETS,
    "resnet50": [
        (n, c, s, s) for n in (1, 2, 4, 16) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    ],
    "unet": [(n, c, s, s) for n in (1, 2) for c, s in ((64, 128), (128, 64), (256, 32), (512, 16))],
    "mlp": [(n, c) for n in (1024, 16384) for c in (64, 256)] + [(n, 128, 1024) for n in (2, 16)],
}
SIDES = {"sync": "syncbn", "fairscale": "fairscale", "naive": "naive"}  # their columns, by their key in pictures


class Side:
    """A layer with an input: forward, backward alone (on a graph that is kept), and both."""

    def __init__(self, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        self.layer, self.x, self.grad = layer, x, grad
        self.wanted = [self.x, *layer.parameters()]
        self.y: Tensor | None = None

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        if self.y is None:
            self.y = self.forward()
        return torch.autograd.grad(self.y, self.wanted, self.grad, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.layer(self.x), self.wanted, self.grad)


def check(layer: nn.Module, x: Tensor, grad: Tensor, group: dist.ProcessGroup | None, tolerance: float = 1e-5) -> None:
    """The synchronized layer against float64 batch norm on all ranks' data; raises if they differ."""
    xs, grads = [x], [grad]
    if group is not None:
        xs = [torch.empty_like(x) for _ in range(group.size())]
        grads = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(xs, x, group=group)
        dist.all_gather(grads, grad, group=group)
    side = Side(layer, x.clone(memory_format=torch.preserve_format).requires_grad_(), grad)
    y, dx = side.forward(), side.both()[0]
    whole = torch.cat(xs).double().requires_grad_()
    expected = nn.functional.batch_norm(whole, None, None, training=True)
    expected.backward(torch.cat(grads).double())
    assert whole.grad is not None
    mine = slice(0, len(x)) if group is None else slice(group.rank() * len(x), (group.rank() + 1) * len(x))
    torch.testing.assert_close(y.double(), expected[mine], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), whole.grad[mine], rtol=tolerance, atol=tolerance)


def measure(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    rounds: int,
    group: dist.ProcessGroup | None,
    with_rivals: bool = False,
) -> dict[str, object]:
    """One row: medians in microseconds of both layers and of a clone, and the ratios."""
    torch.manual_seed(group.rank() if group is not None else 0)
    x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    plain = nn.BatchNorm1d(shape[1]) if len(shape) < 4 else nn.BatchNorm2d(shape[1])
    ours = syncbn.SyncBatchNorm(shape[1])
    check(ours, x, grad, group)
    # Both sides work on the same tensors, in a rotation of their own for each of forward, backward and both.
    times: dict[str, float] = {}
    x.requires_grad_()
    pair = {"nn": Side(plain, x, grad), "syncbn": Side(ours, x, grad)}
    others: dict[str, Callable[[], object]] = {}
    if with_rivals and group is not None and len(shape) == 4:
        for name, convert in (("fairscale", rivals.fairscale), ("naive", rivals.naive)):
            layer = convert(nn.Sequential(nn.BatchNorm2d(shape[1])))
            if layer is not None:
                check(layer, x.detach(), grad, group, tolerance=1e-3)
                others[f"{name} both"] = Side(layer, x, grad).both
    for what in ("forward", "backward", "both"):
        sides: dict[str, Callable[[], object]] = {f"{name} {what}": getattr(side, what) for name, side in pair.items()}
        if what == "both":
            sides |= others
        times |= timing.in_turn(sides | {"clone": x.detach().clone}, rounds, group)
    row: dict[str, object] = {
        "shape": "x".join(map(str, shape)),
        "layout": "channels_last" if layout is torch.channels_last else "contiguous",
        "ranks": 1 if group is None else group.size(),
        "backend": "none" if group is None else dist.get_backend(group),
        "threads": torch.get_num_threads(),
    }
    row |= {f"{name} us": seconds * 1e6 for name, seconds in times.items()}
    for what, passes in (("forward", 3), ("backward", 5), ("both", 8)):
        row[f"{what} ratio"] = times[f"syncbn {what}"] / times[f"nn {what}"]
        row[f"{what} over floor"] = times[f"syncbn {what}"] / (times["clone"] * passes / 2)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Forward + backward of each shape: contiguous, then channels_last."""
    others = [name for name in ("fairscale", "naive") if any(f"{name} both us" in row for row in rows)]
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        line = {"input": shape}
        for layout in ("contiguous", "channels_last"):
            found = next((row for row in rows if (row["shape"], row["layout"]) == (shape, layout)), None)
            cells = {"nn us": "nn both us", "syncbn us": "syncbn both us", "ratio": "both ratio"}
            cells |= {"over 4 clones": "both over floor"} | {f"{name} us": f"{name} both us" for name in others}
            for head, key in cells.items():
                digits = 0 if head.endswith("us") else 2
                line[f"{layout}: {head}"] = f"{found[key]:.{digits}f}" if found is not None and key in found else ""
        lines.append(line)
    return timing.markdown(lines)


def plot(path: Path) -> None:
    """A point for each shape, layer and layout, from the CSV: forward + backward, relative to nn.BatchNorm."""
    import pictures

    rows = timing.read_csv(path)
    shapes, first = list(dict.fromkeys(str(row["shape"]) for row in rows)), rows[0]
    backend = "no peers" if first["backend"] == "none" else f"{first['ranks']} ranks over {first['backend']}"
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)} each"
    title = f"Forward + backward of a layer: {backend}, {threads}, {timing.where(rows)}"
    sides = {side: key for side, key in SIDES.items() if f"{key} both us" in first}
    with pictures.figure(path.with_suffix(".png"), title, 1, 1, height=1.5 + 0.3 * len(shapes)) as (axes,):
        for side, key in sides.items():
            for layout, lift, more in (("contiguous", 0.14, {}), ("channels_last", -0.14, {"mfc": "white"})):
                found = [row for row in rows if row["layout"] == layout and row[f"{key} both us"] != ""]
                ratios = [row[f"{key} both us"] / row["nn both us"] for row in found]
                places = [shapes.index(str(row["shape"])) - lift for row in found]
                if found:
                    label = f"{pictures.METHODS[side].label}, {layout}"
                    axes.plot(ratios, places, **pictures.look(side, label=label, ls="", ms=6, **more))
        axes.axvline(1.0, color=pictures.METHODS["local"].colour, label="nn.BatchNorm, without sync")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        pictures.ticks(axes.xaxis, [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20) if low < tick < high])
        axes.set_yticks(range(len(shapes)), shapes)
        axes.invert_yaxis()
        axes.set(xlabel="time, relative to nn.BatchNorm without synchronization", ylabel="input of each rank")
        pictures.legend_below([axes], columns=3)


def main() -> None:
    parser = argparse.ArgumentParser(description="syncbn.SyncBatchNorm against nn.BatchNorm without sync")
    parser.add_argument("--backend", choices=ranks.BACKENDS, default="none")
    parser.add_argument("--shapes", choices=SHAPES, default="targets")
    parser.add_argument("--rivals", action="store_true", help="fairscale's and a naive layer as well")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    args = parser.parse_args()
    if args.backend == "none":
        timing.keep_freed_memory()
    torch.set_num_threads(args.threads)
    rows = []
    with ranks.joined(args.backend) as group, comm.forced() if group is None else contextlib.nullcontext():
        for shape in SHAPES[args.shapes]:
            for layout in (torch.contiguous_format, torch.channels_last):
                if layout is torch.channels_last and len(shape) != 4:
                    continue
                row = measure(shape, layout, args.rounds, group, args.rivals)
                rows.append(row)
                if ranks.is_first(group):
                    print(
                        f"{row['shape']:>16} {row['layout']:<14} nn {row['nn both us']:8.0f} us  "
                        f"syncbn {row['syncbn both us']:8.0f} us  ratio: forward {row['forward ratio']:.2f} "
                        f"backward {row['backward ratio']:.2f} both {row['both ratio']:.2f}  "
                        f"over floor: {row['both over floor']:.2f}"
                        + "".join(
                            f"  {name} {row[f'{name} both us']:8.0f} us"
                            for name in ("fairscale", "naive")
                            if f"{name} both us" in row
                        ),
                        flush=True,
                    )
    if ranks.is_first(group):
        name = f"layer-{'rivals' if args.rivals else args.shapes}-{args.backend}-{args.threads}t"
        path = timing.write_csv(f"{name}.csv", rows)
        plot(path)
        print(f"{table(rows)}\n{timing.machine()}\nwritten: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
