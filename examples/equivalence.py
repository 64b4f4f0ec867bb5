"""N ranks with b samples each train exactly like one process with N*b samples: experiment and control.

Every rank takes its slice of one stream of global batches of scikit-learn's digits and trains with
`syncbn.SyncBatchNorm`; rank 0 also trains, alone, the same network with `nn.BatchNorm1d` on the whole
batches. The two losses are compared at each of 200 SGD steps, the weights and running statistics at the
end. An uneven split must agree too. Local batch norm, the negative control, must not. Start it with ::

    python -m syncbn.launch -n 4 examples/equivalence.py

It prints a table, and exits with 1 if a tolerance is missed or the control passes. ``steps.csv`` (the difference of the
losses at each step) and ``equivalence.png`` go into the folder given by ``--out``.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import build_mlp, load_data
from torch import Tensor, nn
from training import Data

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
TOTAL_BATCH = 32
LEARNING_RATE = 0.05
HEADER = ["dtype", "layer", "split", "loss diff", "weight diff", "statistics diff", "loss due", "holds"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: precision, layer, how a batch is split over the ranks, and what is due."""

    dtype: torch.dtype
    norm: str
    split: str
    must_agree: bool


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest absolute differences to the single process."""

    loss: float
    weights: float
    statistics: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of ``differences.csv``: the place of a case in `CASES`, and its largest differences."""

    case: int
    loss: float
    weights: float
    statistics: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of the CSV: the absolute difference of the losses at a step, in nats."""

    dtype: str
    norm: str
    split: str
    step: int
    loss_difference: float


CASES = [
    Case(dtype, norm, split, must_agree)
    for dtype in TOLERANCES
    for norm, split, must_agree in (
        ("sync", "even", True),
        ("sync", "uneven", True),
        ("local", "even", False),
    )
]


def shares(split: str, world: int) -> list[int]:
    """Return the number of samples of each rank in a batch of `TOTAL_BATCH`.

    ``"uneven"`` gives every rank but the last one half of its even share, at least one, and the last one the
    rest.
    """
    even = [len(part) for part in torch.arange(TOTAL_BATCH).tensor_split(world)]
    if split == "even":
        return even
    halves = [max(share // 2, 1) for share in even[:-1]]
    return [*halves, TOTAL_BATCH - sum(halves)]


def sgd_step(model: nn.Module, total: Tensor, sync: bool) -> Tensor:
    """Step on the gradient of `total`, this rank's share of the loss of the global batch; return that loss.

    The loss of the global batch is the sum of the ranks' shares, so the gradients are summed. (DDP averages
    them: there, multiply each share by the world size.) The loss travels in the same message.
    """
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total, parameters)
    flat = torch.cat([total.detach().view(1), *(g.flatten() for g in gradients)])
    if sync:
        dist.all_reduce(flat)
    parts = flat[1:].split([p.numel() for p in parameters])
    with torch.no_grad():
        for parameter, gradient in zip(parameters, parts, strict=True):
            parameter.sub_(gradient.view_as(parameter), alpha=LEARNING_RATE)
    return flat[0]


def train(model: nn.Module, data: Data, case: Case, steps: int, mine: slice | None) -> Tensor:
    """Train on the slice `mine` of each batch (None: on all of it, alone); return the global losses."""
    x, y = data.train_x.to(case.dtype), data.train_y
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (TOTAL_BATCH,), generator=generator)
        indices = batch if mine is None else batch[mine]
        total = F.cross_entropy(model(x[indices]), y[indices], reduction="sum") / TOTAL_BATCH
        losses.append(sgd_step(model, total, sync=mine is not None))
    return torch.stack(losses)


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between two sets of tensors of equal names."""
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def compare(case: Case, data: Data, steps: int) -> tuple[Difference, list[Step]] | None:
    """Train on all ranks and, on rank 0, alone; return how far apart they are (None on other ranks)."""
    sizes = shares(case.split, dist.get_world_size())
    start = sum(sizes[: dist.get_rank()])
    model = build_mlp(case.norm, seed=0).to(case.dtype)
    losses = train(model, data, case, steps, slice(start, start + sizes[dist.get_rank()]))
    if dist.get_rank() != 0:
        return None
    alone = build_mlp("local", seed=0).to(case.dtype)
    expected = train(alone, data, case, steps, None)
    apart = (losses - expected).abs().tolist()
    difference = Difference(
        loss=max(apart),
        weights=largest(dict(model.named_parameters()), dict(alone.named_parameters())),
        statistics=largest(dict(model.named_buffers()), dict(alone.named_buffers())),
    )
    name = str(case.dtype).removeprefix("torch.")
    return difference, [Step(name, case.norm, case.split, i + 1, value) for i, value in enumerate(apart)]


