"""Inputs that are DTensors: which part of them this rank works on, and with whom it shares statistics.

A DTensor stands for one whole tensor, so its statistics are those of the whole tensor. Each dimension of its mesh

* shards the batch or space: its ranks hold different values, and share statistics (2C+1 numbers, no activations);
* or shards the channels: its ranks have nothing to tell each other;
* or replicates: its ranks hold the same values, which count once, and each does the same work.

Parameters and running statistics may be DTensors on the same mesh, or plain tensors, which count as replicated: they
get the gradient of the whole tensor's loss on every rank.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import _torch
from syncbn.groups import group_ranks
from syncbn.memory import Memory, Running


def is_dtensor(x: Any) -> bool:
    """Whether a tensor is a DTensor. Where nobody has imported them there are none, and importing them takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@dataclass(frozen=True)
class Parts:
    """What this rank works on.

    Attributes:
        input, residual, mask: this rank's part.
        vectors: running mean, running variance, weight and bias, for the channels of this part.
        memory: the same as given, for the running statistics of this part.
        group: of the ranks that hold other values of the same channels.
        whole: makes the output: a DTensor, with the placements of the input.
        finish: is to be called after a training forward: completes running statistics that are whole on every rank.
    """

    input: Tensor
    residual: Tensor | None
    mask: Tensor | None
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    memory: Memory | None
    group: Any
    whole: Callable[[Tensor], Tensor]
    finish: Callable[[], None]


def parts_of(
    input: Any,
    vectors: Sequence[Tensor | None],
    residual: Any,
    mask: Any,
    memory: Memory | None,
    group: Any,
    training: bool,
) -> Parts:
    """Take a DTensor of shape ``(N, C, *)`` apart.

    Args:
        input: the DTensor.
        vectors: running mean, running variance, weight and bias, each of shape ``(C,)`` or None.
        residual, mask: DTensors on the same mesh, or None.
        memory: as in ``functional.batch_norm``.
        group: that of the layer, as resolved. Its ranks outside of the input's mesh hold other samples of the batch.
        training: whether statistics are shared.

    Raises:
        ValueError: a placement of the input is a sum that is still to be made; the others are on another mesh, or
            placed otherwise; a group of which the mesh does not say which of its ranks hold the same values.
        TypeError: residual or mask are plain tensors.

    Collectives:
        None for parameters that are replicated, or sharded as the input's channels are; where they are sharded
        otherwise, torch's redistribution of C numbers each. At the first call over several dimensions of a mesh, the
        creation of a group.
    """
    layout = _Layout(input)
    for name, other in (("residual", residual), ("mask", mask)):
        layout.check_beside(name, other)
    running = None if memory is None else memory.running
    if layout.by_channel and memory is not None and running is None:
        raise ValueError(
            "the statistics of several batches (step_statistics, update_population_stats) cannot be collected from "
            f"inputs whose channels are sharded, and this one has the placements {input.placements}"
        )
    buffers = [_Buffer(layout, vector) for vector in (vectors[:2] if running is None else (running.mean, running.var))]
    mean, var = (buffer.local for buffer in buffers)
    moved = None if running is None else Running(mean, var, running.momentum, _plain(running.batches))
    weight, bias = (layout.parameter(vector) for vector in vectors[2:])
    shape, stride = input.shape, input.stride()

    def whole(y: Tensor) -> Tensor:
        made: Tensor = type(input).from_local(
            y, layout.mesh, input.placements, run_check=False, shape=shape, stride=stride
        )
        return made

    part = input.to_local()

    def finish() -> None:
        if moved is not None and part.numel() == 0 < input.numel() and layout.by_channel and part.shape[1] == 0:
            moved.count()  # a rank without channels has seen an empty batch, and the others one that counts
        for buffer in buffers:
            buffer.complete()

    if vectors[0] is None:  # in training without running statistics; the memory is none, too
        mean = var = None
    return Parts(
        part,
        None if residual is None else residual.to_local(),
        None if mask is None else mask.to_local(),
        (mean, var, weight, bias),
        moved or memory,
        layout.group(group) if training else None,
        whole,
        finish,
    )


