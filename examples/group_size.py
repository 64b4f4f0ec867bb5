"""Over how many ranks should batch norm synchronize? A sweep of the group size, beside what the noise report says.

Multilayer perceptrons learn scikit-learn's handwritten digits on all ranks, with statistics shared within groups of 1,
2, 4, ... ranks. All else is the same: data, order, weights at the start, learning rate, gradients over all ranks. On
the network that is synchronized over all of them, `syncbn.diagnostics.measure_noise` says how noisy the statistics of
k ranks are, and over how many to synchronize. Does the group size that it recommends reach the test accuracy of full
synchronization, to within one point? ::

    python -m syncbn.launch -n 4 examples/group_size.py

It prints a table and the answers, and writes into the folder given by ``--out``: ``runs.csv`` (one line per run),
``answers.csv`` (one per recommendation), ``noise.csv`` (the reports), ``group_size.png`` and ``noise.png``. The default
(the shallow network, 2 samples per device, 2 seeds, 6 epochs) is a short form; ``--full``, meant for 8 ranks, takes 1,
2 and 4 samples, the deep network at 2 samples as well, 5 seeds and 8 epochs.

The networks of all seeds are stacked into one, whose layers hold theirs side by side: batch norm treats each channel by
itself, so this is training them one by one, with one message for all where each would send its own.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from digits import load_data
from torch import Tensor, nn
from training import Data, Run, groups_of, stacked_batches, train_stacked

import syncbn
from syncbn.diagnostics import THRESHOLD, NoiseReport, measure_noise
from syncbn.diagnostics.plot import draw as draw_noise

NETWORKS = {"shallow": (128, 64), "deep": (128, 128, 128, 128, 64)}
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
    """What the report recommended, and how far that group size ends below full synchronization, in points."""

    network: str
    samples_per_device: int
    threshold: float
    recommended: int
    trained: int
    points_below_full: float
    within_one_point: bool


class StackedLinear(nn.Module):
    """S linear layers side by side: shape (N, S, inputs) to (N, S, outputs)."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply layer s to row s of each sample."""
        return torch.baddbmm(self.bias, input.transpose(0, 1), self.weight).transpose(0, 1)


class Transposed(nn.Module):
    """(N, S, classes) to (N, classes, S)."""

    def forward(self, input: Tensor) -> Tensor:
        """Swap the two."""
        return input.transpose(1, 2)


