"""Does batch norm regularize, and what does synchronizing take away of it? Train and test accuracy on few samples.

The noise of a batch's statistics is said to work like dropout: the smaller the batch, the more of it. Convolutional
networks learn the first 1000 signals of MNIST-1D (`signals.py`), long enough to learn them by heart: without
normalization, with local and with synchronized batch norm, each with dropout before the last layer and without, at
several numbers of samples per device. The gap between the accuracies on the training signals and on the test signals,
both with running statistics, is what they overfit. ::

    python -m syncbn.launch -n 4 examples/regularization.py

It prints a table and writes ``runs.csv`` (one line per run) and ``regularization.png`` into the folder given by
``--out``.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from signals import build_convs, load_signals
from torch import nn
from training import accuracies, compare

LABELS = pictures.labels("none", "local", "sync")
DROPOUT = 0.3


@dataclasses.dataclass(frozen=True)
class Result(experiment.Classified):
    """One line of ``runs.csv``: `dropout` is its probability, `train_accuracy` in percent, with running statistics."""

    dropout: float
    train_accuracy: float


def build(norm: str, seeds: range) -> nn.Module:
    """Return the stacked networks of a name, "sync" or "sync dropout"."""
    layer, _, dropout = norm.partition(" ")
    model = build_convs(layer, seeds)
    if dropout:
        model.features.append(nn.Dropout(DROPOUT))
    return model


def measure(args: argparse.Namespace, case: tuple[int]) -> Iterator[Result]:
    """Train all networks at one number of samples per device. Rank 0's count, as in a DDP checkpoint."""
    (samples,), data, world = case, load_signals(), dist.get_world_size()
    few = dataclasses.replace(data, train_x=data.train_x[: args.subset], train_y=data.train_y[: args.subset])
    torch.manual_seed(dist.get_rank())  # other signals are dropped on each rank
    names = [f"{norm}{more}" for norm in LABELS for more in ("", " dropout")]
    for run, losses in compare(names, build, few, samples, range(args.seeds), args.epochs, args.lr):
        norm, _, dropout = run.norm.partition(" ")
        test = accuracies(run.model, few.test_x, few.test_y, args.seeds)
        train = accuracies(run.model, few.train_x, few.train_y, args.seeds)
        for seed, (right, loss, known) in enumerate(zip(test, losses[-1], train, strict=True)):
            yield Result(norm, samples, world, seed, args.epochs, right, loss, DROPOUT if dropout else 0.0, known)


def gaps(results: list[Result], **same: object) -> tuple[float, float]:
    """Return mean and standard deviation over seeds of the gap, in points."""
    return experiment.mean_and_std(
        result.train_accuracy - result.test_accuracy
        for result in results
        if all(getattr(result, name) == value for name, value in same.items())
    )


def draw(folder: Path) -> None:
    """Draw test accuracy, and the gap to the training accuracy, against samples per device, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    samples = sorted({result.samples_per_device for result in results})
    first = results[0]
    title = f"MNIST-1D, few signals, {first.ranks} ranks, {first.epochs} epochs: {experiment.spread(results)}"
    with pictures.figure(folder / "regularization.png", title) as (left, right):
        for dropout, style in ((0.0, {}), (DROPOUT, {"ls": "--", "mfc": "white"})):
            for norm in LABELS:
                same = {"norm": norm, "dropout": dropout}
                look = pictures.look(norm, label=LABELS[norm] + ", dropout" * (dropout > 0), **style)
                left.errorbar(
                    samples, *experiment.curves(results, "test_accuracy", "samples_per_device", samples, **same), **look
                )
                pairs = [gaps(results, samples_per_device=count, **same) for count in samples]
                right.errorbar(samples, *zip(*pairs, strict=True), **look)
        for axis in (left, right):
            pictures.powers_of_two(axis, samples, "samples per device")
        left.set_ylabel("test accuracy (%)")
        right.set_ylabel("train less test accuracy\n(points)")
        pictures.legend_below([left], columns=2)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print train accuracy, test accuracy and gap."""
    results: list[Result] = tables["runs"]
    lines = []
    for count in args.samples:
        for norm, label in LABELS.items():
            for dropout in (0.0, DROPOUT):
                same = {"samples_per_device": count, "norm": norm, "dropout": dropout}
                lines.append(
                    [
                        count,
                        label,
                        f"{dropout:g}",
                        *(
                            experiment.cell(experiment.over_seeds(results, field, **same), 1)
                            for field in ("train_accuracy", "test_accuracy")
                        ),
                        experiment.cell(gaps(results, **same), 1),
                    ]
                )
    header = ["samples per device", "normalization", "dropout", "train %", "test %", "gap"]
    print(experiment.markdown(header, lines))


EXPERIMENT = experiment.Experiment(
    about="Train and test accuracy of local, synchronized and no batch norm, with dropout and without.",
    options={
        "samples": ([4], [4, 8, 16]),
        "seeds": (2, 3),
        "epochs": (5, 10),
        "lr": (0.1, 0.1),
        "subset": (1000, 1000, "signals to train with"),
    },
    tables={"runs": Result},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
    least_samples=1,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
