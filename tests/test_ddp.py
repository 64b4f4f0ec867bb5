"""Real processes: N ranks under DistributedDataParallel train like one process, and models travel in files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from helpers.links import link_of
from helpers.oracle import close
from helpers.processes import run_processes
from syncbn import comm

CLASSES = 4
# Samples of each rank, step by step: uneven, and once none.
STEPS = {2: [(6, 6), (8, 2), (1, 5), (3, 0)], 3: [(4, 4, 4), (1, 0, 7), (2, 9, 1), (1, 1, 1)]}


def build(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small net with three norms, equal wherever it is built."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4 * 4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip
    return model.to(dtype)


def batches(sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each step the inputs and labels of all ranks; the ranks' inputs differ in offset and scale."""
    generator = torch.Generator().manual_seed(3)
    steps = []
    for parts in sizes:
        xs = [
            torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64) * (1 + r) + r for r, n in enumerate(parts)
        ]
        labels = [torch.randint(CLASSES, (n,), generator=generator) for n in parts]
        steps.append(([x.to(dtype) for x in xs], labels))
    return steps


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole(sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> nn.Module:
    """One process with the whole batch."""
    model = build(dtype)
    sgd = optimizer(model)
    for xs, labels in batches(sizes, dtype):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(torch.cat(xs)), torch.cat(labels)).backward()
        sgd.step()
    return model


def train(
    rank: int, size: int, dtype: torch.dtype, sizes: Sequence[Sequence[int]], *, synchronize: bool, broadcast: bool
) -> dict[str, Tensor]:
    """This rank's part, under the loss contract: the sum over the rank's samples times W / n_global."""
    model = build(dtype)
    if synchronize:
        syncbn.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    sgd = optimizer(ddp)
    for xs, labels in batches(sizes, dtype):
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(ddp(xs[rank]), labels[rank], reduction="sum")
        (loss * size / sum(map(len, xs))).backward()
        sgd.step()
    return model.state_dict()


def parity(rank: int, size: int, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    sizes = STEPS[size]
    return {
        "synchronized": train(rank, size, dtype, sizes, synchronize=True, broadcast=False),
        "with broadcast buffers": train(rank, size, dtype, sizes, synchronize=True, broadcast=True),
        "local, one step": train(rank, size, dtype, sizes[:1], synchronize=False, broadcast=False),
    }


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float64), (3, torch.float64), (2, torch.float32)], ids=str)
def test_ranks_train_like_one_process(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = whole(STEPS[size], torch.float64).state_dict()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    results = run_processes(size, parity, tmp_path, dtype)
    for name, value in expected.items():
        for rank, result in enumerate(results):
            for how in ("synchronized", "with broadcast buffers"):
                close(result[how][name], value, tolerance, tolerance, f"{name} of rank {rank} {how}")
                if "running" in name:
                    assert torch.equal(result[how][name], results[0][how][name])
    # The control: batch norm of each rank's own part is another model, far beyond any tolerance.
    one_step = whole(STEPS[size][:1], torch.float64).state_dict()
    local = results[0]["local, one step"]
    assert max(float((local[name] - value).abs().max()) for name, value in one_step.items()) > 1e-2


def contracts(rank: int, size: int) -> list[Tensor]:
    """The first step's gradients, with and without the loss contract, for parts of 8 and 2."""
    [(xs, labels)] = batches([(8, 2)], torch.float64)
    gradients = []
    for contract in (True, False):
        ddp = DistributedDataParallel(syncbn.convert_sync_batchnorm(build()))
        loss = nn.functional.cross_entropy(ddp(xs[rank]), labels[rank], reduction="sum")
        (loss * size / 10 if contract else loss / len(xs[rank])).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in ddp.parameters()]))
    return gradients