def build(hidden: tuple[int, ...], seeds: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the networks of all seeds as one: shape (N, seeds, 64) to (N, 10, seeds)."""
    widths = (64, *hidden, 10)
    linears: list[list[nn.Linear]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        linears.append([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    *inner, last = (StackedLinear(list(layers)) for layers in zip(*linears, strict=True))
    blocks = [
        nn.Sequential(linear, nn.Flatten(1), norm(seeds * width), nn.ReLU(), nn.Unflatten(1, (seeds, width)))
        for linear, width in zip(inner, hidden, strict=True)
    ]
    return nn.Sequential(*blocks, last, Transposed())


def group_sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to all ranks, as far as a group has the two samples that a variance takes."""
    world = dist.get_world_size()
    return [k for k in range(1, world + 1) if world % k == 0 and k * samples >= 2]


def measure(
    model: nn.Module, data: Data, total_batch: int, seeds: int, threshold: float, alone: bool = False
) -> NoiseReport:
    """Return the noise report over one epoch of batches; `alone`: of this rank by itself."""
    own = dist.new_subgroups(1)[0] if alone else None
    inputs = (data.train_x[mine] for mine in stacked_batches(len(data.train_x), total_batch, range(seeds), epoch=0))
    sizes = [1, 2, 4, 8, 16, 32]
    return measure_noise(model, inputs, sizes, threshold=threshold, process_group=own)


def accuracies(model: nn.Module, data: Data, seeds: int) -> list[float]:
    """Return each seed's share of test images that it gets right with its running statistics, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(data.test_x.unsqueeze(1).expand(-1, seeds, -1)).argmax(1) == data.test_y.unsqueeze(1)
    return (100 * hits.double().mean(0)).tolist()


def run_case(
    network: str, samples: int, data: Data, args: argparse.Namespace
) -> tuple[list[Result], list[Noise], Answer, NoiseReport]:
    """Train with every group size at one number of samples per device, and measure the noise."""
    world = dist.get_world_size()
    total_batch = samples * world
    runs = {}
    for k in group_sizes(samples):
        norm = functools.partial(syncbn.SyncBatchNorm, process_group=groups_of(k))
        model = build(NETWORKS[network], args.seeds, norm)
        runs[k] = Run(f"groups of {k}", 0, model, args.lr * total_batch / 32)
    reports = {("start", "all ranks"): measure(runs[world].model, data, total_batch, args.seeds, args.threshold)}
    if samples > 1:
        reports["start", "one rank alone"] = measure(
            runs[1].model, data, total_batch, args.seeds, args.threshold, alone=True
        )
    losses = train_stacked(list(runs.values()), data, range(args.seeds), total_batch, args.epochs)
    report = reports["end", "all ranks"] = measure(runs[world].model, data, total_batch, args.seeds, args.threshold)
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
        for seed, (accuracy, loss) in enumerate(zip(accuracies(run.model, data, args.seeds), last[-1], strict=True))
    ]
    asked = report.group_size
    assert asked is not None
    trained = min(max(asked, min(runs)), world)
    below = (
        experiment.over_seeds(results, "test_accuracy", group_size=world)[0]
        - experiment.over_seeds(results, "test_accuracy", group_size=trained)[0]
    )
    return results, noises, Answer(network, samples, args.threshold, asked, trained, below, below <= POINTS), report


def print_results(results: list[Result], answer: Answer) -> None:
    """Print the table of one network and number of samples, and the answer."""
    rows = []
    for k in sorted({r.group_size for r in results}):
        accuracy, loss = (
            experiment.over_seeds(results, field, group_size=k) for field in ("test_accuracy", "train_loss")
        )
        noise = next(r.noise for r in results if r.group_size == k)
        rows.append(
            [
                answer.network,
                answer.samples_per_device,
                k,
                f"{noise:.2f}",
                experiment.cell(accuracy, 1),
                experiment.cell(loss, 4),
            ]
        )
    print()
    print(experiment.markdown(["network", "samples per device", "group size", "noise", "test %", "train loss"], rows))
    verdict = "within" if answer.within_one_point else "NOT within"
    print(
        f"Recommended at threshold {answer.threshold:g}: {answer.recommended} (trained: {answer.trained}); "
        f"{answer.points_below_full:.1f} points below full synchronization, {verdict} one point."
    )


def draw(folder: Path) -> None:
    """Draw test accuracy and train loss against group size, the accuracy lost against noise, and the last report."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    threshold = experiment.read_csv(folder / "answers.csv", Answer)[0].threshold
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
        axes[2].axvline(threshold, color=pictures.LIMIT, ls="--", lw=1, label=f"threshold {threshold:g}")
        pictures.legend_below(axes[2:], columns=3)
    ends = [row for row in experiment.read_csv(folder / "noise.csv", Noise) if row.when == "end"]
    network, samples = ends[-1].network, ends[-1].samples_per_device
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in ends:
        if (row.network, row.samples_per_device) == (network, samples):
            curves.setdefault(row.layer, []).append((row.group_size, row.noise, row.noise_error))
    title = f"Noise of batch statistics: {network} network, {samples} samples per device, trained"
    draw_noise(curves, threshold, title, folder / "noise.png")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield each network with its number of samples per device."""
    for text in args.cases:
        network, _, samples = text.partition(":")
        if network not in NETWORKS or not samples.isdecimal() or int(samples) < 1:
            sys.exit(f"--cases {text}: give a network ({', '.join(NETWORKS)}), a colon and samples per device")
        yield network, int(samples)


def sweep(args: argparse.Namespace, case: tuple[str, int]) -> list[Any]:
    """Run a case; rank 0 says what it gave."""
    results, noises, answer, noise_report = run_case(*case, load_data(), args)
    if dist.get_rank() == 0:
        print_results(results, answer)
        print(noise_report)
    return [*results, *noises, answer]


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Say how often the answer was right."""
    answers: list[Answer] = tables["answers"]
    held = sum(answer.within_one_point for answer in answers)
    print(f"\nThe recommended group size is within one point of full synchronization in {held} of {len(answers)}.")


EXPERIMENT = experiment.Experiment(
    about="Statistics over groups of 1, 2, 4, ... ranks.",
    options={
        "cases": (["shallow:2"], ["shallow:1", "shallow:2", "shallow:4", "deep:2"], "network:samples per device"),
        "seeds": (2, 5),
        "epochs": (6, 8),
        "lr": (0.1, 0.1),
        "threshold": (THRESHOLD, THRESHOLD, "of the noise report"),
    },
    tables={"runs": Result, "noise": Noise, "answers": Answer},
    cases=cases,
    measure=sweep,
    draw=draw,
    report=report,
    ranks=8,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
