"""How jobs on the mpi4py backend start, fail and end: one scenario for each run, ``scenarios.py NAME``."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import mpi4py
import torch

if sys.argv[1] == "thread_level":
    mpi4py.rc.thread_level = "funneled"

import torch.distributed as dist
from mpi4py import MPI

import syncbn
import syncbn.mpi

LATE = 60.0  # seconds that the late rank sleeps: more than the whole test may take
rank = MPI.COMM_WORLD.Get_rank()


def expect(text: str, call: Any, *args: Any) -> None:
    begun = time.monotonic()
    try:
        call(*args)
    except RuntimeError as error:
        print(f"rank {rank} after {time.monotonic() - begun:.1f} s: {type(error).__name__}: {error}", flush=True)
        assert text in str(error), error
        return
    raise AssertionError(f"no RuntimeError with {text!r}")


def start(seconds: float | None = None) -> None:
    extra = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    dist.init_process_group("mpi4py", init_method="mpi://", **extra)


def environment() -> None:
    """A launcher's variables instead of mpi://; a sub-group inherits the timeout or has its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(MPI.COMM_WORLD.Get_size()))
    dist.init_process_group("mpi4py")
    dist.all_reduce(x := torch.ones(2), group=dist.new_group(timeout=timedelta(seconds=20)))
    assert x.eq(2).all()


def late_receive() -> None:
    """A send that nobody waits for: its rank does not exit before it is delivered."""
    start()
    if rank == 0:
        dist.isend(torch.full((500_000,), 3.0), 1)
    else:
        time.sleep(1.0)
        dist.recv(got := torch.empty(500_000), 0)
        assert got.eq(3).all()


def deadline() -> None:
    """A rank that does not come: the others get an error, every later call does at once, and exit ends all."""
    start(1.0)
    nobody_waits = dist.new_group(timeout=timedelta(seconds=1))
    patient = dist.new_group(timeout=timedelta(seconds=600))
    of_a_communicator = syncbn.mpi.process_group(MPI.COMM_WORLD.Dup(), timedelta(seconds=0.5))
    if rank == 1:
        time.sleep(LATE)
    group = dist.group.WORLD
    x = torch.ones(1000)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future()
    expect("all_reduce: not all ranks took part within 1.", work.wait)
    expect("not all ranks took part", future.wait)
    begun = time.monotonic()
    expect("cannot be used any more", dist.all_reduce, x)
    expect("cannot be used any more", dist.barrier)
    expect("no group can be made", syncbn.mpi.process_group, MPI.COMM_WORLD)
    assert time.monotonic() - begun < 0.5 and group.dead
    # Nobody waits but C++, as in DDP; a deadline of the call's own; and of a receive. One group's end is not another's.
    expect("not all ranks took part", dist.all_reduce(x, group=nobody_waits, async_op=True).get_future().wait)
    work = dist.all_reduce(x, group=patient, async_op=True)
    expect("not all ranks took part within 0.", work.wait, timedelta(seconds=0.5))
    expect("recv from rank 1, tag 3", of_a_communicator.recv([torch.ones(3)], 1, 3).wait)
    print("survived", flush=True)


def other_size() -> None:
    """MPI itself reports a message that does not fit."""
    start()
    if rank == 0:
        dist.broadcast(torch.ones(10), 0)
        time.sleep(LATE)
    expect("MPI reports", dist.broadcast, torch.ones(3), 0)
    expect("cannot be used any more", dist.barrier)
    print("survived", flush=True)


def interrupted() -> None:
    """A handler raises in the middle of an exchange: the rank's own exception, a dead group, and its exit ends all.

    Then alarms at many moments of a wait: each ends it with the handler's own exception, and nothing else. Not before
    the exchange is under way: its peer would wait for the whole timeout.
    """
    start()
    groups = [dist.new_group() for _ in range(10)]

    def handler(*_: Any) -> None:
        raise TimeoutError("ring")

    signal.signal(signal.SIGALRM, handler)
    for number, group in enumerate(groups):
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        try:
            layer(torch.randn(4, 3))
            if rank == 1:
                time.sleep(0.5)
            else:
                signal.setitimer(signal.ITIMER_REAL, 0.1 + 0.0037 * number)
            layer(torch.randn(4, 3))
        except TimeoutError:
            assert rank == 0

    def raising(*_: Any) -> None:
        raise RuntimeError("ring")

    layer = syncbn.SyncBatchNorm(3)
    layer(x := torch.randn(4, 3))
    if rank == 1:
        time.sleep(LATE)
    signal.signal(signal.SIGALRM, raising)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    expect("ring", layer, x)
    expect("RuntimeError interrupted it in forward of a layer", layer, x)
    expect("interrupted by RuntimeError", dist.barrier)
    print("survived", flush=True)


def exception() -> None:
    """With ``python -m mpi4py``, a rank that raises ends all."""
    start()
    if rank == 1:
        raise KeyError("rank 1 fails alone")
    dist.all_reduce(torch.ones(3))


def killed() -> None:
    """mpiexec ends the job when a rank is killed."""
    start()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))


def thread_level() -> None:
    expect("MPI_THREAD_FUNNELED", start)
    expect("MPI_THREAD_FUNNELED", syncbn.mpi.process_group, MPI.COMM_WORLD)


def alone() -> None:
    """Started without mpiexec, by a launcher that says that there are two ranks."""
    dist.init_process_group("mpi4py", store=dist.HashStore(), rank=0, world_size=2)


def other_ranks() -> None:
    """Ranks that another launcher numbered in its own way."""
    arguments = {"store": dist.HashStore(), "rank": 1 - rank, "world_size": 2}
    expect("RANK and WORLD_SIZE must be MPI's", lambda: dist.init_process_group("mpi4py", **arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
