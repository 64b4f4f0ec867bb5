"""The example of groups, on ranks, and that it can fail; groups under DDP against an oracle per group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.commands import EXAMPLES, launch, must, python
from helpers.oracle import assert_matches, step, whole_batch
from helpers.processes import run_processes
from syncbn import SyncBatchNorm, convert_sync_batchnorm

C = 5
SIZES = [2, 3, 1, 4]  # samples of the ranks


@pytest.mark.integration
def test_the_example_holds() -> None:
    said = must(launch(4, "groups.py"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    assert [row[1] for row in rows] == ["[[0, 1, 2, 3]]", *["[[0, 1], [2, 3]]", "[[0, 2], [1, 3]]"] * 2, rows[1][1]]
    assert all(row[3:] == ["True", "True", "yes"] and float(row[2]) <= 1e-12 for row in rows), said


@pytest.mark.integration
def test_the_example_refuses_ranks_that_do_not_divide() -> None:
    done = python(EXAMPLES / "groups.py", "--size", "2", WORLD_SIZE="3")
    assert done.returncode == 2 and "python -m syncbn.launch -n 4 examples/groups.py" in done.stdout


def data(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x, g = torch.randn(2, SIZES[rank], C, generator=generator, dtype=torch.float64)
    return x * (rank + 1) + rank, g


DIVISIONS = {
    "subgroups": [[0, 1], [2, 3]],
    "enumeration": [[0, 3], [1, 2]],
    "mesh node": [[0, 2], [1, 3]],
    "mesh local": [[0, 1], [2, 3]],
}


def make_group(how: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if how == "subgroups":
        return dist.new_subgroups(group_size=2)[0]
    if how == "enumeration":
        return dist.new_subgroups_by_enumeration(DIVISIONS[how])[0]
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local")), how.removeprefix("mesh ")


def train_in_groups(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for how in DIVISIONS:
        layer = SyncBatchNorm(C, process_group=make_group(how), dtype=torch.float64)
        result = step(layer, *data(rank))
        del result["grad_fn"]
        results[how] = result
        if how.startswith("mesh"):
            converted = convert_sync_batchnorm(torch.nn.BatchNorm1d(C, dtype=torch.float64), make_group(how))
            assert torch.equal(converted(data(rank)[0]), result["y"])
    return results


@pytest.mark.timeout(120)
def test_each_group_is_one_process_with_the_data_of_its_ranks(tmp_path: Path) -> None:
    results = run_processes(4, train_in_groups, tmp_path / "run")
    for how, divided in DIVISIONS.items():
        for members in divided:
            xs, gs = zip(*(data(rank) for rank in members), strict=True)
            assert_matches([results[rank][how] for rank in members], whole_batch(xs, gs), torch.float64)
        first, second = (results[members[0]][how]["running_mean"] for members in divided)
        assert (first - second).abs().max() > 1e-3
