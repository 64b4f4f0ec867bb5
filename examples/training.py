"""What the experiments train with: networks side by side on real ranks, and the layers that they compare.

Not a script: the experiments beside it import it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from experiment import progress
from torch import Tensor, nn

import syncbn


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples and what they are, for training and for the test: inputs float32, classes int64, samples first.

    `weights`, where given, are those of the classes in the loss.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    weights: Tensor | None = None

    def loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """Return the cross entropy in nats: a mean over all values, so that ranks can be averaged."""
        return F.cross_entropy(outputs, classes, self.weights, reduction="none").mean()


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
    model: nn.Module
    peak: float
    losses: list[float] = dataclasses.field(default_factory=list)
    optimizer: torch.optim.Optimizer = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def epoch_losses(self, epochs: int) -> list[float]:
        """Return the mean loss of each epoch."""
        steps = len(self.losses) // epochs
        return [sum(self.losses[epoch * steps : (epoch + 1) * steps]) / steps for epoch in range(epochs)]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """PyTorch's own batch norm, over this rank's samples, for inputs of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@functools.cache
def groups_of(ranks: int) -> dist.ProcessGroup:
    """Return this rank's group of so many neighbours; all ranks call it."""
    return dist.new_subgroups(ranks)[0]


def normalization(norm: str, networks: int = 1) -> Callable[[int], nn.Module]:
    """Return what makes the layer of this name for a number of channels; all ranks call it.

    The names are those of `pictures.METHODS`, and ``"sync 2"`` for synchronization over groups of two ranks.
    ``"frozen"`` is synchronized until `freeze` is called. The channels are those of so many networks side by side.
    """
    if norm == "half" or norm.startswith("sync "):
        size = max(dist.get_world_size() // 2, 1) if norm == "half" else int(norm.removeprefix("sync "))
        return functools.partial(syncbn.SyncBatchNorm, process_group=groups_of(size))
    layers: dict[str, Callable[[int], nn.Module]] = {
        "local": BatchNorm,
        "sync": syncbn.SyncBatchNorm,
        "frozen": syncbn.SyncBatchNorm,
        "group": lambda width: nn.GroupNorm(networks * min(8, width // networks), width),
        "none": lambda width: nn.Identity(),
    }
    return layers[norm]


def freeze(model: nn.Module) -> None:
    """Let the batch norm layers normalize with their running statistics from now on; weight and bias still learn."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


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
    data: Data,
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
                loss = data.loss(run.model(data.train_x[mine]), data.train_y[mine])
                run.optimizer.zero_grad()
                loss.backward()
                run.losses.append(loss.item())
            average_gradients(runs)
            for run in runs:
                run.optimizer.param_groups[0]["lr"] = schedule(epoch * (steps // epochs) + i, steps, run.peak)
                run.optimizer.step()
            yield
    average_losses(runs)


def in_epoch(data: Data, samples: int) -> int:
    """Return the number of steps of an epoch with so many samples per device."""
    return len(data.train_x) // (samples * dist.get_world_size())


def train_side_by_side(
    networks: Mapping[str, Callable[[int], nn.Module]],
    seeds: Iterable[int],
    data: Data,
    samples: int,
    epochs: int,
    lr: float,
    after_step: Callable[[list[Run], float], None] = lambda runs, progress: None,
    rates: Mapping[str, float] | None = None,
) -> list[Run]:
    """Train each of the networks with each of the seeds, and return the runs.

    Args:
        networks: by the names of their normalizations, functions that build the network for a seed.
        samples: per device.
        lr: peak learning rate at a total batch of 32; it scales linearly.
        after_step: called after each step, with the progress of the training from 0 to 1.
        rates: of single normalizations, instead of `lr`.
    """
    total, steps = samples * dist.get_world_size(), in_epoch(data, samples) * epochs
    peaks = {norm: (rates or {}).get(norm, lr) * total / 32 for norm in networks}
    runs = [Run(norm, seed, build(seed), peaks[norm]) for norm, build in networks.items() for seed in seeds]
    with progress(steps) as bar:
        for step, _ in enumerate(train(runs, data, total, epochs), 1):
            bar.update()
            after_step(runs, step / steps)
    return runs


def stacked_batches(count: int, total_batch: int, seeds: Iterable[int], epoch: int) -> list[Tensor]:
    """Return this rank's sample indices for one epoch, each of shape (samples, seeds), for stacked networks."""
    orders = [batches(count, total_batch, seed, epoch) for seed in seeds]
    return [torch.stack(each, 1) for each in zip(*orders, strict=True)]


def train_stacked(
    runs: list[Run],
    data: Data,
    seeds: range,
    total_batch: int,
    epochs: int,
    schedule: Callable[[int, int, float], float] = warm_up_and_cosine,
    after_step: Callable[[list[Run], int, int], None] = lambda runs, step, steps: None,
) -> list[list[list[float]]]:
    """Train networks that hold those of all seeds side by side, and return each run's losses: by epoch, by seed.

    Shapes: a network maps (N, seeds, ...) to (N, classes, seeds). The losses are means over the epoch and the ranks.
    `after_step` is called with the number of steps taken and of all steps.
    """
    in_epoch = len(data.train_x) // total_batch
    steps = in_epoch * epochs
    losses = torch.zeros(len(runs), epochs, len(seeds), dtype=torch.float64)
    with progress(steps) as bar:
        for epoch in range(epochs):
            for i, mine in enumerate(stacked_batches(len(data.train_x), total_batch, seeds, epoch)):
                x, y = data.train_x[mine], data.train_y[mine]
                for r, run in enumerate(runs):
                    loss = F.cross_entropy(run.model(x), y, reduction="none").mean(0)
                    run.optimizer.zero_grad()
                    loss.sum().backward()
                    losses[r, epoch] += loss.detach() / in_epoch
                average_gradients(runs)
                for run in runs:
                    run.optimizer.param_groups[0]["lr"] = schedule(epoch * in_epoch + i, steps, run.peak)
                    run.optimizer.step()
                bar.update()
                after_step(runs, epoch * in_epoch + i + 1, steps)
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def compare(
    norms: Iterable[str],
    build: Callable[[str, range], nn.Module],
    data: Data,
    samples: int,
    seeds: range,
    epochs: int,
    lr: float,
    after_step: Callable[[list[Run], int, int], None] = lambda runs, step, steps: None,
) -> list[tuple[Run, list[list[float]]]]:
    """Train stacked networks that differ in their normalization alone; return each with its losses (`train_stacked`).

    Args:
        build: makes the networks of all seeds, side by side, with normalization of this name.
        samples: per device.
        lr: peak learning rate at a total batch of 32; it scales linearly.
    """
    total = samples * dist.get_world_size()
    runs = [Run(norm, 0, build(norm, seeds), lr * total / 32) for norm in norms]
    losses = train_stacked(runs, data, seeds, total, epochs, after_step=after_step)
    return list(zip(runs, losses, strict=True))


GOAL = 90.0  # percent of test samples: how many epochs it takes to get there
LOOKS = 6  # in an epoch, at the test accuracy


class Watch:
    """Watches how many epochs stacked networks take until they get `GOAL` percent of the test samples right.

    Args:
        data: that they learn.
        seeds: how many networks are stacked.
        epochs: of training.
    """

    def __init__(self, data: Data, seeds: int, epochs: int) -> None:
        self.data, self.seeds, self.epochs = data, seeds, epochs
        self.needed: dict[int, list[float]] = {}  # by the runs' identities

    def after_step(self, runs: list[Run], step: int, steps: int) -> None:
        """Look at all networks, `LOOKS` times in an epoch: for `train_stacked`."""
        if step % max(steps // (self.epochs * LOOKS), 1):
            return
        for run in runs:
            needed = self.needed.setdefault(id(run), [math.inf] * self.seeds)
            if math.inf not in needed:
                continue
            right = accuracies(run.model, self.data.test_x, self.data.test_y, self.seeds)
            run.model.train()
            for seed, percent in enumerate(right):
                if percent >= GOAL:
                    needed[seed] = min(needed[seed], step / steps * self.epochs)

    def epochs_needed(self, runs: list[Run]) -> list[list[float]]:
        """Return, for each run and seed, after how many epochs it was first seen there; infinite if it never was."""
        return [self.needed[id(run)] for run in runs]


class StackedLinear(nn.Module):
    """S linear layers side by side: shape (N, S, inputs) to (N, S, outputs)."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]).unsqueeze(1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply layer s to row s of each sample."""
        return torch.baddbmm(self.bias, input.transpose(0, 1), self.weight).transpose(0, 1)


class Transposed(nn.Module):
    """(N, S, classes) to (N, classes, S)."""

    def forward(self, input: Tensor) -> Tensor:
        """Swap the two."""
        return input.transpose(1, 2)


def stacked_mlp(widths: Sequence[int], norm: str | Callable[[int], nn.Module], seeds: range) -> nn.Sequential:
    """Return multilayer perceptrons side by side, one for each seed, with normalization after their hidden layers.

    Batch norm treats each channel by itself, so this is training them one by one, with one message for all where each
    would send its own. Each has the weights of `nn.Linear` layers that are made in their order after its seed.

    Args:
        widths: of the input, the hidden layers and the output.
        norm: a name that `normalization` knows, or a function that makes the layer for a number of channels.

    Shape: (N, seeds, widths[0]) to (N, widths[-1], seeds).
    """
    linears: list[list[nn.Linear]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        linears.append([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    *inner, last = (StackedLinear(list(layers)) for layers in zip(*linears, strict=True))
    layer = normalization(norm, len(seeds)) if isinstance(norm, str) else norm
    blocks = [
        nn.Sequential(linear, nn.Flatten(1), layer(len(seeds) * width), nn.ReLU(), nn.Unflatten(1, (-1, width)))
        for linear, width in zip(inner, widths[1:-1], strict=True)
    ]
    return nn.Sequential(*blocks, last, Transposed())


def accuracies(model: nn.Module, x: Tensor, y: Tensor, seeds: int) -> list[float]:
    """Return each stacked network's share of samples that it gets right with its running statistics, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(x.unsqueeze(1).expand(-1, seeds, *x.shape[1:])).argmax(1) == y.unsqueeze(1)
    return (100 * hits.double().mean(0)).tolist()
