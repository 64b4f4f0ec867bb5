"""A WGAN-GP critic with synchronized batch norm: double backward across ranks, on real data.

    python -m syncbn.launch -n 2 examples/gradient_penalty.py
    python examples/gradient_penalty.py --batch 64          # one process with the whole batch: the same numbers

The gradient penalty of Gulrajani et al. (2017) differentiates a gradient: the critic's weights get a gradient through
the gradient of its output with respect to its input, and so through the statistics of the batch, which are those of all
ranks. ``torch.nn.SyncBatchNorm`` has no double backward. The penalty is computed on the whole batch's score, as for any
critic in which samples meet: with batch norm, a sample's score depends on the other samples.

Data: scikit-learn's digits (1797 images of 8x8, shipped with the package). In place of a generator there is uniform
noise, so that one can follow the distance that the critic finds: it grows while the penalty holds the gradient's norm
near 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    text = f"{Path(__file__).name} needs {missing.name}, of the extra [examples]: pip install '.[examples]'"
    sys.exit(text if os.environ.get("RANK", "0") == "0" else 0)  # said once, and a failure of the job


def critic() -> nn.Sequential:
    """A small critic with batch norm after both hidden layers."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Softplus(),
        nn.Linear(128, 64), nn.BatchNorm1d(64), nn.Softplus(), nn.Linear(64, 1),
    )  # fmt: skip


def losses(net: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the critic's loss, the estimated distance, and the norms of the penalized gradient.

    Every rank's loss is the mean over its samples: with equal shares, DDP's average is the mean over all of them.
    """
    # One batch of both: normalized apart, real and false images would have the same mean whatever they are.
    scores = net(torch.cat([real, fake]))
    distance = scores[: len(real)].mean() - scores[len(real) :].mean()
    point = (mix * real + (1 - mix) * fake).requires_grad_()
    # The score of the global batch: the ranks' sums add up, so no rank divides by its own number.
    (gradient,) = torch.autograd.grad(net(point).sum(), point, create_graph=True)
    norms = gradient.norm(dim=1)
    return 10.0 * (norms - 1).square().mean() - distance, distance.detach(), norms.detach()


def average(value: Tensor, size: int) -> float:
    """The mean of a number over the ranks."""
    if size > 1:
        dist.all_reduce(value)
    return value.item() / size


def main() -> None:
    parser = argparse.ArgumentParser(description="WGAN-GP critic with synchronized batch norm")
    parser.add_argument("--steps", type=int, default=200, help="updates of the critic (200)")
    parser.add_argument("--batch", type=int, default=32, help="samples of each rank")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    args = parser.parse_args()

    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    images = torch.tensor(load_digits().data, dtype=torch.float64) / 16
    model = syncbn.convert_sync_batchnorm(critic().double())
    net = DistributedDataParallel(model) if size > 1 else model
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.9))

    mine = slice(rank * args.batch, (rank + 1) * args.batch)
    for step in range(args.steps):
        # All ranks draw the whole batch from the same stream, and each takes its slice.
        real = images[torch.randint(len(images), (size * args.batch,))]
        fake, mix = torch.rand_like(real), torch.rand(len(real), 1, dtype=torch.float64)
        loss, distance, norms = losses(net, real[mine], fake[mine], mix[mine])
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 20 == 19:
            distance_now, norm = average(distance, size), average(norms.mean(), size)
            if rank == 0:
                print(f"step {step + 1:4d}   distance {distance_now:9.6f}   gradient norm {norm:.6f}", flush=True)
    if size > 1:
        del net, adam, loss
        gc.collect()  # DistributedDataParallel must go before its group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
