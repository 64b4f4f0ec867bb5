"""What the experiments measure on: the data, the network, and training several networks side by side.

Not a script: the experiments beside it import it.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from experiment import progress
from torch import Tensor, nn

import syncbn

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as missing:
    text = f"{Path(sys.argv[0]).name} needs {missing.name}, of the extra [examples]: pip install '.[examples]'"
    sys.exit(text if os.environ.get("RANK", "0") == "0" else 0)  # said once, and a failure of the job


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

    def epoch_losses(self, epochs: int) -> list[float]:
        """Return the mean loss of each epoch."""
        steps = len(self.losses) // epochs
        return [sum(self.losses[epoch * steps : (epoch + 1) * steps]) / steps for epoch in range(epochs)]


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


def mlps(norms: Iterable[str]) -> dict[str, Callable[[int], nn.Sequential]]:
    """Return, by the names of their normalizations, functions that build the network for a seed."""
    return {norm: functools.partial(build_mlp, norm) for norm in norms}


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


def sweep(
    args: argparse.Namespace,
    data: Digits,
    networks: Mapping[str, Callable[[int], nn.Sequential]],
    lr: float = 0.1,
    after_step: Callable[[list[Run], float], None] = lambda runs, progress: None,
) -> Iterator[tuple[int, list[Run]]]:
    """Train `args.seeds` of each of the `networks` at each of `args.samples` samples per device, for `args.epochs`.

    Args:
        networks: by name, functions that build a network for a seed.
        lr: peak learning rate at a total batch of 32; it scales linearly.
        after_step: called after each step, with the progress of the training from 0 to 1.

    Yields the samples per device and the trained runs.
    """
    world = dist.get_world_size()
    in_epoch = {samples: len(data.train_x) // (samples * world) for samples in args.samples}
    with progress(sum(in_epoch.values()) * args.epochs) as bar:
        for samples, steps in in_epoch.items():
            bar.set_description(f"{samples} samples per device")
            peak = lr * samples * world / 32
            runs = [
                Run(norm, seed, build(seed), peak) for norm, build in networks.items() for seed in range(args.seeds)
            ]
            for step, _ in enumerate(train(runs, data, samples * world, args.epochs), 1):
                bar.update()
                after_step(runs, step / (steps * args.epochs))
            yield samples, runs


def test_accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test images that the model, with its running statistics, gets right, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(data.test_x).argmax(1) == data.test_y
    return 100 * hits.double().mean().item()
