"""Deep networks: how gradients flow at the start, which learning rates train, and how many epochs it takes.

Multilayer perceptrons of 5 and of 20 hidden layers learn scikit-learn's digits, with plain constant learning rates:

* ``none``  no normalization, weights as PyTorch makes them;
* ``he``    no normalization, the same weights multiplied by sqrt(6), which is the initialization of He et al. for ReLU;
* ``local`` and ``sync``  batch norm over the samples of a rank, and over those of all.

Before any step, the norm of the gradient of each layer's weights says whether it vanishes or explodes on its way back
(also for weights of twice the size of ``he``, ``double``). ::

    python -m syncbn.launch -n 4 examples/depth.py

It prints two tables and writes ``gradients.csv``, ``sweeps.csv`` and ``depth.png`` into the folder given by ``--out``.
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
import torch.nn.functional as F
from digits import load_data
from experiment import Reached
from torch import nn
from training import (
    GOAL,
    Run,
    StackedLinear,
    Watch,
    accuracies,
    average_gradients,
    constant,
    stacked_batches,
    stacked_mlp,
    train_stacked,
)

LABELS = pictures.labels("none", "he", "local", "sync")
AT_START = pictures.labels("none", "he", "double", "local", "sync")
WIDTH = 64
SCALES = {"he": 6**0.5, "double": 2 * 6**0.5}


@dataclasses.dataclass(frozen=True)
class Result(Reached):
    """One line of ``sweeps.csv``: a network of `depth` hidden layers, trained at a learning rate."""

    depth: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Gradient:
    """One line of ``gradients.csv``: the norm of the gradient of a layer's weights before the first step."""

    norm: str
    seed: int
    depth: int
    layer: int
    gradient: float


def build(norm: str, depth: int, seeds: range) -> nn.Sequential:
    """Return the stacked networks of a name."""
    model = stacked_mlp((64, *[WIDTH] * depth, 10), "none" if norm in SCALES else norm, seeds)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, StackedLinear):
                layer.weight.mul_(SCALES.get(norm, 1.0))
    return model


def gradients(args: argparse.Namespace) -> Iterator[Gradient]:
    """Yield the gradients of the deepest networks at the start, of the first batch over all ranks."""
    data, seeds, depth = load_data(), range(args.seeds), max(args.depths)
    mine = stacked_batches(len(data.train_x), args.samples * dist.get_world_size(), seeds, epoch=0)[0]
    for norm in AT_START:
        run = Run(norm, 0, build(norm, depth, seeds), 0.0)
        F.cross_entropy(run.model(data.train_x[mine]), data.train_y[mine], reduction="none").mean(0).sum().backward()
        average_gradients([run])
        layers = [layer for layer in run.model.modules() if isinstance(layer, StackedLinear)]
        for number, layer in enumerate(layers, 1):
            assert layer.weight.grad is not None
            for seed, size in enumerate(layer.weight.grad.flatten(1).norm(dim=1).tolist()):
                yield Gradient(norm, seed, depth, number, size)


def measure(args: argparse.Namespace, case: tuple[Any, ...]) -> Iterator[Any]:
    """Look at the gradients, or train networks of one depth with all normalizations and rates side by side."""
    if case == ("gradients",):
        yield from gradients(args)
        return
    (_, depth), data, seeds = case, load_data(), range(args.seeds)
    runs = [Run(norm, 0, build(norm, depth, seeds), rate) for rate in args.rates for norm in LABELS]
    watch = Watch(data, args.seeds, args.epochs)
    train_stacked(runs, data, seeds, args.samples * dist.get_world_size(), args.epochs, constant, watch.after_step)
    for run, needed in zip(runs, watch.epochs_needed(runs), strict=True):
        right = accuracies(run.model, data.test_x, data.test_y, args.seeds)
        for seed, (accuracy, epochs) in enumerate(zip(right, needed, strict=True)):
            yield Result(run.norm, seed, args.epochs, accuracy, epochs, depth, run.peak)


