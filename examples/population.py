"""Population statistics against running averages: what a network in evaluation mode gains after few training steps.

Multilayer perceptrons with `syncbn.SyncBatchNorm` learn scikit-learn's handwritten digits at a total batch of 256.
After some of the steps each of them is evaluated twice:

* ``running``     with the running averages of training (momentum 0.1), which have forgotten little of their start, a
  mean of 0 and a variance of 1, and which lag behind the weights;
* ``population``  with the mean and the variance of the whole training set, as the network is now, from
  `syncbn.update_population_stats` over all ranks.

Training goes on with the running averages, so both are evaluated on the same weights. ::

    python -m syncbn.launch -n 4 examples/population.py

It prints a table and writes ``runs.csv`` (one line per seed and number of steps) and ``population.png`` (mean and
standard deviation over seeds) into the folder given by ``--out``. The default takes 3 seeds and 50 steps; ``--full``
takes 10 seeds and 100 steps.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch.distributed as dist
from digits import build_mlp, load_data, test_accuracy
from training import Data, Run, train

import syncbn

TOTAL_BATCH = 256
SHARE = 64  # samples per rank and batch, for the population statistics


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the CSV: a network after so many steps.

    Test accuracies in percent. `offset_1` and `offset_2`: for the two layers, the root mean square over channels of
    (running mean - population mean) / population standard deviation.
    """

    ranks: int
    seed: int
    steps: int
    running_accuracy: float
    population_accuracy: float
    offset_1: float
    offset_2: float


def evaluate(run: Run, data: Data, steps: int) -> Result:
    """Evaluate a copy of the run's network with either statistics; all ranks take part."""
    model = copy.deepcopy(run.model)
    running = test_accuracy(model, data)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, syncbn.SyncBatchNorm)]
    means = [layer.running_mean.clone() for layer in layers]
    # Each sample in one rank's share: 1347 do not divide evenly, and need not.
    mine = data.train_x[dist.get_rank() :: dist.get_world_size()]
    syncbn.update_population_stats(model.train(), mine.split(SHARE))
    offsets = [
        ((mean - layer.running_mean).square() / layer.running_var).mean().sqrt().item()
        for mean, layer in zip(means, layers, strict=True)
    ]
    return Result(dist.get_world_size(), run.seed, steps, running, test_accuracy(model, data), *offsets)


def cases(args: argparse.Namespace) -> list[tuple[()]]:
    """Return the only case; stop where there is nothing to train."""
    if min(args.steps) < 1:
        sys.exit(f"--steps {min(args.steps)}: evaluate after 1 step or later")
    return [()]


def measure(args: argparse.Namespace, case: tuple[()]) -> list[Result]:
    """Train all seeds side by side, and evaluate them after each of `args.steps` steps."""
    data = load_data()
    in_epoch = len(data.train_x) // TOTAL_BATCH
    epochs = -(-max(args.steps) // in_epoch)
    runs = [Run("sync", seed, build_mlp("sync", seed), args.lr) for seed in range(args.seeds)]
    results = []
    with experiment.progress(epochs * in_epoch) as bar:
        for step, _ in enumerate(train(runs, data, TOTAL_BATCH, epochs), 1):
            bar.update()
            if step in args.steps:
                results += [evaluate(each, data, step) for each in runs]
                for each in runs:
                    each.model.train()
    return results


def format_table(results: list[Result], steps: list[int]) -> str:
    """Return the Markdown table of both test accuracies, mean +- standard deviation over seeds."""
    rows = []
    for count in steps:
        running, population = (
            experiment.over_seeds(results, field, steps=count) for field in ("running_accuracy", "population_accuracy")
        )
        rows.append(
            [count, experiment.cell(running, 1), experiment.cell(population, 1), f"{population[0] - running[0]:+.1f}"]
        )
    return experiment.markdown(["steps", "running averages, test %", "population statistics, test %", "gain"], rows)


def draw(folder: Path) -> None:
    """Draw both accuracies, and how far the running means are off, against the number of steps, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    steps = sorted({result.steps for result in results})
    panels = [
        {"population_accuracy": "population statistics", "running_accuracy": "running averages"},
        {"offset_1": "first layer", "offset_2": "second layer"},
    ]
    fields = [field for panel in panels for field in panel]
    title = f"Handwritten digits, {results[0].ranks} ranks, total batch {TOTAL_BATCH}: {experiment.spread(results)}"
    with pictures.figure(folder / "population.png", title) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            for field, label in panel.items():
                look = pictures.other(fields.index(field), len(fields), label)
                axis.errorbar(steps, *experiment.curves(results, field, "steps", steps), **look)
            axis.set_xscale("log")
            pictures.ticks(axis.xaxis, steps)
            axis.set_xlabel("training steps")
            axis.legend()
        axes[0].set_ylabel("test accuracy (%)")
        axes[1].set_ylabel("offset of the running mean\n(population standard deviations)")


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table."""
    print(format_table(tables["runs"], sorted(set(args.steps))))


EXPERIMENT = experiment.Experiment(
    about="Population statistics against running averages.",
    options={
        "seeds": (3, 10),
        "steps": ([5, 10, 15, 50], [2, 5, 10, 15, 20, 30, 50, 100], "evaluate after"),
        "lr": (0.8, 0.8, "peak rate, reached after 50 steps"),
    },
    tables={"runs": Result},
    cases=cases,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
