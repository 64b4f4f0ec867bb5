"""Every collective of the mpi4py backend against values computed on each rank; run under mpiexec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from mpi4py import MPI
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import syncbn.mpi

Op = dist.ReduceOp

# (as they were called before torch 2.13)
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
FUNCTIONAL_GATHER: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
FUNCTIONAL_SCATTER: Any = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
INTEGERS = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64
]  # fmt: skip
REALS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
SIZES = [1, 513, 0]

rank = MPI.COMM_WORLD.Get_rank()
world = MPI.COMM_WORLD.Get_size()


def numbers(of_rank: int, dtype: torch.dtype, size: int = 13, salt: int = 0) -> Tensor:
    """What a rank brings: small whole numbers, so that sums and products are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * salt + of_rank)
    values = torch.randint(1, 4, (size,), generator=generator)
    if dtype.is_complex:
        return torch.complex(values.double(), values.flip(0).double()).to(dtype)
    return (values % 2).bool() if dtype is torch.bool else values.to(dtype)


def everyone(dtype: torch.dtype, size: int = 13, salt: int = 0) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    return torch.stack([numbers(r, dtype, size, salt).to(wide) for r in range(world)])


REDUCE: dict[Any, Callable[[Tensor], Tensor]] = {
    Op.SUM: lambda x: x.sum(0),
    Op.PRODUCT: lambda x: x.prod(0),
    Op.MIN: lambda x: x.amin(0),
    Op.MAX: lambda x: x.amax(0),
    Op.AVG: lambda x: x.sum(0) / world if x.is_floating_point() or x.is_complex() else x.sum(0) // world,
    Op.BAND: lambda x: functools.reduce(torch.bitwise_and, x),
    Op.BOR: lambda x: functools.reduce(torch.bitwise_or, x),
    Op.BXOR: lambda x: functools.reduce(torch.bitwise_xor, x),
}


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=0, atol=0)


def raises(kind: type[BaseException], text: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except kind as error:
        assert text in str(error), f"{text!r} is not in {str(error)!r}"
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def check_all_reduce() -> None:
    for dtype in INTEGERS + REALS:
        for op, expected in REDUCE.items():
            if dtype.is_floating_point and op in (Op.BAND, Op.BOR, Op.BXOR):
                raises(ValueError, "cannot reduce", dist.all_reduce, numbers(rank, dtype), op)
                continue
            if dtype is torch.uint64 and op == Op.AVG:
                raises(ValueError, "AVG all but bool and uint64", dist.all_reduce, numbers(rank, dtype), op)
                continue
            for size in SIZES:
                x = numbers(rank, dtype, size)
                dist.all_reduce(x, op)
                same(x, expected(everyone(dtype, size)))
    for dtype in COMPLEX:
        for op in (Op.SUM, Op.AVG, Op.PRODUCT):
            x = numbers(rank, dtype)
            dist.group.WORLD.allreduce([x], reduce_options(op)).wait()
            torch.testing.assert_close(x, REDUCE[op](everyone(dtype)).to(dtype))
        x = numbers(rank, dtype)
        dist.all_reduce(x)
        same(x, REDUCE[Op.SUM](everyone(dtype)))
    for op in (Op.SUM, Op.MAX, Op.BOR, Op.PRODUCT, Op.MIN, Op.BAND, Op.BXOR):
        x = numbers(rank, torch.bool)
        dist.all_reduce(x, op)
        same(x, REDUCE[op](everyone(torch.bool)) % 2 if op == Op.BXOR else REDUCE[op](everyone(torch.bool)) > 0)
    raises(ValueError, "AVG all but bool and uint64", dist.all_reduce, numbers(rank, torch.bool), Op.AVG)


def reduce_options(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def check_narrow_floats_are_summed_wide() -> None:
    x = torch.full((3,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)  # in bfloat16, 256 + 1 is 256
    dist.all_reduce(x)
    same(x, torch.full((3,), 256.0 + world - 1).bfloat16())
    scaled = numbers(rank, torch.float32)
    dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.5))
    same(scaled, everyone(torch.float32).sum(0) / 2)


def check_bits_are_equal_on_all_ranks() -> None:
    for size in (1, 129, 1026, 100_000):
        x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
        dist.all_reduce(x)
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x)
        assert all(torch.equal(part, x) for part in parts)


