"""Padded sequences on ranks with different numbers of them: exact, and what ignoring the mask costs.

Handwritten digits are read row by row, each at a speed of its own, so that they are sequences of 4 to 16 rows; they are
padded to one length. A network of two convolutions along the rows classifies them. Two questions:

* *Exact?* Ranks hold 1, 2, 3, ... sequences, each rank pads to its own longest, and one has no sequences left in the
  last third of the steps. In float64 the loss of each step is compared with that of one process which holds the whole
  batch (`syncbn.uneven.joined`, ``mask=``). The control, which ignores the mask, must differ.
* *What does ignoring the mask cost?* Test accuracy with statistics over the valid positions, and over all, by the
  length that everything is padded to, with local and with synchronized batch norm. Only the layers ignore it:
  convolutions see zeros in the padding, and the mean over positions leaves it out.

::

    python -m syncbn.launch -n 4 examples/padded.py

It prints a table and writes ``steps.csv``, ``runs.csv`` and ``padded.png`` into the folder given by ``--out``; the exit
code is 1 if a loss is off by more than 1e-12, or the control by less.
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
from digits import load_data, test_accuracy
from torch import Tensor, nn
from training import Data, Run, average_gradients, groups_of, train_side_by_side

import syncbn
from syncbn.masked import sequence_mask
from syncbn.uneven import joined

LABELS = pictures.labels("sync", "local")
LENGTHS = (4, 16)  # of the sequences
WIDTH = 32
TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Result(experiment.Classified):
    """One line of ``runs.csv``: `padded` is the length that sequences are padded to, `mask` used or ignored."""

    padded: int
    mask: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of ``steps.csv``: how far the loss is from one process's, and how many ranks hold nothing."""

    mask: str
    step: int
    loss_difference: float
    empty: int


def read(images: Tensor, padded: int, seed: int) -> Tensor:
    """Return sequences of rows with a further channel that is 1 at valid positions: shape ``(N, 9, padded)``."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (len(images),), generator=chance)
    rows = images.view(-1, 8, 8).transpose(1, 2)  # 8 values for each of 8 rows
    sequences = torch.zeros(len(images), 9, padded)
    for length in range(LENGTHS[0], LENGTHS[1] + 1):
        there = lengths == length
        sequences[there, :8, :length] = F.interpolate(rows[there], size=length, mode="linear")
    sequences[:, 8:] = sequence_mask(lengths, padded)
    return sequences


@functools.cache
def load_sequences(padded: int) -> Data:
    """Return the sequences for training and for the test."""
    data = load_data()
    return dataclasses.replace(data, train_x=read(data.train_x, padded, 0), test_x=read(data.test_x, padded, 1))


class Reader(nn.Module):
    """Two convolutions with batch norm and ReLU, the mean over valid positions, and a linear layer.

    Args:
        process_group: of the layers.
        mask: whether they take their statistics over the valid positions alone.

    Shape: ``(N, 9, L)``, as `read` makes it, to ``(N, 10)``.
    """

    def __init__(self, process_group: Any, mask: bool) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, WIDTH, 3, padding=1, bias=False) for channels in (8, WIDTH)
        )
        self.norms = nn.ModuleList(syncbn.SyncBatchNorm(WIDTH, process_group=process_group) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)
        self.mask = mask

    def forward(self, sequences: Tensor) -> Tensor:
        """Return the logits."""
        x, mask = sequences[:, :8], sequences[:, 8:] > 0
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x), mask=mask if self.mask else None).relu().masked_fill(~mask, 0.0)
        return self.head(x.sum(2) / mask.sum(2))


def build(group: Any, mask: bool, seed: int) -> Reader:
    """Return the network, with weights that `seed` fixes on every rank."""
    torch.manual_seed(seed)
    return Reader(group, mask)


def cut(sequences: Tensor) -> Tensor:
    """Cut the padding that all sequences of a batch have."""
    longest = int(sequences[:, 8].sum(1).max()) if len(sequences) else LENGTHS[1]
    return sequences[:, :, :longest]


def compare_with_one_process(mask: bool, steps: int) -> list[Step]:
    """Train uneven ranks beside rank 0 alone with their whole batches; return the differences of the losses."""
    rank, world, data = dist.get_rank(), dist.get_world_size(), load_sequences(LENGTHS[1])
    shares = [steps if r < world - 1 else steps - steps // 3 for r in range(world)]  # the last rank runs out early
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    batch = world * (world + 1) // 2
    rows = [order[torch.arange(i * batch, (i + 1) * batch) % len(order)] for i in range(steps)]
    parts = [list(row.split([r + 1 for r in range(world)])) for row in rows]
    mine = [(cut(data.train_x[part[rank]]), data.train_y[part[rank]]) for part in parts[: shares[rank]]]
    run = Run("sync", 0, build(None, mask, 0).double(), 0.0)
    one = copy.deepcopy(run.model)
    alone = groups_of(1)
    for norm in one.norms:  # type: ignore[union-attr]
        norm.process_group = alone
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (run.model, one)]
    found = []
    for number, step in enumerate(joined(mine, count=lambda pair: len(pair[1]))):
        x, y = step.data
        loss = step.loss_from_mean(F.cross_entropy, run.model(x.double()), y)
        optimizers[0].zero_grad()
        loss.backward()
        average_gradients([run])
        optimizers[0].step()
        value = loss.detach() / world
        dist.all_reduce(value)
        if rank == 0:
            there = torch.cat([part for r, part in enumerate(parts[number]) if number < shares[r]])
            expected = F.cross_entropy(one(data.train_x[there].double()), data.train_y[there])
            optimizers[1].zero_grad()
            expected.backward()
            optimizers[1].step()
            empty = sum(number >= share for share in shares)
            found.append(Step("used" if mask else "ignored", number + 1, abs(value.item() - expected.item()), empty))
    return found


def cases(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Return the two comparisons, and the sweep over padded lengths with each seed."""
    sweep = [("length", padded, seed) for seed in range(args.seeds) for padded in args.lengths]
    return [("exact", "used"), ("exact", "ignored"), *sweep]