class _Layout:
    """The placements of an input of shape ``(N, C, *)``, dimension by dimension of its mesh."""

    def __init__(self, input: Any) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        self.type, self.mesh, self.placements = type(input), input.device_mesh, input.placements
        sharded = [getattr(placement, "dim", None) for placement in self.placements]
        self.by_values = [d for d, dim in enumerate(sharded) if dim is not None and dim % input.dim() != 1]
        self.by_channel = [d for d, dim in enumerate(sharded) if dim is not None and dim % input.dim() == 1]
        odd = [self.placements[d] for d in self.by_channel if type(self.placements[d]) is not Shard]
        if any(placement.is_partial() for placement in self.placements) or odd:
            raise ValueError(
                f"the input is a DTensor with the placements {self.placements}, whose parts say nothing alone: "
                + (f"channels as in {odd[0]}" if odd else "a sum over ranks is still to be made")
                + ". Call input.redistribute(placements=...) first, with Shard or Replicate"
            )
        self.of_vector = [Shard(0) if d in self.by_channel else Replicate() for d in range(self.mesh.ndim)]
        self.of_gradient = [Partial() if d in self.by_values else at for d, at in enumerate(self.of_vector)]
        self.replicated = [Replicate()] * self.mesh.ndim

    def check_beside(self, name: str, other: Any) -> None:
        """Raise unless a tensor beside the input is a DTensor whose parts fit the input's."""
        if other is None:
            return
        if not is_dtensor(other):
            raise TypeError(f"the input is a DTensor, so {name} must be one too; got {type(other).__name__}")
        if name == "mask":  # one for all channels; a dimension of size 1 is whole on every rank
            fits = all(
                mine == its or (its.is_replicate() and (d in self.by_channel or other.shape[mine.dim] == 1))
                for d, (mine, its) in enumerate(zip(self.placements, other.placements, strict=True))
            )
        else:
            fits = other.placements == self.placements
        if other.device_mesh != self.mesh or not fits:
            raise ValueError(
                f"{name} must be on the mesh of the input {self.mesh} with its placements {self.placements}, got "
                f"{other.placements} on {other.device_mesh}; {name}.redistribute(placements=...) changes them"
            )

    def dtensor(self, vector: Tensor) -> Any:
        """A vector as a DTensor on the mesh of the input; a plain one is on all ranks alike."""
        if not is_dtensor(vector):
            return self.type.from_local(vector, self.mesh, self.replicated, run_check=False)
        if vector.device_mesh != self.mesh:  # type: ignore[attr-defined]
            raise ValueError(
                f"parameters and running statistics must be on the input's mesh {self.mesh}, or plain tensors; got one "
                f"on {vector.device_mesh}"  # type: ignore[attr-defined]
            )
        return vector

    def parameter(self, vector: Tensor | None) -> Tensor | None:
        """The weight or bias of this rank's channels. Its gradients add up over the ranks that hold other values."""
        if vector is None:
            return None
        local: Tensor = (
            self.dtensor(vector).redistribute(placements=self.of_vector).to_local(grad_placements=self.of_gradient)
        )
        return local

    def group(self, group: Any) -> Any:
        """The group of the ranks that hold other values of this rank's channels. Of this rank alone, if none does.

        They are those that the dimensions of the mesh that shard batch or space lead to; and those that ``group`` leads
        to, along dimensions of the root mesh which are not of the input's.
        """
        if group is None:  # torch.distributed is not initialized: a mesh without ranks, as for estimates
            return None
        known = _groups.setdefault(group, {})
        key = self.mesh, tuple(self.by_values)
        if key not in known:
            known[key] = _group_of(self._ranks(group), group, self.mesh)
        return known[key]

    def _ranks(self, group: Any) -> list[int]:
        here = self.mesh.mesh
        apart = _reach(here, self.by_values)
        others = set(group_ranks(group)) - set(here.flatten().tolist())
        if not others:
            return apart
        root = _torch.root_of(self.mesh).mesh
        of_group, of_input = _varying(root, group_ranks(group)), _varying(root, here.flatten().tolist())
        if of_group is None or of_input is None or _reach(root, of_group) != sorted(group_ranks(group)):
            raise ValueError(
                f"the input is a DTensor on {self.mesh}, and the layer's group has ranks outside of it, "
                f"{sorted(others)}: no mesh says which of them hold the same values. Give the layer a group within the "
                "mesh, process_group=(mesh, dim), or one along a dimension of the mesh that this one is a slice of"
            )
        of_parts = _varying(root, apart)
        assert of_parts is not None
        return _reach(root, of_parts | (of_group - of_input))


_groups: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _reach(mesh: Tensor, dims: Collection[int]) -> list[int]:
    """The ranks of a mesh that lie along these dimensions of it, from this rank; sorted."""
    place = (mesh == dist.get_rank()).nonzero()[0].tolist()
    index = tuple(slice(None) if d in dims else at for d, at in enumerate(place))
    return sorted(mesh[index].flatten().tolist())


def _varying(mesh: Tensor, ranks: Sequence[int]) -> set[int] | None:
    """The dimensions of a mesh in which the places of these ranks differ; None if one has no place in it."""
    places = [(mesh == rank).nonzero() for rank in ranks]
    if any(len(place) != 1 for place in places):
        return None
    every = torch.cat(places)
    return {d for d in range(mesh.dim()) if len(every[:, d].unique()) > 1}


def _group_of(ranks: list[int], group: Any, mesh: Any) -> Any:
    """A group of exactly these ranks: one that exists, or a new one, which its own ranks alone make."""
    along = (mesh.get_group(d) for d in range(mesh.ndim))
    for known in itertools.chain([group], along, _torch.registered_groups()):
        if sorted(group_ranks(known)) == ranks:
            return known
    return dist.new_group(ranks, use_local_synchronization=True)


class _Buffer:
    """A running statistic: the values for this rank's channels, to be moved in place."""

    def __init__(self, layout: _Layout, vector: Tensor | None) -> None:
        self.layout, self.vector = layout, vector
        self.local: Tensor | None = None
        self.copied = False
        if vector is None:
            return
        with torch.no_grad():
            self.copied = [*getattr(vector, "placements", layout.replicated)] != layout.of_vector
            whole = layout.dtensor(vector)
            self.local = (
                whole.redistribute(placements=layout.of_vector).to_local().clone() if self.copied else _plain(vector)
            )

    def complete(self) -> None:
        """Put what was moved where it came from, if that is placed otherwise: with the other ranks' channels."""
        if self.vector is None or not self.copied:
            return
        layout = self.layout
        with torch.no_grad():
            moved = layout.type.from_local(
                self.local, layout.mesh, layout.of_vector, run_check=False, shape=self.vector.shape, stride=(1,)
            )
            placements = getattr(self.vector, "placements", layout.replicated)
            _plain(self.vector).copy_(moved.redistribute(placements=placements).to_local())


def _plain(tensor: Any) -> Any:
    """The memory of a DTensor's part on this rank; any other tensor itself."""
    return _torch.part_of(tensor) if is_dtensor(tensor) else tensor
