"""A trial of the doctor, in a rank: a step of the layer compared with one process, and the time of an exchange."""

from __future__ import annotations

import datetime
import importlib
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

from syncbn import comm
from syncbn._check import MESSAGE
from syncbn._doctor.processes import Failure
from syncbn.modules import SyncBatchNorm
from syncbn.wire import MOMENTS, Call

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}

ROUNDS = 100


def rank_of_trial(folder: Path, backend: str, seconds: float) -> dict[str, Any]:
    """Join the group, and measure: largest errors, statistics, time of an exchange.

    Collectives: those of two layers, forward and backward, and 120 exchanges of 513 float64.
    """
    timeout = datetime.timedelta(seconds=seconds)
    device = torch.device("cpu")
    if backend == "mpi4py":
        importlib.import_module("syncbn.mpi")
        dist.init_process_group(backend, init_method="mpi://", timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if backend == "nccl":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        store = FileStore(str(folder / "store"), size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    errors, statistics_of = {}, []
    with comm.forced():  # on a single device too
        for name in TOLERANCE:
            errors[name], running = exactness(getattr(torch, name), device)
            statistics_of += running
        report = {"rank": dist.get_rank(), "errors": errors, "statistics": statistics_of, "latency_us": latency(device)}
        report["way"] = comm.link_of(dist.group.WORLD, device).way()
    dist.destroy_process_group()
    return report


def exactness(dtype: torch.dtype, device: torch.device) -> tuple[float, list[float]]:
    """Largest error of a step of the layer, as ``|a - b| / (1 + |b|)``, and the running statistics it ends with.

    Compared with ``nn.BatchNorm2d`` in float64 on the batch of all ranks, which hold unequal parts of it: the output,
    the gradients of input, weight and bias, and the running statistics.
    """
    rank, size, channels = dist.get_rank(), dist.get_world_size(), 7
    parts = [3 + 2 * index for index in range(size)]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(parts), channels, 5, 3)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(channels, generator=generator, dtype=torch.float64).to(dtype) + 0.5 for _ in range(2))

    layer = SyncBatchNorm(channels, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    mine = x.split(parts)[rank].to(device).requires_grad_()
    y = layer(mine)
    y.backward(g.split(parts)[rank].to(device))

    whole = nn.BatchNorm2d(channels, affine=False, dtype=torch.float64)
    leaf = x.double().requires_grad_()
    own = [tensor.double().view(1, -1, 1, 1).requires_grad_() for tensor in (weight, bias)]
    peers = [tensor.detach() for tensor in own]
    outputs = [
        z * (own if index == rank else peers)[0] + (own if index == rank else peers)[1]
        for index, z in enumerate(whole(leaf).split(parts))
    ]
    torch.cat(outputs).backward(g.double())
    pairs = [
        (y, outputs[rank]),
        (mine.grad, _gradient(leaf).split(parts)[rank]),
        (layer.weight.grad, _gradient(own[0]).flatten()),
        (layer.bias.grad, _gradient(own[1]).flatten()),
        (layer.running_mean, whole.running_mean),
        (layer.running_var, whole.running_var),
    ]
    errors = [
        float(((a.detach().cpu().double() - b.detach()).abs() / (1 + b.detach().abs())).max())
        for a, b in pairs
        if a is not None and b is not None
    ]
    running = [value for name in ("running_mean", "running_var") for value in getattr(layer, name).tolist()]
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if not math.isfinite(worst):
        raise RuntimeError(f"a step of the layer in {dtype} on {device} gave values that are not finite")
    return worst, running


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def latency(device: torch.device) -> float:
    """Median time of a layer's exchange of 256 channels in microseconds, its result read on the host."""
    link = comm.link_of(dist.group.WORLD, device)
    payload = torch.ones(MESSAGE, dtype=torch.float64, device=device)
    times = []
    for _ in range(20 + ROUNDS):
        start = time.perf_counter()
        total = link.sum(payload, Call(MOMENTS))[0].item()
        times.append(time.perf_counter() - start)
        if total != link.size:
            raise RuntimeError(f"the sum of {link.size} ones came out as {total}")
    link.settle()
    return statistics.median(times[20:]) * 1e6


def judge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks' reports: the largest errors, the way of the messages, the time of the slowest rank.

    Raises:
        Failure: the ranks differ from one process with the whole batch, or from each other.
    """
    errors = {name: max(report["errors"][name] for report in reports) for name in TOLERANCE}
    for name, bound in TOLERANCE.items():
        if errors[name] > bound:
            raise Failure(f"a step in {name} is off by {errors[name]:.1e} from one process with the whole batch")
    if any(report["statistics"] != reports[0]["statistics"] for report in reports):
        raise Failure("the running statistics of the ranks are not equal")
    ways = [report["way"] for report in reports]
    each = (f"{way} from rank {rank}" for rank, way in enumerate(ways))
    way = ways[0] if len(set(ways)) == 1 else "; ".join(each)
    return {"errors": errors, "way": way, "latency_us": round(max(report["latency_us"] for report in reports), 1)}