def growth(rows: list[Gradient], norm: str) -> float:
    """Return by what factor the gradient grows per layer on its way back: over the hidden layers, all seeds.

    The first layer counts as little as the last: it looks at pixels, not at hidden units.
    """
    last = max(row.layer for row in rows) - 1
    first, end = (experiment.over_seeds(rows, "gradient", norm=norm, layer=layer)[0] for layer in (2, last))
    return (first / end) ** (1 / (last - 2))


def draw(folder: Path) -> None:
    """Draw gradients by layer, test accuracy against the learning rate by depth, and epochs, from the CSVs."""
    rows = experiment.read_csv(folder / "gradients.csv", Gradient)
    results = experiment.read_csv(folder / "sweeps.csv", Result)
    depths, rates = (sorted({getattr(result, name) for result in results}) for name in ("depth", "rate"))
    title = f"Perceptrons of {depths[0]} and {depths[-1]} hidden layers, digits: {experiment.spread(results)}"
    with pictures.figure(folder / "depth.png", title, panels=4) as axes:
        layers = sorted({row.layer for row in rows})
        for norm in AT_START:
            means, _ = experiment.curves(rows, "gradient", "layer", layers, norm=norm)
            axes[0].plot(layers, means, **pictures.look(norm))
        axes[0].set(yscale="log", xlabel=f"layer of {len(layers)}", ylabel="norm of the gradient at the start")
        for axis, depth in zip(axes[1:3], (depths[0], depths[-1]), strict=True):
            for norm in LABELS:
                curves = experiment.curves(results, "test_accuracy", "rate", rates, norm=norm, depth=depth)
                axis.errorbar(rates, *curves, **pictures.look(norm))
            axis.set(xscale="log", xlabel=f"learning rate, {depth} layers", ylabel="test accuracy (%)", ylim=(0, 102))
            pictures.ticks(axis.xaxis, rates)
        for norm in LABELS:
            needed = experiment.curves(results, "epochs_needed", "rate", rates, norm=norm, depth=depths[0])
            axes[3].errorbar(rates, *needed, **pictures.look(norm))
        axes[3].set(xscale="log", xlabel=f"learning rate, {depths[0]} layers", ylim=(0, results[0].epochs))
        pictures.ticks(axes[3].xaxis, rates)
        axes[3].set_ylabel(f"epochs to {GOAL:g} %\n(no point: not all seeds)")
        pictures.legend_below(axes[:1], columns=3)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the growth of gradients, and accuracy and epochs by depth and rate."""
    rows, results = tables["gradients"], tables["sweeps"]
    last = max(row.layer for row in rows) - 1
    lines = [
        [
            label,
            *(
                f"{experiment.over_seeds(rows, 'gradient', norm=norm, layer=layer)[0]:.2g}"
                for layer in (2, last // 2, last)
            ),
            f"{growth(rows, norm):.2f}",
        ]
        for norm, label in AT_START.items()
    ]
    header = ["at the start", "gradient, layer 2", f"layer {last // 2}", f"layer {last}", "factor per layer back"]
    print(experiment.markdown(header, lines))
    lines = [
        [depth, f"{rate:g}"]
        + [
            experiment.cell(experiment.over_seeds(results, field, norm=norm, depth=depth, rate=rate), 1)
            for field in ("test_accuracy", "epochs_needed")
            for norm in LABELS
        ]
        for depth in args.depths
        for rate in args.rates
    ]
    header = ["hidden layers", "learning rate", *(f"{label}, test %" for label in LABELS.values())]
    print(experiment.markdown([*header, *(f"{label}, epochs to {GOAL:g} %" for label in LABELS.values())], lines))


EXPERIMENT = experiment.Experiment(
    about="Gradients, learning rates and epochs of deep networks, with and without batch norm.",
    options={
        "samples": (8, 8),
        "seeds": (2, 3),
        "epochs": (3, 5),
        "depths": ([5, 20], [5, 20], "hidden layers"),
        "rates": ([0.01, 0.1], [0.003, 0.01, 0.03, 0.1, 0.3], "learning rates"),
    },
    tables={"gradients": Gradient, "sweeps": Result},
    cases=lambda args: [("gradients",), *(("rates", depth) for depth in args.depths)],
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
