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
seeds, 12 epochs) is a short form; ``--full`` takes 2, 4, 8 and 16 samples, 5 seeds and 15 epochs.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import experiment
import pictures
import torch.distributed as dist
from digits import load_data, mlps, sweep, test_accuracy
from tqdm import tqdm

LABELS = pictures.labels("local", "sync", "group")


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


def measure(args: argparse.Namespace) -> list[Result]:
    """Run the experiment for each number of samples per device. All ranks return the same training losses.

    Ranks with local statistics have running statistics of their own; rank 0's count, as in a DDP checkpoint.
    """
    data, world, is_first = load_data(), dist.get_world_size(), dist.get_rank() == 0
    if is_first:
        print(
            f"{world} ranks learn {len(data.train_x)} handwritten digits, {len(LABELS) * args.seeds} networks side by "
            f"side, with {', '.join(map(str, args.samples))} samples on each rank in turn",
            flush=True,
        )
    results: list[Result] = []
    for samples, runs in sweep(args, data, mlps(LABELS), args.lr):
        results += [
            Result(
                run.norm,
                samples,
                world,
                run.seed,
                args.epochs,
                len(run.losses),
                test_accuracy(run.model, data),
                run.epoch_losses(args.epochs)[-1],
            )
            for run in runs
        ]
        if is_first:
            means = [f"{label} {accuracy(results, norm, samples):.1f} %" for norm, label in LABELS.items()]
            tqdm.write(f"{samples} samples per device, test accuracy: {', '.join(means)}")
    return results


def accuracy(results: list[Result], norm: str, samples: int) -> float:
    """Return the mean test accuracy over the seeds, in percent."""
    return experiment.over_seeds(results, "test_accuracy", norm=norm, samples_per_device=samples)[0]


def draw(folder: Path) -> None:
    """Draw test accuracy and train loss against samples per device, with error bars over seeds, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    first, samples = results[0], sorted({result.samples_per_device for result in results})
    title = f"Handwritten digits, {first.ranks} ranks, {first.epochs} epochs: {experiment.spread(results)}"
    panels = [("test_accuracy", "test accuracy (%)"), ("train_loss", "train loss, last epoch (nats)")]
    with pictures.figure(folder / "small_batch.png", title) as axes:
        for axis, (field, label) in zip(axes, panels, strict=True):
            for norm in LABELS:
                means, stds = experiment.curves(results, field, "samples_per_device", samples, norm=norm)
                axis.errorbar(samples, means, stds, **pictures.look(norm))
            pictures.powers_of_two(axis, samples, "samples per device")
            axis.set_ylabel(label)
        axes[1].set_yscale("log")
        pictures.legend_below(axes)


def report(args: argparse.Namespace, results: list[Result]) -> None:
    """Print the table and what it shows, and write the CSV and the picture."""
    experiment.write_csv(results, args.out / "runs.csv")
    draw(args.out)
    print(experiment.accuracy_and_loss(results, LABELS, args.samples))
    least, most = min(args.samples), max(args.samples)
    local, sync, at_most = (
        accuracy(results, norm, samples) for norm, samples in (("local", least), ("sync", least), ("sync", most))
    )
    print(
        f"SyncBN at {least} samples per device: {sync - local:+.1f} points against local BN, "
        f"{sync - at_most:+.1f} points against itself at {most}."
    )


def main() -> None:
    """Run the sweep on the ranks that the launcher started; rank 0 reports."""
    parser = experiment.options(
        "Local BN, SyncBN and GN at few samples per device.", samples=[2, 4, 16], seeds=2, epochs=12, lr=0.1
    )
    full = {"samples": [2, 4, 8, 16], "seeds": 5, "epochs": 15}
    args = experiment.parse(parser, "the full sweep: samples 2 4 8 16, 5 seeds, 15 epochs", full)
    results = experiment.run(args, measure, report)
    if os.environ["RANK"] == "0":
        print(last_line(args, results))


def last_line(args: argparse.Namespace, results: list[Result]) -> str:
    """What was seen, in words, and what to do next."""
    least = min(args.samples)
    local, sync = (accuracy(results, norm, least) for norm in ("local", "sync"))
    return (
        f"Seen: with {least} samples on a device, batch norm over its own samples reaches {local:.1f} %, over those of "
        f"all ranks {sync:.1f} %. Next: look at {args.out / 'small_batch.png'}, then convert a model of yours as "
        "examples/train.py does, model = syncbn.convert_sync_batchnorm(model), and start it with: "
        "syncbn launch -n 4 your_script.py"
    )


if __name__ == "__main__":
    main()
