"""Contrastive pre-training in small: does batch norm over a rank's own samples tell which rank a view is from?

Each image is shown in two augmented views. A network learns to find the second view of an image among those of all
ranks (InfoNCE, as in SimCLR and MoCo), and a linear classifier on its features is trained with few labels. With local
statistics, both views of an image are normalized together with views of the same other images, which the second views
on other ranks are not: the network may learn to recognize the company instead of the image. He et al. (2020, MoCo)
shuffle samples over the ranks against it, Chen et al. (2020, SimCLR) synchronize.

Four networks that differ in the batch norm of their projector (the encoder has none):

* ``local``     `nn.BatchNorm1d`: the statistics of this rank's samples;
* ``shuffled``  the same, but the second views are shuffled over the ranks before they are normalized;
* ``sync``      `syncbn.SyncBatchNorm`: those of all ranks;
* ``group``     group normalization.

What leaks is measured on new views: how often the second view is found when the company is that of training, less
how often it is found when the second views are shuffled. ::

    python -m syncbn.launch -n 4 examples/contrastive.py

It prints a table and writes ``runs.csv`` and ``contrastive.png`` into the folder given by ``--out``.
"""

import argparse
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import load_data
from torch import Tensor, nn
from training import (
    Run,
    average_gradients,
    in_epoch,
    normalization,
    stacked_batches,
    stacked_mlp,
    warm_up_and_cosine,
)

LABELS = pictures.labels("local", "shuffled", "sync", "group")
FEATURES = 64
TEMPERATURE = 0.2
LABELLED = 5  # images of each class for the linear classifier
DRAWS = 5  # of labelled images


@dataclasses.dataclass(frozen=True)
class Result(experiment.Trained):
    """One line of ``runs.csv``.

    `found` and `found_shuffled`: percent of the images whose second view is the nearest of all, with the company of
    training and with shuffled second views. `loss`: of the last epoch, in nats. `probe`: test accuracy in percent of a
    linear classifier on the encoder's features; `pixels`: on the pixels themselves.
    """

    found: float
    found_shuffled: float
    loss: float
    probe: float
    pixels: float


