"""Many steps of a small network on two ranks: memory stays flat, statistics and weights stay equal."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers.processes import run_processes

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Resident memory of this process in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def train(rank: int, world: int, steps: int) -> tuple[list[float], list[dict[str, Tensor]], int]:
    """Memory and state at ten points of the run, and the number of threads at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6))
    net.extend([nn.BatchNorm1d(6), nn.Linear(6, 1)])
    syncbn.convert_sync_batchnorm(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    memory, states = [], []
    for step in range(1, steps + 1):
        x = torch.randn(1 + (step + rank) % 5, 2, 5, 5, generator=generator)  # shapes of its own on each rank
        optimizer.zero_grad()
        net(x).square().mean().backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        if step % (steps // 10) == 0:
            memory.append(resident())
            states.append({name: value.clone() for name, value in net.state_dict().items()})
    return memory, states, len(os.listdir("/proc/self/task"))


def check(folder: Path, steps: int, growth: float) -> None:
    results = run_processes(2, train, folder, steps, deadline=3000.0, timeout=20.0)
    for memory, states, threads in results:
        assert memory[-1] - memory[1] < growth, memory
        assert threads < 16
        for state, expected in zip(states, results[0][1], strict=True):
            for name, value in state.items():
                assert torch.equal(value, expected[name]) and value.isfinite().all(), name
        assert states[-1]["1.num_batches_tracked"] == steps
        print(f"{steps} steps: resident MiB {[round(mib, 1) for mib in memory]}, {threads} threads")


@pytest.mark.integration
def test_soak_in_short(tmp_path: Path) -> None:
    check(tmp_path, 200, growth=4.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak(tmp_path: Path) -> None:
    check(tmp_path, 10_000, growth=2.0)


def test_memory_is_measured() -> None:
    """The measure sees what a leak would be."""
    before = resident()
    kept: Any = torch.ones(2**26)  # 256 MiB: more than the allocator could have kept of what was freed before
    assert 250 < resident() - before < 262
    del kept
