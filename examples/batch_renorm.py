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
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from digits import build_mlps, load_data
from experiment import Classified, Point
from torch import Tensor, nn
from training import Run, accuracies, compare, groups_of

import syncbn

LABELS = pictures.labels("local", "renorm", "sync", "sync_renorm")
LR = 0.1  # at a total batch of 32


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


def build(alone: Any, norm: str, seeds: range) -> nn.Sequential:
    """Return the stacked networks of a name. `alone` is a group of this rank only."""
    groups = {"renorm": alone, "sync_renorm": None}
    layer = functools.partial(BatchRenorm, process_group=groups[norm]) if norm in groups else norm
    return build_mlps(layer, seeds)


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


def relax(runs: list[Run], step: int, steps: int) -> None:
    """Relax the limits of all layers of batch renorm."""
    for each in runs:
        for layer in each.model.modules():
            if isinstance(layer, BatchRenorm):
                layer.relax(step / steps)


def measure(args: argparse.Namespace, case: tuple[int]) -> Iterator[Any]:
    """Train at one number of samples per device. All ranks have the same training losses; rank 0's network counts, as
    in a DDP checkpoint.
    """
    (samples,), alone, data, seeds = case, groups_of(1), load_data(), range(args.seeds)
    if samples == args.samples[0]:
        yield from (experiment.Number(f"reach of {name}", size) for name, size in reach(alone).items())
    networks = functools.partial(build, alone)
    for run, losses in compare(LABELS, networks, data, samples, seeds, args.epochs, LR, after_step=relax):
        yield from experiment.points(run.norm, samples, losses)
        right = accuracies(run.model, data.test_x, data.test_y, args.seeds)
        yield from experiment.classified(args, samples, run.norm, right, losses)


def draw(folder: Path) -> None:
    """Draw test accuracy against samples per device, and the loss curves at the fewest of them, from the CSVs."""
    results = experiment.read_csv(folder / "runs.csv", Classified)
    points = experiment.read_csv(folder / "curves.csv", Point)
    first, samples = results[0], sorted({result.samples_per_device for result in results})
    title = f"Batch renormalization, digits, {first.ranks} ranks: {experiment.spread(results)}"
    with pictures.figure(folder / "batch_renorm.png", title) as (left, right):
        for norm in LABELS:
            means, stds = experiment.curves(results, "test_accuracy", "samples_per_device", samples, norm=norm)
            left.errorbar(samples, means, stds, **pictures.look(norm))
            epochs = list(range(1, first.epochs + 1))
            least = experiment.curves(points, "train_loss", "epoch", epochs, norm=norm, samples_per_device=samples[0])
            right.errorbar(epochs, *least, **pictures.look(norm, markersize=4))
        pictures.powers_of_two(left, samples, "samples per device")
        left.set_ylabel("test accuracy (%)")
        right.set_yscale("log")
        right.set_xlabel(f"epoch, at {samples[0]} samples per device")
        right.set_ylabel("train loss (nats)")
        pictures.legend_below([left, right])


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table and how far a loss reaches."""
    results: list[Classified] = tables["runs"]
    reached = {row.name.removeprefix("reach of "): row.value for row in tables["numbers"]}
    print(experiment.accuracy_and_loss(results, LABELS, args.samples))
    print(
        "A loss on the first rank's outputs gives the last rank's samples a gradient of norm "
        f"{reached['sync_renorm']:.3g} with statistics over all ranks, {reached['renorm']:.3g} without."
    )


EXPERIMENT = experiment.Experiment(
    about="Batch norm and batch renorm, over one rank's samples and over all.",
    options={"samples": ([2], [2, 4]), "seeds": (2, 3), "epochs": (10, 10)},
    tables={"runs": Classified, "curves": Point, "numbers": experiment.Number},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
