"""The train / test discrepancy: batch norm with the statistics it trained with, and with those it is used with.

In training, batch norm normalizes with the statistics of a batch; afterwards with running ones. The smaller the batch,
the further apart the two, and what was learnt with one need not hold with the other. Here the same trained weights
classify the test images twice: in batches as large as in training, with the statistics of each batch, and with the
running statistics. ::

    python -m syncbn.launch -n 4 examples/discrepancy.py

``local`` is `nn.BatchNorm1d`, whose batch is that of a rank; for ``sync``, `syncbn.SyncBatchNorm`, it is that of all
ranks. It prints a table and writes ``runs.csv`` (one line per run) and ``discrepancy.png`` into the folder given by
``--out``. The default (2 and 16 samples per device, 2 seeds) is a short form; ``--full`` takes 2, 4, 8 and 16 samples
and 5 seeds.
"""

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import load_data, mlps
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from training import Data, Run, train_side_by_side

import syncbn

LABELS = pictures.labels("local", "sync")
LR = 0.1  # at a total batch of 32


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the CSV: accuracies in percent and losses in nats, on test images, by each kind of statistics.

    `distance` is how far the mean of a batch is from the running mean, in running standard deviations: the root mean
    square over channels, averaged over layers and batches.
    """

    norm: str
    samples_per_device: int
    ranks: int
    seed: int
    epochs: int
    batch_accuracy: float
    running_accuracy: float
    batch_loss: float
    running_loss: float
    distance: float


def observe(model: nn.Module, norm: str) -> list[float]:
    """Let every batch norm layer append the distance of its batch's mean to a list, which is returned."""
    distances: list[float] = []

    def measure(layer: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        mean = syncbn.functional.global_moments(x)[1] if norm == "sync" else x.mean(0)
        scaled = (mean - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        distances.append(scaled.square().mean().sqrt().item())

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 0.0  # running statistics stay as training left them
            layer.register_forward_pre_hook(measure)
    return distances


def evaluate(run: Run, data: Data, total_batch: int) -> tuple[float, float, float, float, float]:
    """Return the last five columns of a `Result`, means over all ranks."""
    model = copy.deepcopy(run.model)
    for buffer in model.buffers():  # as a DDP checkpoint holds them
        dist.broadcast(buffer, 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    order = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(run.seed))
    batches = order[: len(order) // total_batch * total_batch].view(-1, world, total_batch // world)[:, rank]
    sums = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        model.eval()
        mine = batches.flatten()
        logits, labels = model(data.test_x[mine]), data.test_y[mine]
        sums[1] = 100 * (logits.argmax(1) == labels).double().mean()
        sums[3] = F.cross_entropy(logits, labels)
        model.train()
        distances = observe(model, run.norm)
        for mine in batches:
            logits, labels = model(data.test_x[mine]), data.test_y[mine]
            sums[0] += 100 * (logits.argmax(1) == labels).double().mean() / len(batches)
            sums[2] += F.cross_entropy(logits, labels) / len(batches)
        sums[4] = sum(distances) / len(distances)
    dist.all_reduce(sums)
    batch_accuracy, running_accuracy, batch_loss, running_loss, distance = (sums / world).tolist()
    return batch_accuracy, running_accuracy, batch_loss, running_loss, distance


def measure(args: argparse.Namespace, case: tuple[int]) -> list[Result]:
    """Train at one number of samples per device, and evaluate twice. All ranks return the same."""
    (samples,), data, world = case, load_data(), dist.get_world_size()
    return [
        Result(run.norm, samples, world, run.seed, args.epochs, *evaluate(run, data, samples * world))
        for run in train_side_by_side(mlps(LABELS), range(args.seeds), data, samples, args.epochs, LR)
    ]


def format_table(results: list[Result], samples: list[int]) -> str:
    """Return the Markdown table of all columns, mean +- standard deviation over seeds."""
    header = [
        "samples per device",
        "layer",
        "test %, batch",
        "test %, running",
        "loss, batch",
        "loss, running",
        "distance",
    ]
    fields = {"batch_accuracy": 1, "running_accuracy": 1, "batch_loss": 3, "running_loss": 3, "distance": 3}
    rows = [
        [count, label]
        + [
            experiment.cell(experiment.over_seeds(results, f, norm=norm, samples_per_device=count), digits)
            for f, digits in fields.items()
        ]
        for count in samples
        for norm, label in LABELS.items()
    ]
    return experiment.markdown(header, rows)


def draw(folder: Path) -> None:
    """Draw accuracy and loss by both kinds of statistics, and the distance, against samples per device."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    first, samples = results[0], sorted({result.samples_per_device for result in results})
    title = f"Train / test discrepancy, digits, {first.ranks} ranks: {experiment.spread(results)}"
    panels = [
        (("batch_accuracy", "running_accuracy"), "test accuracy (%)"),
        (("batch_loss", "running_loss"), "test loss (nats)"),
        (("distance",), "distance of a batch's mean from the\nrunning one (running std)"),
    ]
    with pictures.figure(folder / "discrepancy.png", title, panels=3) as axes:
        for axis, (fields, label) in zip(axes, panels, strict=True):
            for norm in LABELS:
                for field in fields:
                    curves = experiment.curves(results, field, "samples_per_device", samples, norm=norm)
                    if field == "distance":
                        look = pictures.look(norm)
                    elif field.startswith("running"):
                        look = pictures.look(norm, label=f"{LABELS[norm]}, running statistics", ls="--", mfc="white")
                    else:
                        look = pictures.look(norm, label=f"{LABELS[norm]}, batch statistics")
                    axis.errorbar(samples, *curves, **look)
            pictures.powers_of_two(axis, samples, "samples per device")
            axis.set_ylabel(label)
        axes[1].set_yscale("log")
        axes[2].set_yscale("log")
        pictures.ticks(axes[2].yaxis, [0.05, 0.1, 0.2, 0.4])
        pictures.legend_below(axes[:2], columns=2)
        axes[2].legend()


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table and what it shows."""
    results: list[Result] = tables["runs"]
    print(format_table(results, args.samples))
    for norm, label in LABELS.items():
        gaps = []
        for count in (min(args.samples), max(args.samples)):
            running, batch = (
                experiment.over_seeds(results, field, norm=norm, samples_per_device=count)[0]
                for field in ("running_loss", "batch_loss")
            )
            gaps.append(f"{running - batch:+.3f} nats at {count}")
        print(f"{label}: test loss with running statistics less that with batch statistics: {', '.join(gaps)}.")


EXPERIMENT = experiment.Experiment(
    about="Batch statistics against running statistics, at several batch sizes.",
    options={"samples": ([2, 16], [2, 4, 8, 16]), "seeds": (2, 5), "epochs": (10, 10)},
    tables={"runs": Result},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
