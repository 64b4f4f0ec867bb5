"""Which process group an argument means, and how a group survives deepcopy and pickle.

The process group of torch.distributed is the only abstraction: every other form is resolved to one.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from syncbn import _torch


def resolve_group(process_group: Any) -> dist.ProcessGroup | None:
    """The process group that an argument ``process_group=`` means.

    Args:
        process_group: None (the default group, or no group when torch.distributed is not initialized), a
            ``ProcessGroup``, a ``DeviceMesh`` of one dimension, a pair ``(DeviceMesh, dim)`` with the dimension's
            name or index, or an ``mpi4py.MPI.Comm``.

    Returns:
        The group, or None for no synchronization.

    Raises:
        ValueError: this rank is not in the group, or the mesh has several dimensions and none is named.
        TypeError: anything else.
    """
    if process_group is None:
        return _torch.default_group()
    if not dist.is_available():
        raise ValueError(
            f"process_group: this PyTorch was built without torch.distributed, so there are no groups; got "
            f"{type(process_group).__name__}: {process_group!r:.80}. Leave it out"
        )
    if isinstance(process_group, dist.ProcessGroup):
        group = process_group
    elif process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group: this rank is not a member of the group (dist.new_group returned NON_GROUP_MEMBER). "
            "Give each rank a group that it is in, for example one of dist.new_subgroups()."
        )
    elif type(process_group).__module__.startswith("mpi4py"):
        from syncbn.mpi import process_group as of_communicator  # only those who hold one import it

        return of_communicator(process_group)
    else:
        group = _group_of_mesh(process_group)
    if group.rank() < 0:
        raise ValueError(f"process_group: this rank is not a member of the group of size {group.size()}")
    return group


_SIZES = (
    "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
_noticed = False


@_torch.once_per_graph
def notice_alone(group: Any) -> None:
    """Warn, once in a process, if this forward has no peers though the job has more ranks and nobody named a group.

    Args:
        group: as resolved, over which the forward synchronizes with nobody.
    """
    global _noticed
    name, size = size_of_job()
    if size < 2 or _noticed or (group is not None and group is not resolve_group(None)):
        return
    _noticed = True
    why = "no process group is initialized" if group is None else "the default process group has one rank"
    warnings.warn(
        f"this process is one of {size} ({name}), and a synchronized layer has trained on its samples "
        f"alone: {why}. Call torch.distributed.init_process_group() on every rank before the first training step; or "
        "syncbn.revert_sync_batchnorm(model), if local statistics are meant. (Said once.)",
        stacklevel=2,
    )


@functools.cache  # each forward without peers asks
def size_of_job() -> tuple[str, int]:
    """How many processes whoever started this one says there are: torchrun before the rest; and the variable."""
    names = [name for name in _SIZES if os.environ.get(name)]
    # What a whole allocation has is also set in its shell and its batch script, which are one process.
    if not names and ("SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"):
        names = ["SLURM_NTASKS"]
    name = names[0] if names else ""
    size = os.environ.get(name, "").strip()
    return name, int(size) if size.isdecimal() else 1


def _group_of_mesh(process_group: Any) -> dist.ProcessGroup:
    from torch.distributed.device_mesh import DeviceMesh  # imports much, and few use it

    dim: str | int | None = None
    mesh = process_group
    if isinstance(process_group, tuple) and len(process_group) == 2:
        mesh, dim = process_group
    if not isinstance(mesh, DeviceMesh):
        pair = isinstance(process_group, tuple) and any(isinstance(one, dist.ProcessGroup) for one in process_group)
        raise TypeError(
            "process_group must be None, a ProcessGroup, a DeviceMesh of one dimension, (DeviceMesh, dim) or an "
            f"mpi4py.MPI.Comm, got {type(process_group).__name__}: {process_group!r}"
            + (". (dist.new_subgroups returns this rank's group and the list of all: take the first)" if pair else "")
        )
    names = mesh.mesh_dim_names or ()
    if dim is None and mesh.ndim != 1:
        raise ValueError(
            f"process_group: a DeviceMesh of {mesh.ndim} dimensions {names or tuple(mesh.shape)} does not say over "
            f"which one to synchronize. Give (mesh, dim), for example (mesh, {names[0] if names else 0!r})."
        )
    if not isinstance(dim, str | int | None):
        raise TypeError(f"process_group: the dim of (DeviceMesh, dim) must be a name or an index, got {dim!r}")
    if isinstance(dim, str) and dim not in names:
        raise ValueError(f"process_group: the mesh has no dimension {dim!r}, only {names}")
    if isinstance(dim, int) and not -mesh.ndim <= dim < mesh.ndim:
        raise ValueError(f"process_group: dimension {dim} is out of range for a mesh of {mesh.ndim} dimensions")
    if mesh.get_coordinate() is None:
        raise ValueError(f"process_group: this rank is not in the mesh {mesh}")
    return mesh.get_group() if dim is None else mesh.get_group(dim)


def group_ranks(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group, in the group's order; 0..W-1 for a group that is not registered."""
    try:
        return dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return list(range(group.size()))


