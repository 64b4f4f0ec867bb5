"""A step of 64 images in micro-batches: what is exact, what is not, and what the whole batch costs instead.

    python benchmarks/accumulation.py

A network of two convolutions with batch norm on scikit-learn's digits, float64. "statistics": the weights are fixed,
and the running statistics after 50 steps are compared with those of forwards with all 64 images. "gradients": the
gradient of one step against that of the whole batch, over 20 steps' images. "costs": a network of six such layers with
32 channels on 32x32 images in float32, forward and backward.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import bars
import counting
import timing
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.accumulation import step_statistics

STEP = 64
MOMENTUM = 0.1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=MOMENTUM), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=MOMENTUM), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return syncbn.convert_sync_batchnorm(model.double())


def steps(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).view(-1, 1, 8, 8) / 16
    order = torch.Generator().manual_seed(0)
    for _ in range(count):
        chosen = torch.randint(len(x), (STEP,), generator=order)
        yield x[chosen], torch.from_numpy(classes)[chosen]


def running_statistics(k: int) -> list[dict[str, object]]:
    """How far each way is from the running statistics of the whole batch, after 50 steps with the same weights."""
    ways = {"k updates": MOMENTUM, "k updates, smaller momentum": 1 - (1 - MOMENTUM) ** (1 / k), "one update": MOMENTUM}
    whole = network()
    models = {way: copy.deepcopy(whole) for way in ways}
    for way, model in models.items():
        for layer in (model[1], model[4]):
            layer.momentum = ways[way]
    with torch.no_grad():
        for x, _ in steps(50):
            whole(x)
            for way, model in models.items():
                with step_statistics(model) if way == "one update" else nullcontext():
                    for part in x.chunk(k):
                        model(part)
    rows: list[dict[str, object]] = []
    for way, model in models.items():
        for number, index in enumerate((1, 4), start=1):
            ours, theirs = model[index], whole[index]
            mean = (ours.running_mean - theirs.running_mean).abs() / theirs.running_var.sqrt()
            var = ours.running_var / theirs.running_var - 1
            rows.append(
                {"micro-batches": k, "way": way, "layer": number,
                 "mean, in std": float(mean.max()), "var, relative": float(var.abs().max())}
            )  # fmt: skip
    return rows


def gradient(model: nn.Module, x: Tensor, classes: Tensor, k: int) -> Tensor:
    model.zero_grad()
    for part, wanted in zip(x.chunk(k), classes.chunk(k), strict=True):
        (F.cross_entropy(model(part), wanted) / k).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradients(k: int) -> dict[str, object]:
    model, errors = network(), []
    for x, classes in steps(20):
        whole = gradient(model, x, classes, 1)
        errors.append(float((gradient(model, x, classes, k) - whole).norm() / whole.norm()))
    return {"micro-batches": k, "images each": STEP // k, "gradient error": statistics.median(errors)}


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return syncbn.convert_sync_batchnorm(
        nn.Sequential(*(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(6)
        ))
    )  # fmt: skip


def costs(k: int) -> list[dict[str, object]]:
    x = torch.randn(STEP, 32, 32, 32)
    model = blocks()

    def plain(x: Tensor) -> None:
        model(x).square().mean().backward()

    def recomputed(x: Tensor) -> None:
        x = x.detach().requires_grad_()  # for the first block to be recomputed as well
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        x.square().mean().backward()

    def in_parts() -> None:
        with step_statistics(model):
            for part in x.chunk(k):
                plain(part)

    sides: dict[str, Callable[[], None]] = {
        "whole batch": lambda: plain(x),
        "whole batch, checkpoints": lambda: recomputed(x),
        f"{k} micro-batches": in_parts,
    }
    times = timing.in_turn(sides, 5)
    return [
        {"way": name, "peak MB": counting.peak_bytes(side) / 1e6, "ms": 1e3 * times[name]}
        for name, side in sides.items()
    ]


def plot(path: Path) -> Path:
    """The costs of a step in parts, and of the whole batch."""
    rows = timing.read_csv(path)
    quantities = {"peak of memory, MB": "peak MB", "forward and backward, ms": "ms"}
    title = f"A step of {STEP} images, whole and in micro-batches: {timing.where(rows)}"
    return bars.draw(path, title, {
        label: {"sync": {row["way"]: row[column] for row in rows}} for label, column in quantities.items()
    })  # fmt: skip


def show(rows: list[dict[str, object]], name: str) -> Path:
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        cells = (f"{value:.2g}" if isinstance(value, float) and value < 1 else value for value in row.values())
        print("| " + " | ".join(f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    path = timing.write_csv(name, rows)
    print(f"written: {path}\n")
    return path


def main() -> None:
    timing.keep_freed_memory()
    torch.set_num_threads(1)
    show(running_statistics(8), "accumulation-statistics.csv")
    show([gradients(k) for k in (2, 4, 8, 16)], "accumulation-gradients.csv")
    print(f"drawn: {plot(show(costs(8), 'accumulation-costs.csv'))}\n{timing.machine()}")


if __name__ == "__main__":
    main()
