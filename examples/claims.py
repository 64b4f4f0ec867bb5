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
import time
from pathlib import Path

import torch
import torch.distributed as dist
from digits import (
    Digits,
    Run,
    build_mlp,
    constant,
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
from torch import Tensor, nn

import syncbn

LABELS = {"none": "no normalization", "local": "local BN", "sync": "SyncBN"}
COLOURS = {"none": "tab:green", "local": "tab:blue", "sync": "tab:orange"}
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


def activations(data: Digits, samples: int) -> tuple[list[Activation], float]:
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


def sweep(args: argparse.Namespace, data: Digits) -> tuple[list[Result], list[Point]]:
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
    with progress(in_epoch * args.epochs) as bar:
        for _ in train([run for *_, run in jobs], data, total, args.epochs, constant):
            bar.update()
    results, points = [], []
    for swept, value, run in jobs:
        results.append(Result(swept, value, run.norm, run.seed, args.epochs, test_accuracy(run.model, data)))
        if swept == "rate":
            for epoch in range(args.epochs):
                loss = sum(run.losses[epoch * in_epoch : (epoch + 1) * in_epoch]) / in_epoch
                points.append(Point(value, run.norm, run.seed, epoch + 1, loss))
    return results, points


def over_seeds(results: list[Result], swept: str, norm: str, value: float) -> tuple[float, float]:
    """Return mean and standard deviation over seeds of the test accuracy."""
    return mean_and_std(r.test_accuracy for r in results if (r.swept, r.norm, r.value) == (swept, norm, value))


def best_rate(results: list[Result], norm: str, rates: list[float]) -> float:
    """Return the learning rate at which this kind of network is most accurate."""
    return max(rates, key=lambda rate: over_seeds(results, "rate", norm, rate)[0])


def format_sweep(results: list[Result], swept: str, values: list[float]) -> str:
    """Return the Markdown table of one sweep."""
    title = {"rate": "learning rate", "scale": "scale of the weights"}[swept]
    lines = [f"| {title} | " + " | ".join(f"{label}, test %" for label in LABELS.values()) + " |", "|" + "---|" * 4]
    for value in values:
        cells = ("{:.1f} ± {:.1f}".format(*over_seeds(results, swept, norm, value)) for norm in LABELS)
        lines.append(f"| {value:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(args: argparse.Namespace, rows: list[Activation], results: list[Result], points: list[Point]) -> None:
    """Draw one panel for each claim."""
    ranks = dist.get_world_size()
    title = f"Claims of batch norm, digits, {ranks} ranks with {args.samples} samples: {spread(args.seeds)}"
    with picture(args.out / "claims.png", title, panels=4) as (first, second, third, fourth):
        kinds = [("before", "global", "s"), ("after", "rank", "x"), ("after", "global", "o")]
        for where, batch, marker in kinds:
            shown = [row for row in rows if (row.where, row.batch) == (where, batch)]
            label = f"{where}, " + ("all ranks" if batch == "global" else "one rank alone")
            first.plot([r.mean for r in shown], [r.std for r in shown], marker, ms=5, alpha=0.6, label=label)
        first.set_xlabel("mean of a channel of the first layer")
        first.set_ylabel("standard deviation")
        first.legend()
        for axis, swept, values in ((second, "rate", args.rates), (third, "scale", args.scales)):
            for (norm, label), marker in zip(LABELS.items(), "Dos", strict=True):
                means, stds = zip(*(over_seeds(results, swept, norm, value) for value in values), strict=True)
                axis.errorbar(values, means, stds, marker=marker, capsize=4, label=label, color=COLOURS[norm])
            axis.set_xscale("log")
            axis.set_ylabel(f"test accuracy after {args.epochs} epochs (%)")
            axis.legend()
        second.set_xlabel("learning rate")
        third.set_xlabel(f"initial weights multiplied by (rate {RATE:g})")
        epochs = list(range(1, args.epochs + 1))
        for norm, label in LABELS.items():
            best = best_rate(results, norm, args.rates)
            for rate, style in {RATE: "--", best: "-"}.items():
                at = {e: [p.train_loss for p in points if (p.rate, p.norm, p.epoch) == (rate, norm, e)] for e in epochs}
                if not all(at.values()) or not all(math.isfinite(loss) for losses in at.values() for loss in losses):
                    continue
                means, stds = zip(*(mean_and_std(at[e]) for e in epochs), strict=True)
                kind = f"{label}, rate {rate:g}" + (" (its best)" if rate == best else "")
                fourth.errorbar(epochs, means, stds, ls=style, capsize=3, label=kind, color=COLOURS[norm])
        fourth.set_yscale("log")
        fourth.set_xlabel("epoch")
        fourth.set_ylabel("train loss (nats)")
        fourth.legend(fontsize=7)


def report(args: argparse.Namespace, rows: list[Activation], error: float, results: list[Result]) -> None:
    """Print the numbers behind each claim."""

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


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="The classic claims of batch norm, on real ranks.")
    parser.add_argument("--samples", type=int, default=8, help="samples per device (8)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (2)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training set (4)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1, 3], help="learning rates (0.1 1 3)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 1, 10], help="of the weights (0.1 1 10)")
    parser.add_argument("--full", action="store_true", help="all rates and scales, 3 seeds, 6 epochs")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="folder for CSV and PNG")
    args = parse(parser)
    if args.full:
        args.rates, args.scales = [0.01, 0.03, 0.1, 0.3, 1, 3, 10], [0.01, 0.1, 0.3, 1, 3, 10]
        args.seeds, args.epochs = 3, 6
    if args.samples < 2:
        parser.error(f"--samples {args.samples}: local batch norm needs at least 2 samples per device")
    return args


def main() -> None:
    """Measure each claim on the ranks that the launcher started; rank 0 reports."""
    args = parse_arguments()
    start = time.monotonic()
    with joined_ranks():
        data = load_data()
        rows, error = activations(data, args.samples)
        results, points = sweep(args, data)
        if dist.get_rank() == 0:
            write_csv(rows, args.out / "activations.csv")
            write_csv(results, args.out / "sweeps.csv")
            write_csv(points, args.out / "curves.csv")
            draw(args, rows, results, points)
            report(args, rows, error, results)
            print(f"{len(results)} runs in {time.monotonic() - start:.0f} s; wrote CSV and PNG to {args.out}")


if __name__ == "__main__":
    main()
