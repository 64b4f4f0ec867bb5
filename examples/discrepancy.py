"""The train / test discrepancy: batch norm with the statistics it trained with, and with those it is used with.

In training, batch norm normalizes with the statistics of a batch; afterwards with running ones. The smaller the batch,
the further apart the two, and what was learnt with one need not hold with the other. Here the same trained weights
classify the test images twice: in batches as large as in training, with the statistics of each batch, and with the
running statistics. ::

    python -m syncbn.launch -n 4 examples/discrepancy.py

``local`` is `nn.BatchNorm1d`, whose batch is that of a rank; for ``sync``, `syncbn.SyncBatchNorm`, it is that of all
ranks. It prints a table and writes ``runs.csv`` (one line per run) and ``discrepancy.png`` into the folder given by
``--out``. The default (2 and 16 samples per device, 2 seeds) is a short form; ``--full`` takes 2, 4, 8 and 16 samples
and 5 seeds.
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import (
    Digits,
    Run,
    build_mlp,
    joined_ranks,
    load_data,
    over_seeds,
    parse,
    picture,
    progress,
    spread,
    train,
    write_csv,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

NORMS = ("local", "sync")
LABELS = {"local": "local BN", "sync": "SyncBN"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the CSV: accuracies in percent and losses in nats, on test images, by each kind of statistics.

    `distance` is how far the mean of a batch is from the running mean, in running standard deviations: the root mean
    square over channels, averaged over layers and batches.
    """

    norm: str
    samples_per_device: int
    ranks: int
    seed: int
    epochs: int
    batch_accuracy: float
    running_accuracy: float
    batch_loss: float
    running_loss: float
    distance: float


