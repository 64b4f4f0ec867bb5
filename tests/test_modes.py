"""The ways people run DistributedDataParallel: each mode on 2 ranks against one process with the whole batch."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from helpers.oracle import close
from helpers.processes import run_processes

SIZE = 2
MICRO = 3  # samples of a rank in each micro-batch


class Net(nn.Module):
    """Two norms, one of them behind a residual branch; with a parameter that may stay unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head, self.spare = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, use_spare: bool = True) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu().mean((2, 3))
        return self.head(x) + self.spare(x) if use_spare else self.head(x)


def data(steps: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(SIZE * MICRO, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (SIZE * MICRO,), generator=generator),
        )
        for _ in range(steps)
    ]


KNOWN = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in KNOWN else "broadcast_buffers"  # before torch 2.13

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_as_bucket_view": {"ddp": {"gradient_as_bucket_view": True}},
    "static_graph": {"ddp": {"static_graph": True}},
    "find_unused_parameters": {"ddp": {"find_unused_parameters": True}, "use_spare": False},
    "no_sync": {"accumulate": 2},
    "own_statistics": {"ddp": {SYNC_BUFFERS: False}},
    "small_buckets": {"ddp": {"bucket_cap_mb_list": [0.0001, 0.001]}},
    "one_copy": {"ddp": {"batched_grad_copy": True}},
    "skip_unused": {"ddp": {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}, "use_spare": False},
    "autocast": {"autocast": True, "dtype": torch.float32, "tolerance": 3e-2},
    "grad_scaler": {"scaler": True, "dtype": torch.float32, "tolerance": 1e-4},
    "compiled": {"compile": "before"},
    "compiled_ddp": {"compile": "after"},
}
for name in [name for name, mode in MODES.items() if not mode.get("ddp", {}).keys() <= KNOWN.keys()]:
    del MODES[name]  # this version of torch lacks it


def train(net: Any, samples: slice, mode: dict[str, Any], averaged: bool) -> None:
    """Four steps (or two of two micro-batches); the loss is a mean over this process's samples."""
    accumulate = mode.get("accumulate", 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=bool(mode.get("scaler")))
    for i, (x, labels) in enumerate(data(4, mode.get("dtype", torch.float64))):
        last = (i + 1) % accumulate == 0
        waits = contextlib.nullcontext() if last or not averaged else net.no_sync()
        with waits:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(mode.get("autocast"))):
                y = net(x[samples], mode.get("use_spare", True))
                loss = nn.functional.cross_entropy(y.to(x.dtype), labels[samples])
            scaler.scale(loss).backward()
        if last:
            scaler.step(sgd)
            scaler.update()
            sgd.zero_grad()


def ranks_train(rank: int, size: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name in names:
        mode = MODES[name]
        net = syncbn.convert_sync_batchnorm(Net().to(mode.get("dtype", torch.float64)))
        inner: Any = torch.compile(net, backend="aot_eager") if mode.get("compile") == "before" else net
        ddp: Any = DistributedDataParallel(inner, **mode.get("ddp", {}))
        if mode.get("compile") == "after":
            ddp = torch.compile(ddp, backend="aot_eager")
        train(ddp, slice(rank * MICRO, (rank + 1) * MICRO), mode, averaged=mode.get("accumulate", 1) > 1)
        states[name] = {key: value.clone() for key, value in net.state_dict().items()}
        dist.barrier()
    return states


def check(states: list[dict[str, dict[str, Tensor]]], names: list[str]) -> None:
    for name in names:
        mode = MODES[name]
        whole = Net().to(mode.get("dtype", torch.float64))
        train(whole, slice(None), mode, averaged=False)
        tolerance = mode.get("tolerance", 1e-11)
        for key, expected in whole.state_dict().items():
            for rank in range(SIZE):
                close(states[rank][name][key], expected, tolerance, tolerance, f"{name}: {key} of rank {rank}")
            if "running" in key:
                assert torch.equal(states[0][name][key], states[1][name][key]), f"{name}: {key} differs between ranks"


def test_ddp_modes_train_like_the_whole_batch(tmp_path: Path) -> None:
    names = [name for name, mode in MODES.items() if "compile" not in mode]
    check(run_processes(SIZE, ranks_train, tmp_path, names), names)


@pytest.mark.parametrize("name", ["compiled", "compiled_ddp"])
def test_compiled_ddp_trains_like_the_whole_batch(tmp_path: Path, name: str) -> None:
    check(run_processes(SIZE, ranks_train, tmp_path, [name]), [name])


def local_control(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    net = Net().double()
    train(DistributedDataParallel(net), slice(rank * MICRO, (rank + 1) * MICRO), {}, averaged=False)
    return {"plain": net.state_dict()}


def test_local_batch_norm_does_not(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="plain: "):
        check(run_processes(SIZE, local_control, tmp_path), ["plain"])
