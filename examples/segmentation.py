"""Segmentation with one and two images a device: a small U-Net on scenes of handwritten digits.

Dense prediction is where devices hold few images, and where people reach for synchronized statistics. Five networks
that differ only in their normalization learn to find the digits 0 to 3 in cluttered scenes (`scenes.py`):

* ``local``   batch norm with the statistics of a rank's own images;
* ``half``    `syncbn.SyncBatchNorm` over half of the ranks;
* ``sync``    `syncbn.SyncBatchNorm` over all of them;
* ``group``   group normalization with 8 groups;
* ``frozen``  batch norm whose statistics are frozen after a pre-training (synchronized, the first third of the steps).

::

    python -m syncbn.launch -n 4 examples/segmentation.py

It prints a table and writes ``runs.csv``, ``curves.csv`` (train loss by epoch), ``noise.csv`` (the noise report, before
training and after it), ``segmentation.png``, ``noise.png``, and ``predictions.png``: test scenes, and what the networks
of the first seed at the fewest images make of them (kept in ``predictions.csv``).
"""

import argparse
import dataclasses
import functools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from experiment import Point
from scenes import CLASSES, SIZE, build_unet, load_scenes, mean_iou, predicted
from torch import Tensor
from training import Data, Run, batches, freeze, normalization, train_side_by_side

from syncbn.diagnostics import THRESHOLD, measure_noise

LABELS = pictures.labels("local", "half", "sync", "group", "frozen")
PRETRAINING = 1 / 3
SHOWN = 5  # scenes in the picture of predictions


@dataclasses.dataclass(frozen=True)
class Result(experiment.Trained):
    """One line of ``runs.csv``: test mean IoU in percent, and train loss as the mean over last epoch and ranks."""

    steps: int
    mean_iou: float
    train_loss: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """One line of ``noise.csv``: a layer's noise over a group of ranks, `when` is "start" or "end" of training."""

    samples_per_device: int
    when: str
    layer: str
    values: float
    group_size: int
    noise: float
    noise_error: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.csv``: the class of each pixel of a scene, row by row, as a letter from a on."""

    norm: str
    scene: int
    pixels: str


def cases(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Yield each number of samples per device with each seed."""
    return ((samples, seed) for seed in range(args.seeds) for samples in args.samples)


def freeze_after_pretraining(runs: list[Run], progress: float) -> None:
    """Freeze the statistics of the networks that train with frozen ones."""
    for run in runs:
        if run.norm == "frozen" and progress >= PRETRAINING:
            freeze(run.model)


def noise_of(model: Any, data: Data, samples: int, when: str) -> Iterator[Noise]:
    """Yield the lines of the noise report of a network in training."""
    inputs = [data.train_x[mine] for mine in batches(len(data.train_x), samples * dist.get_world_size(), 0, 0)]
    report = measure_noise(model.train(), inputs[:64], [1, 2, 4, 8])
    return (Noise(samples, when, r.layer, r.values, r.group_size, r.noise, r.noise_error) for r in report.rows)


def measure(args: argparse.Namespace, case: tuple[int, int]) -> Iterator[Any]:
    """Train all networks of a seed side by side; yields rows. Rank 0's network counts, as in a DDP checkpoint."""
    samples, seed = case
    data = load_scenes(args.scenes)
    networks = {norm: functools.partial(build_unet, normalization(norm)) for norm in LABELS}
    if seed == 0:
        yield from noise_of(build_unet(normalization("sync"), 0), data, samples, "start")
    runs = train_side_by_side(networks, [seed], data, samples, args.epochs, args.lr, freeze_after_pretraining)
    for run in runs:
        losses, guesses = run.epoch_losses(args.epochs), predicted(run.model, data.test_x)
        iou = mean_iou(data.test_y, guesses)
        ranks = dist.get_world_size()
        yield Result(run.norm, samples, ranks, seed, args.epochs, len(run.losses), iou, losses[-1])
        yield from (Point(run.norm, samples, seed, epoch, loss) for epoch, loss in enumerate(losses, 1))
        if seed == 0 and samples == min(args.samples):
            yield from (Prediction(run.norm, i, letters(guesses[i])) for i in range(SHOWN))
        if seed == 0 and run.norm == "sync":
            yield from noise_of(run.model, data, samples, "end")


def letters(classes: Tensor) -> str:
    """Return the class of each pixel as a letter."""
    return "".join(string.ascii_lowercase[number] for number in classes.flatten().tolist())


def numbers(pixels: str) -> Tensor:
    """Return the classes that `letters` wrote."""
    return torch.tensor([string.ascii_lowercase.index(letter) for letter in pixels]).view(SIZE, SIZE)


def draw(folder: Path) -> None:
    """Draw the three pictures from the CSVs."""
    draw_results(folder)
    draw_noise(folder)
    draw_predictions(folder)


