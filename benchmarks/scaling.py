"""The cost of synchronization against world size: counted and measured where ranks can be had, a model up to 4096.

    python benchmarks/scaling.py                  # needs Linux; as root, the bytes on the wire are measured too
    python benchmarks/scaling.py --worlds         # the model alone

For one layer and one training step (forward and backward): collectives, hops one after the other, messages that a rank
sends, bytes that a rank sends, time. Patterns:

* ``torch``: what ``torch.nn.SyncBatchNorm`` does: an all-gather of 2C + 1 float32 forward (a ring: W - 1 hops) and an
  all-reduce of 2C float32 backward. That layer does not run on CPUs; its two collectives do.
* ``syncbn all_reduce``: two all-reduces of float64 with check slots. Over gloo a ring of 2(W - 1) hops each, padded to
  1024 float64; NCCL's tree goes up and down, 2 log2(W); MPI doubles recursively, log2(W).
* ``syncbn one hop``: every rank sends to every other, forward and backward: 1 hop, W - 1 messages each.

The model: ``time = hops * HOP + messages * SEND + bytes / BANDWIDTH``, with the constants stated below. Measured: wall
time, processor time of a rank, and bytes through the loopback interface of a network namespace of the run's own (TCP's
headers and acknowledgements included). On fewer cores than ranks wall time is that of ranks taking turns, not that of
a cluster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
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

import syncbn
from syncbn import comm, header
from syncbn.header import FORWARD, Call

CHANNELS = 256
MODEL_WORLDS = tuple(2**i for i in range(1, 13))


@dataclasses.dataclass(frozen=True)
class Network:
    """Constants of the model, in microseconds and bytes per microsecond."""

    hop: float  # what the next step waits for, beyond SEND: the wire, and waking a thread
    send: float  # of a rank's processor, for a message sent and one received
    bandwidth: float  # out of a rank


# gloo over 10 Gbit/s Ethernet. From the processor times that this program measured on 2 cores, the growth from 4 to 16
# ranks: 55 us a message where all are under way together (one hop), 120 us where each waits for the one before (ring).
# The wire, 25 us, and the bandwidth are assumed.
TCP = Network(hop=120.0 - 55.0 + 25.0, send=55.0, bandwidth=1250.0)
# NCCL or MPI over 200 Gbit/s InfiniBand. All three assumed; nothing of it was measured.
FABRIC = Network(hop=4.0, send=1.0, bandwidth=25_000.0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one layer and step, for a rank."""

    collectives: int
    hops: int
    messages: int
    bytes: float

    def time(self, network: Network) -> float:
        """Microseconds in the model."""
        return self.hops * network.hop + self.messages * network.send + self.bytes / network.bandwidth


def ring_all_reduce(world: int, size: int) -> Cost:
    steps = 2 * (world - 1)
    return Cost(1, steps, steps, steps * size / world)


def tree_all_reduce(world: int, size: int) -> Cost:
    hops = 2 * math.ceil(math.log2(world))
    return Cost(1, hops, hops, 2 * size)


def doubling_all_reduce(world: int, size: int) -> Cost:
    hops = math.ceil(math.log2(world))
    return Cost(1, hops, hops, hops * size)


def ring_all_gather(world: int, size: int) -> Cost:
    return Cost(1, world - 1, world - 1, (world - 1) * size)


def to_every_peer(world: int, size: int) -> Cost:
    return Cost(1, 1, world - 1, (world - 1) * size)


def both(forward: Cost, backward: Cost) -> Cost:
    added = (a + b for a, b in zip(dataclasses.astuple(forward), dataclasses.astuple(backward), strict=True))
    return Cost(*added)