class Projected(nn.Module):
    """Encoders without normalization, and projectors with batch norm behind both their layers, one for each seed.

    Shape: (N, seeds, 64) to (N, seeds, 32).
    """

    def __init__(self, norm: str, seeds: range) -> None:
        super().__init__()
        norm = "local" if norm == "shuffled" else norm
        layer = normalization(norm, len(seeds))(32 * len(seeds))
        self.encoder = stacked_mlp((64, 128, FEATURES, 1), "none", seeds)[:2]
        projector = stacked_mlp((FEATURES, 64, 32), norm, seeds)[:-1]
        self.projector = nn.Sequential(projector, nn.Flatten(1), layer, nn.Unflatten(1, (-1, 32)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the projections, of length 1."""
        return F.normalize(self.projector(self.encoder(x)), dim=2)


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """Return views of images: turned by up to 15 degrees, scaled, shifted by a pixel, of other contrast, noisy."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=chance)

    angle, scale = uniform(-0.26, 0.26), uniform(0.85, 1.15)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale.view(-1, 1, 1)
    shift = torch.stack([uniform(-0.25, 0.25), uniform(-0.25, 0.25)], 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([turn, shift], 2), [count, 1, 8, 8], align_corners=False)
    views = F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    views = views * uniform(0.6, 1.4).unsqueeze(1)
    return views + 0.1 * torch.randn(views.shape, generator=chance)


class Gathered(torch.autograd.Function):
    """All ranks' rows, of the same number each; the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return them in order of the ranks."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return this rank's part."""
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def second_projections(model: nn.Module, views: Tensor, shuffle: torch.Generator | None) -> Tensor:
    """Return the projections of all ranks' second views, in order of the ranks; shuffled over the ranks on the way."""
    if shuffle is None:
        return Gathered.apply(model(views))
    everything = Gathered.apply(views)
    order = torch.randperm(len(everything), generator=shuffle)
    mine = order.view(dist.get_world_size(), -1)[dist.get_rank()]
    return Gathered.apply(model(everything[mine]))[order.argsort()]


def similarities(model: nn.Module, views: tuple[Tensor, Tensor], shuffle: torch.Generator | None) -> Tensor:
    """Return how similar this rank's first views are to the second views of all ranks: (N, all, seeds)."""
    return torch.einsum("nsd,msd->nms", model(views[0]), second_projections(model, views[1], shuffle)) / TEMPERATURE


def targets(mine: Tensor) -> Tensor:
    """Return which of all ranks' second views are those of this rank's images: (N, seeds)."""
    return (dist.get_rank() * len(mine) + torch.arange(len(mine))).unsqueeze(1).expand(mine.shape)


def two_views(x: Tensor, mine: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two augmented views of the images of these indices, each (N, seeds, 64)."""
    first, second = (augmented(x[mine.flatten()], chance).view(*mine.shape, -1) for _ in range(2))
    return first, second


def found(model: nn.Module, x: Tensor, samples: int, seeds: range, shuffled: bool) -> list[float]:
    """Return the percentage of training images whose second view is nearest, with statistics as in training."""
    model = copy.deepcopy(model).train()
    hits, number = torch.zeros(len(seeds), dtype=torch.float64), 0
    shuffle = torch.Generator().manual_seed(0) if shuffled else None
    chance = torch.Generator().manual_seed(7 + 1000 * dist.get_rank())
    with torch.no_grad():
        for epoch in range(2):
            for mine in stacked_batches(len(x), samples * dist.get_world_size(), seeds, 500 + epoch):
                scores = similarities(model, two_views(x, mine, chance), shuffle)
                hits += (scores.argmax(1) == targets(mine)).double().sum(0)
                number += len(mine)
    dist.all_reduce(hits)
    by_seed: list[float] = (100 * hits / number / dist.get_world_size()).tolist()
    return by_seed


def probe(train: Tensor, test: Tensor) -> float:
    """Return the test accuracy in percent of a linear classifier on few labelled rows, a mean over their draws."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    data = load_data()
    scores = []
    for draw in range(DRAWS):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
        classes = data.train_y[order]
        few = torch.cat([order[classes == kind][:LABELLED] for kind in range(10)])
        scaler = StandardScaler().fit(train)
        classifier = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(train[few]), data.train_y[few])
        scores.append(classifier.score(scaler.transform(test), data.test_y))
    return 100 * sum(scores) / len(scores)


def measure(args: argparse.Namespace, case: tuple[int]) -> Iterator[Result]:
    """Train all networks at one number of samples per device, and look at what they have learnt."""
    (samples,), x, world, seeds = case, load_data().train_x, dist.get_world_size(), range(args.seeds)
    total = samples * world
    runs = [Run(norm, 0, Projected(norm, seeds), args.lr * total / 32) for norm in LABELS]
    steps, done = in_epoch(load_data(), samples) * args.epochs, 0
    last = torch.zeros(len(runs), len(seeds), dtype=torch.float64)
    chance = torch.Generator().manual_seed(1000 * dist.get_rank())  # other views on each rank
    shuffle = torch.Generator().manual_seed(0)  # and the same order on all
    with experiment.progress(steps) as bar:
        for epoch in range(args.epochs):
            for mine in stacked_batches(len(x), total, seeds, epoch):
                views = two_views(x, mine, chance)
                for number, run in enumerate(runs):
                    scores = similarities(run.model, views, shuffle if run.norm == "shuffled" else None)
                    loss = F.cross_entropy(scores, targets(mine), reduction="none").mean(0)
                    run.optimizer.zero_grad()
                    loss.sum().backward()
                    if epoch == args.epochs - 1:
                        last[number] += loss.detach() * args.epochs / steps / world
                average_gradients(runs)
                for run in runs:
                    run.optimizer.param_groups[0]["lr"] = warm_up_and_cosine(done, steps, run.peak)
                    run.optimizer.step()
                done += 1
                bar.update()
    dist.all_reduce(last)
    counts = dist.get_rank() == 0  # of the others' rows nothing is kept
    pixels = probe(x, load_data().test_x) if counts else 0.0
    for run, losses in zip(runs, last.tolist(), strict=True):
        as_trained, other = (found(run.model, x, samples, seeds, shuffled) for shuffled in (False, True))
        if not counts:
            continue
        columns = zip(as_trained, other, losses, probes(run.model, seeds), strict=True)
        for seed, column in enumerate(columns):
            yield Result(run.norm, samples, world, seed, args.epochs, *column, pixels)


def probes(model: Any, seeds: range) -> list[float]:
    """Return the linear classifiers' accuracies on the features of each seed's encoder."""
    data = load_data()
    with torch.no_grad():
        train, test = (model.encoder(x.unsqueeze(1).expand(-1, len(seeds), -1)) for x in (data.train_x, data.test_x))
    return [probe(train[:, i], test[:, i]) for i in range(len(seeds))]


def draw(folder: Path) -> None:
    """Draw how often the second view is found, by company, and the linear classifier's accuracy, from the CSV."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    samples, first = sorted({result.samples_per_device for result in results}), results[0]
    title = f"Contrastive pre-training, digits, {first.ranks} ranks: {experiment.spread(results)}"
    with pictures.figure(folder / "contrastive.png", title) as (left, right):
        for norm in LABELS:
            for field, style in (("found", {}), ("found_shuffled", {"ls": "--", "mfc": "white"})):
                if style and norm not in ("local", "shuffled"):
                    continue  # its statistics do not depend on the company on a rank
                label = LABELS[norm] + (", other company" if style else "")
                curves = experiment.curves(results, field, "samples_per_device", samples, norm=norm)
                left.errorbar(samples, *curves, **pictures.look(norm, label=label, **style))
            curves = experiment.curves(results, "probe", "samples_per_device", samples, norm=norm)
            right.errorbar(samples, *curves, **pictures.look(norm))
        right.axhline(first.pixels, color=pictures.LIMIT, ls=":", lw=1.2, label="classifier on pixels")
        for axis in (left, right):
            pictures.powers_of_two(axis, samples, "samples per device")
        left.set_ylabel("second view found (%)")
        right.set_ylabel(f"linear probe,\n{LABELLED} labels a class (%)")
        pictures.legend_below([left, right], columns=3)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print what leaks, and what the features are good for."""
    results: list[Result] = tables["runs"]
    lines = []
    for count in args.samples:
        for norm, label in LABELS.items():
            cell = functools.partial(experiment.over_seeds, results, norm=norm, samples_per_device=count)
            leak = experiment.mean_and_std(
                result.found - result.found_shuffled
                for result in results
                if (result.norm, result.samples_per_device) == (norm, count)
            )
            fields = {"found": 1, "found_shuffled": 1}
            lines.append(
                [
                    count,
                    label,
                    *(experiment.cell(cell(field), digits) for field, digits in fields.items()),
                    experiment.cell(leak, 1),
                    experiment.cell(cell("loss"), 3),
                    experiment.cell(cell("probe"), 1),
                ]
            )
    header = ["samples per device", "normalization", "found %", "found, shuffled %", "leak (points)", "loss", "probe %"]
    print(experiment.markdown(header, lines))
    print(f"The same linear classifier on pixels: {results[0].pixels:.1f} %")


EXPERIMENT = experiment.Experiment(
    about="Contrastive pre-training with local, shuffled, synchronized and group normalization.",
    options={
        "samples": ([2], [2, 8]),
        "seeds": (2, 3),
        "epochs": (4, 12),
        "lr": (0.2, 0.2),
    },
    tables={"runs": Result},
    cases=experiment.each_size,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
