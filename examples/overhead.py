"""What batch norm costs: a training step and inference without it, with it, synchronized, and fused into convolutions.

Two networks, as small as those of the other experiments: the U-Net for scenes with one image a rank, and the
convolutions for signals with two. A training step is forward, backward, one message for all gradients, and SGD; it is
timed with statistics of a rank, and of groups of 2, 4, ... ranks, over gloo and over MPI. Inference is timed in one
process, on 8 samples: batch norm in evaluation mode is a multiplication and an addition, which
`torch.nn.utils.fusion.fuse_conv_bn_eval` works into the convolution before it. All sides run in turn. ::

    python -m syncbn.launch --engine mpi -n 8 examples/overhead.py

It prints two tables and writes ``steps.csv``, ``inference.csv`` and ``overhead.png`` into the folder given by
``--out``. Without MPI (``python -m syncbn.launch -n 8``) gloo alone is timed.
"""

import argparse
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import experiment
import pictures
import torch
import torch.distributed as dist
from scenes import UNet, load_scenes
from signals import StackedConvs, load_signals
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from training import BatchNorm, Run, average_gradients, groups_of

import syncbn

NETWORKS = {"U-Net": 1, "signals": 2}  # samples of each rank in a step
BATCH = 8  # samples at inference
KINDS = {"none": "no normalization", "local": "batch norm", "sync": "SyncBN", "fused": "batch norm, fused"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of ``steps.csv``: a training step in milliseconds, median and quartiles over rounds, slowest rank.

    `transport` of the statistics is "gloo" or "MPI"; `group_size` is 0 without normalization, 1 for local statistics.
    """

    network: str
    transport: str
    group_size: int
    ranks: int
    milliseconds: float
    lower: float
    upper: float


@dataclasses.dataclass(frozen=True)
class Inference:
    """One line of ``inference.csv``: a forward in milliseconds, and how many numbers the network holds.

    `difference` is the largest of its outputs to those of ``local``, over the largest output.
    """

    network: str
    kind: str
    milliseconds: float
    lower: float
    upper: float
    parameters: int
    buffers: int
    difference: float


def build(network: str, layer: Callable[[int], nn.Module]) -> nn.Module:
    """Return a network, with the same weights for all layers and on all ranks."""
    torch.manual_seed(0)
    return UNet(layer) if network == "U-Net" else StackedConvs(layer, range(1))


def samples_of(network: str, count: int, first: int) -> tuple[Any, Any]:
    """Return so many training samples and their classes."""
    rows = slice(first, first + count)
    if network == "U-Net":
        data = load_scenes(64, 16)
        return data.train_x[rows], data.train_y[rows]
    data = load_signals()
    return data.train_x[rows].unsqueeze(1), data.train_y[rows].unsqueeze(1)


def mpi_groups(size: int) -> Any:
    """Return an MPI communicator of this rank and its neighbours; None where mpiexec has not started this."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    if MPI.COMM_WORLD.size != dist.get_world_size():
        return None
    return MPI.COMM_WORLD.Split(dist.get_rank() // size, dist.get_rank())


def in_turn(
    sides: Mapping[Any, Callable[[], object]], rounds: int, meet: bool
) -> dict[Any, tuple[float, float, float]]:
    """Return median and quartiles of the milliseconds of each side; `meet`: of the slowest rank, begun together."""
    times: dict[Any, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 2):  # two to warm up
        for side, run in sides.items():
            if meet:
                dist.barrier()
            start = time.perf_counter()
            run()
            took = torch.tensor(1e3 * (time.perf_counter() - start))
            if meet:
                dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn >= 2:
                times[side].append(took.item())
    found = {}
    for side, values in times.items():
        lower, middle, upper = statistics.quantiles(values, n=4)
        found[side] = (middle, lower, upper)
    return found


def steps(network: str, rounds: int) -> Iterator[Step]:
    """Time training steps of a network with all kinds of statistics."""
    world = dist.get_world_size()
    layers: dict[tuple[str, int], Callable[[int], nn.Module]] = {
        ("gloo", 0): lambda width: nn.Identity(),
        ("gloo", 1): BatchNorm,
    }
    for size in (k for k in (2, 4, 8, 16) if world % k == 0):
        groups = {"gloo": groups_of(size), "MPI": mpi_groups(size)}
        for transport, group in groups.items():
            if group is not None:
                layers[transport, size] = functools.partial(syncbn.SyncBatchNorm, process_group=group)
    x, y = samples_of(network, NETWORKS[network], NETWORKS[network] * dist.get_rank())
    sides = {}
    for key, layer in layers.items():
        run = Run("", 0, build(network, layer), 0.0)

        def step(run: Run = run) -> None:
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x), y).backward()
            average_gradients([run])
            run.optimizer.step()

        sides[key] = step
    for (transport, size), times in in_turn(sides, rounds, meet=True).items():
        yield Step(network, transport, size, world, *times)


