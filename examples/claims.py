"""The classic claims of batch norm, one by one, with the statistics of all ranks.

1. Behind the normalization each channel has mean 0 and standard deviation 1, over the *global* batch and not over that
   of a rank; and weight and bias can undo it.
2. Higher learning rates still train.
3. The scale of the initial weights matters less.
4. Training takes fewer epochs to a given accuracy.

Networks with SyncBN, with local BN and without normalization learn scikit-learn's digits with plain constant learning
rates. `depth.py` has the same of deep networks, and the gradients in them. ::

    python -m syncbn.launch -n 4 examples/claims.py

It prints what it finds and writes ``activations.csv``, ``sweeps.csv`` and ``claims.png`` into the folder given by
``--out``. The default (2 seeds, a part of the sweeps) is a short form; ``--full`` takes all of them
and 3 seeds.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from digits import build_mlp, build_mlps, load_data
from experiment import Reached
from torch import Tensor, nn
from training import GOAL, Data, Run, StackedLinear, Watch, accuracies, constant, train_stacked

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
class Result(Reached):
    """One line of ``sweeps.csv``: `swept` is rate or scale."""

    swept: str
    value: float


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


def scaled(norm: str, seeds: range, scale: float) -> nn.Sequential:
    """Return the stacked networks with all their initial weight matrices multiplied by a number."""
    model = build_mlps(norm, seeds)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, StackedLinear):
                layer.weight.mul_(scale)
    return model


def train_all(args: argparse.Namespace, data: Data) -> list[Result]:
    """Train all networks of both sweeps side by side."""
    total, seeds = args.samples * dist.get_world_size(), range(args.seeds)
    jobs = [("rate", rate, Run(norm, 0, build_mlps(norm, seeds), rate)) for rate in args.rates for norm in LABELS]
    jobs += [("scale", x, Run(norm, 0, scaled(norm, seeds, x), RATE)) for x in args.scales for norm in LABELS]
    runs = [run for *_, run in jobs]
    watch = Watch(data, args.seeds, args.epochs)
    train_stacked(runs, data, seeds, total, args.epochs, constant, watch.after_step)
    results = []
    for (swept, value, run), needed in zip(jobs, watch.epochs_needed(runs), strict=True):
        right = accuracies(run.model, data.test_x, data.test_y, args.seeds)
        for seed, (accuracy, epochs) in enumerate(zip(right, needed, strict=True)):
            results.append(Result(run.norm, seed, args.epochs, accuracy, epochs, swept, value))
    return results


def format_sweep(results: list[Result], swept: str, values: list[float]) -> str:
    """Return the Markdown table of one sweep."""
    title = {"rate": "learning rate", "scale": "scale of the weights"}[swept]
    rows = [
        [f"{value:g}"]
        + [
            experiment.cell(experiment.over_seeds(results, field, swept=swept, norm=norm, value=value), 1)
            for field in ("test_accuracy", "epochs_needed")
            for norm in LABELS
        ]
        for value in values
    ]
    header = [title, *(f"{label}, test %" for label in LABELS.values())]
    return experiment.markdown([*header, *(f"{label}, epochs to {GOAL:g} %" for label in LABELS.values())], rows)


def draw(folder: Path) -> None:
    """Draw one panel for each claim, from the CSVs."""
    rows = experiment.read_csv(folder / "activations.csv", Activation)
    results = experiment.read_csv(folder / "sweeps.csv", Result)
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
            needed = experiment.curves(results, "epochs_needed", "value", sweeps["rate"], swept="rate", norm=norm)
            fourth.errorbar(sweeps["rate"], *needed, **pictures.look(norm))
        fourth.set(xscale="log", xlabel="learning rate", ylabel=f"epochs to {GOAL:g} %\n(no point: not all seeds)")
        fourth.set_ylim(0, epochs)
        pictures.legend_below([second])


def measure(args: argparse.Namespace, case: tuple[str]) -> list[Any]:
    """Measure one claim, or two that are sweeps."""
    if case == ("activations",):
        rows, error = activations(load_data(), args.samples)
        return [*rows, experiment.Number("undone", error)]
    return [*train_all(args, load_data())]


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
    tables={"activations": Activation, "sweeps": Result, "numbers": experiment.Number},
    cases=lambda args: [("activations",), ("sweeps",)],
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