def holds(case: Case, difference: Difference) -> bool:
    """Return whether a case came out as it must: within tolerance or, for the control, clearly outside."""
    # The control must miss by far more than rounding could explain.
    if case.must_agree:
        return difference.loss <= TOLERANCES[case.dtype]
    return difference.loss > 1000 * TOLERANCES[torch.float32]


def format_row(case: Case, difference: Difference, good: bool) -> str:
    """Return one line of the Markdown table."""
    layer = {"sync": "SyncBN", "local": "local BN (control)"}[case.norm]
    due = f"<= {TOLERANCES[case.dtype]:.0e}" if case.must_agree else "must differ"
    cells = [str(case.dtype).removeprefix("torch."), layer, case.split]
    cells += [f"{value:.1e}" for value in dataclasses.astuple(difference)]
    return "| " + " | ".join([*cells, due, "yes" if good else "NO"]) + " |"


def draw(folder: Path) -> None:
    """Draw the difference of the losses at each step, one panel for each precision, from the CSV."""
    steps = experiment.read_csv(folder / "steps.csv", Step)
    title = f"Loss of several ranks less that of one process with the whole batch of {TOTAL_BATCH} (0 left out)"
    with pictures.figure(folder / "equivalence.png", title) as axes:
        for axis, dtype in zip(axes, TOLERANCES, strict=True):
            name = str(dtype).removeprefix("torch.")
            for norm, split, more in (
                ("local", "even", {"label": "local BN, the control"}),
                ("sync", "uneven", {"label": "SyncBN, uneven split", "marker": "^", "mfc": "white"}),
                ("sync", "even", {"label": "SyncBN, even split"}),
            ):
                shown = [s for s in steps if (s.dtype, s.norm, s.split) == (name, norm, split)]
                # Where the losses are equal to the bit there is nothing to draw on a logarithmic axis.
                shown = [s for s in shown if s.loss_difference > 0]
                look = pictures.look(norm, **more) | {"markersize": 3, "ls": ""}
                axis.plot([s.step for s in shown], [s.loss_difference for s in shown], **look)
            axis.axhline(TOLERANCES[dtype], color=pictures.LIMIT, ls="--", lw=1, label="tolerance")
            axis.set(yscale="log", title=name, xlabel="SGD step")
        axes[0].set_ylabel("|difference| (nats)")
        pictures.legend_below(axes)


def cases(args: argparse.Namespace) -> Iterator[tuple[int]]:
    """Yield the place of each case in the table; stop where there is nothing to compare."""
    if dist.get_world_size() < 2:
        sys.exit("needs 2 or more ranks: python -m syncbn.launch -n 4 examples/equivalence.py")
    return ((i,) for i in range(len(CASES)))


def measure(args: argparse.Namespace, case: tuple[int]) -> list[Any]:
    """Compare a case; rank 0 returns what it gave."""
    compared = compare(CASES[case[0]], load_data(), args.steps)
    if compared is None:
        return []
    difference, steps = compared
    return [Row(case[0], **dataclasses.asdict(difference)), *steps]


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> int:
    """Print the table; return 1 if a case did not hold."""
    print(f"{dist.get_world_size()} ranks against one process, {args.steps} steps, total batch {TOTAL_BATCH}")
    print(experiment.markdown(HEADER, []))
    failures = 0
    for row in tables["differences"]:
        case, difference = CASES[row.case], Difference(row.loss, row.weights, row.statistics)
        good = holds(case, difference)
        failures += not good
        print(format_row(case, difference, good))
    return int(failures > 0)


EXPERIMENT = experiment.Experiment(
    about="N ranks against one process with the whole batch.",
    options={"steps": (200, 200, "SGD steps")},
    tables={"differences": Row, "steps": Step},
    cases=cases,
    measure=measure,
    draw=draw,
    report=report,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