def fused(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norm is worked into the convolutions."""
    model = copy.deepcopy(model).eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            convolution, norm = sequence[i], sequence[i + 1]
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert isinstance(convolution, nn.Conv1d | nn.Conv2d)
                sequence[i], sequence[i + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    return model


def inference(network: str, rounds: int) -> Iterator[Inference]:
    """Time the forward of a network in one process; the others wait."""
    x, _ = samples_of(network, BATCH, 0)
    if dist.get_rank() == 0:
        models = {  # (in evaluation mode nothing communicates)
            "none": build(network, lambda width: nn.Identity()).eval(),
            "local": build(network, BatchNorm).eval(),
            "sync": build(network, syncbn.SyncBatchNorm).eval(),
        }
        for module in models["local"].modules():  # statistics that are not those of the start
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
        models["sync"].load_state_dict(models["local"].state_dict())
        models["fused"] = fused(models["local"])
        with torch.no_grad():
            due = models["local"](x)
            sides = {kind: (lambda model=model: model(x)) for kind, model in models.items()}
            times = in_turn(sides, 4 * rounds, meet=False)
            for kind, model in models.items():
                off = ((model(x) - due).abs().max() / due.abs().max()).item()
                parameters = sum(p.numel() for p in model.parameters())
                buffers = sum(b.numel() for b in model.buffers())
                yield Inference(network, kind, *times[kind], parameters, buffers, off)
    dist.barrier()


def measure(args: argparse.Namespace, case: tuple[str, str]) -> Iterator[Any]:
    """Time steps, or inference, of a network."""
    what, network = case
    yield from (steps if what == "steps" else inference)(network, args.rounds)


def draw(folder: Path) -> None:
    """Draw the times of steps by group size and transport, and of inference, from the CSVs."""
    rows = experiment.read_csv(folder / "steps.csv", Step)
    times = experiment.read_csv(folder / "inference.csv", Inference)
    sizes = sorted({row.group_size for row in rows})
    title = f"What batch norm costs, {rows[0].ranks} ranks on few cores: median and quartiles"
    with pictures.figure(folder / "overhead.png", title, panels=4) as axes:
        for axis, network in zip(axes, NETWORKS, strict=False):
            for i, transport in enumerate(("gloo", "MPI")):
                own = [row for row in rows if (row.network, row.transport) == (network, transport)]
                if not own:
                    continue
                bars = [[r.milliseconds - r.lower for r in own], [r.upper - r.milliseconds for r in own]]
                axis.errorbar(
                    [sizes.index(r.group_size) + 0.06 * i for r in own],
                    [r.milliseconds for r in own],
                    bars,
                    **pictures.other(i, 2, f"statistics over {transport}"),
                )
            names = {0: "none", 1: "local"}
            axis.set_xticks(range(len(sizes)), [names.get(size, f"{size}") for size in sizes])
            axis.set(xlabel="ranks that share statistics", ylabel="training step (ms)", title=network)
            axis.set_ylim(bottom=0)
        for axis, network in zip(axes[2:], NETWORKS, strict=True):
            by_kind = [row for row in times if row.network == network]
            bars = [[r.milliseconds - r.lower for r in by_kind], [r.upper - r.milliseconds for r in by_kind]]
            axis.bar(range(len(by_kind)), [r.milliseconds for r in by_kind], 0.6, yerr=bars, color="#8c8c8c")
            labels = [KINDS[row.kind].replace(" norm", "\nnorm").replace("no ", "no\n") for row in by_kind]
            axis.set_xticks(range(len(by_kind)), labels, fontsize=8)
            axis.set(ylabel="inference (ms)", title=f"{network}, {BATCH} samples")
        pictures.legend_below(axes[:1])


def report(args: argparse.Namespace, tables: dict[str, list[Any]]) -> None:
    """Print times and numbers."""
    rows: list[Step] = tables["steps"]
    lines = []
    for row in rows:
        local = next(r for r in rows if (r.network, r.group_size) == (row.network, 1))
        what = {0: "no normalization", 1: "batch norm, local"}.get(row.group_size, f"SyncBN over {row.group_size}")
        what += f", {row.transport}" if row.group_size > 1 else ""
        quartiles = f"{row.lower:.1f} to {row.upper:.1f}"
        ratio = f"{row.milliseconds / local.milliseconds:.2f}"
        lines.append([row.network, what, f"{row.milliseconds:.1f}", quartiles, ratio])
    print(experiment.markdown(["network", "training step", "ms", "quartiles", "to local"], lines))
    lines = []
    for each in tables["inference"]:
        same = [r for r in tables["inference"] if r.network == each.network]
        none = next(r for r in same if r.kind == "none")
        ratio = f"{each.milliseconds / none.milliseconds:.2f}"
        numbers = [each.parameters, each.buffers, f"{each.difference:.1g}"]
        lines.append([each.network, KINDS[each.kind], f"{each.milliseconds:.2f}", ratio, *numbers])
    header = ["network", "inference", "ms", "to none", "parameters", "buffers", "difference to batch norm"]
    print(experiment.markdown(header, lines))


EXPERIMENT = experiment.Experiment(
    about="A training step and inference with no batch norm, local, synchronized and fused.",
    options={"rounds": (10, 25, "of which the median counts")},
    tables={"steps": Step, "inference": Inference},
    cases=lambda args: [(what, network) for network in NETWORKS for what in ("steps", "inference")],
    measure=measure,
    draw=draw,
    report=report,
    ranks=8,
    engine="mpi",
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