def measure(args: argparse.Namespace, case: tuple[Any, ...]) -> Iterator[Any]:
    """Compare with one process, or train at one padded length."""
    if case[0] == "exact":
        yield from compare_with_one_process(case[1] == "used", args.steps)
        return
    (_, padded, seed), data, world = case, load_sequences(case[1]), dist.get_world_size()
    groups = {"sync": None, "local": groups_of(1)}
    networks = {
        f"{norm} {mask}": functools.partial(build, groups[norm], mask == "used")
        for norm in LABELS
        for mask in ("used", "ignored")
    }
    for run in train_side_by_side(networks, [seed], data, args.samples, args.epochs, args.lr):
        norm, _, mask = run.norm.partition(" ")
        right, loss = test_accuracy(run.model, data), run.epoch_losses(args.epochs)[-1]
        yield Result(norm, args.samples, world, seed, args.epochs, right, loss, padded, mask)


def draw(folder: Path) -> None:
    """Draw the differences of the losses, and test accuracy against the padded length, from the CSVs."""
    results = experiment.read_csv(folder / "runs.csv", Result)
    steps = experiment.read_csv(folder / "steps.csv", Step)
    lengths, first = sorted({result.padded for result in results}), results[0]
    title = f"Padded sequences, {first.ranks} ranks, {first.samples_per_device} a device: {experiment.spread(results)}"
    with pictures.figure(folder / "padded.png", title) as (left, right):
        for mask, style in (("used", {}), ("ignored", {"ls": "--", "mfc": "white"})):
            own = [step for step in steps if step.mask == mask]
            look = pictures.look("sync", label=f"SyncBN, mask {mask}", **style)
            left.plot([s.step for s in own], [max(s.loss_difference, 1e-17) for s in own], **look | {"marker": None})
            for norm in LABELS:
                curves = experiment.curves(results, "test_accuracy", "padded", lengths, norm=norm, mask=mask)
                right.errorbar(lengths, *curves, **pictures.look(norm, label=f"{LABELS[norm]}, mask {mask}", **style))
        empty = [step.step for step in steps if step.empty]
        left.axvspan(min(empty), max(empty), color=pictures.LIMIT, alpha=0.15, label="a rank is empty")
        left.axhline(TOLERANCE, color=pictures.LIMIT, lw=1)
        left.set(yscale="log", xlabel="step", ylabel="difference of the loss\nfrom one process's")
        pictures.powers_of_two(right, lengths, "padded to so many positions")
        right.set_ylabel("test accuracy (%)")
        pictures.legend_below([right, left], columns=3)


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> int:
    """Print both answers; return 1 if the ranks are not exact, or the control is."""
    worst = {
        mask: max(step.loss_difference for step in tables["steps"] if step.mask == mask) for mask in ("used", "ignored")
    }
    holds = worst["used"] <= TOLERANCE < worst["ignored"]
    print(
        f"Losses of uneven ranks and of one process differ by at most {worst['used']:.1e} with the mask, "
        f"{worst['ignored']:.1e} without (tolerance {TOLERANCE:g}): {'as due' if holds else 'NOT as due'}."
    )
    results: list[Result] = tables["runs"]
    columns = [(norm, mask) for norm in LABELS for mask in ("used", "ignored")]
    lines = [
        [
            padded,
            *(
                experiment.cell(experiment.over_seeds(results, "test_accuracy", padded=padded, norm=n, mask=m), 1)
                for n, m in columns
            ),
        ]
        for padded in args.lengths
    ]
    header = ["padded to", *(f"{LABELS[norm]}, mask {mask}, test %" for norm, mask in columns)]
    print(experiment.markdown(header, lines))
    return int(not holds)


EXPERIMENT = experiment.Experiment(
    about="Padded sequences on uneven ranks: exact against one process, and what ignoring the mask costs.",
    options={
        "samples": (2, 2),
        "seeds": (1, 3),
        "epochs": (3, 4),
        "lr": (0.4, 0.4),
        "lengths": ([16, 64], [16, 64], "that sequences are padded to"),
        "steps": (60, 120, "of the comparison with one process"),
    },
    tables={"steps": Step, "runs": Result},
    cases=cases,
    measure=measure,
    draw=draw,
    report=report,
    least_samples=1,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
