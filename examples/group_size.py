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
from collections.abc import Callable
from pathlib import Path

import experiment
import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import Digits, Run, average_gradients, batches, load_data, warm_up_and_cosine
from torch import Tensor, nn

import syncbn
from syncbn.diagnostics import THRESHOLD, NoiseReport, measure_noise
from syncbn.diagnostics.plot import draw as draw_noise

NETWORKS = {"shallow": (128, 64), "deep": (128, 128, 128, 128, 64)}
FULL = [("shallow", 1), ("shallow", 2), ("shallow", 4), ("deep", 2)]
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


def build(hidden: tuple[int, ...], seeds: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the networks of all seeds as one: shape (N, seeds, 64) to (N, seeds, 10)."""
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
    return nn.Sequential(*blocks, last)


def stacked_batches(data: Digits, total_batch: int, seeds: int, epoch: int) -> list[Tensor]:
    """Return this rank's sample indices for one epoch, each of shape (samples, seeds)."""
    orders = [batches(len(data.train_x), total_batch, seed, epoch) for seed in range(seeds)]
    return [torch.stack(each, 1) for each in zip(*orders, strict=True)]


def group_sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to all ranks, as far as a group has the two samples that a variance takes."""
    world = dist.get_world_size()
    return [k for k in range(1, world + 1) if world % k == 0 and k * samples >= 2]


def measure(
    model: nn.Module, data: Digits, total_batch: int, seeds: int, threshold: float, alone: bool = False
) -> NoiseReport:
    """Return the noise report over one epoch of batches; `alone`: of this rank by itself."""
    own = dist.new_subgroups(1)[0] if alone else None
    inputs = (data.train_x[mine] for mine in stacked_batches(data, total_batch, seeds, epoch=0))
    sizes = [1, 2, 4, 8, 16, 32]
    return measure_noise(model, inputs, sizes, threshold=threshold, process_group=own)


def train(runs: list[Run], data: Digits, total_batch: int, args: argparse.Namespace, name: str) -> list[Tensor]:
    """Train the stacked networks of each group size side by side; return their losses per seed in the last epoch."""
    steps_per_epoch = len(data.train_x) // total_batch
    losses = [torch.zeros(args.seeds, dtype=torch.float64) for _ in runs]
    with experiment.progress(steps_per_epoch * args.epochs) as bar:
        bar.set_description(name)
        for epoch in range(args.epochs):
            for i, mine in enumerate(stacked_batches(data, total_batch, args.seeds, epoch)):
                rate = warm_up_and_cosine(epoch * steps_per_epoch + i, steps_per_epoch * args.epochs, runs[0].peak)
                for run, last in zip(runs, losses, strict=True):
                    logits = run.model(data.train_x[mine]).transpose(1, 2)
                    loss = F.cross_entropy(logits, data.train_y[mine], reduction="none").mean(0)
                    run.optimizer.zero_grad()
                    loss.sum().backward()
                    if epoch == args.epochs - 1:
                        last += loss.detach() / steps_per_epoch
                average_gradients(runs)
                for run in runs:
                    run.optimizer.param_groups[0]["lr"] = rate
                    run.optimizer.step()
                bar.update()
    for last in losses:
        dist.all_reduce(last)
        last /= dist.get_world_size()
    return losses


def accuracies(model: nn.Module, data: Digits, seeds: int) -> list[float]:
    """Return each seed's share of test images that it gets right with its running statistics, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(data.test_x.unsqueeze(1).expand(-1, seeds, -1)).argmax(2) == data.test_y.unsqueeze(1)
    return (100 * hits.double().mean(0)).tolist()


def run_case(
    network: str, samples: int, groups: dict[int, dist.ProcessGroup], data: Digits, args: argparse.Namespace
) -> tuple[list[Result], list[Noise], Answer, NoiseReport]:
    """Train with every group size at one number of samples per device, and measure the noise."""
    world = dist.get_world_size()
    total_batch = samples * world
    runs = {}
    for k in group_sizes(samples):
        norm = functools.partial(syncbn.SyncBatchNorm, process_group=groups[k])
        model = build(NETWORKS[network], args.seeds, norm)
        runs[k] = Run(f"groups of {k}", 0, model, args.lr * total_batch / 32)
    reports = {("start", "all ranks"): measure(runs[world].model, data, total_batch, args.seeds, args.threshold)}
    if samples > 1:
        reports["start", "one rank alone"] = measure(
            runs[1].model, data, total_batch, args.seeds, args.threshold, alone=True
        )
    losses = train(list(runs.values()), data, total_batch, args, f"{network}, {samples} samples per device")
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
        for seed, (accuracy, loss) in enumerate(
            zip(accuracies(run.model, data, args.seeds), last.tolist(), strict=True)
        )
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


@dataclasses.dataclass
class Found:
    """What all cases gave."""

    results: list[Result] = dataclasses.field(default_factory=list)
    noises: list[Noise] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)


def sweep(args: argparse.Namespace) -> Found:
    """Run all cases; rank 0 says of each what it gave."""
    data, found = load_data(), Found()
    groups = {k: dist.new_subgroups(k)[0] for k in group_sizes(2)}
    for network, samples in args.cases:
        own, noises, answer, noise_report = run_case(network, samples, groups, data, args)
        found.results += own
        found.noises += noises
        found.answers.append(answer)
        if dist.get_rank() == 0:
            print_results(own, answer)
            print(noise_report)
    return found


def report(args: argparse.Namespace, found: Found) -> None:
    """Write the CSVs and the pictures, and say how often the answer was right."""
    experiment.write_csv(found.results, args.out / "runs.csv")
    experiment.write_csv(found.noises, args.out / "noise.csv")
    experiment.write_csv(found.answers, args.out / "answers.csv")
    draw(args.out)
    held = sum(answer.within_one_point for answer in found.answers)
    print(
        f"\nThe recommended group size is within one point of full synchronization in {held} of {len(found.answers)}."
    )


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = experiment.options("Statistics over groups of 1, 2, 4, ... ranks.", samples=[2], seeds=2, epochs=6, lr=0.1)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["shallow"], help="networks (shallow)")
    experiment.add_option(parser, "threshold", THRESHOLD, "of the noise report")
    in_full = "1, 2 and 4 samples, the deep network at 2; 5 seeds, 8 epochs"
    args = experiment.parse(parser, in_full, {"cases": FULL, "seeds": 5, "epochs": 8}, least_samples=1)
    if not args.full:
        args.cases = [(network, samples) for network in args.networks for samples in args.samples]
    return args


def main() -> None:
    """Run the sweep on the ranks that the launcher started; rank 0 reports."""
    experiment.run(parse_arguments(), sweep, report)


if __name__ == "__main__":
    main()