def patterns(world: int, channels: int) -> dict[str, tuple[Cost, Network]]:
    """What each pattern costs a layer of so many channels, and on which network it is found."""
    forward, backward = 2 * channels + 1, 2 * channels
    slots, bucket = comm.AllReduce._HEAD, comm.AllReduce._BUCKET
    padded = [8 * bucket * math.ceil((slots + n) / bucket) for n in (forward, backward)]
    slotted = [8 * (slots + n) for n in (forward, backward)]
    framed = [header.SIZE + 8 * n for n in (forward, backward)]
    gather = ring_all_gather(world, 4 * forward)

    def twice(way: Callable[[int, int], Cost], sizes: list[int]) -> Cost:
        return both(way(world, sizes[0]), way(world, sizes[1]))

    return {
        "gloo: torch": (both(gather, ring_all_reduce(world, 4 * backward)), TCP),
        "gloo: syncbn all_reduce": (twice(ring_all_reduce, padded), TCP),
        "gloo: syncbn one hop": (twice(to_every_peer, framed), TCP),
        "NCCL: torch": (both(gather, tree_all_reduce(world, 4 * backward)), FABRIC),
        "NCCL: syncbn all_reduce": (twice(tree_all_reduce, padded), FABRIC),
        "MPI: syncbn all_reduce": (twice(doubling_all_reduce, slotted), FABRIC),
    }


# ---- measured


def steps(channels: int) -> dict[str, Callable[[], object]]:
    """The communication of a layer and step in each pattern, over the default group (gloo)."""
    group: Any = dist.group.WORLD
    cpu = torch.device("cpu")
    forward, backward = torch.ones(2 * channels + 1, dtype=torch.float64), torch.ones(2 * channels, dtype=torch.float64)
    small, gathered = forward.float(), torch.empty(group.size() * (2 * channels + 1))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

    def as_torch() -> None:
        gather(gathered, small)
        dist.all_reduce(torch.ones(2 * channels))

    def linked(link: comm.Link) -> Callable[[], None]:
        def run() -> None:
            for payload in (forward, backward):
                assert link.sum(payload, Call(FORWARD, "layer"))[0] == group.size()

        return run

    as_torch()
    assert gathered.sum() == len(gathered)
    return {
        "gloo: torch": as_torch,
        "gloo: syncbn all_reduce": linked(comm.AllReduce(group, cpu)),
        "gloo: syncbn one hop": linked(comm.OneHop(group, cpu)),
    }


def widths_of_a_step(channels: int) -> list[int]:
    """The payloads that a layer's forward and backward really exchange."""
    link: Any = comm.link(dist.group.WORLD, torch.device("cpu"))
    exchange, widths = link.exchange, []

    def counted(payload: torch.Tensor, call: Call) -> Any:
        widths.append(payload.numel())
        return exchange(payload, call)

    link.exchange = counted
    x = torch.randn(4, channels, requires_grad=True)
    syncbn.SyncBatchNorm(channels)(x).square().sum().backward()
    del link.exchange  # the class's again
    return widths


def sent_bytes() -> int:
    """Bytes through the loopback interface of this network namespace so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line.split()[9] for line in lines if line.strip().startswith("lo:")))


def measure(channels: int, rounds: int, calls: int) -> list[dict[str, object]]:
    """Wall time, processor time of a rank and bytes of a rank, for each pattern, of a layer and step."""
    world = dist.get_world_size()
    assert widths_of_a_step(channels) == [2 * channels + 1, 2 * channels], "the layer makes other exchanges"
    rows: list[dict[str, object]] = []
    for name, step in steps(channels).items():
        walls, cpus, sizes = [], [], []
        for _ in range(rounds + 2):
            dist.barrier()
            before, wall, cpu = sent_bytes(), time.perf_counter(), time.process_time()
            for _ in range(calls):
                step()
            walls.append((time.perf_counter() - wall) / calls * 1e6)
            cpus.append((time.process_time() - cpu) / calls * 1e6)
            dist.barrier()
            sizes.append((sent_bytes() - before) / calls / world)
        medians = torch.tensor([walls[2:], cpus[2:], sizes[2:]], dtype=torch.float64).median(1).values
        dist.all_reduce(medians)
        wall_us, cpu_us, size = (medians / world).tolist()
        rows.append({"pattern": name, "ranks": world, "wall us": wall_us, "cpu us": cpu_us, "bytes": size})
    return rows


def run_rank(args: argparse.Namespace) -> None:
    """What each rank does: measure; rank 0 leaves the rows in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measure(CHANNELS, args.rounds, args.calls)
    if dist.get_rank() == 0:
        args.rows.write_text(json.dumps(rows))
    dist.destroy_process_group()