def check_layouts() -> None:
    base = torch.zeros(5, 8)
    view = base.t()[1::2]
    view.copy_(torch.full((4, 5), float(rank + 1)))
    dist.all_reduce(view)
    same(view, torch.full((4, 5), world * (world + 1) / 2))
    assert base.t()[0::2].eq(0).all()
    for got in (torch.zeros(3, 4).t(), torch.zeros(4, 6)[:, ::2]):
        value = torch.arange(12.0).view(3, 4).t()
        dist.broadcast(got.copy_(value) if rank == 0 else got, 0)
        same(got, value)
    conjugate = numbers(rank, torch.complex64).conj()
    parts = [torch.empty(13, dtype=torch.complex64) for _ in range(world)]
    dist.group.WORLD.allgather([parts], [conjugate]).wait()
    same(torch.stack(parts), everyone(torch.complex64).conj())
    weight = torch.nn.Parameter(torch.full((2, 3), float(rank)))
    with torch.no_grad():
        dist.all_reduce(weight.t(), op=Op.MAX)
    same(weight.detach(), torch.full((2, 3), world - 1.0))
    with torch.inference_mode():
        inner = torch.full((4, 2), float(rank)).t()
        dist.all_reduce(inner)
    assert inner.flatten().tolist() == [world * (world - 1) / 2] * 8


def check_broadcast() -> None:
    for dtype in [*INTEGERS, *REALS, *COMPLEX, torch.bool, torch.float8_e4m3fn]:
        for root in range(world):
            x = numbers(rank, dtype)
            dist.broadcast(x, root)
            assert torch.equal(x.view(torch.uint8), numbers(root, dtype).view(torch.uint8))


def check_reduce() -> None:
    for dtype in (torch.int32, torch.float64, torch.bfloat16):
        for root in range(world):
            for op in (Op.SUM, Op.AVG, Op.MAX):
                x = numbers(rank, dtype)
                dist.reduce(x, root, op)
                same(x, REDUCE[op](everyone(dtype)) if rank == root else numbers(rank, dtype))


def check_all_gather() -> None:
    for dtype in [*INTEGERS, *REALS, *COMPLEX, torch.bool]:
        for size in SIZES:
            x = numbers(rank, dtype, size)
            parts = [torch.empty_like(x) for _ in range(world)]
            dist.all_gather(parts, x)
            same(torch.stack(parts), everyone(dtype, size))
            whole = torch.empty(world * size, dtype=dtype)
            all_gather_single(whole, x)
            same(whole, everyone(dtype, size).flatten())
    uneven = [torch.empty(r + 1, 2) for r in range(world)]
    dist.all_gather(uneven, torch.full((rank + 1, 2), float(rank)))
    for r, part in enumerate(uneven):
        same(part, torch.full((r + 1, 2), float(r)))
    apart = torch.zeros(world, 4).t()
    all_gather_single(apart, torch.full((4,), float(rank)))
    same(apart.reshape(-1), torch.arange(world).repeat_interleave(4).float())


def check_shared_memory() -> None:
    """Inputs that lie in the output, which MPI forbids and FSDP2 does."""
    whole = torch.full((world * 4,), -1.0)
    mine = whole[rank * 4 : (rank + 1) * 4].fill_(rank)
    all_gather_single(whole, mine)
    same(whole, torch.arange(world).repeat_interleave(4).float())
    whole = torch.arange(world * 4.0)
    shifted = whole[1:4].clone()
    all_gather_single(whole[: 3 * world], whole[1:4])
    same(whole[: 3 * world], shifted.repeat(world))
    whole = torch.arange(world * 4.0)
    reduce_scatter_single(whole[:4], whole)
    same(whole[:4], world * torch.arange(4.0 * rank, 4.0 * rank + 4))
    rows = torch.full((world, 2), float(rank))
    dist.all_to_all_single(rows, rows)
    same(rows, torch.arange(float(world)).unsqueeze(1).expand(world, 2))


