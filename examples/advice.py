"""Is the noise report's advice any good? Group sizes on more tasks than one, beside what the report recommends.

On 8 ranks, networks synchronize batch norm over groups of 1, 2, 4 and 8 of them. The report recommends a group from the
trained, fully synchronized network, and, as somebody would ask it before there is a cluster, from one process with a
network that is not trained. Does the recommended group reach full synchronization, within one point? ::

    python -m syncbn.launch -n 8 examples/advice.py

Tasks: ``signals`` (MNIST-1D, a convolutional network: accuracy) and, with ``--cases scenes:1``, ``scenes``
(segmentation, a U-Net: mean IoU, one seed; `segmentation.py` has three, on 1, 2 and 4 ranks), each with its number of
samples per device. `group_size.py` has the multilayer perceptrons. It prints a table and writes ``runs.csv``,
``answers.csv`` and ``advice.png`` into the folder given by ``--out``.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import signals
import torch
import torch.distributed as dist
from scenes import build_unet, load_scenes, mean_iou, predicted
from torch import Tensor, nn
from training import Data, Run, accuracies, batches, groups_of, normalization, train_side_by_side, train_stacked

from syncbn.diagnostics import THRESHOLD, NoiseReport, measure_noise

TASKS = {"scenes": "mean IoU (%)", "signals": "test accuracy (%)"}
RATES = {"scenes": 0.4, "signals": 0.1}
BATCHES = 96  # of each rank, for the noise reports
POINTS = 1.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of ``runs.csv``: `score` in percent, `train_loss` the mean over last epoch and ranks in nats."""

    task: str
    samples_per_device: int
    ranks: int
    group_size: int
    seed: int
    epochs: int
    score: float
    train_loss: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """One line of ``answers.csv``: what a report recommends; `noise` is that of the noisiest layer at each group size.

    `when` is "before" (one process, a network that is not trained) or "after" (all ranks, the synchronized network).
    `between` is the share of a channel's variance, a mean over channels, that lies between the means of samples, in
    that layer: 1 where samples have one position each, small where positions differ more than samples do.
    """

    task: str
    samples_per_device: int
    when: str
    recommended: int
    noise_1: float
    noise_2: float
    noise_4: float
    noise_8: float
    between: float


def group_sizes() -> list[int]:
    """Return 1, 2, 4, ... up to all ranks."""
    world = dist.get_world_size()
    return [k for k in range(1, world + 1) if world % k == 0 and k & (k - 1) == 0]


