"""Internal covariate shift: how far the distribution of each layer's input moves from one step to the next.

The claim of Ioffe and Szegedy (2015): what a layer sees changes as the layers before it learn, and batch norm holds it
still. Here multilayer perceptrons of five hidden layers learn scikit-learn's digits at two constant learning rates,
without normalization (``he``: with the initialization of He et al.), with local and with synchronized batch norm. Early
and late in training, mean and standard deviation of each channel are taken over the global batch, and three drifts:

* ``step``     from the batch of a step to that of the next, as the layer sees it: weights and samples change;
* ``weights``  from before a step to after it, on the same 512 samples: what is meant by the claim;
* ``batch``    from one batch to another, with the same weights: chance alone.

Each at two places: ``before`` the normalization, and ``after`` it, which is the input of the next layer. ::

    python -m syncbn.launch -n 4 examples/covariate_shift.py

It prints a table and writes ``drift.csv`` and ``covariate_shift.png`` into the folder given by ``--out``.
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
from depth import build
from digits import load_data
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from training import Data, Run, constant, stacked_batches, train_stacked

LABELS = pictures.labels("he", "local", "sync")
HIDDEN = 5
REFERENCE = 512  # samples, over all ranks, on which the drift by weights is measured
DEAD = 1e-8  # variance below which a channel has no distribution


@dataclasses.dataclass(frozen=True)
class Drift:
    """One line of ``drift.csv``: root mean squares over the channels of a layer and the steps of a window.

    `mean` is the change of a channel's mean in its standard deviations, `std` that of the logarithm of its standard
    deviation.
    """

    norm: str
    rate: float
    seed: int
    when: str
    place: str
    layer: int
    kind: str
    mean: float
    std: float


Moments = dict[
    tuple[str, int], tuple[Tensor, Tensor]
]  # by place and layer: means and variances, of shape (S, channels)


class Looking:
    """Takes the moments of a network's layers over the samples of all ranks, leaving the network as it is."""

    def __init__(self, model: nn.Module, seeds: int) -> None:
        self.model, self.seeds = model, seeds
        self.seen: dict[tuple[str, int], Tensor] = {}
        blocks = [block for block in model.children() if isinstance(block, nn.Sequential)]
        for layer, (_, _, norm, *_) in enumerate(blocks, 1):
            norm.register_forward_pre_hook(lambda _, x, key=("before", layer): self.keep(key, x[0]))
        for layer, block in enumerate(blocks, 1):
            block.register_forward_hook(lambda _, x, y, key=("after", layer): self.keep(key, y))

    def keep(self, key: tuple[str, int], x: Tensor) -> None:
        """Keep what goes by."""
        self.seen[key] = x.detach()

    def moments(self, x: Tensor) -> Moments:
        """Run a batch in training mode; all ranks call it with batches of one size."""
        norms = [layer for layer in self.model.modules() if isinstance(layer, _BatchNorm)]
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = 0.0
        with torch.no_grad():
            self.model(x)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        values = {key: value.view(len(value), self.seeds, -1).double() for key, value in self.seen.items()}
        sums = torch.cat([torch.stack([v.mean(0), v.square().mean(0)]).flatten() for v in values.values()])
        dist.all_reduce(sums)
        parts = (sums / dist.get_world_size()).split([2 * v[0].numel() for v in values.values()])
        found = {}
        for (key, value), part in zip(values.items(), parts, strict=True):
            mean, square = part.view(2, *value.shape[1:])
            found[key] = (mean, (square - mean.square()).clamp(min=0))
        return found