def draw_results(folder: Path) -> None:
    """Draw mean IoU against images a device, and the loss by epoch at the fewest of them."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    points = experiment.read_csv(folder / "curves.csv", Point)
    samples = sorted({result.samples_per_device for result in results})
    first = results[0]
    title = f"Segmentation, {first.ranks} ranks, {first.epochs} epochs: {experiment.spread(results)}"
    with pictures.figure(folder / "segmentation.png", title) as (left, right):
        for place, norm in enumerate(LABELS):
            means, stds = experiment.curves(results, "mean_iou", "samples_per_device", samples, norm=norm)
            left.bar(
                [i + 0.16 * (place - 2) for i in range(len(samples))],
                means,
                0.15,
                yerr=stds,
                color=pictures.METHODS[norm].colour,
            )
            epochs = list(range(1, first.epochs + 1))
            least = {"norm": norm, "samples_per_device": min(samples)}
            means, stds = experiment.curves(points, "train_loss", "epoch", epochs, **least)
            right.errorbar(epochs, means, stds, **pictures.look(norm))
        left.set_xticks(range(len(samples)), [f"{count} a device" for count in samples])
        left.set_ylabel("test mean IoU (%)")
        left.set_ylim(bottom=max(0, min(result.mean_iou for result in results) - 5))
        right.set(xlabel=f"epoch, at {min(samples)} a device", ylabel="train loss (nats)")
        pictures.legend_below([right], columns=3)


def draw_noise(folder: Path) -> None:
    """Draw the noise of each layer against ranks that share statistics, after training."""
    rows = [row for row in experiment.read_csv(folder / "noise.csv", Noise) if row.when == "end"]
    samples = sorted({row.samples_per_device for row in rows})
    layers = list(dict.fromkeys(row.layer for row in rows))
    title = "Noise of each layer of the trained U-Net (in brackets: values of a channel in one image)"
    with pictures.figure(folder / "noise.png", title, panels=len(samples)) as axes:
        for axis, count in zip(axes, samples, strict=True):
            for i, layer in enumerate(layers):
                own = [row for row in rows if (row.samples_per_device, row.layer) == (count, layer)]
                sizes = [row.group_size for row in own]
                look = pictures.other(i, len(layers), f"{layer} ({own[0].values / count:g})")
                axis.errorbar(sizes, [row.noise for row in own], [row.noise_error for row in own], **look)
            pictures.powers_of_two(axis, sizes, "ranks that share statistics")
            axis.axhline(THRESHOLD, color=pictures.LIMIT, ls="--", label="threshold")
            axis.set(yscale="log", title=f"{count} image{'s' * (count > 1)} a device")
            pictures.ticks(axis.yaxis, [0.01, 0.03, 0.1, 0.3, 1])
        axes[0].set_ylabel("noise (standard deviations)")
        pictures.legend_below(axes[:1], columns=3)


def draw_predictions(folder: Path) -> None:
    """Draw some test scenes, their classes, and those that the network of each normalization predicts."""
    from matplotlib.colors import ListedColormap

    rows = experiment.read_csv(folder / "predictions.csv", Prediction)
    data = load_scenes()
    colours = ListedColormap(["#ffffff", "#0072b2", "#d55e00", "#009e73", "#cc79a7"])
    columns = ["scene", "truth", *LABELS]
    title = "Test scenes, and what networks of one seed make of them (a colour for each digit)"
    with pictures.figure(
        folder / "predictions.png", title, panels=SHOWN * len(columns), columns=len(columns), height=1.12
    ) as axes:
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for side in axis.spines.values():
                side.set_visible(True)
        for scene in range(SHOWN):
            row = axes[scene * len(columns) : (scene + 1) * len(columns)]
            row[0].imshow(data.test_x[scene, 0], cmap="gray")
            found = {r.norm: numbers(r.pixels) for r in rows if r.scene == scene}
            for axis, classes in zip(row[1:], [data.test_y[scene], *(found[norm] for norm in LABELS)], strict=True):
                axis.imshow(classes, cmap=colours, vmin=0, vmax=CLASSES - 1, interpolation="nearest")
        for axis, name in zip(axes, columns, strict=False):
            axis.set_title(LABELS.get(name, name).replace("SyncBN over ", "SyncBN,\n").replace("frozen ", "frozen\n"))
            axis.title.set_fontsize(8)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table, and what the noise report says beside it."""
    results: list[Result] = tables["runs"]
    rows = [
        [
            count,
            label,
            experiment.cell(experiment.over_seeds(results, "mean_iou", norm=norm, samples_per_device=count), 1),
            experiment.cell(experiment.over_seeds(results, "train_loss", norm=norm, samples_per_device=count), 4),
        ]
        for count in args.samples
        for norm, label in LABELS.items()
    ]
    print(experiment.markdown(["images per device", "normalization", "test mean IoU %", "train loss"], rows))
    for count in args.samples:
        for when in ("start", "end"):
            own = [row for row in tables["noise"] if (row.samples_per_device, row.when) == (count, when)]
            worst = {
                k: max(row.noise for row in own if row.group_size == k) for k in sorted({r.group_size for r in own})
            }
            said = ", ".join(f"{noise:.2f} over {k}" for k, noise in worst.items())
            print(f"Noise of the noisiest layer at {count} per device, {when} of training: {said} ranks")


EXPERIMENT = experiment.Experiment(
    about="Local BN, SyncBN, GN and frozen statistics in a U-Net with one or two images per device.",
    options={
        "samples": ([1], [1, 2]),
        "seeds": (1, 3),
        "epochs": (5, 6),
        "lr": (0.4, 0.4),
        "scenes": (768, 768, "to train with"),
    },
    tables={"runs": Result, "curves": Point, "noise": Noise, "predictions": Prediction},
    cases=cases,
    measure=measure,
    draw=draw,
    report=report,
    least_samples=1,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
