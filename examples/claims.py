"""The classic claims of batch norm, one by one, with the statistics of all ranks.

1. Behind the normalization each channel has mean 0 and standard deviation 1, over the *global* batch and not over that
   of a rank; and weight and bias can undo it.
2. Higher learning rates still train.
3. The scale of the initial weights matters less.
4. Training converges faster.

Networks with SyncBN, with local BN and without normalization learn scikit-learn's digits with plain constant learning
rates. ::

    python -m syncbn.launch -n 4 examples/claims.py

It prints what it finds and writes ``activations.csv``, ``sweeps.csv``, ``curves.csv`` and ``claims.png`` into the
folder given by ``--out``. The default (2 seeds, a part of the sweeps) is a short form; ``--full`` takes all of them
and 3 seeds.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from digits import build_mlp, load_data, test_accuracy
from torch import Tensor, nn
from training import Data, Run, constant, train

import syncbn

LABELS = pictures.labels("none", "local", "sync")
RATE = 0.1  # where the scale of the weights is swept


@dataclasses.dataclass(frozen=True)
class Activation:
    """One line of ``activations.csv``: mean and standard deviation of a channel of the first hidden layer.

    `where` is before, after, or undone; `batch` is global, or that of one rank.
    """

    channel: int
    where: str
    batch: str
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of ``sweeps.csv``: `swept` is rate or scale, `test_accuracy` is in percent."""

    swept: str
    value: float
    norm: str
    seed: int
    epochs: int
    test_accuracy: float


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of ``curves.csv``: the mean train loss of an epoch at one learning rate, in nats."""

    rate: float
    norm: str
    seed: int
    epoch: int
    train_loss: float


def gathered(x: Tensor) -> Tensor:
    """Return all ranks' rows."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def activations(data: Data, samples: int) -> tuple[list[Activation], float]:
    """Return the statistics of the first layer's channels, and how far from its input the undone output is."""
    model = build_mlp("sync", seed=0)
    linear, norm = model[0][0], model[0][1]  # type: ignore[index]
    assert isinstance(norm, syncbn.SyncBatchNorm)
    start = dist.get_rank() * samples
    rows: list[Activation] = []
    with torch.no_grad():
        before = linear(data.train_x[start : start + samples])
        values = {"before": before, "after": norm(before)}
        whole = gathered(before)
        norm.weight.copy_((whole.var(0, unbiased=False) + norm.eps).sqrt())
        norm.bias.copy_(whole.mean(0))
        values["undone"] = norm(before)
        error = (gathered(values["undone"]) - whole).abs().max() / whole.abs().max()
    for where, mine in values.items():
        for batch, x in (("global", gathered(mine)), ("rank", mine)):
            pairs = torch.stack(torch.std_mean(x.double(), 0, correction=0)).T.tolist()
            rows += [Activation(channel, where, batch, mean, std) for channel, (std, mean) in enumerate(pairs)]
    return rows, error.item()


