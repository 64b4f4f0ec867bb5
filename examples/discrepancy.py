"""The train / test discrepancy: batch norm with the statistics it trained with, and with those it is used with.

In training, batch norm normalizes with the statistics of a batch; afterwards with running ones. The smaller the batch,
the further apart the two, and what was learnt with one need not hold with the other. Here the same trained weights
classify the test images twice: in batches as large as in training, with the statistics of each batch, and with the
running statistics. ::

    python -m syncbn.launch -n 4 examples/discrepancy.py

``local`` is `nn.BatchNorm1d`, whose batch is that of a rank; for ``sync``, `syncbn.SyncBatchNorm`, it is that of all
ranks. What one sample gives depends on its company, as long as the statistics are those of the batch: each test image
is shown in `COMPANIES` different batches, in training mode and in evaluation mode. It prints two tables and writes
``runs.csv`` (one line per run), ``companies.csv``, ``samples.csv``, ``discrepancy.png`` and ``one_sample.png`` into the
folder given by ``--out``. The default (2 and 16 samples per device, 2 seeds) is a short form; ``--full`` takes 2, 4, 8
and 16 samples and 5 seeds.
"""

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import build_mlps, load_data
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from training import Data, Run, compare, stacked_batches

import syncbn

LABELS = pictures.labels("local", "sync")
LR = 0.1  # at a total batch of 32
COMPANIES = 16  # batches in which each test image is shown
SHOWN = 12  # images in the picture


@dataclasses.dataclass(frozen=True)
class Result(experiment.Trained):
    """One line of ``runs.csv``: accuracies in percent and losses in nats, on test images, by each kind of statistics.

    `distance` is how far the mean of a batch is from the running mean, in running standard deviations: the root mean
    square over channels, averaged over layers and batches.
    """

    batch_accuracy: float
    running_accuracy: float
    batch_loss: float
    running_loss: float
    distance: float


@dataclasses.dataclass(frozen=True)
class Company(experiment.Trained):
    """One line of ``companies.csv``: how what an image gives depends on its batch, by `mode` of the network.

    `changed` is the share of test images that do not get the same class in all batches, in percent; `spread` the
    standard deviation over batches of the probability of an image's true class, averaged over images.
    """

    mode: str
    changed: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line of ``samples.csv``: the probability of an image's true class in one of its batches, in training mode."""

    norm: str
    samples_per_device: int
    image: int
    company: int
    probability: float