def drift(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """Return mean squares over channels of both changes, of shape (2, S); dead channels do not count."""
    (mean, var), (later, later_var) = old, new
    alive = (var > DEAD) & (later_var > DEAD)
    of_mean = torch.where(alive, (later - mean).square() / (0.5 * (var + later_var)), 0.0)
    of_std = torch.where(alive, (0.5 * (later_var / var).log()).square(), 0.0)
    return torch.stack([of_mean, of_std]).sum(2) / alive.sum(1).clamp(min=1)


class Observer:
    """Measures the drifts of stacked networks in windows at the start and at the end of training."""

    def __init__(self, args: argparse.Namespace, data: Data, runs: list[Run], total: int) -> None:
        self.args, self.data, self.total, self.world = args, data, total, dist.get_world_size()
        self.looks = [Looking(run.model, args.seeds) for run in runs]
        mine = torch.arange(REFERENCE).view(self.world, -1)[dist.get_rank()]
        self.reference = data.train_x[mine].unsqueeze(1).expand(-1, args.seeds, -1)
        self.last: list[dict[str, Moments]] = []
        self.sums: dict[tuple[int, str, str, int, str], list[Tensor]] = {}

    def after_step(self, runs: list[Run], step: int, steps: int) -> None:
        """Look at the networks before the step that is next, where a window is open: for `train_stacked`."""
        when = "early" if step <= self.args.window + 1 else "late" if step >= steps - self.args.window else ""
        per_epoch = steps // self.args.epochs
        if not when or step == steps:
            self.last = []
            return
        seeds = range(self.args.seeds)
        epoch, i = divmod(step, per_epoch)
        next_one = stacked_batches(len(self.data.train_x), self.total, seeds, epoch)[i]
        another = stacked_batches(len(self.data.train_x), self.total, seeds, 1000 + step)[0]
        now = []
        for number, look in enumerate(self.looks):
            found = {
                "step": look.moments(self.data.train_x[next_one]),
                "another": look.moments(self.data.train_x[another]),
                "weights": look.moments(self.reference),
            }
            now.append(found)
            pairs = [("batch", found["step"], found["another"])]
            if self.last:
                pairs += [(kind, self.last[number][kind], found[kind]) for kind in ("step", "weights")]
            for kind, old, new in pairs:
                for place, layer in old:
                    both = drift(old[place, layer], new[place, layer])
                    self.sums.setdefault((number, when, place, layer, kind), []).append(both)
        self.last = now

    def rows(self, runs: list[Run]) -> Iterator[Drift]:
        """Yield the root mean squares over the steps of each window."""
        for (number, when, place, layer, kind), squares in self.sums.items():
            run = runs[number]
            for seed, (mean, std) in enumerate(torch.stack(squares).mean(0).sqrt().T.tolist()):
                yield Drift(run.norm, run.peak, seed, when, place, layer, kind, mean, std)


def measure(args: argparse.Namespace, case: tuple[()]) -> Iterator[Any]:
    """Train all networks side by side, and look at them."""
    data, seeds, total = load_data(), range(args.seeds), args.samples * dist.get_world_size()
    runs = [Run(norm, 0, build(norm, HIDDEN, seeds), rate) for rate in args.rates for norm in LABELS]
    observer = Observer(args, data, runs, total)
    losses = train_stacked(runs, data, seeds, total, args.epochs, constant, observer.after_step)
    yield from observer.rows(runs)
    for run, by_epoch in zip(runs, losses, strict=True):
        yield experiment.Number(f"train loss of {run.norm} at {run.peak:g}", experiment.mean_and_std(by_epoch[-1])[0])


def draw(folder: Path) -> None:
    """Draw the drift of the means by weights and by batch, for each window and learning rate, from the CSV."""
    rows = [row for row in experiment.read_csv(folder / "drift.csv", Drift) if row.place == "after"]
    rates, layers = sorted({row.rate for row in rows}), sorted({row.layer for row in rows})
    title = f"Drift of the next layer's inputs in a step, digits: {experiment.spread(rows)}"
    with pictures.figure(folder / "covariate_shift.png", title, panels=2 * len(rates)) as axes:
        panels = [(when, rate) for when in ("early", "late") for rate in rates]
        for axis, (when, rate) in zip(axes, panels, strict=True):
            for kind, style in (("weights", {}), ("batch", {"ls": "--", "mfc": "white"})):
                for norm in LABELS:
                    same = {"norm": norm, "when": when, "rate": rate, "kind": kind}
                    label = f"{LABELS[norm]}: {'by weights' if kind == 'weights' else 'by batch alone'}"
                    curves = experiment.curves(rows, "mean", "layer", layers, **same)
                    axis.errorbar(layers, *curves, **pictures.look(norm, label=label, **style))
            axis.set(yscale="log", xlabel="hidden layer", title=f"{when}, learning rate {rate:g}")
            axis.set_ylabel("standard deviations")
            axis.set_ylim(1e-3, 2)
        pictures.legend_below(axes[:1], columns=2)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print the drifts, over all layers."""
    rows: list[Drift] = tables["drift"]
    lines = []
    for rate in args.rates:
        for when in ("early", "late"):
            for place in ("before", "after"):
                for norm, label in LABELS.items():
                    same = {"norm": norm, "rate": rate, "when": when, "place": place}
                    cells = [
                        f"{experiment.over_seeds(rows, field, kind=kind, **same)[0]:.3f}"
                        for field in ("mean", "std")
                        for kind in ("step", "weights", "batch")
                    ]
                    lines.append([f"{rate:g}", when, place, label, *cells])
    header = ["rate", "when", "place", "layer", *(f"mean, {k}" for k in ("step", "weights", "batch"))]
    print(experiment.markdown([*header, *(f"std, {k}" for k in ("step", "weights", "batch"))], lines))
    for number in tables["numbers"]:
        print(f"{number.name}: {number.value:.3f}")


EXPERIMENT = experiment.Experiment(
    about="The drift of each layer's input from step to step, and the part of it that is chance.",
    options={
        "samples": (8, 8),
        "seeds": (2, 3),
        "epochs": (3, 5),
        "rates": ([0.03, 0.1], [0.03, 0.1], "learning rates"),
        "window": (10, 25, "steps that are measured, early and late"),
    },
    tables={"drift": Drift, "numbers": experiment.Number},
    cases=lambda args: [()],
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
