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
import time
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
    parse,
    picture,
    progress,
    spread,
    test_accuracy,
    train,
    write_csv,
)

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


def evaluate(run: Run, data: Digits, steps: int) -> Result:
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


def experiment(args: argparse.Namespace, data: Digits) -> list[Result]:
    """Train all seeds side by side, and evaluate them after each of `args.steps` steps."""
    in_epoch = len(data.train_x) // TOTAL_BATCH
    epochs = -(-max(args.steps) // in_epoch)
    runs = [Run("sync", seed, build_mlp("sync", seed), args.lr) for seed in range(args.seeds)]
    results = []
    with progress(epochs * in_epoch) as bar:
        for step, _ in enumerate(train(runs, data, TOTAL_BATCH, epochs), 1):
            bar.update()
            if step in args.steps:
                results += [evaluate(run, data, step) for run in runs]
                for run in runs:
                    run.model.train()
    return results


def over_seeds(results: list[Result], steps: int, field: str) -> tuple[float, float]:
    """Return the mean and the standard deviation over seeds of one column."""
    return mean_and_std(getattr(result, field) for result in results if result.steps == steps)


def format_table(results: list[Result], steps: list[int]) -> str:
    """Return the Markdown table of both test accuracies, mean +- standard deviation over seeds."""
    lines = ["| steps | running averages, test % | population statistics, test % | gain |", "|" + "---|" * 4]
    for count in steps:
        running = over_seeds(results, count, "running_accuracy")
        population = over_seeds(results, count, "population_accuracy")
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in (running, population)]
        lines.append(f"| {count} | " + " | ".join(cells) + f" | {population[0] - running[0]:+.1f} |")
    return "\n".join(lines)


def draw(results: list[Result], steps: list[int], path: Path) -> None:
    """Draw both accuracies, and how far the running means are off, against the number of steps."""
    panels = [
        [("population_accuracy", "population statistics"), ("running_accuracy", "running averages")],
        [("offset_1", "first layer"), ("offset_2", "second layer")],
    ]
    title = f"Handwritten digits, {results[0].ranks} ranks, total batch {TOTAL_BATCH}"
    with picture(path, f"{title}: {spread(len({result.seed for result in results}))}") as axes:
        for axis, lines in zip(axes, panels, strict=True):
            for (field, label), marker in zip(lines, "so", strict=True):
                means, stds = zip(*(over_seeds(results, count, field) for count in steps), strict=True)
                axis.errorbar(steps, means, stds, marker=marker, capsize=4, label=label)
            axis.set_xscale("log")
            axis.set_xticks(steps, [str(count) for count in steps])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("training steps")
            axis.legend()
        axes[0].set_ylabel("test accuracy (%)")
        axes[1].set_ylabel("offset of the running mean\n(population standard deviations)")


def report(results: list[Result], args: argparse.Namespace, seconds: float) -> None:
    """Print the table, and write the CSV and the picture."""
    write_csv(results, args.out / "runs.csv")
    draw(results, args.steps, args.out / "population.png")
    print(format_table(results, args.steps))
    print(
        f"{args.seeds} seeds on {dist.get_world_size()} ranks in {seconds:.0f} s; wrote {args.out / 'runs.csv'} and "
        f"{args.out / 'population.png'}"
    )


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Population statistics against running averages.")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 15, 50], help="evaluate after (5 10 15 50)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--lr", type=float, default=0.8, help="peak rate, reached after 50 steps (0.8)")
    parser.add_argument("--full", action="store_true", help="10 seeds, steps 2 5 10 15 20 30 50 100")
    parser.add_argument("--out", type=Path, default=Path("out/population"), help="folder for CSV and PNG")
    args = parse(parser)
    if args.full:
        args.steps, args.seeds = [2, 5, 10, 15, 20, 30, 50, 100], 10
    args.steps = sorted(set(args.steps))
    if args.steps[0] < 1:
        parser.error(f"--steps {args.steps[0]}: evaluate after 1 step or later")
    return args


def main() -> None:
    """Run the experiment on the ranks that the launcher started; rank 0 reports."""
    args = parse_arguments()
    with joined_ranks():
        torch.manual_seed(0)
        start = time.monotonic()
        results = experiment(args, load_data())
        if dist.get_rank() == 0:
            report(results, args, time.monotonic() - start)


if __name__ == "__main__":
    main()
