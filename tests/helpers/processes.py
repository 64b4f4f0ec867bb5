"""Ranks as processes: for what threads cannot show, such as registered groups and DistributedDataParallel.

Processes are forked from a server that has imported torch and done nothing else: nearly as quick as fork, which
deadlocks once the parent has used autograd or gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.commands import IMPORTS

DEADLINE = 90.0
IMPORTED = [
    "torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
    "torch._functorch.aot_autograd", "syncbn", "programs.faults",
]  # fmt: skip
"""What the server imports, once for all ranks that need it."""


@contextlib.contextmanager
def started(size: int, body: Callable[..., None], *args: Any) -> Iterator[list[Any]]:
    """Processes that run ``body(rank, size, *args)``, a function at the top of a module; none outlives the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORTS)  # for the server to import from
        forkserver.ensure_running()
    processes = [context.Process(target=body, args=(rank, size, *args), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def run_processes(
    size: int, body: Callable[..., Any], folder: Path, *args: Any, deadline: float = DEADLINE, timeout: float = DEADLINE
) -> list[Any]:
    """Run ``body(rank, size, *args)`` in ``size`` processes, in a default gloo group; the results in rank order.

    Args:
        body: a function at the top of a module.
        folder: empty; for the rendezvous and the results.
        deadline: seconds for all of it.
        timeout: seconds, of the group.

    Raises:
        AssertionError: a process did not end with exit code 0 within the deadline (an abort has -6); with tracebacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + deadline
    with started(size, _rank, folder, timeout, body, args) as processes:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert codes == [0] * size, f"exit codes {codes} (None: still running after {deadline} s)\n{errors}"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, timeout: float, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(body(rank, size, *args), folder / f"result-{rank}.pt")
        gc.collect()  # DistributedDataParallel that outlives its group aborts or hangs now and then, in torch 2.13
        dist.destroy_process_group()
    except BaseException:
        with contextlib.suppress(OSError):
            (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