def check_reduce_scatter() -> None:
    for dtype in (torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for op in (Op.SUM, Op.AVG, Op.MAX, Op.PRODUCT):
            total = REDUCE[op](everyone(dtype, 6 * world)).view(world, 6)[rank]
            x = numbers(rank, dtype, 6 * world)
            out = torch.empty(6, dtype=dtype)
            reduce_scatter_single(out, x, op)
            same(out, total)
            dist.reduce_scatter(out.zero_(), list(x.view(world, 6).clone()), op)
            same(out, total)
            strided = torch.empty(12, dtype=dtype)[::2]
            reduce_scatter_single(strided, x, op)
            same(strided, total)
    uneven = [torch.full((r + 1,), float(rank + 1)) for r in range(world)]
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, uneven)
    same(out, torch.full((rank + 1,), world * (world + 1) / 2))


def check_gather_and_scatter() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for root in range(world):
            x = numbers(rank, dtype)
            parts = [torch.empty_like(x) for _ in range(world)] if rank == root else None
            dist.gather(x, parts, root)
            if parts is not None:
                same(torch.stack(parts), everyone(dtype))
            out = torch.empty(26, dtype=dtype)[::2]
            dist.scatter(out, [numbers(r, dtype, salt=root) for r in range(world)] if rank == root else None, root)
            same(out, numbers(rank, dtype, salt=root))


def check_all_to_all() -> None:
    for dtype in (torch.float32, torch.float16, torch.int64):
        x = numbers(rank, dtype, 3 * world).view(world, 3)
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        wanted = torch.stack([numbers(r, dtype, 3 * world).view(world, 3)[rank] for r in range(world)])
        same(out, wanted)
        parts = list(torch.empty_like(x))
        dist.all_to_all(parts, list(x))
        same(torch.stack(parts), wanted)
    sent = torch.full((sum(range(world)), 2), float(rank))  # r rows for rank r
    received = torch.empty(rank * world, 2)
    dist.all_to_all_single(received, sent, [rank] * world, list(range(world)))
    same(received, torch.arange(float(world)).repeat_interleave(rank).unsqueeze(1).expand(-1, 2))