def observe(model: nn.Module, norm: str) -> list[float]:
    """Let every batch norm layer append the distance of its batch's mean to a list, which is returned."""
    distances: list[float] = []

    def measure(layer: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        mean = syncbn.functional.global_moments(x)[1] if norm == "sync" else x.mean(0)
        scaled = (mean - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        distances.append(scaled.square().mean().sqrt().item())

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 0.0  # running statistics stay as training left them
            layer.register_forward_pre_hook(measure)
    return distances


def evaluate(run: Run, data: Digits, total_batch: int) -> tuple[float, float, float, float, float]:
    """Return the last five columns of a `Result`, means over all ranks."""
    model = copy.deepcopy(run.model)
    for buffer in model.buffers():  # as a DDP checkpoint holds them
        dist.broadcast(buffer, 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    order = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(run.seed))
    batches = order[: len(order) // total_batch * total_batch].view(-1, world, total_batch // world)[:, rank]
    sums = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        model.eval()
        mine = batches.flatten()
        logits, labels = model(data.test_x[mine]), data.test_y[mine]
        sums[1] = 100 * (logits.argmax(1) == labels).double().mean()
        sums[3] = F.cross_entropy(logits, labels)
        model.train()
        distances = observe(model, run.norm)
        for mine in batches:
            logits, labels = model(data.test_x[mine]), data.test_y[mine]
            sums[0] += 100 * (logits.argmax(1) == labels).double().mean() / len(batches)
            sums[2] += F.cross_entropy(logits, labels) / len(batches)
        sums[4] = sum(distances) / len(distances)
    dist.all_reduce(sums)
    batch_accuracy, running_accuracy, batch_loss, running_loss, distance = (sums / world).tolist()
    return batch_accuracy, running_accuracy, batch_loss, running_loss, distance


def sweep(args: argparse.Namespace, data: Digits) -> list[Result]:
    """Train at each number of samples per device, and evaluate twice. All ranks return the same."""
    world = dist.get_world_size()
    results = []
    with progress(sum(len(data.train_x) // (samples * world) for samples in args.samples) * args.epochs) as bar:
        for samples in args.samples:
            bar.set_description(f"{samples} samples per device")
            peak = 0.1 * samples * world / 32
            runs = [Run(norm, seed, build_mlp(norm, seed), peak) for norm in NORMS for seed in range(args.seeds)]
            for _ in train(runs, data, samples * world, args.epochs):
                bar.update()
            for run in runs:
                columns = evaluate(run, data, samples * world)
                results.append(Result(run.norm, samples, world, run.seed, args.epochs, *columns))
    return results


def format_table(results: list[Result], samples: list[int]) -> str:
    """Return the Markdown table of all columns, mean +- standard deviation over seeds."""
    lines = [
        "| samples per device | layer | test %, batch | test %, running | loss, batch | loss, running | distance |",
        "|" + "---|" * 7,
    ]
    fields = {"batch_accuracy": 1, "running_accuracy": 1, "batch_loss": 3, "running_loss": 3, "distance": 3}
    for count in samples:
        for norm in NORMS:
            cells = []
            for field, digits in fields.items():
                mean, std = over_seeds(results, norm, count, field)
                cells.append(f"{mean:.{digits}f} ± {std:.{digits}f}")
            lines.append(f"| {count} | {LABELS[norm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[Result], samples: list[int], path: Path) -> None:
    """Draw accuracy and loss by both kinds of statistics, and the distance, against samples per device."""
    first = results[0]
    title = f"Train / test discrepancy, digits, {first.ranks} ranks: {spread(len({r.seed for r in results}))}"
    panels = [
        (("batch_accuracy", "running_accuracy"), "test accuracy (%)"),
        (("batch_loss", "running_loss"), "test loss (nats)"),
        (("distance",), "distance of a batch's mean from the\nrunning one (running standard deviations)"),
    ]
    with picture(path, title, panels=3) as axes:
        for axis, (fields, label) in zip(axes, panels, strict=True):
            for norm, colour in zip(NORMS, ("tab:blue", "tab:orange"), strict=True):
                for field in fields:
                    running = field.startswith("running")
                    kind = "" if field == "distance" else ", running statistics" if running else ", batch statistics"
                    means, stds = zip(*(over_seeds(results, norm, s, field) for s in samples), strict=True)
                    axis.errorbar(
                        samples, means, stds, marker="os"[running], ls=["-", "--"][running], capsize=4, color=colour,
                        label=LABELS[norm] + kind,
                    )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xticks(samples, [str(s) for s in samples])
            axis.set_xlabel("samples per device")
            axis.set_ylabel(label)
            axis.legend()
        axes[1].set_yscale("log")
        axes[2].set_yscale("log")


def report(results: list[Result], samples: list[int], out: Path, seconds: float) -> None:
    """Print the table and what it shows, and write the CSV and the picture."""
    write_csv(results, out / "runs.csv")
    draw(results, samples, out / "discrepancy.png")
    print(format_table(results, samples))
    for norm in NORMS:
        gaps = []
        for count in (min(samples), max(samples)):
            running = over_seeds(results, norm, count, "running_loss")[0]
            gaps.append(f"{running - over_seeds(results, norm, count, 'batch_loss')[0]:+.3f} nats at {count}")
        print(f"{LABELS[norm]}: test loss with running statistics less that with batch statistics: {', '.join(gaps)}.")
    print(f"{len(results)} runs in {seconds:.0f} s; wrote {out / 'runs.csv'} and {out / 'discrepancy.png'}")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Batch statistics against running statistics, at several batch sizes.")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 16], help="samples per device (2 16)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (2)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training set (10)")
    parser.add_argument("--full", action="store_true", help="the full sweep: samples 2 4 8 16, 5 seeds")
    parser.add_argument("--out", type=Path, default=Path("out/discrepancy"), help="folder for CSV and PNG")
    args = parse(parser)
    if args.full:
        args.samples, args.seeds = [2, 4, 8, 16], 5
    if min(args.samples) < 2:
        parser.error(f"--samples {min(args.samples)}: local batch norm needs at least 2 samples per device")
    return args


def main() -> None:
    """Run the sweep on the ranks that the launcher started; rank 0 reports."""
    args = parse_arguments()
    start = time.monotonic()
    with joined_ranks():
        results = sweep(args, load_data())
        if dist.get_rank() == 0:
            report(results, args.samples, args.out, time.monotonic() - start)


if __name__ == "__main__":
    main()
