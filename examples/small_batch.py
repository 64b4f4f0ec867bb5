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
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch.distributed as dist
from digits import build_mlps, load_data
from experiment import Classified
from training import accuracies, compare

LABELS = pictures.labels("local", "sync", "group")


def measure(args: argparse.Namespace, case: tuple[int]) -> list[Classified]:
    """Train all networks at one number of samples per device. All ranks return the same training losses.

    Ranks with local statistics have running statistics of their own; rank 0's count, as in a DDP checkpoint.
    """
    (samples,), data, world, is_first = case, load_data(), dist.get_world_size(), dist.get_rank() == 0
    if is_first and samples == args.samples[0]:
        print(
            f"{world} ranks learn {len(data.train_x)} handwritten digits, {len(LABELS) * args.seeds} networks side by "
            f"side, with {', '.join(map(str, args.samples))} samples on each rank in turn",
            flush=True,
        )
    results: list[Classified] = []
    for run, losses in compare(LABELS, build_mlps, data, samples, range(args.seeds), args.epochs, args.lr):
        right = accuracies(run.model, data.test_x, data.test_y, args.seeds)
        results += experiment.classified(args, samples, run.norm, right, losses)
    if is_first:
        means = [f"{label} {accuracy(results, norm, samples):.1f} %" for norm, label in LABELS.items()]
        print(f"{samples} samples per device, test accuracy: {', '.join(means)}", flush=True)
    return results


def accuracy(results: list[Classified], norm: str, samples: int) -> float:
    """Return the mean test accuracy over the seeds, in percent."""
    return experiment.over_seeds(results, "test_accuracy", norm=norm, samples_per_device=samples)[0]


def draw(folder: Path) -> None:
    """Draw test accuracy and train loss against samples per device, with error bars over seeds, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Classified)
    experiment.draw_by_samples(results, LABELS, "Handwritten digits", folder / "small_batch.png")


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table and what it shows."""
    results: list[Classified] = tables["runs"]
    print(experiment.accuracy_and_loss(results, LABELS, args.samples))
    least, most = min(args.samples), max(args.samples)
    local, sync, at_most = (
        accuracy(results, norm, samples) for norm, samples in (("local", least), ("sync", least), ("sync", most))
    )
    print(
        f"SyncBN at {least} samples per device: {sync - local:+.1f} points against local BN, "
        f"{sync - at_most:+.1f} points against itself at {most}."
    )
    print(
        f"Seen: with {least} samples on a device, batch norm over its own samples reaches {local:.1f} %, over those of "
        f"all ranks {sync:.1f} %. Next: look at {args.out / 'small_batch.png'}, then convert a model of yours as "
        "examples/train.py does, model = syncbn.convert_sync_batchnorm(model), and start it with: "
        "syncbn launch -n 4 your_script.py"
    )


EXPERIMENT = experiment.Experiment(
    about="Local BN, SyncBN and GN at few samples per device.",
    options={"samples": ([2, 4, 16], [2, 4, 8, 16]), "seeds": (2, 5), "epochs": (12, 15), "lr": (0.1, 0.1)},
    tables={"runs": Classified},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
