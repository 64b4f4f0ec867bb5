"""MNIST-1D with 1 to 16 signals a device: a second classification task, and a convolutional network.

Three networks that differ only in their normalization learn the signals (`signals.py`) on real ranks: ``local`` batch
norm, ``sync`` (`syncbn.SyncBatchNorm` over all ranks), and ``group`` normalization with 8 groups. The layers see 20, 10
and 5 positions of each signal. The learning rate scales linearly with the total batch, all else is fixed. ::

    python -m syncbn.launch -n 4 examples/mnist_1d.py

It prints a table and writes ``runs.csv`` (one line per run) and ``mnist_1d.png`` into the folder given by ``--out``.
"""

import argparse
from pathlib import Path
from typing import Any

import experiment
import pictures
from experiment import Classified
from signals import build_convs, load_signals
from training import accuracies, compare

LABELS = pictures.labels("local", "sync", "group")


def measure(args: argparse.Namespace, case: tuple[int]) -> list[Classified]:
    """Train all networks at one number of samples per device. Rank 0's count, as in a DDP checkpoint."""
    (samples,), data, results = case, load_signals(), []
    for run, losses in compare(LABELS, build_convs, data, samples, range(args.seeds), args.epochs, args.lr):
        right = accuracies(run.model, data.test_x, data.test_y, args.seeds)
        results += experiment.classified(args, samples, run.norm, right, losses)
    return results


def draw(folder: Path) -> None:
    """Draw test accuracy and train loss against signals per device, with error bars over seeds, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Classified)
    experiment.draw_by_samples(results, LABELS, "MNIST-1D", folder / "mnist_1d.png")


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the table."""
    print(experiment.accuracy_and_loss(tables["runs"], LABELS, args.samples))


EXPERIMENT = experiment.Experiment(
    about="Local BN, SyncBN and GN in a convolutional network at 1 to 16 signals per device.",
    options={"samples": ([2, 16], [1, 2, 4, 8, 16]), "seeds": (2, 3), "epochs": (2, 3), "lr": (0.1, 0.1)},
    tables={"runs": Classified},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
    least_samples=1,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
