"""Synchronization within groups of ranks: per node, in groups of a fixed size, along one dimension of a mesh.

By default a layer synchronizes over all ranks. Large jobs may want less: the ranks of one node, which are joined by
faster links than nodes are, or groups of a fixed size, so that the number of samples behind each statistic stays the
same however large the job grows. `process_group=` takes what torch.distributed makes; this script shows three ways on
four ranks, as if they were two nodes of two ranks each ::

    python -m syncbn.launch -n 4 examples/groups.py

On each way it compares every rank's output and running statistics with `nn.BatchNorm1d` in float64 on the
concatenated data of that rank's group, and exits with 1 if they differ, or if groups that saw different data do not.
"""

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import syncbn

FEATURES = 6
SAMPLES = 3
TOLERANCE = 1e-12


def node_group(ranks_per_node: int | None = None) -> dist.ProcessGroup:
    """Return the group of this rank's node.

    `dist.new_subgroups()` without a size takes the number of devices of a node, which CPUs do not have: the launcher
    says in LOCAL_WORLD_SIZE how many ranks a node has. All nodes must have as many, and their ranks must be numbered
    one after the other, as torchrun does it.
    """
    group, _ = dist.new_subgroups(group_size=ranks_per_node or int(os.environ["LOCAL_WORLD_SIZE"]))
    return group


def group_of_ranks(members: list[list[int]]) -> dist.ProcessGroup:
    """Return this rank's group in any division of the ranks, for example ``[[0, 2], [1, 3]]``."""
    group, _ = dist.new_subgroups_by_enumeration(members)
    return group


def samples(rank: int) -> Tensor:
    """Return the data of a rank: shape (SAMPLES, FEATURES), another mean and spread on each."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=generator) * (rank + 1) + rank


def difference(process_group: Any, members: list[int]) -> tuple[float, Tensor]:
    """Run a layer over the group; return its largest difference to one process with the members' data, and its mean."""
    layer = syncbn.SyncBatchNorm(FEATURES, process_group=process_group, dtype=torch.float64)
    y = layer(samples(dist.get_rank()))
    oracle = nn.BatchNorm1d(FEATURES, dtype=torch.float64)
    whole = oracle(torch.cat([samples(rank) for rank in members])).split(SAMPLES)
    assert layer.running_mean is not None and layer.running_var is not None
    assert oracle.running_mean is not None and oracle.running_var is not None
    pairs = [
        (y, whole[members.index(dist.get_rank())]),
        (layer.running_mean, oracle.running_mean),
        (layer.running_var, oracle.running_var),
    ]
    return max((a - b).abs().max().item() for a, b in pairs), layer.running_mean


def report(name: str, process_group: Any, divided: list[list[int]]) -> bool:
    """Run one way on all ranks and print a line; return whether it came out as it must, the same on every rank."""
    mine = next(members for members in divided if dist.get_rank() in members)
    off, mean = difference(process_group, mine)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (off, mean))
    within = all(torch.equal(results[rank][1], results[members[0]][1]) for members in divided for rank in members)
    firsts = [results[members[0]][1] for members in divided]
    apart = all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    worst = max(off for off, _ in results)
    good = worst <= TOLERANCE and within and apart
    if dist.get_rank() == 0:
        print(f"| {name} | {divided} | {worst:.1e} | {within} | {apart} | {'yes' if good else 'NO'} |", flush=True)
    return good


def main() -> int:
    """Run all ways on the ranks that the launcher started; return the exit code, the same on every rank."""
    parser = argparse.ArgumentParser(description="Synchronization per node, in groups and along a mesh dimension.")
    parser.add_argument("--size", type=int, default=2, help="ranks in a group, a divisor of their number (2)")
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2 or args.size < 1 or world % args.size:
        parser.error("needs a multiple of --size ranks: python -m syncbn.launch -n 4 examples/groups.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = list(range(world))
    blocks = [ranks[start : start + args.size] for start in range(0, world, args.size)]
    columns = [ranks[start :: args.size] for start in range(args.size)]
    # Rows are nodes, and a column has one rank of each node. Data-parallel jobs with another kind of parallelism
    # inside a node synchronize over the columns, which hold different samples.
    mesh = init_device_mesh("cpu", (world // args.size, args.size), mesh_dim_names=("node", "local"))
    if dist.get_rank() == 0:
        print("| way | groups | largest difference | equal within | different across | holds |")
        print("|" + "---|" * 6)
    good = [
        report("all ranks: the default", None, [ranks]),
        report("per node: dist.new_subgroups", node_group(args.size), blocks),
        report("any division: dist.new_subgroups_by_enumeration", group_of_ranks(columns), columns),
        report('mesh: (mesh, "local")', (mesh, "local"), blocks),
        report('mesh: (mesh, "node")', (mesh, "node"), columns),
        report('mesh: mesh["local"]', mesh["local"], blocks),
    ]
    dist.destroy_process_group()
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
