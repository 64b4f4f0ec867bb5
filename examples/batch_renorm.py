"""Batch Renormalization on `syncbn.functional.global_moments`: what the statistics beneath the layer are for.

Batch Renormalization (Ioffe, 2017) lets a small batch train with nearly the statistics that are used afterwards: it
normalizes with those of the batch and corrects them by factors that carry no gradient, within limits that are relaxed
as the running statistics settle::

    y = weight * ((x - mean) / std * r + d) + bias
    r = clip(std / running_std, 1 / r_max, r_max)        d = clip((mean - running_mean) / running_std, -d_max, d_max)

`BatchRenorm` below is those formulas. Mean and variance come from ``global_moments``, with gradients through all ranks
of a group: the whole world, or a group of this rank alone for the form of the paper. ::

    python -m syncbn.launch -n 4 examples/batch_renorm.py

Four networks learn scikit-learn's digits at few samples per device: batch norm and batch renorm, each over this rank's
samples and over all ranks'. It prints a table and writes ``runs.csv`` (one line per run), ``curves.csv`` (train loss
of each epoch) and ``batch_renorm.png`` into the folder given by ``--out``. The default (2 samples per device, 2 seeds)
is a short form; ``--full`` takes 2 and 4 samples and 3 seeds.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import (
    Digits,
    Run,
    build_mlp,
    joined_ranks,
    load_data,
    mean_and_std,
    over_seeds,
    parse,
    picture,
    progress,
    spread,
    test_accuracy,
    train,
    write_csv,
)
from torch import Tensor, nn

import syncbn

LABELS = {"local": "local BN", "renorm": "local renorm", "sync": "SyncBN", "sync_renorm": "SyncBN renorm"}


class BatchRenorm(nn.Module):
    """Batch renormalization of inputs of shape ``(N, C)`` over the ranks of a process group.

    `r_max` and `d_max` are the limits of the corrections; 1 and 0 make it batch norm.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, process_group: Any = None, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.group, self.eps, self.momentum = process_group, eps, momentum
        self.r_max, self.d_max = 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        running_std = (self.running_var + self.eps).sqrt()
        if not self.training:
            return (x - self.running_mean) / running_std * self.weight + self.bias
        count, mean, var = syncbn.functional.global_moments(x, process_group=self.group)
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            r = (std / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return ((x - mean) / std * r + d) * self.weight + self.bias

    def relax(self, progress: float) -> None:
        """Set the limits for a point of the training from 0 to 1: batch norm at first, 3 and 5 from a quarter on."""
        share = min(max((progress - 0.05) / 0.2, 0.0), 1.0)
        self.r_max, self.d_max = 1 + 2 * share, 5 * share


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of ``runs.csv``: `test_accuracy` in percent, `train_loss` as the mean over last epoch and ranks."""

    norm: str
    samples_per_device: int
    ranks: int
    seed: int
    epochs: int
    test_accuracy: float
    train_loss: float


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of ``curves.csv``: the mean train loss of one epoch, in nats."""

    norm: str
    samples_per_device: int
    seed: int
    epoch: int
    train_loss: float


def networks(alone: Any) -> dict[str, Callable[[int], nn.Sequential]]:
    """Return, by name, functions that build a network for a seed. `alone` is a group of this rank only."""
    return {
        "local": lambda seed: build_mlp("local", seed),
        "renorm": lambda seed: build_mlp(lambda width: BatchRenorm(width, alone), seed),
        "sync": lambda seed: build_mlp("sync", seed),
        "sync_renorm": lambda seed: build_mlp(BatchRenorm, seed),
    }


def reach(alone: Any) -> dict[str, float]:
    """Return how large a gradient the last rank's samples get from a loss on the first rank's outputs alone."""
    torch.manual_seed(dist.get_rank())
    sizes = {}
    for name, group in (("renorm", alone), ("sync_renorm", None)):
        x = torch.randn(8, 4, requires_grad=True)
        loss = BatchRenorm(4, group)(x).pow(3).sum()
        (loss if dist.get_rank() == 0 else 0 * loss).backward()
        assert x.grad is not None
        size = x.grad.norm()
        dist.broadcast(size, dist.get_world_size() - 1)
        sizes[name] = size.item()
    return sizes


def sweep(args: argparse.Namespace, data: Digits, alone: Any) -> tuple[list[Result], list[Point]]:
    """Train at each number of samples per device. All ranks return the same training losses; rank 0's network counts,
    as in a DDP checkpoint.
    """
    world = dist.get_world_size()
    results, points = [], []
    with progress(sum(len(data.train_x) // (samples * world) for samples in args.samples) * args.epochs) as bar:
        for samples in args.samples:
            bar.set_description(f"{samples} samples per device")
            in_epoch = len(data.train_x) // (samples * world)
            peak = 0.1 * samples * world / 32
            runs = [
                Run(norm, seed, build(seed), peak)
                for norm, build in networks(alone).items()
                for seed in range(args.seeds)
            ]
            layers = [layer for run in runs for layer in run.model.modules() if isinstance(layer, BatchRenorm)]
            for step, _ in enumerate(train(runs, data, samples * world, args.epochs)):
                bar.update()
                for layer in layers:
                    layer.relax((step + 1) / (in_epoch * args.epochs))
            for run in runs:
                losses = [sum(run.losses[e * in_epoch : (e + 1) * in_epoch]) / in_epoch for e in range(args.epochs)]
                points += [Point(run.norm, samples, run.seed, e + 1, loss) for e, loss in enumerate(losses)]
                accuracy = test_accuracy(run.model, data)
                results.append(Result(run.norm, samples, world, run.seed, args.epochs, accuracy, losses[-1]))
    return results, points


def format_table(results: list[Result], samples: list[int]) -> str:
    """Return the Markdown table of test accuracy and train loss, mean +- standard deviation over seeds."""
    columns = [f"{label} {what}" for what in ("test %", "loss") for label in LABELS.values()]
    lines = ["| samples per device | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    for count in samples:
        accuracy = [over_seeds(results, norm, count, "test_accuracy") for norm in LABELS]
        loss = [over_seeds(results, norm, count, "train_loss") for norm in LABELS]
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in accuracy]
        cells += [f"{mean:.4f} ± {std:.4f}" for mean, std in loss]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[Result], points: list[Point], samples: list[int], path: Path) -> None:
    """Draw test accuracy against samples per device, and the loss curves at the fewest of them."""
    first, least = results[0], min(samples)
    title = f"Batch renormalization, digits, {first.ranks} ranks: {spread(len({r.seed for r in results}))}"
    with picture(path, title) as (left, right):
        for (norm, label), marker in zip(LABELS.items(), "osD^", strict=True):
            means, stds = zip(*(over_seeds(results, norm, s, "test_accuracy") for s in samples), strict=True)
            left.errorbar(samples, means, stds, marker=marker, capsize=4, label=label)
            epochs = list(range(1, first.epochs + 1))
            at = {e: [p for p in points if (p.norm, p.samples_per_device, p.epoch) == (norm, least, e)] for e in epochs}
            means, stds = zip(*(mean_and_std(p.train_loss for p in at[e]) for e in epochs), strict=True)
            right.errorbar(epochs, means, stds, marker=marker, ms=4, capsize=2, label=label)
        left.set_xscale("log", base=2)
        left.set_xticks(samples, [str(s) for s in samples])
        left.set_xlabel("samples per device")
        left.set_ylabel("test accuracy (%)")
        right.set_yscale("log")
        right.set_xlabel(f"epoch, at {least} samples per device")
        right.set_ylabel("train loss (nats)")
        left.legend()


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Batch norm and batch renorm, over one rank's samples and over all.")
    parser.add_argument("--samples", type=int, nargs="+", default=[2], help="samples per device (2)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (2)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training set (10)")
    parser.add_argument("--full", action="store_true", help="the full sweep: samples 2 4, 3 seeds")
    parser.add_argument("--out", type=Path, default=Path("out/batch_renorm"), help="folder for CSV and PNG")
    args = parse(parser)
    if args.full:
        args.samples, args.seeds = [2, 4], 3
    if min(args.samples) < 2:
        parser.error(f"--samples {min(args.samples)}: local statistics need at least 2 samples per device")
    return args


def main() -> None:
    """Run the sweep on the ranks that the launcher started; rank 0 reports."""
    args = parse_arguments()
    start = time.monotonic()
    with joined_ranks():
        alone, _ = dist.new_subgroups(1)
        reached = reach(alone)
        results, points = sweep(args, load_data(), alone)
        if dist.get_rank() == 0:
            write_csv(results, args.out / "runs.csv")
            write_csv(points, args.out / "curves.csv")
            draw(results, points, args.samples, args.out / "batch_renorm.png")
            print(format_table(results, args.samples))
            print(
                "A loss on the first rank's outputs gives the last rank's samples a gradient of norm "
                f"{reached['sync_renorm']:.3g} with statistics over all ranks, {reached['renorm']:.3g} without."
            )
            print(f"{len(results)} runs in {time.monotonic() - start:.0f} s; wrote CSV and PNG to {args.out}")


if __name__ == "__main__":
    main()
