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