def test_uneven_ranks_need_the_loss_contract(tmp_path: Path) -> None:
    model = build()
    [(xs, labels)] = batches([(8, 2)], torch.float64)
    nn.functional.cross_entropy(model(torch.cat(xs)), torch.cat(labels)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    for kept, broken in run_processes(2, contracts, tmp_path):
        close(kept, expected, 1e-12, 1e-12, "gradient")
        assert (broken - expected).norm() > 0.1 * expected.norm()


def test_state_dicts_go_both_ways_after_training(tmp_path: Path) -> None:
    [first, second] = run_processes(2, parity, tmp_path, torch.float64)
    plain = build()
    plain.load_state_dict(first["synchronized"])  # strict
    converted = syncbn.convert_sync_batchnorm(build())
    converted.load_state_dict(plain.state_dict())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    close(plain.eval()(x), converted.eval()(x), 0.0, 0.0, "y")
    torch_own = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    torch_own.load_state_dict(second["synchronized"])
    close(torch_own.eval()(x), plain(x), 0.0, 0.0, "y")


def saved(rank: int, size: int, file: str) -> Tensor:
    """Saves a converted model whose group is the second one of ranks 0 and 1, with its output."""
    dist.new_group([0, 1, 2])
    group = dist.new_group([0, 1])
    model = build()
    if rank == 2:
        return torch.zeros(0)
    syncbn.convert_sync_batchnorm(model, group)
    assert copy.deepcopy(model)[1].process_group is group
    torch.manual_seed(rank)
    y = model(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    if rank == 0:
        torch.save(model, file)
    dist.barrier(group)
    return y


def loaded(rank: int, size: int, file: str) -> Tensor:
    """Another program: the groups are made in another order and number."""
    wrong = dist.new_group([1, 2])
    group = dist.new_group([0, 1])
    dist.new_group([0, 2])
    if rank == 2:
        return torch.zeros(0)
    model = torch.load(file, weights_only=False)
    assert model[1].process_group is group and model[1].process_group is not wrong
    for layer in model:
        if isinstance(layer, syncbn.SyncBatchNorm):
            layer.reset_running_stats()
    torch.manual_seed(rank)
    return model(torch.randn(3, 1, 8, 8, dtype=torch.float64))


def missing(rank: int, size: int, file: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        torch.load(file, weights_only=False)
    return str(caught.value)


def test_a_saved_module_finds_its_group_again(tmp_path: Path) -> None:
    file = str(tmp_path / "model.pt")
    before = run_processes(3, saved, tmp_path / "save", file)
    after = run_processes(3, loaded, tmp_path / "load", file)
    for rank in range(2):
        close(after[rank], before[rank], 0.0, 0.0, f"y of rank {rank}")
    [said] = run_processes(1, missing, tmp_path / "alone", file)
    assert "[0, 1]" in said and "new_group" in said
    model = torch.load(file, weights_only=False)  # without torch.distributed: plain batch norm
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    plain = build()
    plain.load_state_dict(model.state_dict())
    close(model(x), plain(x), 1e-12, 1e-12, "y")
    assert type(syncbn.revert_sync_batchnorm(model)[1]) is nn.BatchNorm2d


def default_group(rank: int, size: int) -> tuple[Tensor, bool]:
    """A layer without a group uses the default one, as it is at the time of the forward."""
    layer = syncbn.SyncBatchNorm(1, momentum=1.0)
    layer(torch.full((2, 1), float(rank)))
    assert layer.running_mean is not None
    return layer.running_mean, isinstance(link_of(dist.group.WORLD), comm.OneHop)


def test_the_default_group(tmp_path: Path) -> None:
    for mean, one_hop in run_processes(3, default_group, tmp_path):
        assert mean.item() == 1.0
        assert one_hop


def raises_and_leaves(rank: int, size: int) -> Any:
    raise ValueError("meant to fail")


def test_the_harness_reports_a_failing_rank(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit codes \[1, 1\].*meant to fail"):
        run_processes(2, raises_and_leaves, tmp_path)