def on_one_node(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of a group are on one node, by what the launcher says, so that all ranks find alike.

    ``LOCAL_WORLD_SIZE``, as torchrun and ``syncbn-launch`` set it: so many ranks, one after the other, to a node. Where
    nobody says so, no.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return local.isdecimal() and int(local) > 0 and len({rank // int(local) for rank in group_ranks(group)}) == 1


def group_device(group: dist.ProcessGroup | None, device: torch.device | str | None = None) -> torch.device:
    """The device over which the layers of a group exchange: as given, or CUDA where the group can, else the CPU."""
    if device is not None:
        return torch.device(device)
    if group is not None and torch.cuda.is_available():
        cuda = torch.device("cuda", torch.cuda.current_device())
        if _torch.has_backend(group, cuda):
            return cuda
    return torch.device("cpu")


class GroupHandle:
    """Keeps a process group where deepcopy and pickle meet it.

    A deepcopy shares the group. A pickle stores the group's global ranks, never its name (names are counters of
    creation: "1" was another group in another program), and is resolved when it is loaded, or, when torch.distributed
    is not initialized by then, at its first use after it is.

    Raises:
        RuntimeError: on loading, where torch.distributed is initialized and no group has these ranks.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._group = None if process_group is None else resolve_group(process_group)
        self._ranks: list[int] | None = None  # of a group that is still to be found

    def get(self) -> dist.ProcessGroup | None:
        """The group; None for the default group, and as long as a loaded handle has nothing to resolve with."""
        if self._ranks is not None and dist.is_available() and dist.is_initialized():
            self._group, self._ranks = _find_group(self._ranks), None
        return self._group

    def resolve(self) -> dist.ProcessGroup | None:
        """The group to synchronize over now: the default group where none was given, None for none."""
        group = self.get()
        return group if group is not None or self._ranks is not None else resolve_group(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, tuple[list[int] | None]]:
        if self._group is None:
            return _load_handle, (self._ranks,)
        return _load_handle, (group_ranks(self._group),)


def _load_handle(ranks: list[int] | None) -> GroupHandle:
    handle = GroupHandle()
    handle._ranks = ranks
    handle.get()
    return handle


def _find_group(ranks: list[int]) -> dist.ProcessGroup:
    """The oldest registered group of exactly these global ranks: creation is collective, so all ranks find the same."""
    world = dist.group.WORLD
    assert world is not None
    if group_ranks(world) == ranks:
        return world
    for group in _torch.registered_groups():
        if group_ranks(group) == ranks:
            return group
    raise RuntimeError(
        f"this SyncBatchNorm was saved with a process group of ranks {ranks}, and this program (world size "
        f"{world.size()}) has no group of these ranks. Create it with dist.new_group({ranks}) before loading, or load "
        "without torch.distributed initialized (plain batch norm), or save the state_dict instead of the module."
    )
