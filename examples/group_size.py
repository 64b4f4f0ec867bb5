"""Over how many ranks should batch norm synchronize? A sweep of the group size, beside what the noise report says.

Multilayer perceptrons learn scikit-learn's handwritten digits on all ranks, with statistics shared within groups of 1,
2, 4, ... ranks. All else is the same: data, order, weights at the start, learning rate, gradients over all ranks. On
the network that is synchronized over all of them, `syncbn.diagnostics.measure_noise` says how noisy the statistics of
k ranks are, and over how many to synchronize. Does the group size that it recommends reach the test accuracy of full
synchronization, to within one point? ::

    python -m syncbn.launch -n 4 examples/group_size.py

It prints a table and the answers, and writes into the folder given by ``--out``: ``runs.csv`` (one line per run),
``noise.csv`` (the reports), ``group_size.png`` and ``noise.png``. The default
(the shallow network, 2 samples per device, 2 seeds, 6 epochs) is a short form; ``--full``, meant for 8 ranks, takes 1,
2 and 4 samples, the deep network at 2 samples as well, 5 seeds and 8 epochs.

The networks of all seeds are stacked into one, whose layers hold theirs side by side (`training.stacked_mlp`).
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch.distributed as dist
from digits import load_data
from torch import nn
from training import Data, Run, accuracies, groups_of, stacked_batches, stacked_mlp, train_stacked

from syncbn.diagnostics import THRESHOLD, NoiseReport, measure_noise
from syncbn.diagnostics.plot import draw as draw_noise

NETWORKS = {"shallow": (64, 128, 64, 10), "deep": (64, 128, 128, 128, 128, 64, 10)}
POINTS = 1.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One run: `test_accuracy` in percent, `train_loss` the mean over last epoch and ranks in nats.

    `noise` is that of the noisiest layer for this group size, on the fully synchronized networks after training.
    """

    network: str
    samples_per_device: int
    ranks: int
    group_size: int
    seed: int
    epochs: int
    steps: int
    noise: float
    test_accuracy: float
    train_loss: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """One line of the noise reports, with what was measured: `when` is "start" or "end" of training."""

    network: str
    samples_per_device: int
    when: str
    source: str
    layer: str
    group_size: int
    noise: float
    noise_error: float
    mean_noise: float
    std_noise: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the report recommends at a threshold, and how far that group size ends below full synchronization."""

    network: str
    samples_per_device: int
    recommended: int
    trained: int
    points_below_full: float


def group_sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to all ranks, as far as a group has the two samples that a variance takes."""
    world = dist.get_world_size()
    return [k for k in range(1, world + 1) if world % k == 0 and k * samples >= 2]


def measure(model: nn.Module, data: Data, total_batch: int, seeds: int, alone: bool = False) -> NoiseReport:
    """Return the noise report over one epoch of batches; `alone`: of this rank by itself."""
    own = groups_of(1) if alone else None
    inputs = (data.train_x[mine] for mine in stacked_batches(len(data.train_x), total_batch, range(seeds), epoch=0))
    sizes = [1, 2, 4, 8, 16, 32]
    return measure_noise(model, inputs, sizes, process_group=own)


def run_case(
    network: str, samples: int, data: Data, args: argparse.Namespace
) -> tuple[list[Result], list[Noise], NoiseReport]:
    """Train with every group size at one number of samples per device, and measure the noise."""
    world = dist.get_world_size()
    total_batch = samples * world
    runs = {}
    for k in group_sizes(samples):
        model = stacked_mlp(NETWORKS[network], f"sync {k}", range(args.seeds))
        runs[k] = Run(f"groups of {k}", 0, model, args.lr * total_batch / 32)
    reports = {("start", "all ranks"): measure(runs[world].model, data, total_batch, args.seeds)}
    if samples > 1:
        reports["start", "one rank alone"] = measure(runs[1].model, data, total_batch, args.seeds, alone=True)
    losses = train_stacked(list(runs.values()), data, range(args.seeds), total_batch, args.epochs)
    report = reports["end", "all ranks"] = measure(runs[world].model, data, total_batch, args.seeds)
    noises = [
        Noise(network, samples, *key, r.layer, r.group_size, r.noise, r.noise_error, r.mean_noise, r.std_noise)
        for key, each in reports.items()
        for r in each.rows
    ]
    results = [
        Result(
            network,
            samples,
            world,
            k,
            seed,
            args.epochs,
            len(data.train_x) // total_batch * args.epochs,
            max(row.noise for row in report.rows if row.group_size == k),
            accuracy,
            loss,
        )
        for (k, run), last in zip(runs.items(), losses, strict=True)
        for seed, (accuracy, loss) in enumerate(
            zip(accuracies(run.model, data.test_x, data.test_y, args.seeds), last[-1], strict=True)
        )
    ]
    return results, noises, report


def answers(results: list[Result], noises: list[Noise], threshold: float) -> Iterator[Answer]:
    """Yield what the reports on the trained networks recommend at a threshold, of the group sizes that were trained."""
    for network, samples in dict.fromkeys((r.network, r.samples_per_device) for r in results):
        own = [r for r in results if (r.network, r.samples_per_device) == (network, samples)]
        rows = [n for n in noises if (n.network, n.samples_per_device, n.when) == (network, samples, "end")]
        worst = {k: max(n.noise for n in rows if n.group_size == k) for k in sorted({n.group_size for n in rows})}
        recommended = next((k for k, noise in worst.items() if noise <= threshold), 2 * max(worst))
        sizes = sorted({r.group_size for r in own})
        trained = min(max(recommended, sizes[0]), sizes[-1])
        full, got = (experiment.over_seeds(own, "test_accuracy", group_size=k)[0] for k in (sizes[-1], trained))
        yield Answer(network, samples, recommended, trained, full - got)


