"""One synchronization message over each way it can travel, against world size and number of channels.

    python benchmarks/latency.py                              # all worlds over gloo and MPI: CSV and picture
    python benchmarks/latency.py --worlds 2 --backends gloo   # a part of it
    python benchmarks/latency.py --worlds 2 --busy 2          # beside two processes that compute

It starts itself through the launcher, once for each world size and backend. The message is a layer's in the forward,
2C + 1 float64. In each run the ways are measured in turn, so many calls on end after a barrier and some calls that are
not counted, for ranks leave a barrier one after the other; the result of each way is first compared with the sum of
what all ranks sent, and its bits between ranks. Reported are medians of the wall time of a call, and the processor time
that a rank takes for it, with all its threads. Ways:

* ``sockets one hop``, ``gloo one hop``, ``gloo all_reduce``: the ways of ``syncbn.comm`` in a group over gloo, with
  headers and checks;
* ``mpi4py link``: the way of ``syncbn.comm`` over the mpi4py backend, with checks;
* ``gloo dist.all_reduce``, ``mpi4py dist.all_reduce``, ``gloo dist.all_gather``, ``mpi4py dist.all_gather``: the bare
  collectives of torch.distributed (the gathers without the sum that has to follow);
* ``raw mpi4py Allreduce``: MPI itself, blocking, through mpi4py.

And what a layer adds: the forward, without gradients, of an input of 2 samples, of ``nn.BatchNorm1d`` and of
``SyncBatchNorm`` over the default group.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.comm import Link, OneHop
from syncbn.comm.all_reduce import AllReduceOnHost
from syncbn.comm.handshake import SWITCH
from syncbn.wire import FORWARD, Call

CHANNELS = (64, 256, 1024, 2048)
WORLDS = (2, 4, 8)
MAIN = 256  # channels, in tables
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
        linked = {
            "sockets one hop": OneHop(group, cpu),
            "gloo one hop": without_sockets(OneHop(group, cpu), payload, call),
            "gloo all_reduce": AllReduceOnHost(group, cpu),
        }
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


def without_sockets(link: Link, payload: Tensor, call: Call) -> Link:
    """The link, which finds out in its first exchange who is reached by socket: nobody."""
    os.environ[SWITCH] = "off"
    link.sum(payload, call)
    del os.environ[SWITCH]
    return link


def layers(backend: str, channels: int) -> dict[str, Callable[[], Tensor]]:
    """A forward of each layer, in a group of this backend."""
    x = torch.randn(2, channels)
    sides = nn.BatchNorm1d(channels), syncbn.SyncBatchNorm(channels)
    return {f"{backend} {type(side).__name__}": torch.no_grad()(lambda side=side: side(x)) for side in sides}


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
    """Medians of all ways for all numbers of channels, in microseconds a call; the means of the ranks.

    All are measured in each round, so that another job's burst falls on a few rounds of all of them.
    """
    sides: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for channels in CHANNELS:
        for name, way in ways(backend, message(dist.get_rank(), channels)).items():
            check(name, way, channels)
            sides[name, channels] = way
    sides |= {(name, MAIN): forward for name, forward in layers(backend, MAIN).items()}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in sides}
    for turn in range(rounds + 1):
        for key, way in sides.items():
            dist.barrier()
            for _ in range(3):
                way()
            processor, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                way()
            if turn:
                times[key].append((time.perf_counter() - wall, time.process_time() - processor))
    medians = [[statistics.median(column) for column in zip(*found, strict=True)] for found in times.values()]
    means = torch.tensor(medians, dtype=torch.float64)
    dist.all_reduce(means)
    means *= 1e6 / calls / dist.get_world_size()
    return [
        {"way": name, "ranks": dist.get_world_size(), "channels": channels, "us": wall, "processor us": processor}
        for (name, channels), (wall, processor) in zip(sides, means.tolist(), strict=True)
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
    """Run this program on so many ranks, beside ``args.busy`` processes that compute; the rows that they measured."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        return run(world, backend, args)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(world: int, backend: str, args: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "syncbn.launch", "--engine", ENGINES[backend], "-n", str(world)]
        command += [__file__, "--backends", backend, "--rows", str(path)]
        command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
        subprocess.run(command, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[dict[str, object]] = json.loads(path.read_text())
    load = f"{os.getloadavg()[0]:.1f}"  # of the last minute: W ranks of our own, and whoever else is there
    return [{**row, "busy": args.busy, "load": load} for row in rows]


def plot(path: Path) -> None:
    """Time against world size at 256 channels, and against channels on the fewest ranks, from the CSV."""
    import pictures

    rows = timing.read_csv(path)
    fewest = min(row["ranks"] for row in rows)
    title = f"One message (2C + 1 float64) between ranks of one host: {timing.where(rows)}"
    carriers = ["sockets", "gloo", "mpi4py"]
    markers = {"one hop": "o", "all_reduce": "s", "link": "s", "dist.all_reduce": "^", "dist.all_gather": "v"}
    with pictures.figure(path.with_suffix(".png"), title, height=4.2) as (by_world, by_channels):
        for way in dict.fromkeys(row["way"] for row in rows if "BatchNorm" not in row["way"]):
            carrier, how = ("mpi4py", "raw") if way.startswith("raw") else way.split(" ", 1)
            bare = {"ls": "--", "mfc": "white"} if how == "raw" or how.startswith("dist.") else {}
            look = pictures.other(carriers.index(carrier), len(carriers), way, **bare)
            look["marker"] = markers.get(how, "X")
            mine = [row for row in rows if row["way"] == way and row["channels"] == MAIN]
            by_world.plot([row["ranks"] for row in mine], [row["us"] for row in mine], **look)
            mine = [row for row in rows if row["way"] == way and row["ranks"] == fewest]
            by_channels.plot([row["channels"] for row in mine], [row["us"] for row in mine], **look)
        for axes, along, title in (
            (by_world, "ranks", f"{MAIN} channels"),
            (by_channels, "channels", f"{fewest} ranks"),
        ):
            pictures.powers_of_two(axes, sorted({row[along] for row in rows}), along)
            axes.set(yscale="log", title=title)
        by_world.set_ylabel("µs per message (median)")
        pictures.legend_below([by_world, by_channels], columns=3)


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds at 256 channels as Markdown, and those of a processor: a line per way, a column per world size."""
    worlds = sorted({row["ranks"] for row in rows})
    lines = [f"| {MAIN} channels, us: wall, processor | " + " | ".join(f"{world} ranks" for world in worlds) + " |"]
    lines.append("|---" * (len(worlds) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["ranks"]: row for row in rows if row["way"] == way and row["channels"] == MAIN}
        cells = [f"{found[w]['us']:.0f}, {found[w]['processor us']:.0f}" if w in found else "" for w in worlds]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def added(rows: list[dict[str, Any]]) -> str:
    """What synchronization adds to a forward, over gloo's own all_reduce of the same message."""
    lines = []
    for world in sorted({row["ranks"] for row in rows if row["way"] == "gloo SyncBatchNorm"}):
        us = {row["way"]: row["us"] for row in rows if row["ranks"] == world and row["channels"] == MAIN}
        more = us["gloo SyncBatchNorm"] - us["gloo BatchNorm1d"]
        share = more / us["gloo dist.all_reduce"]
        lines.append(
            f"{world} ranks: a layer's forward of (2, {MAIN}) takes {more:.0f} us more, {share:.3f} of all_reduce"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="one synchronization message over each way")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--backends", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=20, help="calls on end in one measurement")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument(
        "--name", default="latency", help="of the CSV and the picture, in $BENCHMARKS_OUT or out/benchmarks"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows is not None:
        run_rank(args)
        return
    rows = [row for world in args.worlds for backend in args.backends for row in launch(world, backend, args)]
    path = timing.write_csv(f"{args.name}.csv", rows)
    plot(path)
    print(f"{table(rows)}\n{added(rows)}\n{timing.machine()}\nwritten: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
