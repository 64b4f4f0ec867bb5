"""Other synchronized batch norm layers that run on a CPU, to compare with."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Mean and mean square averaged over ranks by differentiable all-reduces; equal batches assumed."""

    def forward(self, input: Tensor) -> Tensor:
        moments = torch.cat([input.mean((0, 2, 3)), input.square().mean((0, 2, 3))])
        moments = differentiable.all_reduce(moments) / dist.get_world_size()
        mean, square = moments.chunk(2)
        var = square - mean.square()
        scale = self.weight * (var + self.eps).rsqrt()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return input * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


def fairscale(module: nn.Module) -> nn.Module | None:
    """The module with fairscale's layers in place of batch norm, or None without the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from fairscale.experimental.nn import SyncBatchNorm
        except ImportError:
            return None
        return SyncBatchNorm.convert_sync_batchnorm(module)


def naive(module: nn.Module) -> nn.Module:
    """The module with ``NaiveSyncBatchNorm`` in place of ``nn.BatchNorm2d``."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = NaiveSyncBatchNorm
    return module