def observe(model: nn.Module, norm: str, seeds: int) -> list[Tensor]:
    """Let every batch norm layer append the distance of its batch's mean, by seed, to a list, which is returned."""
    distances: list[Tensor] = []

    def measure(layer: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        mean = syncbn.functional.global_moments(x)[1] if norm == "sync" else x.mean(0)
        scaled = (mean - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        distances.append(scaled.square().view(seeds, -1).mean(1).sqrt())

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(measure)
    return distances


def as_used(model: nn.Module) -> nn.Module:
    """Return a copy whose running statistics are rank 0's, as in a DDP checkpoint, and stay as training left them."""
    model = copy.deepcopy(model)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 0.0
    return model


def evaluate(run: Run, data: Data, total_batch: int, seeds: int) -> list[list[float]]:
    """Return the last five columns of a `Result` for each seed, means over all ranks."""
    model, world = as_used(run.model), dist.get_world_size()
    batches = stacked_batches(len(data.test_x), total_batch, range(seeds), epoch=0)
    sums = torch.zeros(5, seeds, dtype=torch.float64)

    def score(row: int, mine: Tensor, share: float) -> None:
        logits, labels = model(data.test_x[mine]), data.test_y[mine]
        sums[row] += share * 100 * (logits.argmax(1) == labels).double().mean(0)
        sums[row + 2] += share * F.cross_entropy(logits, labels, reduction="none").mean(0)

    with torch.no_grad():
        model.eval()
        score(1, torch.cat(batches), 1.0)
        model.train()
        distances = observe(model, run.norm, seeds)
        for mine in batches:
            score(0, mine, 1 / len(batches))
        sums[4] = torch.stack(distances).mean(0)
    dist.all_reduce(sums)
    by_seed: list[list[float]] = (sums / world).T.tolist()
    return by_seed


def companies(run: Run, data: Data, total_batch: int, seeds: int, train: bool) -> tuple[Tensor, Tensor]:
    """Return the class of each test image (0 where it was in no batch) and the probability of its true one.

    Shapes: (COMPANIES, images, seeds). In each company all images are shuffled anew; classes count from 1.
    """
    model = as_used(run.model).train(train)
    classes = torch.zeros(COMPANIES, len(data.test_x), seeds, dtype=torch.float64)
    probabilities = torch.zeros_like(classes)
    with torch.no_grad():
        for i in range(COMPANIES):
            for mine in stacked_batches(len(data.test_x), total_batch, range(seeds), epoch=1 + i):
                chances = model(data.test_x[mine]).double().softmax(1)
                classes[i].scatter_(0, mine, 1 + chances.argmax(1).double())
                true = chances.gather(1, data.test_y[mine].unsqueeze(1)).squeeze(1)
                probabilities[i].scatter_(0, mine, true)
    for found in (classes, probabilities):
        dist.all_reduce(found)
    return classes, probabilities


def summary(classes: Tensor, probabilities: Tensor) -> list[tuple[float, float]]:
    """Return `changed` and `spread` of a `Company` for each seed, over the images that were in all companies."""
    found = []
    for kinds, chances in zip(classes.unbind(2), probabilities.unbind(2), strict=True):
        there = (kinds > 0).all(0)
        changed = (kinds != kinds[0]).any(0)[there].double().mean()
        found.append((100 * changed.item(), chances.std(0)[there].mean().item()))
    return found


def measure(args: argparse.Namespace, case: tuple[int]) -> Iterator[Any]:
    """Train at one number of samples per device, and evaluate. All ranks return the same."""
    (samples,), data, world, seeds = case, load_data(), dist.get_world_size(), range(args.seeds)
    total = samples * world
    for run, _ in compare(LABELS, build_mlps, data, samples, seeds, args.epochs, LR):
        same = [(run.norm, samples, world, seed, args.epochs) for seed in seeds]
        yield from (Result(*s, *row) for s, row in zip(same, evaluate(run, data, total, len(seeds)), strict=True))
        for mode in ("train", "eval"):
            classes, chances = companies(run, data, total, len(seeds), mode == "train")
            rows = summary(classes, chances)
            yield from (Company(*s, mode, *row) for s, row in zip(same, rows, strict=True))
            if mode == "train":
                shown = (classes[:, :, 0] > 0).all(0).nonzero().flatten()[:SHOWN]
                for image, by_company in zip(shown.tolist(), chances[:, shown, 0].T.tolist(), strict=True):
                    yield from (Sample(run.norm, samples, image, i, p) for i, p in enumerate(by_company))


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
    """Draw both pictures from the CSVs."""
    draw_discrepancy(folder)
    draw_companies(folder)


def draw_discrepancy(folder: Path) -> None:
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


def draw_companies(folder: Path) -> None:
    """Draw what some images give in different batches, and how many of all change their class."""
    rows = experiment.read_csv(folder / "companies.csv", Company)
    seen = experiment.read_csv(folder / "samples.csv", Sample)
    samples = sorted({row.samples_per_device for row in rows})
    middle = samples[len(samples) // 2]
    title = f"One sample in {COMPANIES} batches, digits, {rows[0].ranks} ranks: {experiment.spread(rows)}"
    with pictures.figure(folder / "one_sample.png", title) as (left, right):
        for norm, offset in (("local", -0.15), ("sync", 0.15)):
            own = [row for row in seen if (row.norm, row.samples_per_device) == (norm, middle)]
            images = list(dict.fromkeys(row.image for row in own))
            places = [images.index(row.image) + offset for row in own]
            left.plot(places, [row.probability for row in own], **pictures.look(norm, ls="", alpha=0.6, ms=4))
            for mode, style in (("train", {}), ("eval", {"ls": "--", "mfc": "white"})):
                curves = experiment.curves(rows, "changed", "samples_per_device", samples, norm=norm, mode=mode)
                name = {"train": "training", "eval": "evaluation"}[mode]
                label = f"{LABELS[norm]}, {name} mode"
                right.errorbar(samples, *curves, **pictures.look(norm, label=label, **style))
        left.set_xticks(range(len(images)), [""] * len(images))
        left.set_xlabel(f"{len(images)} test images, training mode,\n{middle} samples per device")
        left.set_ylabel("probability of the true class")
        pictures.powers_of_two(right, samples, "samples per device")
        right.set_ylabel("images whose class\ndepends on their batch (%)")
        pictures.legend_below([right], columns=2)


def format_companies(rows: list[Company], samples: list[int]) -> str:
    """Return the table of what depends on an image's company."""
    header = ["samples per device", "layer", "class depends on the batch, %, training", "evaluation"]
    header += ["std of the true class's probability, training", "evaluation"]
    lines = [
        [count, label]
        + [
            experiment.cell(experiment.over_seeds(rows, field, norm=norm, samples_per_device=count, mode=mode), digits)
            for field, digits in (("changed", 1), ("spread", 3))
            for mode in ("train", "eval")
        ]
        for count in samples
        for norm, label in LABELS.items()
    ]
    return experiment.markdown(header, lines)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table and what it shows."""
    results: list[Result] = tables["runs"]
    print(format_table(results, args.samples))
    print(format_companies(tables["companies"], args.samples))
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
    tables={"runs": Result, "companies": Company, "samples": Sample},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
