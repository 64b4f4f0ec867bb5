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
import csv
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import syncbn

NORMS = ("local", "sync", "group")
LABELS = {"local": "local BN", "sync": "SyncBN", "group": "GN(8)"}


@dataclasses.dataclass(frozen=True)
class Digits:
    """1797 images of handwritten digits, split 75/25 with equal class shares.

    `train_x` is `(1347, 64)`, `test_x` `(450, 64)`, both float32 in [0, 1]; `train_y` and `test_y` are int64
    class numbers.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclasses.dataclass
class Run:
    """One network in training: a normalization and a seed, with what it has measured so far."""

    norm: str
    seed: int
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    last_epoch_loss: float = 0.0
    test_accuracy: float = math.nan


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


def load_data() -> Digits:
    """Return the digits data set, which comes with scikit-learn: nothing is downloaded."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x.float(), train_y.long(), test_x.float(), test_y.long())


def build_mlp(norm: str, seed: int) -> nn.Sequential:
    """Return the 64-128-64-10 network with normalization after both hidden layers.

    Args:
        norm: ``"local"``, ``"sync"`` or ``"group"``.
        seed: fixes the weights, which are the same on every rank and for every `norm`.
    """
    torch.manual_seed(seed)

    def normalization(width: int) -> nn.Module:
        return nn.GroupNorm(8, width) if norm == "group" else nn.BatchNorm1d(width)

    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), normalization(128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), normalization(64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    if norm == "sync":
        syncbn.convert_sync_batchnorm(model)
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Return the rate of a step: linear over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def batches(count: int, total_batch: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the sample indices of this rank, batch by batch, for one epoch.

    All ranks draw the same permutation of the `count` samples; of each batch of `total_batch`, rank r takes
    the r-th slice. The incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(count, generator=generator)[: count // total_batch * total_batch]
    return list(order.view(-1, dist.get_world_size(), total_batch // dist.get_world_size())[:, dist.get_rank()])


def average_gradients(runs: list[Run]) -> None:
    """Replace every gradient by its mean over the ranks, in one message for all `runs` together.

    What DDP would do for each network alone. At this size a message is pure latency, so one serves them all.
    """
    gradients = [p.grad for run in runs for p in run.model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(runs: list[Run], data: Digits, total_batch: int, epochs: int, peak: float) -> Iterator[None]:
    """Train all `runs` side by side, each on its own order of the data, and yield after each step."""
    steps = len(data.train_x) // total_batch * epochs
    step = 0
    for epoch in range(epochs):
        orders = {seed: batches(len(data.train_x), total_batch, seed, epoch) for seed in {r.seed for r in runs}}
        for i in range(steps // epochs):
            rate = learning_rate(step, steps, peak)
            for run in runs:
                mine = orders[run.seed][i]
                loss = F.cross_entropy(run.model(data.train_x[mine]), data.train_y[mine])
                run.optimizer.zero_grad()
                loss.backward()
                if epoch == epochs - 1:
                    run.last_epoch_loss += loss.item() * epochs / steps
            average_gradients(runs)
            for run in runs:
                run.optimizer.param_groups[0]["lr"] = rate
                run.optimizer.step()
            step += 1
            yield


def evaluate(runs: list[Run], data: Digits) -> None:
    """Fill in `test_accuracy` and replace `last_epoch_loss` by its mean over the ranks.

    Ranks with local statistics have running statistics of their own; rank 0's count, as in a DDP checkpoint.
    """
    losses = torch.tensor([run.last_epoch_loss for run in runs], dtype=torch.float64)
    dist.all_reduce(losses)
    for run, loss in zip(runs, losses.tolist(), strict=True):
        run.last_epoch_loss = loss / dist.get_world_size()
        run.model.eval()
        with torch.no_grad():
            hits = run.model(data.test_x).argmax(1) == data.test_y
        run.test_accuracy = 100 * hits.double().mean().item()


def sweep(args: argparse.Namespace, data: Digits) -> list[Result]:
    """Run the experiment for each number of samples per device. All ranks return the same training losses."""
    world = dist.get_world_size()
    steps = {s: len(data.train_x) // (s * world) * args.epochs for s in args.samples}
    results = []
    # Without a terminal a bar that is redrawn ten times a second would fill a log file.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=sum(steps.values()), unit="step", disable=dist.get_rank() != 0, mininterval=pace) as bar:
        for samples in args.samples:
            bar.set_description(f"{samples} samples per device")
            runs = []
            for norm in NORMS:
                for seed in range(args.seeds):
                    model = build_mlp(norm, seed)
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
                    runs.append(Run(norm, seed, model, optimizer))
            total_batch = samples * world
            for _ in train(runs, data, total_batch, args.epochs, peak=args.lr * total_batch / 32):
                bar.update()
            evaluate(runs, data)
            results += [
                Result(
                    r.norm,
                    samples,
                    world,
                    r.seed,
                    args.epochs,
                    steps[samples],
                    r.test_accuracy,
                    r.last_epoch_loss,
                )
                for r in runs
            ]
    return results


def mean_and_std(results: list[Result], norm: str, samples: int, field: str) -> tuple[float, float]:
    """Return the mean and the sample standard deviation over seeds (0 for one seed) of one column."""
    values = [getattr(r, field) for r in results if (r.norm, r.samples_per_device) == (norm, samples)]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_table(results: list[Result], samples: list[int]) -> str:
    """Return the Markdown table of test accuracy and train loss, mean +- standard deviation over seeds."""
    columns = [f"{LABELS[norm]} {what}" for what in ("test %", "loss") for norm in NORMS]
    lines = ["| samples per device | " + " | ".join(columns) + " |", "|" + "---|" * 7]
    for count in samples:
        accuracy = [mean_and_std(results, norm, count, "test_accuracy") for norm in NORMS]
        loss = [mean_and_std(results, norm, count, "train_loss") for norm in NORMS]
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in accuracy]
        cells += [f"{mean:.4f} ± {std:.4f}" for mean, std in loss]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(results: list[Result], path: Path) -> None:
    """Write one line per run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in results)


def draw(results: list[Result], samples: list[int], path: Path) -> None:
    """Draw test accuracy and train loss against samples per device, with error bars over seeds."""
    import matplotlib

    matplotlib.use("Agg")  # ranks have no display
    import matplotlib.pyplot as plt

    first = results[0]
    seeds = len({result.seed for result in results})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    panels = [("test_accuracy", "test accuracy (%)"), ("train_loss", "train loss, last epoch (nats)")]
    for axis, (field, label) in zip(axes, panels, strict=True):
        for norm, marker in zip(NORMS, "osD", strict=True):
            means, stds = zip(*(mean_and_std(results, norm, s, field) for s in samples), strict=True)
            axis.errorbar(samples, means, stds, marker=marker, capsize=4, label=LABELS[norm])
        axis.set_xscale("log", base=2)
        axis.set_xticks(samples, [str(s) for s in samples])
        axis.set_xlabel("samples per device")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    setting = f"Handwritten digits, {first.ranks} ranks, {first.epochs} epochs"
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"{setting}: {spread}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(results: list[Result], samples: list[int], out: Path, seconds: float) -> None:
    """Print the table and what it shows, and write the CSV and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(results, out / "runs.csv")
    draw(results, samples, out / "small_batch.png")
    print(format_table(results, samples))
    least, most = min(samples), max(samples)
    sync = mean_and_std(results, "sync", least, "test_accuracy")[0]
    local = mean_and_std(results, "local", least, "test_accuracy")[0]
    at_most = mean_and_std(results, "sync", most, "test_accuracy")[0]
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
    args = parser.parse_args()
    if args.full:
        args.samples, args.seeds = [2, 4, 8, 16], 5
    if min(args.samples) < 2:
        parser.error(f"--samples {min(args.samples)}: local batch norm needs at least 2 samples per device")
    if "RANK" not in os.environ:
        parser.error("start the ranks with: python -m syncbn.launch -n 4 examples/small_batch.py")
    return args


def main() -> None:
    """Run the sweep on the ranks that the launcher started; rank 0 reports."""
    args = parse_arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    start = time.monotonic()
    results = sweep(args, load_data())
    if dist.get_rank() == 0:
        report(results, args.samples, args.out, time.monotonic() - start)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
