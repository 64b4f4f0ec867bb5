"""A rank that trains a small net and meets a fault; in a thread, or as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers.links import travel
from helpers.ranks import make_group

LAYERS = ("bn1", "bn2", "bn3")
WIDTH = 8
STEPS = 3


class Fault(NamedTuple):
    """What happens, in which part of the step ("forward", "between", "backward"), on which rank, step and layer."""

    kind: str
    phase: str = "forward"
    rank: int = 1
    step: int = 1
    layer: str = "bn2"

    def __str__(self) -> str:
        return f"{self.kind}-{self.phase}-rank{self.rank}"


class Planned(Exception):
    """The fault "exception"."""


class Net(nn.Module):
    """Three linear layers, each followed by a batch norm of one width: swapped, they still fit."""

    def __init__(self, odd: str | None = None) -> None:
        super().__init__()
        before = WIDTH
        for name in LAYERS:
            width = 2 * WIDTH if name == odd else WIDTH
            setattr(self, f"to_{name}", nn.Linear(before, width))
            setattr(self, name, nn.BatchNorm1d(width))
            before = width

    def forward(self, x: Tensor, fault: Fault | None = None) -> Tensor:
        for name in order(fault):
            x = getattr(self, f"to_{name}")(x)
            here = fault is not None and fault.layer == name
            x = faulty_layer(getattr(self, name), x, fault) if here else getattr(self, name)(x)
        return x


def order(fault: Fault | None) -> Sequence[str]:
    if fault is None or fault.kind not in ("skip", "swap"):
        return LAYERS
    names = list(LAYERS)
    at = names.index(fault.layer)
    names[at : at + 2] = names[at + 1 : at + 2] if fault.kind == "skip" else names[at : at + 2][::-1]
    return names


def faulty_layer(layer: Any, x: Tensor, fault: Fault) -> Tensor:
    """The layer's forward as the fault has it; for faults in the backward, a hook before the layer's."""
    kind = fault.kind
    if kind in ("exit", "exception", "kill", "stop", "collective"):
        if fault.phase == "forward":
            die(kind)
        y = layer(x)
        if fault.phase == "backward":
            y.register_hook(lambda _: die(kind))
        return y
    if kind == "eval":
        layer.eval()
    elif kind == "frozen":
        layer.weight.requires_grad_(False)
    elif kind == "nan":
        x = x * torch.tensor([float("nan")] + [1.0] * (x.shape[1] - 1))
    elif kind == "dtype":
        return layer(x.to(torch.bfloat16)).float()
    elif kind == "channels":
        x = x[:, :-1]
    elif kind == "detach":
        x = x.detach().requires_grad_()
    with torch.no_grad() if kind == "no_grad" else contextlib.nullcontext():
        return layer(x)


def die(kind: str) -> None:
    if kind == "exit":
        os._exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "exception":
        raise Planned("a fault on purpose")
    if kind == "collective":
        _in_another_collective()


BUILDING = threading.Lock()  # the random state is shared by all threads
_groups: dict[int, Any] = {}  # per thread: where a fault finds the group


def _in_another_collective() -> None:
    group = _groups[threading.get_ident()]
    group.allreduce([torch.ones(100)], dist.AllreduceOptions()).wait()


def train(
    rank: int,
    group: Any,
    fault: Fault | None,
    steps: int = STEPS,
    convert: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Any]:
    """Train; what became of it: error class and text, seconds in the step that failed, step, statistics, outputs."""
    _groups[threading.get_ident()] = group
    mine = fault if fault is not None and rank == fault.rank else None
    with BUILDING:
        torch.manual_seed(0)
        net = Net(odd=mine.layer if mine is not None and mine.kind == "width" else None)
    (convert or syncbn.convert_sync_batchnorm)(net, group)
    report: dict[str, Any] = {"error": None, "text": "", "seconds": 0.0, "step": 0, "outputs": []}
    for step in range(steps):
        started = time.monotonic()
        report["step"] = step
        x = batch(rank, step, fault)
        try:
            train_step(net, x, mine if mine is not None and step == mine.step else None, report)
        except BaseException as error:
            report.update(error=type(error).__name__, text=str(error), seconds=time.monotonic() - started)
            break
    report["state"] = {name: value.clone() for name, value in net.state_dict().items()}
    return report


def batch(rank: int, step: int, fault: Fault | None = None) -> Tensor:
    """The batch of a rank in a step, equal whenever it is asked for."""
    x = torch.randn(3 + rank, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    return x[:0] if fault is not None and fault.kind == "empty" and (rank, step) == (fault.rank, fault.step) else x


def train_step(net: Net, x: Tensor, fault: Fault | None, report: dict[str, Any]) -> None:
    y = net(x, fault)
    report["outputs"].append(y.detach())
    if fault is not None and fault.phase == "between":
        if fault.kind == "skip backward":
            return
        die(fault.kind)
    y.square().sum().backward()


def process_main(
    rank: int,
    size: int,
    folder: Path,
    fault: Fault | None,
    timeout: float,
    way: str,
    convert: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    """A rank as a process: trains, leaves its report in ``folder``, and exits with 1 after an error."""
    torch.set_num_threads(1)
    threading.current_thread().name = f"rank {rank}"
    store = dist.FileStore(str(folder / "store"), size)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(size)])  # so that the timeout is not spent on starting
    with travel(way):
        report = train(rank, make_group(store, rank, size, timeout), fault, convert=convert)
    report["state"] = {name: value.tolist() for name, value in report["state"].items()}
    report["outputs"] = [output.tolist() for output in report["outputs"]]
    (folder / f"{rank}.json").write_text(json.dumps(report))
    sys.exit(1 if report["error"] else 0)


# ---- ranks that make different calls

FORWARD = "forward of layer {!r}"
BACKWARD = "backward of layer {!r}"


class Different(NamedTuple):
    """A fault of the last rank by which ranks come to be in different calls.

    Attributes:
        mine, theirs: what the faulty rank is in, and what the others are in.
        later: in which step, after that of the fault.
        ahead: steps that the faulty rank is ahead of the others by then.
    """

    kind: str
    phase: str
    layer: str
    mine: str
    theirs: str
    later: int = 0
    ahead: int = 0

    def name(self) -> str:
        return f"{self.kind}-{self.phase}-{self.layer}"

    def fault(self, world: int) -> Fault:
        return Fault(self.kind, self.phase, rank=world - 1, layer=self.layer)

    def check(self, reports: Sequence[dict[str, Any]], sees_each_rank: bool) -> None:
        """All ranks have raised in the same call, and say which calls they were in."""
        assert [report["error"] for report in reports] == ["RankMismatchError"] * len(reports), reports
        last = len(reports) - 1
        step = self.fault(len(reports)).step + self.later
        for rank, report in enumerate(reports):
            text = report["text"]
            assert (self.mine if rank == last else self.theirs) in text, text
            assert f"This is rank {rank}" in text, text
            assert report["step"] == step + (self.ahead if rank == last else 0), report
            if sees_each_rank:
                assert self.mine in text and self.theirs in text, text
                others = " and ".join(str(other) for other in range(last))
                here, there = (self._call(words) for words in (self.mine, self.theirs))
                assert f"rank {others}: {there}" in text and f"rank {last}: {here}" in text, text

    def _call(self, words: str) -> str:
        return words if "layer" in words else f"{FORWARD.format(self.layer)} "  # the same layer, another call of it


DIFFERENT_CALLS = [
    Different("skip", "forward", "bn2", FORWARD.format("bn3"), FORWARD.format("bn2")),
    Different("skip", "forward", "bn3", BACKWARD.format("bn2"), FORWARD.format("bn3")),
    Different("swap", "forward", "bn1", FORWARD.format("bn2"), FORWARD.format("bn1")),
    Different("eval", "forward", "bn2", FORWARD.format("bn3"), FORWARD.format("bn2")),
    Different("frozen", "forward", "bn2", "gradients for input, bias", "gradients for input, weight, bias"),
    Different("no_grad", "forward", "bn2", "no gradients", "gradients for input, weight, bias"),
    Different("width", "forward", "bn2", "(16 channels", "(8 channels", later=-1),
    Different("skip backward", "between", "bn2", FORWARD.format("bn1"), BACKWARD.format("bn3"), ahead=1),
    Different("detach", "backward", "bn2", FORWARD.format("bn1"), BACKWARD.format("bn1"), ahead=1),
]


def all_different(rank: int, world: int) -> list[dict[str, Any]]:
    """What becomes of each of them, one after the other in the default group, in models that are compiled."""

    def convert(net: nn.Module, group: Any) -> None:
        torch._dynamo.reset()
        syncbn.convert_sync_batchnorm(net, group).compile(backend="aot_eager")

    torch.set_num_threads(1)
    group = dist.group.WORLD
    return [train(rank, group, case.fault(world), convert=convert) for case in DIFFERENT_CALLS]


def over_mpi() -> None:
    import syncbn.mpi  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", init_method="mpi://")
    rank, world = dist.get_rank(), dist.get_world_size()
    for case in DIFFERENT_CALLS:
        reports: list[Any] = [None] * world
        dist.all_gather_object(reports, train(rank, dist.group.WORLD, case.fault(world)))
        case.check(reports, sees_each_rank=False)
    print(f"rank {rank}: {len(DIFFERENT_CALLS)} checked", flush=True)


if __name__ == "__main__":
    over_mpi()
