"""The small-batch experiment: what batch normalization loses when each device sees few samples.

Three multilayer perceptrons that differ only in their normalization learn scikit-learn's handwritten digits
on real ranks:

* ``local``  `nn.BatchNorm1d`: each rank normalizes with the statistics of its own samples;
* ``sync``   `syncbn.SyncBatchNorm`: all ranks normalize with the statistics of the global batch;
* ``group``  `nn.GroupNorm` with 8 groups: no batch statistics at all.

The number of samples per device is swept, the learning rate scales linearly with the total batch, all else is
fixed. Start it with ::

    python -m syncbn.launch -n 4 examples/small_batch.py

It prints a table and writes ``runs.csv`` (one line per run) and ``small_batch.png`` (mean and standard
deviation over seeds) into the folder given by ``--out``. The default (2, 4 and 16 samples per device, 2
seeds) is a short form; ``--full`` takes 2, 4, 8 and 16 samples and 5 seeds.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch.distributed as dist
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
    test_accuracy,
    train,
    write_csv,
)

NORMS = ("local", "sync", "group")
LABELS = {"local": "local BN", "sync": "SyncBN", "group": "GN(8)"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the CSV: `test_accuracy` in percent, `train_loss` as the mean over last epoch and ranks."""

    norm: str
    samples_per_device: int
    ranks: int
    seed: int
    epochs: int
    steps: int
    test_accuracy: float
    train_loss: float


def sweep(args: argparse.Namespace, data: Digits) -> list[Result]:
    """Run the experiment for each number of samples per device. All ranks return the same training losses.

    Ranks with local statistics have running statistics of their own; rank 0's count, as in a DDP checkpoint.
    """
    world = dist.get_world_size()
    in_epoch = {samples: len(data.train_x) // (samples * world) for samples in args.samples}
    results = []
    with progress(sum(in_epoch.values()) * args.epochs) as bar:
        for samples, steps in in_epoch.items():
            bar.set_description(f"{samples} samples per device")
            peak = args.lr * samples * world / 32
            runs = [Run(norm, seed, build_mlp(norm, seed), peak) for norm in NORMS for seed in range(args.seeds)]
            for _ in train(runs, data, samples * world, args.epochs):
                bar.update()
            results += [
                Result(
                    run.norm,
                    samples,
                    world,
                    run.seed,
                    args.epochs,
                    steps * args.epochs,
                    test_accuracy(run.model, data),
                    sum(run.losses[-steps:]) / steps,
                )
                for run in runs
            ]
    return results


def format_table(results: list[Result], samples: list[int]) -> str:
    """Return the Markdown table of test accuracy and train loss, mean +- standard deviation over seeds."""
    columns = [f"{LABELS[norm]} {what}" for what in ("test %", "loss") for norm in NORMS]
    lines = ["| samples per device | " + " | ".join(columns) + " |", "|" + "---|" * 7]
    for count in samples:
        accuracy = [over_seeds(results, norm, count, "test_accuracy") for norm in NORMS]
        loss = [over_seeds(results, norm, count, "train_loss") for norm in NORMS]
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in accuracy]
        cells += [f"{mean:.4f} ± {std:.4f}" for mean, std in loss]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[Result], samples: list[int], path: Path) -> None:
    """Draw test accuracy and train loss against samples per device, with error bars over seeds."""
    first = results[0]
    setting = f"Handwritten digits, {first.ranks} ranks, {first.epochs} epochs"
    panels = [("test_accuracy", "test accuracy (%)"), ("train_loss", "train loss, last epoch (nats)")]
    with picture(path, f"{setting}: {spread(len({result.seed for result in results}))}") as axes:
        for axis, (field, label) in zip(axes, panels, strict=True):
            for norm, marker in zip(NORMS, "osD", strict=True):
                means, stds = zip(*(over_seeds(results, norm, s, field) for s in samples), strict=True)
                axis.errorbar(samples, means, stds, marker=marker, capsize=4, label=LABELS[norm])
            axis.set_xscale("log", base=2)
            axis.set_xticks(samples, [str(s) for s in samples])
            axis.set_xlabel("samples per device")
            axis.set_ylabel(label)
        axes[1].set_yscale("log")
        axes[0].legend()


def report(results: list[Result], samples: list[int], out: Path, seconds: float) -> None:
    """Print the table and what it shows, and write the CSV and the picture."""
    write_csv(results, out / "runs.csv")
    draw(results, samples, out / "small_batch.png")
    print(format_table(results, samples))
    least, most = min(samples), max(samples)
    sync = over_seeds(results, "sync", least, "test_accuracy")[0]
    local = over_seeds(results, "local", least, "test_accuracy")[0]
    at_most = over_seeds(results, "sync", most, "test_accuracy")[0]
    print(
        f"SyncBN at {least} samples per device: {sync - local:+.1f} points against local BN, "
        f"{sync - at_most:+.1f} points against itself at {most}."
    )
    print(f"{len(results)} runs in {seconds:.0f} s; wrote {out / 'runs.csv'} and {out / 'small_batch.png'}")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Local BN, SyncBN and GN at few samples per device.")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 16], help="samples per device (2 4 16)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (2)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training set (15)")
    parser.add_argument("--lr", type=float, default=0.1, help="peak rate at a total batch of 32 (0.1)")
    parser.add_argument("--full", action="store_true", help="the full sweep: samples 2 4 8 16, 5 seeds")
    parser.add_argument("--out", type=Path, default=Path("out/small_batch"), help="folder for CSV and PNG")
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