def cases(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield each task with its samples per device, and a seed; signals have `args.seeds` networks side by side."""
    for text in args.cases:
        task, _, samples = text.partition(":")
        if task not in TASKS or not samples.isdecimal() or int(samples) < 1:
            sys.exit(f"--cases {text}: give a task ({', '.join(TASKS)}), a colon and samples per device")
        yield task, int(samples), 0


def answer(task: str, samples: int, when: str, model: nn.Module, inputs: list[Tensor], alone: bool) -> Answer:
    """Return what the noise report says of a network."""
    group = groups_of(1) if alone else None
    sizes = [1, 2, 4, 8]
    report: NoiseReport = measure_noise(model.train(), inputs[:BATCHES], sizes, process_group=group)
    one, two, four, eight = (max(row.noise for row in report.rows if row.group_size == k) for k in sizes)
    assert report.group_size is not None
    noisiest = max((row for row in report.rows if row.group_size == 1), key=lambda row: row.noise).layer
    between = between_samples(model, noisiest, inputs[:BATCHES])
    return Answer(task, samples, when, report.group_size, one, two, four, eight, between)


def between_samples(model: nn.Module, layer: str, inputs: list[Tensor]) -> float:
    """Return the `between` of a layer, over this rank's inputs; all ranks call it, and the network stays as it is."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(2)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for x in inputs:
            model(x)
    handle.remove()
    model.load_state_dict(state)
    values = torch.cat(seen)
    between = values.mean(2).var(0, correction=0) / values.var((0, 2), correction=0).clamp(min=1e-12)
    return between.mean().item()


def measure(args: argparse.Namespace, case: tuple[str, int, int]) -> Iterator[Any]:
    """Train with every group size, and ask the noise report before and after; yields rows."""
    task, samples, seed = case
    yield from (segment if task == "scenes" else classify)(args, samples, seed)


def segment(args: argparse.Namespace, samples: int, seed: int) -> Iterator[Any]:
    """Train one seed of the U-Net."""
    world, data = dist.get_world_size(), load_scenes()
    networks = {f"sync {k}": functools.partial(build_unet, normalization(f"sync {k}")) for k in group_sizes()}
    inputs = [data.train_x[mine] for mine in batches(len(data.train_x), samples * world, seed, 0)]
    if seed == 0:
        shuffled = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
        own = list(data.train_x[shuffled].split(samples))
        yield answer("scenes", samples, "before", networks["sync 1"](0), own, alone=True)
    runs = train_side_by_side(networks, [seed], data, samples, args.epochs, RATES["scenes"])
    for k, run in zip(group_sizes(), runs, strict=True):
        score = mean_iou(data.test_y, predicted(run.model, data.test_x))
        yield Result("scenes", samples, world, k, seed, args.epochs, score, run.epoch_losses(args.epochs)[-1])
    if seed == 0:
        yield answer("scenes", samples, "after", runs[-1].model, inputs, alone=False)


def classify(args: argparse.Namespace, samples: int, seed: int) -> Iterator[Any]:
    """Train all seeds of the network for signals side by side."""
    world, data, seeds = dist.get_world_size(), signals.load_signals(), range(args.seeds)
    total, epochs = samples * world, max(args.epochs // 2, 1)
    runs = [
        Run(f"sync {k}", 0, signals.build_convs(f"sync {k}", seeds), RATES["signals"] * total / 32)
        for k in group_sizes()
    ]
    yield answer("signals", samples, "before", runs[0].model, inputs_of(data, samples, seeds, 0, 1), alone=True)
    losses = train_stacked(runs, data, seeds, total, epochs)
    for k, run, by_epoch in zip(group_sizes(), runs, losses, strict=True):
        scores = accuracies(run.model, data.test_x, data.test_y, len(seeds))
        for each, score, loss in zip(seeds, scores, by_epoch[-1], strict=True):
            yield Result("signals", samples, world, k, each, epochs, score, loss)
    inputs = inputs_of(data, samples, seeds, dist.get_rank(), world)
    yield answer("signals", samples, "after", runs[-1].model, inputs, alone=False)


def inputs_of(data: Data, samples: int, seeds: range, rank: int, world: int) -> list[Tensor]:
    """Return batches of inputs for the stacked networks, as a rank of so many has them."""
    orders = [
        torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[rank::world] for seed in seeds
    ]
    return [data.train_x[mine] for mine in torch.stack(orders, 1).split(samples) if len(mine) == samples]


def score_of(results: list[Result], task: str, samples: int, size: int) -> tuple[float, float]:
    """Return mean and standard deviation over seeds at one group size."""
    return experiment.over_seeds(results, "score", task=task, samples_per_device=samples, group_size=size)


def verdicts(results: list[Result], answers: list[Answer]) -> Iterator[tuple[Answer, int, float]]:
    """Yield each answer, the size that was trained for it, and how many points that is below full synchronization."""
    for each in answers:
        sizes = sorted({r.group_size for r in results if r.task == each.task})
        trained = min(each.recommended, max(sizes))
        full, got = (score_of(results, each.task, each.samples_per_device, k)[0] for k in (max(sizes), trained))
        yield each, trained, full - got


def draw(folder: Path) -> None:
    """Draw score against group size, and points lost against the noise of the trained network, from the CSVs."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    answers = [a for a in experiment.read_csv(folder / "answers.csv", Answer) if a.when == "after"]
    sizes = sorted({result.group_size for result in results})
    tasks = "MNIST-1D" if {a.task for a in answers} == {"signals"} else "other tasks"
    title = f"Group sizes on {tasks}, {results[0].ranks} ranks: {experiment.spread(results)}"
    with pictures.figure(folder / "advice.png", title) as (left, right):
        for i, each in enumerate(answers):
            look = pictures.other(i, len(answers), f"{each.task}, {each.samples_per_device} per device")
            pairs = [score_of(results, each.task, each.samples_per_device, k) for k in sizes]
            full = pairs[-1][0]
            left.errorbar(sizes, [mean - full for mean, _ in pairs], [std for _, std in pairs], **look)
            noises = [each.noise_1, each.noise_2, each.noise_4, each.noise_8][: len(sizes)]
            lost = [full - mean for mean, _ in pairs]
            right.plot(noises, lost, **look)
            between = look | {"label": f"{look['label']}, noise in stds between samples", "ls": "--", "mfc": "white"}
            right.plot([noise / each.between**0.5 for noise in noises], lost, **between)
        pictures.powers_of_two(left, sizes, "ranks that share statistics")
        left.set_ylabel("score less that of\nall ranks (points)")
        right.set(xlabel="noise of the noisiest layer", ylabel="points below\nfull synchronization")
        right.axhline(POINTS, color=pictures.LIMIT, lw=1)
        right.axvline(THRESHOLD, color=pictures.LIMIT, ls="--", lw=1, label=f"threshold {THRESHOLD:g}, one point")
        pictures.legend_below([right], columns=2)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the scores by group size, and the verdict on each answer."""
    results, answers = tables["runs"], tables["answers"]
    sizes = sorted({result.group_size for result in results})
    rows = [
        [each.task, each.samples_per_device]
        + [experiment.cell(score_of(results, each.task, each.samples_per_device, k), 1) for k in sizes]
        for each in answers
        if each.when == "after"
    ]
    print(experiment.markdown(["task", "samples per device", *(f"% at {k}" for k in sizes)], rows))
    judged = [
        [
            each.task,
            each.samples_per_device,
            each.when,
            ", ".join(f"{n:.2f}" for n in (each.noise_1, each.noise_2, each.noise_4, each.noise_8)),
            each.recommended,
            f"{below:.1f}",
            "yes" if below <= POINTS else "NO",
        ]
        for each, _, below in verdicts(results, answers)
    ]
    header = ["task", "samples per device", "asked", "noise at 1, 2, 4, 8", "recommended", "points below all", "holds"]
    print(experiment.markdown(header, judged))


EXPERIMENT = experiment.Experiment(
    about="What groups of 1, 2, 4 and 8 ranks reach on two tasks, and what the noise report recommends.",
    options={
        "cases": (["signals:2"], ["signals:2"], "task:samples per device"),
        "seeds": (2, 3),
        "epochs": (2, 6, "over the scenes; half as many over the signals, of which there are five times as many"),
    },
    tables={"runs": Result, "answers": Answer},
    cases=cases,
    measure=measure,
    draw=draw,
    report=report,
    ranks=8,
    least_samples=1,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
