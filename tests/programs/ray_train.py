"""Two workers of Ray train by the recipe in the guide, and compare themselves with one process: recipe, folder."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

import syncbn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()


def train(config: dict[str, Any]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    names = {"syncbn": syncbn, "ray": ray, "model": network()}
    exec(config["recipe"], names)
    model: Any = names["model"]
    alone, x = network(), torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = alone(x)
    expected.square().mean().backward()
    y = model(x.tensor_split(world)[rank])
    y.square().mean().backward()
    torch.testing.assert_close(y, expected.tensor_split(world)[rank], rtol=1e-12, atol=1e-12)
    for (name, own), other in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert isinstance(model.module[1], syncbn.SyncBatchNorm) and world == 2
    Path(config["folder"], f"exact-{rank}").touch()


if __name__ == "__main__":
    recipe, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=2**28)
        TorchTrainer(
            train,
            train_loop_config={"recipe": recipe, "folder": folder},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=own),
        ).fit()
        ray.shutdown()
