"""The roll call of ``syncbn-launch --check``: every rank joins and says what it is, before the job runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

MESSAGE = 2 * 256 + 1
"""Length of the timed message in float64: that of a layer of 256 channels."""

MUST_AGREE = ("device", "backend", "python", "torch", "syncbn")

Report = dict[str, str]

_stores: list[Any] = []  # rank 0's store is the server of the script's own store too: it must stay


def run() -> None:
    """Call the roll, print it on rank 0, and end every rank with code 1 if a rank is missing or differs.

    ``SYNCBN_CHECK_TIMEOUT`` in the environment: seconds to wait for a rank, 60 by default.

    Raises:
        SystemExit: the check failed.

    Collectives: 25 all-reduces of 513 float64 over a group that exists only for the check.
    """
    seconds = float(os.environ.get("SYNCBN_CHECK_TIMEOUT", "60"))
    timeout = datetime.timedelta(seconds=seconds)
    base, rank, size = next(dist.rendezvous("env://", timeout=timeout + timeout))  # type: ignore[attr-defined]
    store = PrefixStore("syncbn_check", base)
    _stores.append(base)
    report = describe()
    store.set(f"report/{rank}", json.dumps(report))
    problem = _roll_call(store, size, seconds) if rank == 0 else ""
    if not _agree(store, "roll", rank, problem, timeout):
        raise SystemExit(1)
    error, latency = _measure(store, rank, size, report, timeout)
    store.set(f"result/{rank}", json.dumps([error, latency]))
    problem = _results(store, size, seconds) if rank == 0 else ""
    if not _agree(store, "result", rank, problem, timeout):
        raise SystemExit(1)


def describe() -> Report:
    """What this rank is: host, device, backend, versions."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    on_gpu = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and dist.is_nccl_available()
    under_mpi = "TORCHELASTIC_RUN_ID" not in os.environ and importlib.util.find_spec("syncbn.mpi") is not None
    try:
        version = importlib.metadata.version("syncbn")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(local_rank) if on_gpu else "cpu",
        "backend": "nccl" if on_gpu else "mpi4py" if under_mpi else "gloo",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "syncbn": version,
        "threads": str(torch.get_num_threads()),
    }


def _agree(store: Store, step: str, rank: int, problem: str, timeout: datetime.timedelta) -> bool:
    """Rank 0's verdict on a step, the same on every rank."""
    if rank == 0:
        store.set(f"{step}/verdict", "failed" if problem else "passed")
        if problem:
            print(f"syncbn-launch: check failed: {problem}", file=sys.stderr, flush=True)
            # The agent ends all ranks as soon as one is gone; and here it is rank 0 that has the store.
            time.sleep(0.2)
        return not problem
    store.wait([f"{step}/verdict"], timeout + timeout)
    return store.get(f"{step}/verdict") == b"passed"


def _collect(store: Store, step: str, size: int, seconds: float) -> dict[int, Any]:
    """What the ranks have put under a step, of those that have within the time."""
    deadline = time.monotonic() + seconds
    found: dict[int, Any] = {}
    for rank in range(size):
        left = datetime.timedelta(seconds=max(0.01, deadline - time.monotonic()))
        try:
            store.wait([f"{step}/{rank}"], left)
        except dist.DistStoreError:
            continue
        found[rank] = json.loads(store.get(f"{step}/{rank}"))
    return found


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _roll_call(store: Store, size: int, seconds: float) -> str:
    """Print every rank; what is wrong, or nothing."""
    reports: dict[int, Report] = _collect(store, "report", size, seconds)
    for rank, report in reports.items():
        print(f"rank {rank}: " + ", ".join(f"{name} {value}" for name, value in report.items()), flush=True)
    missing = [rank for rank in range(size) if rank not in reports]
    if missing:
        return f"{_ranks(missing)} of {size} did not join within {seconds:g} s"
    differences = []
    for name in MUST_AGREE:
        ranks_with = defaultdict(list)
        for rank, report in reports.items():
            ranks_with[report[name]].append(rank)
        if len(ranks_with) > 1:
            sides = [f"{value} on {_ranks(ranks)}" for value, ranks in ranks_with.items()]
            differences.append(f"{name} differs: {'; '.join(sides)}")
    return "; ".join(differences)


def _measure(store: Store, rank: int, size: int, report: Report, timeout: datetime.timedelta) -> tuple[str, float]:
    """What went wrong in joining the group (or nothing), and the median time of a small all-reduce in seconds."""
    try:
        if report["backend"] == "mpi4py":
            importlib.import_module("syncbn.mpi")
        device = torch.device("cpu")
        if report["backend"] == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group(
            report["backend"], store=PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
        )
        times = [_time_one(device, size) for _ in range(25)]
        dist.destroy_process_group()
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0
    return "", statistics.median(times[5:])


def _time_one(device: torch.device, size: int) -> float:
    message = torch.ones(MESSAGE, dtype=torch.float64, device=device)
    start = time.perf_counter()
    dist.all_reduce(message)
    total = message[0].item()
    elapsed = time.perf_counter() - start
    if total != size:
        raise RuntimeError(f"the sum of {size} ones came out as {total}")
    return elapsed


def _results(store: Store, size: int, seconds: float) -> str:
    results = _collect(store, "result", size, 2 * seconds)
    missing = [rank for rank in range(size) if rank not in results]
    errors = [f"rank {rank}: {' '.join(error.split())}" for rank, (error, _) in results.items() if error]
    if missing or errors:
        silent = [f"{_ranks(missing)} did not come out of the all_reduce"] if missing else []
        return "; ".join(silent + errors)
    slowest = max(latency for _, latency in results.values())
    print(
        f"check passed: {size} ranks, one all_reduce of {MESSAGE} float64 takes {slowest * 1e6:.0f} us "
        "(median, slowest rank)",
        flush=True,
    )
    return ""