def check_send_and_receive() -> None:
    if rank == 0:
        for peer in range(1, world):  # tags keep messages apart, in whatever order they are received
            dist.send(torch.full((3,), 1.0), peer, tag=1)
            dist.send(torch.full((3,), 2.0), peer, tag=2)
        sources = set()
        for _ in range(1, world):
            got = torch.empty(6)[::2]
            source = dist.recv(got, tag=5)
            sources.add(source)
            same(got, torch.full((3,), float(source)))
        assert sources == set(range(1, world))
    else:
        first, second = dist.irecv(a := torch.empty(3), 0, tag=2), dist.irecv(b := torch.empty(3), 0, tag=1)
        second.wait()
        first.wait()
        assert a[0] == 2 and b[0] == 1
        dist.send(torch.full((3,), float(rank)), 0, tag=5)
    ring = torch.empty(1000)
    operations = [
        dist.P2POp(dist.isend, torch.full((1000,), float(rank)), (rank + 1) % world),
        dist.P2POp(dist.irecv, ring, (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert ring.eq((rank - 1) % world).all()
    if rank == 0:
        dist.send(torch.zeros(2), 1, tag=9)
    elif rank == 1:
        raises(RuntimeError, "sent 8 bytes, and 12 are expected", dist.recv, torch.empty(3), 0, tag=9)
    raises(ValueError, "takes tags from 0", dist.isend, torch.zeros(1), (rank + 1) % world, tag=-1)


def check_dropped_work() -> None:
    """An isend that nobody waits for keeps its buffer until it is delivered."""
    if rank == 0:
        dist.isend(torch.full((200_000,), 7.0), 1)
        for _ in range(20):
            torch.full((200_000,), 8.0)
    elif rank == 1:
        dist.recv(got := torch.empty(200_000), 0)
        assert got.eq(7).all()
    dist.barrier()


def check_async() -> None:
    """Operations in flight at once, waited for in another order, by futures, and by C++."""
    tensors = [torch.full((k + 1,), float(rank)) for k in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for tensor, work in reversed(list(zip(tensors, works, strict=True))):
        future = work.get_future()
        assert future.wait()[0] is tensor and work.is_completed() and work.is_success()
        assert tensor.eq(world * (world - 1) / 2).all()
    doubled = dist.all_reduce(x := torch.ones(2), async_op=True).get_future().then(lambda f: f.value()[0] * 2)
    same(doubled.wait(), torch.full((2,), 2.0 * world))
    same(x, torch.full((2,), float(world)))
    other = dist.new_group()
    a, b = torch.ones(3), torch.ones(3)
    order = [(a, dist.group.WORLD), (b, other)]
    pending = [dist.all_reduce(t, group=g, async_op=True) for t, g in (order if rank % 2 else reversed(order))]
    for work in pending:
        work.wait()
    assert a.eq(world).all() and b.eq(world).all()
    dist.all_reduce(mixed := torch.ones(3), async_op=rank == 0)  # one rank's work is dropped, the others wait
    dist.barrier()
    dist.barrier()
    assert mixed.eq(world).all()
    dist.destroy_process_group(other)
    raises(RuntimeError, "was destroyed", other.allreduce, [a])


def check_coalesced() -> None:
    group = dist.group.WORLD
    tensors = [torch.full((k + 1,), float(rank + 1), dtype=d) for k, d in enumerate([torch.float32, torch.bfloat16])]
    with dist.distributed_c10d._coalescing_manager(group):
        for tensor in tensors:
            dist.all_reduce(tensor)
    assert all(tensor.eq(world * (world + 1) / 2).all() for tensor in tensors)
    outs = [torch.empty(world * 2), torch.empty(world * 3)]
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as manager:
        for k, out in enumerate(outs):
            all_gather_single(out, torch.full((k + 2,), float(rank)))
    manager.wait()
    for k, out in enumerate(outs):
        same(out, torch.arange(world).repeat_interleave(k + 2).float())
    scattered = [torch.empty(1), torch.empty(2)]
    with dist.distributed_c10d._coalescing_manager(group):
        for k, out in enumerate(scattered):
            reduce_scatter_single(out, torch.ones(world * (k + 1)))
    assert all(out.eq(world).all() for out in scattered)


def check_functional() -> None:
    group = dist.group.WORLD
    x = torch.arange(4.0 * world) + rank
    total = sum(torch.arange(4.0 * world) + r for r in range(world))
    same(funcol.all_reduce(x, "sum", group) + 0, total)
    same(funcol.all_reduce(x, "avg", group) + 0, total / world)
    same(funcol.broadcast(x, 0, group) + 0, torch.arange(4.0 * world))
    gathered = FUNCTIONAL_GATHER(x, gather_dim=0, group=group) + 0
    same(gathered, torch.cat([torch.arange(4.0 * world) + r for r in range(world)]))
    scattered = FUNCTIONAL_SCATTER(x, "sum", scatter_dim=0, group=group) + 0
    same(scattered, total.view(world, 4)[rank])
    swapped = funcol.all_to_all_single(x, None, None, group) + 0
    same(swapped, torch.cat([torch.arange(4.0 * rank, 4.0 * rank + 4) + r for r in range(world)]))
    for got in funcol.all_reduce_coalesced([x, x * 2], "sum", group):
        assert torch.equal(got + 0, total) or torch.equal(got + 0, total * 2)
    compiled = torch.compile(lambda t: funcol.all_reduce(t * 2, "sum", group) + 1, backend="eager", fullgraph=True)
    same(compiled(x), 2 * total + 1)


def check_objects() -> None:
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": r, "text": "x" * r} for r in range(world)]
    sent = ["from", 0] if rank == 0 else [None, None]
    dist.broadcast_object_list(sent, 0)
    assert sent == ["from", 0]
    collected: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(rank, collected, 0)
    assert rank or collected == list(range(world))
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(world)] if rank == 0 else None, 0)
    assert mine == [f"for {rank}"]


def check_groups() -> None:
    pair = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        dist.all_reduce(x := torch.ones(2), group=pair)
        assert x.eq(2).all() and dist.get_backend(pair) == "mpi4py" and pair.group_name
        dist.broadcast(x.fill_(rank), world - 1, group=pair)
        assert x.eq(world - 1).all()
    local = dist.new_group([rank], use_local_synchronization=True)
    dist.all_reduce(x := torch.ones(2), group=local)
    assert x.eq(1).all()
    mine, groups = dist.new_subgroups(1)
    assert mine.size() == 1 and len(groups) == world
    mine, _ = dist.new_subgroups_by_enumeration([list(range(world))[::-1]])
    dist.all_reduce(x := torch.ones(2), group=mine)
    assert x.eq(world).all()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("outer", "inner"))
    dist.all_reduce(x := torch.ones(2), group=mesh.get_group("inner"))
    assert x.eq(world).all()
    same(funcol.all_reduce(torch.ones(2), "sum", (mesh, 1)) + 0, torch.full((2,), float(world)))
    dist.all_reduce(x := torch.ones(2), group=mesh["outer"].get_group())
    assert x.eq(1).all()


def check_many_groups() -> None:
    """More groups, one after the other, than an MPI library has communicators."""
    for _ in range(2100):
        group = dist.new_group(use_local_synchronization=True)
        assert isinstance(group, syncbn.mpi.MPIProcessGroup)
        dist.destroy_process_group(group)


def check_communicators() -> None:
    comm = MPI.COMM_WORLD.Dup()
    group = syncbn.mpi.process_group(comm)
    assert syncbn.mpi.process_group(comm) is group
    assert syncbn.mpi.process_group(MPI.COMM_WORLD) is not group
    assert (group.rank(), group.size(), group.name()) == (rank, world, "mpi4py")
    group.allreduce([x := torch.ones(3)]).wait()
    assert x.eq(world).all()
    comm.Bcast(y := torch.full((3,), float(rank)).numpy(), 0)  # its messages are its own
    assert (y == 0).all()
    half = MPI.COMM_WORLD.Split(rank % 2, rank)
    part = syncbn.mpi.process_group(half)
    part.allreduce([x := torch.ones(3)]).wait()
    assert x.eq(half.Get_size()).all() and part.rank() == half.Get_rank()
    half.Free()
    for _ in range(2100):
        assert syncbn.mpi.process_group(comm) is group
    raises(TypeError, "Intracomm", syncbn.mpi.process_group, 3)
    raises(ValueError, "COMM_NULL", syncbn.mpi.process_group, MPI.Intracomm())


def check_bad_input() -> None:
    raises(ValueError, "dense CPU tensors", dist.all_reduce, torch.ones(2, device="meta"))
    raises(ValueError, "dense CPU tensors", dist.broadcast, torch.ones(2).to_sparse(), 0)
    raises(ValueError, "does not fit", dist.all_gather, [torch.empty(3)] * world, torch.empty(2))
    raises(ValueError, f"{world} tensors, one for each rank", dist.all_gather, [torch.empty(3)], torch.empty(3))
    raises(ValueError, f"{world} times 3", all_gather_single, torch.empty(3 * world + 1), torch.empty(3))
    raises(ValueError, "input_split_sizes", dist.all_to_all_single, torch.empty(4), torch.empty(4), [4], [1])
    raises(ValueError, "no rank 99", dist.broadcast, torch.empty(2), group_src=99)
    dist.barrier()


NEED_PEERS = (check_send_and_receive, check_dropped_work, check_groups, check_bad_input)


def main() -> None:
    syncbn.mpi.process_group(MPI.COMM_WORLD).barrier().wait()  # without a default group
    dist.init_process_group("mpi4py", init_method="mpi://")
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (rank, world, "mpi4py")
    for name, check in list(globals().items()):
        if name.startswith("check_") and (world > 1 or check not in NEED_PEERS):
            check()
            if rank == 0:
                print("passed", name, flush=True)
    dist.destroy_process_group()
    dist.init_process_group("mpi4py", init_method="mpi://")  # again, in the same process
    dist.all_reduce(x := torch.ones(1))
    assert x.item() == world
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