def scaled(norm: str, seed: int, scale: float) -> nn.Sequential:
    """Return the network with all its initial weight matrices multiplied by a number."""
    model = build_mlp(norm, seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= scale
    return model


def train_all(args: argparse.Namespace, data: Data) -> tuple[list[Result], list[Point]]:
    """Train all networks of both sweeps side by side."""
    total = args.samples * dist.get_world_size()
    in_epoch = len(data.train_x) // total
    jobs = [
        ("rate", rate, Run(norm, seed, build_mlp(norm, seed), rate))
        for rate in args.rates
        for norm in LABELS
        for seed in range(args.seeds)
    ] + [
        ("scale", scale, Run(norm, seed, scaled(norm, seed, scale), RATE))
        for scale in args.scales
        for norm in LABELS
        for seed in range(args.seeds)
    ]
    with experiment.progress(in_epoch * args.epochs) as bar:
        for _ in train([each for *_, each in jobs], data, total, args.epochs, constant):
            bar.update()
    results, points = [], []
    for swept, value, each in jobs:
        results.append(Result(swept, value, each.norm, each.seed, args.epochs, test_accuracy(each.model, data)))
        if swept == "rate":
            losses = enumerate(each.epoch_losses(args.epochs), 1)
            points += [Point(value, each.norm, each.seed, epoch, loss) for epoch, loss in losses]
    return results, points


def best_rate(results: list[Result], norm: str, rates: list[float]) -> float:
    """Return the learning rate at which this kind of network is most accurate."""
    return max(
        rates, key=lambda rate: experiment.over_seeds(results, "test_accuracy", swept="rate", norm=norm, value=rate)[0]
    )


def format_sweep(results: list[Result], swept: str, values: list[float]) -> str:
    """Return the Markdown table of one sweep."""
    title = {"rate": "learning rate", "scale": "scale of the weights"}[swept]
    rows = [
        [f"{value:g}"]
        + [
            experiment.cell(experiment.over_seeds(results, "test_accuracy", swept=swept, norm=norm, value=value), 1)
            for norm in LABELS
        ]
        for value in values
    ]
    return experiment.markdown([title, *(f"{label}, test %" for label in LABELS.values())], rows)


def draw(folder: Path) -> None:
    """Draw one panel for each claim, from the CSVs."""
    rows = experiment.read_csv(folder / "activations.csv", Activation)
    results = experiment.read_csv(folder / "sweeps.csv", Result)
    points = experiment.read_csv(folder / "curves.csv", Point)
    epochs, title = results[0].epochs, f"Claims of batch norm, digits: {experiment.spread(results)}"
    sweeps = {
        swept: sorted({result.value for result in results if result.swept == swept}) for swept in ("rate", "scale")
    }
    with pictures.figure(folder / "claims.png", title, panels=4) as (first, second, third, fourth):
        seen = {
            ("before", "global"): pictures.look("none", label="before, all ranks"),
            ("after", "rank"): pictures.look("sync", label="after, one rank alone", fillstyle="none"),
            ("after", "global"): pictures.look("sync", label="after, all ranks"),
        }
        for (where, batch), look in seen.items():
            channels = [row for row in rows if (row.where, row.batch) == (where, batch)]
            first.plot([c.mean for c in channels], [c.std for c in channels], **look, ls="")
        first.set(xlabel="mean of a channel of the first layer", ylabel="standard deviation", ylim=(0, 2.3))
        first.legend(loc="upper right")
        for axis, (swept, values) in zip((second, third), sweeps.items(), strict=True):
            for norm in LABELS:
                curves = experiment.curves(results, "test_accuracy", "value", values, swept=swept, norm=norm)
                axis.errorbar(values, *curves, **pictures.look(norm))
            axis.set_xscale("log")
            axis.set_ylabel(f"test accuracy, {epochs} epochs (%)")
        second.set_xlabel("learning rate")
        third.set_xlabel(f"initial weights multiplied by (rate {RATE:g})")
        for norm in LABELS:
            best = best_rate(results, norm, sweeps["rate"])
            for rate, style in {RATE: "--", best: "-"}.items():
                shown = [point for point in points if (point.rate, point.norm) == (rate, norm)]
                if not shown or not all(math.isfinite(point.train_loss) for point in shown):
                    continue
                curves = experiment.curves(shown, "train_loss", "epoch", range(1, epochs + 1))
                fourth.errorbar(range(1, epochs + 1), *curves, **pictures.look(norm, ls=style))
        fourth.set(yscale="log", xlabel=f"epoch (dashed: rate {RATE:g}, solid: best rate)")
        fourth.set_ylabel("train loss (nats)")
        pictures.legend_below([second])


def measure(args: argparse.Namespace, case: tuple[str]) -> list[Any]:
    """Measure one claim, or two that are sweeps."""
    if case == ("activations",):
        rows, error = activations(load_data(), args.samples)
        return [*rows, experiment.Number("undone", error)]
    results, points = train_all(args, load_data())
    return [*results, *points]


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the numbers behind each claim."""
    rows, results, error = tables["activations"], tables["sweeps"], tables["numbers"][0].value

    def furthest(where: str, batch: str) -> str:
        shown = [row for row in rows if (row.where, row.batch) == (where, batch)]
        mean, std = max(abs(row.mean) for row in shown), max(abs(row.std - 1) for row in shown)
        return f"|mean| up to {mean:.2g}, |std - 1| up to {std:.2g}"

    print("1. Channels of the first hidden layer:")
    print(f"   before, all ranks: {furthest('before', 'global')}")
    print(f"   after, all ranks:  {furthest('after', 'global')}")
    print(f"   after, rank 0:     {furthest('after', 'rank')}")
    print(f"   with weight = sqrt(var + eps), bias = mean: the input again, up to {error:.2g} of its largest value")
    print(f"2. Learning rates:\n{format_sweep(results, 'rate', args.rates)}")
    print(f"3. Scales of the initial weights:\n{format_sweep(results, 'scale', args.scales)}")


EXPERIMENT = experiment.Experiment(
    about="The classic claims of batch norm, on real ranks.",
    options={
        "samples": (8, 8),
        "seeds": (2, 3),
        "epochs": (4, 6),
        "rates": ([0.1, 1.0, 3.0], [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0], "learning rates"),
        "scales": ([0.1, 1.0, 10.0], [0.01, 0.1, 0.3, 1.0, 3.0, 10.0], "of the weights"),
    },
    tables={"activations": Activation, "sweeps": Result, "curves": Point, "numbers": experiment.Number},
    cases=lambda args: [("activations",), ("sweeps",)],
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