def launch(world: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run this program on so many ranks, as root in a network namespace of its own; the rows that they measured."""
    own = os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("ip") is not None
    prefix = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"'] if own else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [*prefix, sys.executable, "-m", "syncbn.launch", "-n", str(world), __file__, "--rows", str(path)]
        command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
        subprocess.run(command, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    # Other programs use the loopback interface as well.
    return [{**row, "bytes": row["bytes"] if own else ""} for row in rows]


# ---- both, side by side


def join(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's rows for all worlds, with what was measured beside them."""
    found = {(row["pattern"], row["ranks"]): row for row in measured}
    worlds = sorted({*MODEL_WORLDS, *(row["ranks"] for row in measured)})
    rows = []
    for name in patterns(2, CHANNELS):
        for world in worlds:
            cost, network = patterns(world, CHANNELS)[name]
            seen = found.get((name, world), {})
            rows.append(
                {
                    "pattern": name, "ranks": world, "channels": CHANNELS, **dataclasses.asdict(cost),
                    "model us": cost.time(network), "measured bytes": seen.get("bytes", ""),
                    "measured wall us": seen.get("wall us", ""), "measured cpu us": seen.get("cpu us", ""),
                    **{f"{key} (model)": value for key, value in dataclasses.asdict(network).items()},
                }
            )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Model as lines, measurements as points: time with gloo, time on a fabric, bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (gloo, fabric, sizes) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["pattern"] for row in rows)):
        mine = [row for row in rows if row["pattern"] == name]
        worlds, color = [row["ranks"] for row in mine], f"C{i}"
        axes = gloo if name.startswith("gloo") else fabric
        axes.plot(worlds, [row["model us"] for row in mine], color=color, label=name)
        sizes.plot(worlds, [row["bytes"] for row in mine], color=color, label=name)
        seen = [row for row in mine if row["measured wall us"] != ""]
        for key, marker in (("measured wall us", "o"), ("measured cpu us", "x")):
            gloo.plot([row["ranks"] for row in seen], [row[key] for row in seen], marker, color=color)
        seen = [row for row in seen if row["measured bytes"] != ""]
        sizes.plot([row["ranks"] for row in seen], [row["measured bytes"] for row in seen], "o", color=color)
    cores = os.cpu_count()
    gloo.set(title=f"gloo (measured on {cores} cores: o wall, x processor time)", ylabel="µs per layer and step")
    fabric.set(title="NCCL and MPI (model only)", ylabel="µs per layer and step")
    sizes.set(title="bytes sent by a rank (points: measured)", ylabel="bytes per layer and step")
    for axes in (gloo, fabric, sizes):
        axes.set(xlabel="ranks", xscale="log", yscale="log")
        axes.set_xticks([2, 8, 32, 128, 512, 4096], ["2", "8", "32", "128", "512", "4096"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"One layer of {CHANNELS} channels, forward and backward; lines: model", fontsize=11)
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """The model at a few world sizes as Markdown."""
    worlds = (2, 8, 32, 256, 4096)
    lines = ["| pattern | collectives | hops, W = " + ", ".join(map(str, worlds)) + " | KB per rank | model, us |"]
    lines.append("|---" * 5 + "|")
    for name in dict.fromkeys(row["pattern"] for row in rows):
        mine = [next(row for row in rows if row["pattern"] == name and row["ranks"] == world) for world in worlds]
        hops = ", ".join(str(row["hops"]) for row in mine)
        sizes = ", ".join(f"{row['bytes'] / 1e3:.3g}" for row in mine)
        times = ", ".join(f"{row['model us']:.0f}" for row in mine)
        lines.append(f"| {name} | {mine[0]['collectives']} | {hops} | {sizes} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of synchronization against world size")
    parser.add_argument("--worlds", type=int, nargs="*", default=(2, 4, 8), help="to measure at")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="steps on end in one measurement")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows is not None:
        run_rank(args)
        return
    measured = [row for world in args.worlds for row in launch(world, args)]
    for row in measured:
        size = row["bytes"] if row["bytes"] == "" else f"{row['bytes']:10.0f} bytes"
        print(f"{row['pattern']:>25} W={row['ranks']:<3} {row['wall us']:9.0f} us  {row['cpu us']:9.0f} us cpu {size}")
    rows = join(measured)
    path = timing.write_csv("scaling.csv", rows)
    plot(rows, path.with_suffix(".png"))
    print(f"{table(rows)}\n{timing.machine()}\nwritten: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
