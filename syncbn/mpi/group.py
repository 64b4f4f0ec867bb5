"""The process group: each collective of torch.distributed as an MPI call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from syncbn.mpi import operation
from syncbn.mpi.operation import NO_TIMEOUT, Operation, Started, Work
from syncbn.mpi.tensors import (
    Reduction,
    apart,
    average,
    bring,
    buffer,
    buffer_of_parts,
    check,
    flatten,
    is_plain,
    plain_input,
    plain_output,
    reduction,
    unflatten,
)

_c10d: Any = torch._C._distributed_c10d  # not by its stubs, which list overloads that subclasses never see
_Op = _c10d.ReduceOp.RedOpType

_ALLGATHER = _c10d.AllgatherOptions()
_ALLREDUCE = _c10d.AllreduceOptions()
_ALLREDUCE_COALESCED = _c10d.AllreduceCoalescedOptions()
_ALLTOALL = _c10d.AllToAllOptions()
_BARRIER = _c10d.BarrierOptions()
_BROADCAST = _c10d.BroadcastOptions()
_GATHER = _c10d.GatherOptions()
_REDUCE = _c10d.ReduceOptions()
_REDUCE_SCATTER = _c10d.ReduceScatterOptions()
_SCATTER = _c10d.ScatterOptions()


class MPIProcessGroup(_c10d.ProcessGroup):
    """A ``torch.distributed.ProcessGroup`` whose collectives are MPI's, for CPU tensors.

    Made by ``dist.init_process_group("mpi4py")``, ``dist.new_group()`` and ``syncbn.mpi.process_group(comm)``. Its
    methods are those of every ProcessGroup, normally called through ``torch.distributed``: each starts an operation and
    returns a ``Work``. Any dtype can be sent. Reductions take real and complex numbers and bool (SUM is "or", PRODUCT
    is "and"); half, bfloat16 and float8 are reduced in float32 and rounded once. Tensors may be empty, need not be
    contiguous, and inputs may share memory with outputs.

    Args:
        comm: an intra-communicator that belongs to this group alone.
        timeout: how long an operation may take, from its start.
        name: the group's name in torch.distributed.
        keep_comm: whether the communicator outlives the group.

    Attributes:
        dead: why the group cannot be used any more, or None.
    """

    def __init__(self, comm: Any, timeout: timedelta, name: str, keep_comm: bool = False) -> None:
        self._comm = comm
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        super().__init__(self._rank, self._size)
        self._timeout = timeout.total_seconds()
        self._name = name
        self._description = "undefined"
        self._keep_comm = keep_comm
        self._tag_limit: int = comm.Get_attr(MPI.TAG_UB)
        self._destroyed = False
        self.dead: str | None = None
        comm.Set_errhandler(MPI.ERRORS_RETURN)

    # What torch.distributed asks of a group, by the names that C++ and Python call.

    def getBackendName(self) -> str:
        return "mpi4py"

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> MPIProcessGroup:
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long an operation may take, from its start."""
        self._timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Give the communicator back to MPI, which has about 2000; ``dist.destroy_process_group`` calls this."""
        if not self._destroyed and not self.dead and not self._keep_comm:
            self._comm.Free()
        self._destroyed = True

    abort = shutdown

    @property
    def is_destroyed(self) -> bool:
        """Whether ``shutdown`` was called."""
        return self._destroyed

    def bury(self, reason: str) -> RuntimeError:
        """Note that the group cannot be used any more; returns the error to raise."""
        if self.dead is None:
            self.dead = reason
            operation.lost.append(reason)
        return dist.DistBackendError(
            f"mpi4py backend, rank {self._rank} of {self._size}: {reason}. A rank is late, has ended, or is in another "
            "collective. The group cannot be used any more, and the exit of this process will end all ranks."
        )

    # Starting an operation.

    def _check_alive(self, name: str) -> None:
        if self.dead is not None:
            raise self.bury(self.dead)
        if self._destroyed:
            raise RuntimeError(f"{name}: this process group was destroyed")

    def _start(self, name: str, begin: Callable[..., Any], *arguments: Any, keep: Any, finish: Any = None) -> Started:
        try:
            return Started(begin(*arguments), keep, finish)
        except OverflowError as error:
            raise ValueError(
                f"{name}: this MPI library takes no more than 2**31 - 1 elements in one call ({error}). Split the "
                "tensor, or use an MPI-4 library, for example MPICH 4 or later."
            ) from error
        except MPI.Exception as error:
            raise self.bury(f"{name} failed, MPI reports: {error}") from error

    def _work(self, name: str, started: Sequence[Started], result: Any, timeout: timedelta = NO_TIMEOUT) -> Work:
        seconds = timeout.total_seconds() if timeout > NO_TIMEOUT else self._timeout
        return Work(Operation(self, name, started, result, seconds))

    # Reductions.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = _ALLREDUCE) -> Work:
        self._check_alive("all_reduce")
        started = self._start_allreduce(_single("all_reduce", tensors), opts.reduceOp)
        return self._work("all_reduce", (started,), tensors, opts.timeout)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = _ALLREDUCE_COALESCED) -> Work:
        self._check_alive("all_reduce_coalesced")
        started = [self._start_allreduce(tensor, opts.reduceOp) for tensor in tensors]
        return self._work("all_reduce_coalesced", started, tensors, opts.timeout)

    def _start_allreduce(self, tensor: Tensor, op: Any) -> Started:
        how = reduction(op.op, tensor.dtype)
        sent, finish = check(tensor), None
        if not how.in_place or not is_plain(tensor):
            sent = _numbers(tensor, how, op)
            finish = self._deliver(sent, tensor, op)
        arguments = MPI.IN_PLACE, buffer(sent, how.datatype), how.op
        return self._start("all_reduce", self._comm.Iallreduce, *arguments, keep=sent, finish=finish)

    def _deliver(self, received: Tensor, target: Tensor, op: Any) -> Callable[[], None] | None:
        return average(received, target, self._size) if op.op == _Op.AVG else bring(received, target)

    def reduce(self, tensors: Sequence[Tensor], opts: Any = _REDUCE) -> Work:
        self._check_alive("reduce")
        tensor, root = _single("reduce", tensors), self._check_rank("reduce", opts.rootRank)
        how = reduction(opts.reduceOp.op, tensor.dtype)
        sent = _numbers(tensor, how, opts.reduceOp)
        numbers, finish = buffer(sent, how.datatype), None
        buffers: tuple[Any, Any] = (numbers, None)
        if root == self._rank:
            finish = self._deliver(sent, tensor, opts.reduceOp)
            buffers = (MPI.IN_PLACE, numbers)
        started = self._start("reduce", self._comm.Ireduce, *buffers, how.op, root, keep=sent, finish=finish)
        return self._work("reduce", (started,), tensors, opts.timeout)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = _REDUCE_SCATTER
    ) -> Work:
        self._check_alive("reduce_scatter")
        output, parts = _single("reduce_scatter", outputs), _single("reduce_scatter", inputs)
        self._check_length("reduce_scatter", parts)
        _check_alike("reduce_scatter", output, parts[self._rank : self._rank + 1])
        counts = [part.numel() for part in parts]
        started = self._start_reduce_scatter("reduce_scatter", output, flatten(parts), opts.reduceOp, counts)
        return self._work("reduce_scatter", (started,), outputs, opts.timeout)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = _REDUCE_SCATTER) -> Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _REDUCE_SCATTER
    ) -> Work:
        name = "reduce_scatter_single"
        self._check_alive(name)
        started = []
        for output, whole in zip(outputs, inputs, strict=True):
            self._check_whole(name, "input", whole, output)
            counts = [output.numel()] * self._size
            started.append(self._start_reduce_scatter(name, output, whole, opts.reduceOp, counts))
        return self._work(name, started, outputs, opts.timeout)

    def _start_reduce_scatter(self, name: str, output: Tensor, whole: Tensor, op: Any, counts: list[int]) -> Started:
        how = reduction(op.op, output.dtype)
        received = plain_output(output, how.dtype)
        sent = apart(_numbers(whole, how, op), received)
        arguments = buffer(sent, how.datatype), buffer(received, how.datatype), counts, how.op
        finish = self._deliver(received, output, op)
        return self._start(name, self._comm.Ireduce_scatter, *arguments, keep=(sent, received), finish=finish)

    # Moving tensors.

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = _BROADCAST) -> Work:
        self._check_alive("broadcast")
        tensor, root = _single("broadcast", tensors), self._check_rank("broadcast", opts.rootRank)
        finish = None
        if root == self._rank:
            moved = plain_input(tensor)
        else:
            moved = plain_output(tensor)
            finish = bring(moved, tensor)
        started = self._start("broadcast", self._comm.Ibcast, buffer(moved), root, keep=moved, finish=finish)
        return self._work("broadcast", (started,), tensors, opts.timeout)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = _ALLGATHER) -> Work:
        _single("all_gather", inputs)
        return self.allgather_coalesced(outputs, inputs, opts)

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = _ALLGATHER
    ) -> Work:
        self._check_alive("all_gather")
        started = [self._start_allgather(*both) for both in zip(outputs, inputs, strict=True)]
        return self._work("all_gather", started, outputs, opts.timeout)

    def _start_allgather(self, outputs: Sequence[Tensor], input: Tensor) -> Started:
        self._check_length("all_gather", outputs)
        _check_alike("all_gather", input, outputs[self._rank : self._rank + 1])
        sent = plain_input(input)
        counts = [output.numel() for output in outputs]
        received = torch.empty(sum(counts), dtype=sent.dtype)
        arguments = buffer(sent), buffer_of_parts(received, counts)
        finish = unflatten(received, outputs)
        return self._start("all_gather", self._comm.Iallgatherv, *arguments, keep=(sent, received), finish=finish)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = _ALLGATHER) -> Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _ALLGATHER
    ) -> Work:
        self._check_alive("all_gather_single")
        started = [self._start_all_gather_single(*both) for both in zip(outputs, inputs, strict=True)]
        return self._work("all_gather_single", started, outputs, opts.timeout)

    def _start_all_gather_single(self, output: Tensor, part: Tensor) -> Started:
        name = "all_gather_single"
        self._check_whole(name, "output", output, part)
        received = plain_output(output)
        sent = apart(plain_input(part), received)
        arguments = buffer(sent), buffer(received, count=sent.numel())
        finish = bring(received, output)
        return self._start(name, self._comm.Iallgather, *arguments, keep=(sent, received), finish=finish)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = _GATHER) -> Work:
        self._check_alive("gather")
        input, root = _single("gather", inputs), self._check_rank("gather", opts.rootRank)
        sent = plain_input(input)
        received = finish = target = None
        if root == self._rank:
            parts = _single("gather", outputs)
            self._check_length("gather", parts)
            _check_alike("gather", input, parts)
            received = torch.empty(self._size * sent.numel(), dtype=sent.dtype)
            finish = unflatten(received, parts)
            target = buffer(received, count=sent.numel())
        keep = sent, received
        started = self._start("gather", self._comm.Igather, buffer(sent), target, root, keep=keep, finish=finish)
        return self._work("gather", (started,), outputs, opts.timeout)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = _SCATTER) -> Work:
        self._check_alive("scatter")
        output, root = _single("scatter", outputs), self._check_rank("scatter", opts.rootRank)
        received = plain_output(output)
        sent = source = None
        if root == self._rank:
            parts = _single("scatter", inputs)
            self._check_length("scatter", parts)
            _check_alike("scatter", output, parts)
            sent = flatten(parts)
            source = buffer(sent, count=received.numel())
        arguments = source, buffer(received), root
        finish = bring(received, output)
        started = self._start("scatter", self._comm.Iscatter, *arguments, keep=(sent, received), finish=finish)
        return self._work("scatter", (started,), outputs, opts.timeout)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = _ALLTOALL,
    ) -> Work:
        name = "all_to_all_single"
        self._check_alive(name)
        received = plain_output(output)
        sent = apart(plain_input(input), received)
        counts = self._count_rows("input", input, input_splits), self._count_rows("output", output, output_splits)
        started = self._start_alltoall(name, sent, received, *counts, bring(received, output))
        return self._work(name, (started,), [output], opts.timeout)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = _ALLTOALL) -> Work:
        name = "all_to_all"
        self._check_alive(name)
        self._check_length(name, outputs)
        self._check_length(name, inputs)
        counts = [part.numel() for part in inputs], [part.numel() for part in outputs]
        sent = flatten(inputs)
        received = torch.empty(sum(counts[1]), dtype=outputs[0].dtype)
        started = self._start_alltoall(name, sent, received, *counts, unflatten(received, outputs))
        return self._work(name, (started,), outputs, opts.timeout)

    def _start_alltoall(
        self, name: str, sent: Tensor, received: Tensor, sizes: list[int], received_sizes: list[int], finish: Any
    ) -> Started:
        if sent.dtype is not received.dtype:
            raise ValueError(f"{name}: the input is {sent.dtype} and the output {received.dtype}; make them equal")
        arguments = buffer_of_parts(sent, sizes), buffer_of_parts(received, received_sizes)
        return self._start(name, self._comm.Ialltoallv, *arguments, keep=(sent, received), finish=finish)

    # One rank to another.

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> Work:
        self._check_alive("send")
        name = f"send to rank {rank}, tag {tag}"
        sent = plain_input(_single("send", tensors))
        peer = self._check_rank("send", rank), self._check_tag(tag)
        started = self._start(name, self._comm.Isend, buffer(sent), *peer, keep=sent)
        return self._work(name, (started,), tensors)

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> Work:
        return self._receive(f"recv from rank {rank}, tag {tag}", tensors, self._check_rank("recv", rank), tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        return self._receive(f"recv from any rank, tag {tag}", tensors, MPI.ANY_SOURCE, tag)

    def _receive(self, name: str, tensors: Sequence[Tensor], rank: int, tag: int) -> Work:
        self._check_alive("recv")
        target = _single("recv", tensors)
        received = plain_output(target)
        arguments = buffer(received), rank, self._check_tag(tag)
        finish = bring(received, target)
        started = self._start(name, self._comm.Irecv, *arguments, keep=received, finish=finish)
        receive = Operation(self, name, (started,), tensors, self._timeout)
        receive.expect(received.numel() * received.itemsize)
        return Work(receive)

    def barrier(self, opts: Any = _BARRIER) -> Work:
        self._check_alive("barrier")
        started = self._start("barrier", self._comm.Ibarrier, keep=None)
        return self._work("barrier", (started,), [], opts.timeout)

    # The names before torch 2.13, and those that only Python calls.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
    _set_group_name = setGroupName
    _set_group_desc = setGroupDesc

    # Checks of arguments. None of them can see what other ranks do.

    def _check_length(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self._size:
            raise ValueError(f"{name}: expected {self._size} tensors, one for each rank, got {len(tensors)}")

    def _check_whole(self, name: str, what: str, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != self._size * part.numel() or whole.dtype is not part.dtype:
            raise ValueError(
                f"{name}: the {what} must have {self._size} times {part.numel()} elements of {part.dtype}, got "
                f"{whole.numel()} of {whole.dtype}"
            )

    def _check_rank(self, name: str, rank: int) -> int:
        if not 0 <= rank < self._size:
            raise ValueError(f"{name}: there is no rank {rank} in a group of {self._size}")
        return rank

    def _check_tag(self, tag: int) -> int:
        if not 0 <= tag <= self._tag_limit:
            raise ValueError(f"tag {tag}: this MPI library takes tags from 0 to {self._tag_limit}")
        return tag

    def _count_rows(self, what: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        """Elements for each rank, of rows that are split as said, or equally."""
        rows = tensor.shape[0]
        row = tensor[0].numel() if rows else 0
        if not splits and rows % self._size == 0:
            return [rows // self._size * row] * self._size
        if len(splits) != self._size or sum(splits) != rows:
            raise ValueError(
                f"all_to_all_single: {what}_split_sizes must be {self._size} numbers with the sum {rows} (the rows of "
                f"the {what}), got {list(splits)}; they can be left out only if all ranks get equally many rows"
            )
        return [split * row for split in splits]


def _single(name: str, tensors: Sequence[Any]) -> Any:
    if len(tensors) != 1:
        raise ValueError(f"{name}: expected one tensor (or one list of tensors) on each rank, got {len(tensors)}")
    return tensors[0]


def _check_alike(name: str, tensor: Tensor, others: Sequence[Tensor]) -> None:
    for other in others:
        if other.numel() != tensor.numel() or other.dtype is not tensor.dtype:
            raise ValueError(
                f"{name}: a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} does not fit one of shape "
                f"{tuple(other.shape)} and {other.dtype}"
            )


def _numbers(tensor: Tensor, how: Reduction, op: Any) -> Tensor:
    """What is sent to be reduced: the tensor itself where that is possible."""
    if how.in_place and is_plain(check(tensor)):
        return tensor
    numbers = plain_input(tensor, how.dtype)
    if op.op == _Op.PREMUL_SUM:
        return numbers * op.__getstate__()[1]
    return numbers
