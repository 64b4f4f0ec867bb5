"""What the experiments share: the data, the network, training several networks side by side, CSV and pictures.

Not a script: the experiments beside it import it.
"""

import argparse
import contextlib
import csv
import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import syncbn


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
    """One network in training.

    Attributes:
        norm: name of its normalization.
        seed: fixes its weights and its order of the data.
        model: the network.
        peak: its largest learning rate.
        losses: the loss of each step, in nats: of this rank's samples, after `average_losses` the mean over the ranks.
        optimizer: SGD with momentum 0.9 and weight decay 5e-4.
    """

    norm: str
    seed: int
    model: nn.Sequential
    peak: float
    losses: list[float] = dataclasses.field(default_factory=list)
    optimizer: torch.optim.Optimizer = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def load_data() -> Digits:
    """Return the digits data set, which comes with scikit-learn: nothing is downloaded."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x.float(), train_y.long(), test_x.float(), test_y.long())


def build_mlp(norm: str | Callable[[int], nn.Module], seed: int) -> nn.Sequential:
    """Return the 64-128-64-10 network with normalization after both hidden layers.

    Args:
        norm: ``"local"`` (`nn.BatchNorm1d`), ``"sync"``, ``"group"``, ``"none"``, or a function that makes the layer
            for a number of channels.
        seed: fixes the weights, which are the same on every rank and for every `norm`.
    """
    torch.manual_seed(seed)
    layers: dict[str, Callable[[int], nn.Module]] = {
        "local": nn.BatchNorm1d,
        "sync": nn.BatchNorm1d,
        "group": lambda width: nn.GroupNorm(8, width),
        "none": lambda width: nn.Identity(),
    }
    normalization = layers[norm] if isinstance(norm, str) else norm
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), normalization(128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), normalization(64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    if norm == "sync":
        syncbn.convert_sync_batchnorm(model)
    return model


def warm_up_and_cosine(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Return the learning rate of a step: linear over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def constant(step: int, steps: int, peak: float) -> float:
    """Return the peak learning rate, at every step."""
    return peak


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


def average_losses(runs: list[Run]) -> None:
    """Replace the losses of each run by their means over the ranks."""
    losses = torch.tensor([run.losses for run in runs], dtype=torch.float64)
    dist.all_reduce(losses)
    for run, mean in zip(runs, losses / dist.get_world_size(), strict=True):
        run.losses = mean.tolist()


def train(
    runs: list[Run],
    data: Digits,
    total_batch: int,
    epochs: int,
    schedule: Callable[[int, int, float], float] = warm_up_and_cosine,
) -> Iterator[None]:
    """Train all `runs` side by side, each on its own order of the data, and yield after each step.

    `schedule` gives the learning rate for a step, the number of steps and a run's peak rate.
    """
    steps = len(data.train_x) // total_batch * epochs
    for epoch in range(epochs):
        orders = {seed: batches(len(data.train_x), total_batch, seed, epoch) for seed in {r.seed for r in runs}}
        for i in range(steps // epochs):
            for run in runs:
                mine = orders[run.seed][i]
                loss = F.cross_entropy(run.model(data.train_x[mine]), data.train_y[mine])
                run.optimizer.zero_grad()
                loss.backward()
                run.losses.append(loss.item())
            average_gradients(runs)
            for run in runs:
                run.optimizer.param_groups[0]["lr"] = schedule(epoch * (steps // epochs) + i, steps, run.peak)
                run.optimizer.step()
            yield
    average_losses(runs)


def test_accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test images that the model, with its running statistics, gets right, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(data.test_x).argmax(1) == data.test_y
    return 100 * hits.double().mean().item()


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line; stop with a hint where no launcher has started this process."""
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start the ranks with: python -m syncbn.launch -n 4 examples/{parser.prog}")
    return args


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the ranks that the launcher started, for the length of the block, with one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def progress(steps: int) -> Any:
    """Return a progress bar on rank 0 for so many steps."""
    # Without a terminal a bar that is redrawn ten times a second would fill a log file.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, unit="step", disable=dist.get_rank() != 0, mininterval=pace)


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for one value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(results: Iterable[Any], norm: str, samples: int, field: str) -> tuple[float, float]:
    """Return mean and standard deviation over seeds of one column, of those with this norm and samples per device."""
    return mean_and_std(getattr(r, field) for r in results if (r.norm, r.samples_per_device) == (norm, samples))


def spread(seeds: int) -> str:
    """Say what error bars show, for a title."""
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write one line for each of `rows`, which are dataclasses of one type; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


@contextlib.contextmanager
def picture(path: Path, title: str, panels: int = 2) -> Iterator[Any]:
    """Give the axes of a row of panels to draw on, and save them as a PNG; makes the folder."""
    import matplotlib

    matplotlib.use("Agg")  # ranks have no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4.2), layout="constrained")
    yield axes
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