def print_results(results: list[Result]) -> None:
    """Print the table of one network and number of samples."""
    rows = []
    for k in sorted({r.group_size for r in results}):
        accuracy, loss = (
            experiment.over_seeds(results, field, group_size=k) for field in ("test_accuracy", "train_loss")
        )
        noise = next(r.noise for r in results if r.group_size == k)
        rows.append(
            [
                results[0].network,
                results[0].samples_per_device,
                k,
                f"{noise:.2f}",
                experiment.cell(accuracy, 1),
                experiment.cell(loss, 4),
            ]
        )
    print()
    print(experiment.markdown(["network", "samples per device", "group size", "noise", "test %", "train loss"], rows))


def draw(folder: Path) -> None:
    """Draw test accuracy and train loss against group size, the accuracy lost against noise, and the last report."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    cases = sorted({(r.network, r.samples_per_device) for r in results}, reverse=True)
    first, sizes = results[0], sorted({r.group_size for r in results})
    title = f"Handwritten digits, {first.ranks} ranks, {first.epochs} epochs: {experiment.spread(results)}"
    with pictures.figure(folder / "group_size.png", title, panels=3) as axes:
        for i, (network, samples) in enumerate(cases):
            own = [r for r in results if (r.network, r.samples_per_device) == (network, samples)]
            mine = sorted({r.group_size for r in own})
            dashed = {"ls": "--"} if network == "deep" else {}
            look = pictures.other(i, len(cases), f"{network}, {samples} per device", **dashed)
            for axis, field in zip(axes, ("test_accuracy", "train_loss"), strict=False):
                axis.errorbar(mine, *experiment.curves(own, field, "group_size", mine), **look)
            full = experiment.over_seeds(own, "test_accuracy", group_size=max(mine))[0]
            lost = [full - experiment.over_seeds(own, "test_accuracy", group_size=k)[0] for k in mine]
            noises = [next(r.noise for r in own if r.group_size == k) for k in mine]
            axes[2].plot(noises, lost, **look)
        for axis, label in zip(axes, ("test accuracy (%)", "train loss, last epoch (nats)"), strict=False):
            pictures.powers_of_two(axis, sizes, "ranks that share statistics")
            axis.set_ylabel(label)
        axes[1].set_yscale("log")
        axes[2].set_xscale("log")
        low, high = axes[2].get_xlim()
        pictures.ticks(axes[2].xaxis, [n for n in (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5) if low < n < high])
        axes[2].set_yscale("symlog", linthresh=POINTS)
        axes[2].set_ylim(-2 * POINTS, 100)
        pictures.ticks(axes[2].yaxis, [-1, 0, 1, 10, 100])
        axes[2].set_xlabel("noise of the noisiest layer")
        axes[2].set_ylabel("test accuracy below\nfull synchronization (points)")
        axes[2].axhline(POINTS, color=pictures.LIMIT, lw=1)
        axes[2].axvline(THRESHOLD, color=pictures.LIMIT, ls="--", lw=1, label=f"threshold {THRESHOLD:g}")
        pictures.legend_below(axes[2:], columns=3)
    ends = [row for row in experiment.read_csv(folder / "noise.csv", Noise) if row.when == "end"]
    network, samples = ends[-1].network, ends[-1].samples_per_device
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in ends:
        if (row.network, row.samples_per_device) == (network, samples):
            curves.setdefault(row.layer, []).append((row.group_size, row.noise, row.noise_error))
    title = f"Noise of batch statistics: {network} network, {samples} samples per device, trained"
    draw_noise(curves, THRESHOLD, title, folder / "noise.png")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield each network with its number of samples per device."""
    for text in args.cases:
        network, _, samples = text.partition(":")
        if network not in NETWORKS or not samples.isdecimal() or int(samples) < 1:
            sys.exit(f"--cases {text}: give a network ({', '.join(NETWORKS)}), a colon and samples per device")
        yield network, int(samples)


def sweep(args: argparse.Namespace, case: tuple[str, int]) -> list[Any]:
    """Run a case; rank 0 says what it gave."""
    results, noises, noise_report = run_case(*case, load_data(), args)
    if dist.get_rank() == 0:
        print_results(results)
        print(noise_report)
    return [*results, *noises]


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print what is recommended at both thresholds, and how often that was right."""
    for threshold in args.thresholds:
        found = list(answers(tables["runs"], tables["noise"], threshold))
        lines = [
            [a.network, a.samples_per_device, a.recommended, a.trained, f"{a.points_below_full:.1f}"] for a in found
        ]
        header = ["network", "samples per device", f"recommended at {threshold:g}", "trained", "points below all"]
        print(experiment.markdown(header, lines))
        held = sum(answer.points_below_full <= POINTS for answer in found)
        print(f"The recommended group size is within one point of full synchronization in {held} of {len(found)}.\n")


EXPERIMENT = experiment.Experiment(
    about="Statistics over groups of 1, 2, 4, ... ranks.",
    options={
        "cases": (["shallow:2"], ["shallow:1", "shallow:2", "shallow:4", "deep:2"], "network:samples per device"),
        "seeds": (2, 5),
        "epochs": (6, 8),
        "lr": (0.1, 0.1),
        "thresholds": ([THRESHOLD, 0.5], [THRESHOLD, 0.5], "of the noise report"),
    },
    tables={"runs": Result, "noise": Noise},
    cases=cases,
    measure=sweep,
    draw=draw,
    report=report,
    ranks=8,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
