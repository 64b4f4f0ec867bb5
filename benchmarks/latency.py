"""One synchronization message over each way it can travel, against world size and number of channels.

    python benchmarks/latency.py                              # all worlds over gloo and MPI: CSV and picture
    python benchmarks/latency.py --worlds 2 --backends gloo   # a part of it

It starts itself through the launcher, once for each world size and backend. The message is a layer's in the forward,
2C + 1 float64. In each run the ways are measured in turn, so many calls on end after a barrier; the result of each way
is first compared with the sum of what all ranks sent, and its bits between ranks. Ways:

* ``gloo one hop`` and ``gloo all_reduce``: the two ways of ``syncbn.comm`` over gloo, with headers and checks;
* ``mpi4py link``: the way of ``syncbn.comm`` over the mpi4py backend, with checks;
* ``gloo dist.all_reduce``, ``mpi4py dist.all_reduce``, ``gloo dist.all_gather``, ``mpi4py dist.all_gather``: the bare
  collectives of torch.distributed (the gathers without the sum that has to follow);
* ``raw mpi4py Allreduce``: MPI itself, blocking, through mpi4py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm import Link, OneHop
from syncbn.comm.all_reduce import AllReduceOnHost
from syncbn.wire import FORWARD, Call

CHANNELS = (64, 256, 1024, 2048)
WORLDS = (2, 4, 8)
ENGINES = {"gloo": "torchrun", "mpi4py": "mpi"}


def ways(backend: str, payload: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each way as a function that returns the sum, or what was gathered, of ``payload`` over the default group."""
    group: Any = dist.group.WORLD
    cpu = torch.device("cpu")
    total = torch.empty_like(payload)
    gathered = payload.new_empty(dist.get_world_size(), len(payload))

    def all_reduce() -> Tensor:
        total.copy_(payload)
        dist.all_reduce(total)
        return total

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

    def all_gather() -> Tensor:
        gather(gathered.view(-1), payload)
        return gathered

    call = Call(FORWARD, "layer")
    linked: dict[str, Link]
    if backend == "gloo":
        linked = {"gloo one hop": OneHop(group, cpu), "gloo all_reduce": AllReduceOnHost(group, cpu)}
    else:
        linked = {"mpi4py link": AllReduceOnHost(group, cpu)}
    found: dict[str, Callable[[], Tensor]] = {
        name: lambda link=link: link.sum(payload, call)  # type: ignore[misc]
        for name, link in linked.items()
    }
    found |= {f"{backend} dist.all_reduce": all_reduce, f"{backend} dist.all_gather": all_gather}
    if backend == "mpi4py":
        found["raw mpi4py Allreduce"] = raw_all_reduce(payload)
    return found


def raw_all_reduce(payload: Tensor) -> Callable[[], Tensor]:
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD.Dup()
    total = torch.empty_like(payload)
    send, receive = payload.numpy(), total.numpy()

    def all_reduce() -> Tensor:
        communicator.Allreduce(send, receive)
        return total

    return all_reduce


def message(rank: int, channels: int) -> Tensor:
    """What a rank sends: as many numbers as a layer's sums, sums of squares and count."""
    return torch.randn(2 * channels + 1, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def check(name: str, way: Callable[[], Tensor], channels: int) -> None:
    """The result against the ranks' messages, and against the other ranks' results, bit for bit."""
    world = dist.get_world_size()
    expected = torch.stack([message(rank, channels) for rank in range(world)])
    found = way().clone()
    if name.endswith("gather"):
        assert torch.equal(found, expected), name
    else:
        torch.testing.assert_close(found, expected.sum(0), rtol=1e-13, atol=1e-13)
    others = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(others, found)
    assert all(torch.equal(other, found) for other in others), f"{name}: ranks have different bits"


def measure(backend: str, rounds: int, calls: int) -> list[dict[str, object]]:
    """Medians of all ways for all numbers of channels, in microseconds a call.

    All are measured in each round, so that another job's burst falls on a few rounds of all of them.
    """

    def repeated(way: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                way()

        return run

    keys: list[tuple[str, int]] = []
    sides: dict[str, Callable[[], None]] = {}
    for channels in CHANNELS:
        for name, way in ways(backend, message(dist.get_rank(), channels)).items():
            check(name, way, channels)
            keys.append((name, channels))
            sides[f"{name} {channels}"] = repeated(way)
    times = timing.in_turn(sides, rounds, dist.group.WORLD)
    world = dist.get_world_size()
    return [
        {"way": name, "ranks": world, "channels": channels, "us": times[f"{name} {channels}"] / calls * 1e6}
        for name, channels in keys
    ]


def run_rank(args: argparse.Namespace) -> None:
    """What each rank does: measure; rank 0 leaves the rows in a file."""
    torch.set_num_threads(1)
    backend = args.backends[0]
    if backend == "mpi4py":
        importlib.import_module("syncbn.mpi")  # registers the backend
    dist.init_process_group(backend)
    rows = measure(backend, args.rounds, args.calls)
    if dist.get_rank() == 0:
        args.rows.write_text(json.dumps(rows))
    dist.destroy_process_group()


def launch(world: int, backend: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Run this program on so many ranks; the rows that they measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "syncbn.launch", "--engine", ENGINES[backend], "-n", str(world)]
        command += [__file__, "--backends", backend, "--rows", str(path)]
        command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
        subprocess.run(command, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[dict[str, object]] = json.loads(path.read_text())
    load = f"{os.getloadavg()[0]:.1f}"  # of the last minute: W ranks of our own, and whoever else is there
    return [{**row, "load": load} for row in rows]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against world size at 256 channels, and against channels on two ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_world, by_channels) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for way in dict.fromkeys(row["way"] for row in rows):
        style = {"marker": "o", "linestyle": "--" if "dist." in way or "raw" in way else "-", "label": way}
        mine = [row for row in rows if row["way"] == way and row["channels"] == 256]
        by_world.plot([row["ranks"] for row in mine], [row["us"] for row in mine], **style)
        mine = [row for row in rows if row["way"] == way and row["ranks"] == 2]
        by_channels.plot([row["channels"] for row in mine], [row["us"] for row in mine], **style)
    worlds = sorted({row["ranks"] for row in rows})
    by_world.set(xlabel="ranks", ylabel="µs per message (median)", title="256 channels")
    by_channels.set(xlabel="channels", title="2 ranks")
    for axes, ticks in ((by_world, worlds), (by_channels, CHANNELS)):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3, which="both")
    by_channels.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    cores = os.cpu_count() or 1
    figure.suptitle(f"One synchronization message (2C + 1 float64) on one host of {cores} cores", fontsize=11)
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds at 256 channels as Markdown: a line per way, a column per world size."""
    worlds = sorted({row["ranks"] for row in rows})
    lines = ["| way, 256 channels | " + " | ".join(f"{world} ranks" for world in worlds) + " |"]
    lines.append("|---" * (len(worlds) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["ranks"]: row["us"] for row in rows if row["way"] == way and row["channels"] == 256}
        lines.append(f"| {way} | " + " | ".join(f"{found[w]:.0f}" if w in found else "" for w in worlds) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="one synchronization message over each way")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--backends", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=10, help="calls on end in one measurement")
    parser.add_argument("--name", default="latency", help="of the CSV and the picture in benchmarks/results")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows is not None:
        run_rank(args)
        return
    rows = [row for world in args.worlds for backend in args.backends for row in launch(world, backend, args)]
    path = timing.write_csv(f"{args.name}.csv", rows)
    plot(rows, path.with_suffix(".png"))
    print(f"{table(rows)}\n{timing.machine()}\nwritten: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
