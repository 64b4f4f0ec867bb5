"""Domain parallelism: the rows of a sample over ranks, beside data parallelism, and one process's numbers.

Where a sample is too large for a device, its rows are spread over ranks, as evenly as they go or not. A convolution
then needs the rows next to its own (`Halo`), and batch norm needs the statistics of all rows of all samples: those of
all ranks that hold a part of the batch. That is all of a two-dimensional mesh (data × rows), where every rank weighs as
much as it has elements. The loss is a mean over pixels, so its scale counts pixels ::

    python -m syncbn.launch -n 4 examples/domain_parallel.py

It trains a small segmentation network for some steps on four ranks, two batches of samples by two strips of 7 and 4
rows, prints the largest differences to one process with whole samples, and exits with 1 if they are not rounding. The
control synchronizes over the rows alone, as if each batch of samples were the whole one, and must differ.
"""

import argparse
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.uneven import loss_scale

ROWS = (7, 4)
SAMPLES = 3
CLASSES = 3
TOLERANCE = 1e-12


class Halo(torch.autograd.Function):
    """Add one row of each neighbour in a group to ``(N, C, H, W)``: H + 2 rows; zeros where there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        above, below = _swap(x[:, :, :1], x[:, :, -1:], group)
        return torch.cat([above, x, below], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from_above, from_below = _swap(grad[:, :, :1], grad[:, :, -1:], ctx.group)
        inner = grad[:, :, 1:-1].clone()
        inner[:, :, :1] += from_above
        inner[:, :, -1:] += from_below
        return inner, None


def _swap(top: Tensor, bottom: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Give the top row to the rank above and the bottom row to the one below; what those give, or zeros."""
    rank, size = group.rank(), group.size()
    edges = [torch.empty(2, *top.shape, dtype=top.dtype) for _ in range(size)]
    dist.all_gather(edges, torch.stack([top, bottom]).contiguous(), group=group)
    nothing = torch.zeros_like(top)
    return edges[rank - 1][1] if rank > 0 else nothing, edges[rank + 1][0] if rank < size - 1 else nothing


class RowConv(nn.Conv2d):
    """A 3 x 3 convolution of which each rank of a group has some rows; without a group, one with padding."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.conv2d(x, self.weight, padding=1)
        return F.conv2d(Halo.apply(x, self.group), self.weight, padding=(0, 1))


def network(rows: dist.ProcessGroup | None = None) -> nn.Sequential:
    """A segmentation network; with a group, for strips of rows."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (2, 8):
        layers += [RowConv(inputs, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, CLASSES, 1)).double()
    for layer in model.modules():
        if isinstance(layer, RowConv):
            layer.group = rows
    return model


def batch(step: int, parts: int) -> tuple[Tensor, Tensor]:
    """All samples of a step, whole, with another brightness in each row; and the class of each pixel."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(parts * SAMPLES, 2, sum(ROWS), 6, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (len(x), sum(ROWS), 6), generator=generator)
    return x + torch.arange(sum(ROWS)).view(-1, 1), y


def train_parts(mesh: Any, process_group: Any, steps: int) -> nn.Module:
    """Train on this rank's strip of its samples."""
    model = syncbn.convert_sync_batchnorm(network(mesh.get_group("rows")), process_group)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        x, y = (t.chunk(mesh.size(0))[mesh.get_local_rank("data")] for t in batch(step, mesh.size(0)))
        x, y = (t.split(ROWS, dim)[mesh.get_local_rank("rows")] for t, dim in ((x, 2), (y, 1)))
        optimizer.zero_grad()
        (loss_scale(y.numel()) * F.cross_entropy(ddp(x), y, reduction="sum")).backward()
        optimizer.step()
    return model


def train_whole(parts: int, steps: int) -> nn.Module:
    """Train one process on all samples."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        x, y = batch(step, parts)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def difference(model: nn.Module, truth: nn.Module) -> float:
    """The largest difference of weights and running statistics, over all ranks."""
    states = zip(model.state_dict().values(), truth.state_dict().values(), strict=True)
    off = torch.stack([(a - b).abs().max().double() for a, b in states]).max()
    dist.all_reduce(off, dist.ReduceOp.MAX)
    return off.item()


def main() -> None:
    """Train on the ranks that the launcher started, in three ways; rank 0 prints."""
    parser = argparse.ArgumentParser(description="Rows of samples over ranks, against one process.")
    parser.add_argument("--steps", type=int, default=5, help="SGD steps (default 5)")
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    world, rows = dist.get_world_size(), len(ROWS)
    if world % rows:
        dist.destroy_process_group()
        sys.exit(
            f"this example splits samples in {rows}; start it on 4 ranks: python -m syncbn.launch -n 4 {sys.argv[0]}"
        )
    mesh = init_device_mesh("cpu", (world // rows, rows), mesh_dim_names=("data", "rows"))
    truth = train_whole(world // rows, steps)
    flat = mesh._flatten("all") if hasattr(mesh, "_flatten") else None  # torch has no public name for it yet
    off = {
        "all ranks, the default group": difference(train_parts(mesh, None, steps), truth),
        "all ranks, a flattened mesh": difference(train_parts(mesh, flat, steps), truth),
        "rows alone, the control": difference(train_parts(mesh, (mesh, "rows"), steps), truth),
    }
    if dist.get_rank() == 0:
        print(f"largest difference to one process after {steps} steps, in weights and statistics")
        for name, value in off.items():
            print(f"  {name}: {value:.2g}")
    *good, control = off.values()
    dist.destroy_process_group()
    sys.exit(int(max(good) > TOLERANCE or control < 1e-3))


if __name__ == "__main__":
    main()
