"""A training step of a ResNet-18 at 2 samples per device: local batch norm, syncbn, fairscale's layer, a naive layer.

    python -m syncbn.launch --engine mpi -n 2 benchmarks/step.py --backend mpi4py
    python -m syncbn.launch -n 2 benchmarks/step.py --backend gloo

Each side is the same network with another normalization, under DistributedDataParallel: forward, loss, backward with
averaged gradients, SGD. Sides run in turn in one process. "naive" makes batch norm out of differentiable all-reduces of
``torch.distributed.nn``; fairscale's layer is left out where the package is not installed. Before anything is timed,
the first step's loss of each synchronized side is compared with syncbn's.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rivals
import timing
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2015)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """11.7 million parameters and 20 batch norm layers."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(before, after, stride), Block(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


SIDES = {
    "local": "local",
    "sync": "syncbn",
    "fairscale": "fairscale",
    "naive": "naive",
}  # in the CSV, by key in pictures


def plot(folder: Path) -> Path:
    """A line for each CSV of steps in the folder, a point for each side: time relative to local batch norm."""
    import pictures

    runs = [timing.read_csv(path) for path in sorted(folder.glob("step-*.csv"))]
    first, path = runs[0][0], folder / "step.png"
    title = f"A step of a ResNet-18, {first['batch']} images on each of {first['ranks']} ranks: {timing.where(runs[0])}"
    with pictures.figure(path, title, 1, 1, height=1.5 + 0.4 * len(runs)) as (axes,):
        for key, side in SIDES.items():
            found = {place: row for place, run in enumerate(runs) for row in run if row["side"] == side}
            ratios = [row["ratio to local"] for row in found.values()]
            axes.plot(ratios, list(found), **pictures.look(key, ls="", ms=7))
        axes.set_yticks(range(len(runs)), [f"{run[0]['backend']}, {run[0]['layout']}" for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlabel("time of a step, relative to local batch norm")
        pictures.legend_below([axes])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="a training step with several batch norms")
    parser.add_argument("--backend", choices=("gloo", "mpi4py"), default="gloo")
    parser.add_argument("--batch", type=int, default=2, help="samples of each rank")
    parser.add_argument("--image", type=int, default=224, help="height and width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    if args.backend == "mpi4py":
        importlib.import_module("syncbn.mpi")  # registers the backend
    dist.init_process_group(args.backend)
    torch.set_num_threads(1)
    form = torch.channels_last if args.channels_last else torch.contiguous_format

    makers: dict[str, Callable[[nn.Module], nn.Module | None]] = {
        "local": lambda module: module,
        "syncbn": syncbn.convert_sync_batchnorm,
        "fairscale": rivals.fairscale,
        "naive": rivals.naive,
    }
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(args.batch, 3, args.image, args.image).to(memory_format=form)
    labels = torch.randint(1000, (args.batch,))
    sides: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        module = make(resnet18().to(memory_format=form))
        if module is None:
            print("fairscale is not installed: left out")
            continue
        net = DistributedDataParallel(module)
        sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def step(net: nn.Module = net, sgd: torch.optim.Optimizer = sgd) -> float:
            sgd.zero_grad()
            loss = nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            sgd.step()
            return loss.item()

        losses[name], sides[name] = step(), step
    for name in ("fairscale", "naive"):
        if name in losses:
            assert abs(losses[name] - losses["syncbn"]) < 1e-3, f"{name} computes something else: {losses}"
    assert abs(losses["local"] - losses["syncbn"]) > 1e-3, f"local batch norm is not local: {losses}"

    times = timing.in_turn(sides, args.rounds, dist.group.WORLD)
    rows = [
        {
            "side": name, "ms": seconds * 1e3, "ratio to local": seconds / times["local"], "backend": args.backend,
            "ranks": dist.get_world_size(), "batch": args.batch, "image": args.image,
            "layout": "channels_last" if args.channels_last else "contiguous", "loss": losses[name],
        }
        for name, seconds in times.items()
    ]  # fmt: skip
    if dist.get_rank() == 0:
        for row in rows:
            print(
                f"{row['side']:>10} {row['ms']:9.1f} ms   {row['ratio to local']:.3f} of the step with local batch norm"
            )
        layout = "-channels_last" if args.channels_last else ""
        path = timing.write_csv(f"step-{args.backend}{layout}.csv", rows)
        print(f"{timing.machine()}\nwritten: {path}, {plot(path.parent)}")
    del sides, net, sgd, step, module
    gc.collect()  # DistributedDataParallel must go before its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
