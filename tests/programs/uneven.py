"""What a rank does in the tests of uneven loaders: trains a small network with DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import uneven


class Net(nn.Module):
    """Takes (N, 1, 5, 5) to (N, 3), by way of a ``view`` that an empty batch breaks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.linear = nn.Linear(36, 6)
        self.bn2 = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu()
        return self.head(self.bn2(self.linear(x.view(x.size(0), -1))).tanh())


def loader(rank: int, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of these sizes, the same whenever asked."""
    for step, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(size, 1, 5, 5, generator=generator, dtype=torch.float64)
        yield x + rank, torch.randint(3, (size,), generator=generator)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train_joined(rank: int, world: int, sizes: Sequence[Sequence[int]], mean: bool) -> dict[str, Any]:
    """Until all ranks are done, with a sum of losses or with a mean."""
    net = syncbn.convert_sync_batchnorm(Net())
    ddp = DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    seen = []
    for step in uneven.joined(loader(rank, sizes[rank])):
        x, y = step.data
        with uneven.empty_views():
            output = ddp(x)
        if mean:
            loss = step.loss_from_mean(F.cross_entropy, output, y)
        else:
            loss = step.scale * F.cross_entropy(output, y, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((step.count, step.total))
    return {"seen": seen, "state": net.state_dict()}


def train_join(rank: int, world: int, sizes: Sequence[Sequence[int]], throw: bool) -> dict[str, Any]:
    """DistributedDataParallel's own ``join``: what it raised, and after how many steps."""
    net = syncbn.convert_sync_batchnorm(Net())
    ddp = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = optimizer_of(net)
    steps, error = 0, None
    try:
        with ddp.join(throw_on_early_termination=throw):
            for x, y in loader(rank, sizes[rank]):
                loss = F.cross_entropy(ddp(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
    except RuntimeError as caught:
        error = caught
    return {"steps": steps, "error": type(error).__name__, "text": str(error), "state": net.state_dict()}


def whole_batches(sizes: Sequence[Sequence[int]], steps: int | None = None) -> dict[str, Tensor]:
    """The oracle: one process, in each step the batches of all ranks that have one, plain batch norm, mean loss."""
    net = Net()
    optimizer = optimizer_of(net)
    data = [list(loader(rank, own)) for rank, own in enumerate(sizes)]
    for step in range(max(map(len, data)) if steps is None else steps):
        parts = [own[step] for own in data if step < len(own)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.state_dict()
