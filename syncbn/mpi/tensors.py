"""Tensors as MPI sees them: addresses, counts and datatypes, and which reductions MPI can do on them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

_Op: Any = dist.ReduceOp.RedOpType

_NUMBERS = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}

# What only moves travels as words of its item size, whatever the bits mean.
_WORDS = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

_OPS = {
    _Op.SUM: MPI.SUM,
    _Op.AVG: MPI.SUM,
    _Op.PREMUL_SUM: MPI.SUM,
    _Op.PRODUCT: MPI.PROD,
    _Op.MIN: MPI.MIN,
    _Op.MAX: MPI.MAX,
    _Op.BAND: MPI.BAND,
    _Op.BOR: MPI.BOR,
    _Op.BXOR: MPI.BXOR,
}

_LOGICAL = {
    _Op.SUM: MPI.LOR,
    _Op.PRODUCT: MPI.LAND,
    _Op.MIN: MPI.LAND,
    _Op.MAX: MPI.LOR,
    _Op.BAND: MPI.LAND,
    _Op.BOR: MPI.LOR,
    _Op.BXOR: MPI.LXOR,
}


class Reduction(NamedTuple):
    """How MPI does a reduction of torch.distributed.

    Attributes:
        op, datatype: MPI's.
        dtype: of the numbers that are sent. float32 for half, bfloat16 and float8, which MPI does not have: they are
            reduced in float32 and rounded once, at the end.
        in_place: the tensor's own memory can be given to MPI, and holds the result afterwards.
    """

    op: Any
    datatype: Any
    dtype: torch.dtype
    in_place: bool


@functools.cache
def reduction(op: Any, dtype: torch.dtype) -> Reduction:
    """How MPI reduces a dtype with a ``ReduceOp.RedOpType``; ValueError if it cannot."""
    if dtype is torch.bool and op in _LOGICAL:
        return Reduction(_LOGICAL[op], MPI.C_BOOL, dtype, True)
    integer = not dtype.is_floating_point and not dtype.is_complex
    sent = torch.float32 if dtype.is_floating_point and dtype not in _NUMBERS else dtype
    if (
        sent not in _NUMBERS
        or (op in (_Op.BAND, _Op.BOR, _Op.BXOR) and not integer)
        or (op in (_Op.MIN, _Op.MAX) and dtype.is_complex)
        or (op == _Op.PREMUL_SUM and integer)
        or (op == _Op.AVG and dtype is torch.uint64)
    ):
        raise ValueError(
            f"the mpi4py backend cannot reduce {dtype} with {op.name}. Bitwise operations take integers and bool; MIN "
            "and MAX real numbers and bool; PREMUL_SUM floating point; AVG all but bool and uint64."
        )
    return Reduction(_OPS[op], _NUMBERS[sent], sent, sent is dtype and op not in (_Op.AVG, _Op.PREMUL_SUM))


def check(tensor: Tensor) -> Tensor:
    """The tensor, if it is one that MPI can send; ValueError if not."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise ValueError(
            f"the mpi4py backend carries dense CPU tensors, and this one is {tensor.layout} on {tensor.device}. Move "
            "it (tensor.cpu(), tensor.to_dense()), or make a group for that device: for CUDA, "
            "dist.new_group(backend='nccl')."
        )
    return tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the tensor's numbers in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def plain_input(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself if memory holds its numbers in order, as ``dtype``; else such a copy."""
    tensor = check(tensor).detach()
    dtype = dtype or tensor.dtype
    if tensor.dtype is dtype and is_plain(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def plain_output(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself if a result can be received in it, as ``dtype``; else a buffer of its shape."""
    dtype = dtype or tensor.dtype
    if check(tensor).dtype is dtype and is_plain(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=dtype)


def bring(buffer: Tensor, target: Tensor) -> Callable[[], None] | None:
    """What copies a received buffer to its tensor: None if it is the tensor itself."""
    if buffer is target:
        return None

    def copy() -> None:
        target.copy_(buffer)

    return copy


def average(total: Tensor, target: Tensor, size: int) -> Callable[[], None]:
    """What divides a total by the number of ranks (integers: towards zero) and stores it."""

    def divide() -> None:
        if total.is_floating_point() or total.is_complex():
            target.copy_(total / size)
        else:  # torch divides no unsigned numbers wider than 8 bits
            target.copy_(torch.div(total.long(), size, rounding_mode="trunc"))

    return divide


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of the tensors, one tensor after the other."""
    return torch.cat([check(tensor).detach().reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """What copies the parts of a received buffer to their tensors."""
    for tensor in tensors:
        check(tensor)

    def copy() -> None:
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    return copy


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose memory is in order share some of it, which MPI forbids."""
    start, other = first.data_ptr(), second.data_ptr()
    return start < other + second.numel() * second.itemsize and other < start + first.numel() * first.itemsize


def apart(sent: Tensor, received: Tensor) -> Tensor:
    """What is sent, or a copy of it where it shares memory with what is received (FSDP2 does that)."""
    return sent.clone() if overlap(sent, received) else sent


def buffer(tensor: Tensor, datatype: Any = None, count: int | None = None) -> list[Any]:
    """The buffer argument of mpi4py for a tensor whose memory is in order.

    ``count``: elements for each rank, where that is not the tensor's number of elements.
    """
    numel, itemsize = tensor.numel(), tensor.itemsize
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), numel * itemsize)
    return [memory, numel if count is None else count, datatype or _WORDS[itemsize]]


def buffer_of_parts(tensor: Tensor, counts: Sequence[int]) -> list[Any]:
    """The same for ``counts`` elements for each rank, one after the other."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
    return [memory, (list(counts), starts), _WORDS[tensor.itemsize]]
