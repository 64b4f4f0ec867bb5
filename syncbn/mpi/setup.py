"""Making groups: around a user's communicator, and for ``init_process_group`` and ``new_group``."""

from __future__ import annotations

import functools
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

from syncbn.mpi import operation
from syncbn.mpi.group import MPIProcessGroup

_TIMEOUT = dist.default_pg_timeout

_world_duplicate: Any = None  # under the default group: kept, since programs may initialize torch.distributed anew
_wrapped = MPI.Comm.Create_keyval()  # a communicator carries its group, and MPI drops both together


def process_group(comm: Any, timeout: timedelta | None = None) -> MPIProcessGroup:
    """A process group over the ranks of an MPI communicator; torch.distributed need not be initialized.

    The group works on a duplicate of ``comm``, so that its messages never meet others. It is made once for each
    communicator and kept, because MPI libraries have no more than about 2000 communicators.

    Args:
        comm: an ``mpi4py.MPI.Intracomm`` that this rank is in.
        timeout: how long an operation may take before it raises, alike on all ranks. None for 30 minutes, or to leave
            the group as it is if it was made before.

    Returns:
        The group, for ``process_group=`` of a layer and ``group=`` of torch.distributed, or to be used directly:
        ``group.allreduce([tensor]).wait()``.

    Raises:
        TypeError: not an intra-communicator.
        ValueError: the null communicator.
        RuntimeError: MPI does not allow calls from several threads, or has no communicator left.

    Collectives:
        The first call for a communicator duplicates it, so all its ranks must make it.
    """
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(comm).__name__}: {comm!r}")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm is MPI.COMM_NULL: this rank is not in the communicator")
    group: Any = comm.Get_attr(_wrapped)
    if group is None or group.is_destroyed:
        _check_usable()
        made = MPIProcessGroup(_make_comm(comm.Dup), timeout or _TIMEOUT, f"mpi4py:{comm.Get_name()}")
        comm.Set_attr(_wrapped, made)
        return made
    assert isinstance(group, MPIProcessGroup)
    if timeout is not None:
        group.set_timeout(timeout)
    return group


def _create_backend(options: Any, _: Any) -> MPIProcessGroup:
    """What torch.distributed calls for ``init_process_group("mpi4py")`` and for ``new_group``."""
    global _world_duplicate
    _check_usable()
    ranks = list(options.global_ranks_in_group)
    if ranks:
        _check_world(dist.get_world_size(), dist.get_rank())
        world = MPI.COMM_WORLD if _world_duplicate is None else _world_duplicate
        everyone = world.Get_group()
        members = everyone.Incl(ranks)
        # The tag keeps groups apart that are made at the same time. Names differ on ranks with different histories.
        tag = zlib.crc32(repr(ranks).encode()) & 0x7FFF
        comm = _make_comm(functools.partial(world.Create_group, members, tag))
        members.Free()
        everyone.Free()
        return MPIProcessGroup(comm, options.timeout, options.group_id)
    _check_world(options.group_size, options.group_rank)
    if _world_duplicate is None:
        _world_duplicate = _make_comm(MPI.COMM_WORLD.Dup)
    return MPIProcessGroup(_world_duplicate, options.timeout, options.group_id, keep_comm=True)


def _make_comm(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MPI.Exception as error:
        raise RuntimeError(
            f"MPI could not make a communicator ({error}). Libraries have about 2000 of them: end groups that are no "
            "longer needed with dist.destroy_process_group(group), and use a group again instead of making it anew."
        ) from error


def _check_usable() -> None:
    if operation.lost:
        raise RuntimeError(f"no group can be made, because {operation.lost[0]}. End this process, or restart the job.")
    if MPI.Is_finalized():
        raise RuntimeError("MPI has been finalized in this process, so no group can be made any more")
    names = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED")
    levels = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED)
    for name, level in zip(names, levels, strict=True):
        if MPI.Query_thread() == level:
            raise RuntimeError(
                f"MPI was initialized with {name}, and the mpi4py backend needs MPI_THREAD_MULTIPLE, because backward "
                "and DDP communicate from several threads. That is mpi4py's default: unset MPI4PY_RC_THREADS and "
                "MPI4PY_RC_THREAD_LEVEL, or set mpi4py.rc.thread_level = 'multiple' before mpi4py.MPI is first "
                "imported, and use an MPI library that was built with it."
            )


def _check_world(size: int, rank: int) -> None:
    mpi_size, mpi_rank = MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank()
    if (mpi_size, mpi_rank) == (size, rank):
        return
    start = f"mpiexec -n {size} python -m mpi4py {' '.join(sys.argv) or 'script.py'}"
    if mpi_size == 1:
        library, version = MPI.get_vendor()
        raise RuntimeError(
            f"WORLD_SIZE is {size}, but this process was started without mpiexec, or with that of another MPI library: "
            f"MPI knows of one process only. Start the job with `{start}`, using the mpiexec of {library} "
            f"{'.'.join(map(str, version))}."
        )
    raise RuntimeError(
        f"to torch.distributed this is rank {rank} of {size}, and to MPI rank {mpi_rank} of {mpi_size}. RANK and "
        "WORLD_SIZE must be MPI's: unset them, use init_method='mpi://', and start the job with mpiexec alone, not "
        f"together with torchrun: `{start}`."
    )


def _rendezvous(url: str, timeout: timedelta = _TIMEOUT, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """``init_method="mpi://"``: rank and world size are MPI's, and rank 0 tells the others where its store is."""
    _check_usable()
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    one_host = len(set(world.allgather(MPI.Get_processor_name()))) == 1
    listener = None
    address = ("", 0)
    if rank == 0:
        listener = socket.create_server(("127.0.0.1" if one_host else "", 0))
        address = ("127.0.0.1" if one_host else socket.gethostname(), listener.getsockname()[1])
    host, port = world.bcast(address)
    handle = None if listener is None else listener.detach()
    yield TCPStore(host, port, size, rank == 0, timeout, False, master_listen_fd=handle), rank, size


dist.Backend.register_backend("mpi4py", _create_backend, extended_api=True, devices=["cpu"])
register_rendezvous_handler("mpi", _rendezvous)
