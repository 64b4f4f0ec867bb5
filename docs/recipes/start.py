import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

if not dist.is_initialized():
    dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world_size = dist.get_rank(), dist.get_world_size()


def network():
    torch.manual_seed(0)  # the same weights on every rank
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def batch(samples=4, step=0, of_rank=None):
    """Random data: each rank and each step has its own."""
    seed = 100 * step + (rank if of_rank is None else of_rank)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, generator=generator) + seed % 7
    return images, torch.randint(10, (samples,), generator=generator)


# The tests of these pages compare with:


def whole_batch(samples=4, step=0):
    parts = [batch(samples, step, r) for r in range(world_size)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def same_gradients(model, other, tolerance=1e-5):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
