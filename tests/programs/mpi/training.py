"""DDP, FSDP2 and SyncBatchNorm over the mpi4py backend equal one process with the whole batch; run under mpiexec."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
import syncbn.mpi

STEPS = 4
rank = MPI.COMM_WORLD.Get_rank()
world = MPI.COMM_WORLD.Get_size()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)]
    return nn.Sequential(*layers).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 * world, 3, 6, 6, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def train(model: nn.Module, own: slice, parameters: Any = None) -> list[float]:
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = model(batch[own]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_equal_models(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_ddp_with_synchronized_batch_norm() -> None:
    reference = make_model()
    before = copy.deepcopy(reference.state_dict())
    train(reference, slice(None))
    own = slice(2 * rank, 2 * rank + 2)
    for bucket in (25, 0.0001):  # one bucket, and one for each parameter
        model = DistributedDataParallel(syncbn.convert_sync_batchnorm(make_model()), bucket_cap_mb=bucket)
        train(model, own)
        assert_equal_models(model.module.state_dict(), reference.state_dict())
    assert not torch.equal(before["4.weight"], reference.state_dict()["4.weight"])


def check_ddp_with_unused_parameters() -> None:
    """Ranks that use different branches start their buckets in different order, around the layer's collectives."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(4, 4), syncbn.SyncBatchNorm(4)
            self.branches = nn.ModuleList([nn.Linear(4, 1) for _ in range(world)])

        def forward(self, x: Tensor) -> Tensor:
            return self.branches[rank](self.norm(self.first(x)))

    model = DistributedDataParallel(Branches(), find_unused_parameters=True, bucket_cap_mb=0.0001)
    for step in range(5):
        model.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + rank)
        model(torch.randn(6, 4, generator=generator)).square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        everyone = [torch.empty_like(gradients) for _ in range(world)]
        dist.all_gather(everyone, gradients)
        assert all(torch.equal(other, gradients) for other in everyone) and gradients.abs().max() > 0


def check_fully_shard() -> None:
    reference = make_model()
    reference[1] = nn.Identity()
    train(reference, slice(None))
    model = make_model()
    model[1] = nn.Identity()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, slice(2 * rank, 2 * rank + 2))
    full = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert_equal_models(full, reference.state_dict())


def check_mesh_of_two_dimensions() -> None:
    if world % 2:
        return
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    value = torch.tensor([float(rank)])
    dist.all_reduce(value, group=mesh.get_group("shard"))
    assert value.item() == 2 * (rank // 2 * 2) + 1
    reference = make_model()
    reference[1] = nn.Identity()
    train(reference, slice(None))
    model = make_model()
    model[1] = nn.Identity()
    fully_shard(model, mesh=mesh)  # sharded over one dimension, replicated over the other
    train(model, slice(2 * rank, 2 * rank + 2))
    full = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert_equal_models(full, reference.state_dict())


def check_communicator_as_process_group() -> None:
    comm = MPI.COMM_WORLD.Split(rank // 2, rank)
    layer = syncbn.SyncBatchNorm(3, process_group=comm)
    everyone = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank // 2))
    plain = nn.BatchNorm1d(3)
    size, part = comm.Get_size(), comm.Get_rank()
    rows = torch.arange(4).tensor_split(size)[part]
    torch.testing.assert_close(layer(everyone[rows]), plain(everyone)[rows])
    torch.testing.assert_close(layer.running_var, plain.running_var)


def check_backward_on_another_thread() -> None:
    model = syncbn.convert_sync_batchnorm(make_model())
    loss = model(batches()[0][2 * rank : 2 * rank + 2]).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    whole = make_model()
    whole(batches()[0]).square().mean().backward()
    gradient = model[0].weight.grad
    dist.all_reduce(gradient, op=dist.ReduceOp.AVG)
    torch.testing.assert_close(gradient, whole[0].weight.grad)


def main() -> None:
    dist.init_process_group("mpi4py", init_method="mpi://")
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            if rank == 0:
                print("passed", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
