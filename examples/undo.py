"""Can training undo the normalization, where a network gains by it? Weight and bias of batch norm learn to.

Two tasks on scikit-learn's digits in which the output has to have the means and the standard deviations of the pixels,
which a normalization takes away:

* ``identity``  a batch norm layer alone, fed with the images, has to give them back: that is weight = sqrt(var + eps)
  and bias = mean, which nobody sets;
* ``code``      an autoencoder with a code of 24 numbers and batch norm at its end has to give the images back.

Pixels that are white in nearly all images are left out: their statistics are those of a few images.

Each with ``local`` and ``sync`` batch norm, and with synchronized batch norm that has no weight and bias (``plain``).
Adam, no weight decay. ::

    python -m syncbn.launch -n 4 examples/undo.py

It prints a table and writes ``curves.csv`` (test error by epoch), ``channels.csv`` (what weight and bias have become,
beside the pixels' statistics) and ``undo.png`` into the folder given by ``--out``.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from digits import load_data
from torch import Tensor, nn
from training import Run, average_gradients, batches, normalization

import syncbn

LABELS = pictures.labels("local", "sync", "plain")
TASKS = {"identity": "the layer alone", "code": "autoencoder"}
CODE = 24
ALIVE = 0.1  # least standard deviation of a pixel


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of ``curves.csv``: squared error of test images with running statistics, over the pixels' variance."""

    task: str
    norm: str
    seed: int
    epoch: int
    error: float


@dataclasses.dataclass(frozen=True)
class Channel:
    """One line of ``channels.csv``: weight and bias after training, of seed 0, and what undoes the normalization."""

    task: str
    norm: str
    channel: int
    weight: float
    bias: float
    std: float
    mean: float


def load_pixels() -> tuple[Tensor, Tensor]:
    """Return the images for training and for the test, without pixels that hardly vary."""
    data = load_data()
    alive = data.train_x.std(0) > ALIVE
    return data.train_x[:, alive], data.test_x[:, alive]


def build(task: str, norm: str, seed: int, pixels: int) -> nn.Sequential:
    """Return the network of a task, whose last layer is the batch norm."""
    torch.manual_seed(seed)
    last = syncbn.SyncBatchNorm(pixels, affine=False) if norm == "plain" else normalization(norm)(pixels)
    if task == "identity":
        return nn.Sequential(last)
    return nn.Sequential(nn.Linear(pixels, CODE), nn.ReLU(), nn.Linear(CODE, pixels), last)


def error_of(model: nn.Module, x: Tensor) -> float:
    """Return the error of a `Point`; leaves the model in training mode."""
    model.eval()
    with torch.no_grad():
        error = (model(x) - x).square().mean() / x.var(0).mean()
    model.train()
    return error.item()


def measure(args: argparse.Namespace, case: tuple[str, int]) -> Iterator[Any]:
    """Train the networks of a task with one seed side by side."""
    (task, seed), (train_x, test_x) = case, load_pixels()
    models = {norm: build(task, norm, seed, train_x.shape[1]) for norm in LABELS}
    learning = [norm for norm, model in models.items() if list(model.parameters())]  # a plain layer alone has none
    runs = [Run(norm, seed, models[norm], args.lr) for norm in learning]
    optimizers = [torch.optim.Adam(run.model.parameters(), args.lr) for run in runs]
    total = args.samples * dist.get_world_size()
    for epoch in range(args.epochs):
        for mine in batches(len(train_x), total, seed, epoch):
            x = train_x[mine]
            for norm, model in models.items():
                model.zero_grad()
                loss = (model(x) - x).square().mean()
                if norm in learning:
                    loss.backward()
            average_gradients(runs)
            for optimizer in optimizers:
                optimizer.step()
        for norm, model in models.items():
            yield Point(task, norm, seed, epoch + 1, error_of(model, test_x))
    if seed == 0:
        std, mean = torch.std_mean(train_x, 0, correction=0)
        for norm, model in models.items():
            layer: Any = model[-1]
            if layer.affine:
                yield from channels(task, norm, layer, std, mean)


def channels(task: str, norm: str, layer: Any, std: Tensor, mean: Tensor) -> Iterator[Channel]:
    """Yield what weight and bias have become."""
    table = torch.stack([layer.weight.detach(), layer.bias.detach(), std, mean], 1).tolist()
    yield from (Channel(task, norm, i, *row) for i, row in enumerate(table))


def closeness(rows: list[Channel], task: str, norm: str) -> tuple[float, float]:
    """Return the correlations over channels of weight with standard deviation, and of bias with mean."""
    own = [row for row in rows if (row.task, row.norm) == (task, norm)]
    columns = torch.tensor([[abs(row.weight), row.std, row.bias, row.mean] for row in own], dtype=torch.float64).T
    of_weight, of_bias = (torch.corrcoef(pair)[0, 1].item() for pair in columns.split(2))
    return of_weight, of_bias


def draw(folder: Path) -> None:
    """Draw the error by epoch of both tasks, and weight and bias against what undoes the normalization."""
    rows = experiment.read_csv(folder / "channels.csv", Channel)
    points = experiment.read_csv(folder / "curves.csv", Point)
    epochs = sorted({point.epoch for point in points})
    title = f"Undoing the normalization, digits: {experiment.spread(points)}"
    with pictures.figure(folder / "undo.png", title, panels=4) as axes:
        for axis, (task, name) in zip(axes, TASKS.items(), strict=False):
            for norm in LABELS:
                curves = experiment.curves(points, "error", "epoch", epochs, task=task, norm=norm)
                axis.errorbar(epochs, *curves, **pictures.look(norm, markersize=4))
            axis.set(yscale="log", xlabel="epoch", ylabel="test error / variance", title=name)
        for axis, (learnt, due) in zip(axes[2:], (("weight", "std"), ("bias", "mean")), strict=True):
            own = [row for row in rows if row.task == "identity"]
            for norm in ("local", "sync"):
                mine = [row for row in own if row.norm == norm]
                axis.plot(
                    [getattr(row, due) for row in mine],
                    [getattr(row, learnt) for row in mine],
                    **pictures.look(norm, ls="", alpha=0.7),
                )
            most = max(getattr(row, due) for row in own)
            axis.plot([0, most], [0, most], color=pictures.LIMIT, ls="--", lw=1)
            name = {"std": "standard deviation", "mean": "mean"}[due]
            axis.set(xlabel=f"{name} of a pixel", ylabel=f"{learnt} after training", title=TASKS["identity"])
        pictures.legend_below(axes[:1], columns=3)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the errors, and how close weight and bias have come."""
    lines = []
    for task, name in TASKS.items():
        for norm, label in LABELS.items():
            last = experiment.over_seeds(tables["curves"], "error", task=task, norm=norm, epoch=args.epochs)
            close = ("-", "-")
            if norm != "plain":
                of_weight, of_bias = closeness(tables["channels"], task, norm)
                close = (f"{of_weight:.3f}", f"{of_bias:.3f}")
            lines.append([name, label, experiment.cell(last, 4), *close])
    header = ["task", "layer", "test error / variance", "correlation of weight and std", "of bias and mean"]
    print(experiment.markdown(header, lines))


EXPERIMENT = experiment.Experiment(
    about="Weight and bias of batch norm, where a network gains by undoing the normalization.",
    options={
        "samples": (8, 8),
        "seeds": (2, 3),
        "epochs": (15, 20),
        "lr": (0.01, 0.01, "learning rate of Adam"),
    },
    tables={"curves": Point, "channels": Channel},
    cases=lambda args: [(task, seed) for task in TASKS for seed in range(args.seeds)],
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
