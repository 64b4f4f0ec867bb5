"""The cost of synchronization against world size: counted and measured where ranks can be had, a model up to 4096.

    python benchmarks/scaling.py                            # one host; needs Linux; as root, bytes are measured too
    python benchmarks/scaling.py --worlds 4 8 --hosts 2     # two hosts, network namespaces of this machine: as root
    python benchmarks/scaling.py --worlds                   # the model alone

For one layer and one training step (forward and backward): collectives, hops one after the other, messages that a rank
sends, bytes that a rank sends, time; of the busiest rank where they differ. Patterns:

* ``torch``: what ``torch.nn.SyncBatchNorm`` does: an all-gather of 2C + 1 float32 forward (a ring: W - 1 hops) and an
  all-reduce of 2C float32 backward. That layer does not run on CPUs; its two collectives do.
* ``syncbn all_reduce``: two all-reduces of float64 with check slots. Over gloo a ring of 2(W - 1) hops each, padded to
  1024 float64; NCCL's tree goes up and down, 2 log2(W); MPI doubles recursively, log2(W).
* ``syncbn one hop``: every rank sends to every other, forward and backward: 1 hop, W - 1 messages each. Measured on one
  host with sockets switched off, and on two with sockets within each.
* ``sockets: syncbn one hop``: the same over Unix sockets, up to 64 ranks of one host.
* ``syncbn two levels``: to a leader on each host by socket, among leaders over gloo, and back: 3 hops each. The last is
  a word; what it stands for is read from memory that a leader shares with its ranks. The model has ``RANKS_PER_HOST``
  ranks on a host; its row is that of a leader.

The model: ``time = hops * HOP + messages * SEND + bytes / BANDWIDTH`` for each kind of network, with the constants
stated below. Measured: wall time, processor time of a rank, and bytes through the network device of a namespace of the
run's own (TCP's headers and acknowledgements included, Unix sockets not). Ranks are forked from one process that has
imported all. On fewer cores than ranks wall time is that of ranks taking turns, not that of a cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ranks
import timing
import torch
import torch.distributed as dist

import syncbn
from syncbn import comm, wire
from syncbn.comm import two_levels
from syncbn.comm.all_reduce import AllReduceOnHost
from syncbn.comm.handshake import SWITCH
from syncbn.messages import Message, Shared
from syncbn.wire import FORWARD, Call

CHANNELS = 256
DEVICE = "GLOO_SOCKET_IFNAME"
MODEL_WORLDS = tuple(2**i for i in range(1, 13))
RANKS_PER_HOST = 32


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
# Unix sockets. From the processor times that this program measured on 2 cores: 15 us a message with 64 ranks; 20 ms of
# a leader for 34 MB to 63 ranks. The hop, which wakes a process, is assumed.
SOCKET = Network(hop=10.0, send=15.0, bandwidth=1700.0)
# A rank's copy of what its leader wrote, from memory that they share. Assumed.
MEMORY = Network(hop=0.0, send=0.0, bandwidth=5000.0)
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


def led(world: int, size: int) -> list[tuple[Cost, Network]]:
    """What a leader does: frames come by socket, and a word that all is there goes back; blocks of a host go over gloo;
    and each rank copies all frames from the memory that it shares with its leader.
    """
    mine = min(world, RANKS_PER_HOST)
    hosts = math.ceil(world / mine)
    local = Cost(1, 2, mine - 1, (mine - 1) * 8)
    among = Cost(0, int(hosts > 1), hosts - 1, (hosts - 1) * mine * size)
    return [(local, SOCKET), (among, TCP), (Cost(0, 0, 0, world * size), MEMORY)]


def both(forward: Cost, backward: Cost) -> Cost:
    added = (a + b for a, b in zip(dataclasses.astuple(forward), dataclasses.astuple(backward), strict=True))
    return Cost(*added)


def patterns(world: int, channels: int) -> dict[str, list[tuple[Cost, Network]]]:
    """What each pattern costs a layer of so many channels, on each kind of network that it uses."""
    forward, backward = 2 * channels + 1, 2 * channels
    padded = [8 * wire.summed_length(n) for n in (forward, backward)]
    framed = [wire.HEADER_BYTES + 8 * n for n in (forward, backward)]
    gather = ring_all_gather(world, 4 * forward)

    def twice(way: Callable[[int, int], Cost], sizes: list[int]) -> Cost:
        return both(way(world, sizes[0]), way(world, sizes[1]))

    def on_host(way: Callable[[int, int], Cost]) -> Cost:
        """Two first messages, each with the rest of a payload that it does not hold."""
        first, rests = way(world, 8 * wire.BUCKET), [wire.SLOTS + n - wire.BUCKET for n in (forward, backward)]
        costs = [both(first, way(world, 8 * rest)) if rest > 0 else first for rest in rests]
        return both(*costs)

    return {
        "gloo: torch": [(both(gather, ring_all_reduce(world, 4 * backward)), TCP)],
        "gloo: syncbn all_reduce": [(on_host(ring_all_reduce), TCP)],
        "gloo: syncbn one hop": [(twice(to_every_peer, framed), TCP)],
        "gloo: syncbn two levels": [leg for size in framed for leg in led(world, 8 + size)],
        "sockets: syncbn one hop": [(twice(to_every_peer, framed), SOCKET)],
        "NCCL: torch": [(both(gather, tree_all_reduce(world, 4 * backward)), FABRIC)],
        "NCCL: syncbn all_reduce": [(twice(tree_all_reduce, padded), FABRIC)],
        "MPI: syncbn all_reduce": [(on_host(doubling_all_reduce), FABRIC)],
    }


# ---- measured


def steps(channels: int, hosts: int) -> dict[str, Callable[[], object]]:
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

        run()  # finds out who shares a host
        return run

    as_torch()
    assert gathered.sum() == len(gathered)
    found: dict[str, Callable[[], object]] = {"gloo: torch": as_torch}
    found["gloo: syncbn all_reduce"] = linked(AllReduceOnHost(group, cpu))
    if hosts == 1:
        os.environ[SWITCH] = "off"
        found["gloo: syncbn one hop"] = linked(comm.OneHop(group, cpu))
        del os.environ[SWITCH]
        found["sockets: syncbn one hop"] = linked(comm.OneHop(group, cpu))
    else:
        found["gloo: syncbn one hop"] = linked(comm.OneHop(group, cpu))
    two_levels.SOCKETS_LIMIT = 1  # a leader on one host too
    found["gloo: syncbn two levels"] = linked(comm.OneHop(group, cpu, levels=True))
    return found


def widths_of_a_step(channels: int) -> list[int]:
    """The payloads that a layer's forward and backward really exchange."""
    link: Any = comm.link_of(dist.group.WORLD, torch.device("cpu"))
    share, widths = link.share, []

    def counted(message: Message, call: Call) -> Shared:
        widths.append(message.payload.numel())
        return share(message, call)

    link.share = counted
    x = torch.randn(4, channels, requires_grad=True)
    syncbn.SyncBatchNorm(channels)(x).square().sum().backward()
    del link.share  # the class's again
    return widths


def sent_bytes() -> int:
    """Bytes out of the device that gloo uses in this network namespace so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line.split()[9] for line in lines if line.strip().startswith(f"{os.environ[DEVICE]}:")))


def resident() -> float:
    """MB of memory of this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1e3


def measure(channels: int, hosts: int, rounds: int, calls: int) -> list[dict[str, object]]:
    """Wall time, processor time of a rank and bytes of a rank, for each pattern, of a layer and step."""
    world = dist.get_world_size()
    assert widths_of_a_step(channels) == [2 * channels + 1, 2 * channels], "the layer makes other exchanges"
    rows: list[dict[str, object]] = []
    for name, step in steps(channels, hosts).items():
        walls, cpus, sizes = [], [], []
        for _ in range(rounds + 2):
            dist.barrier()
            before, wall, cpu = sent_bytes(), time.perf_counter(), time.process_time()
            for _ in range(calls):
                step()
            walls.append((time.perf_counter() - wall) / calls * 1e6)
            cpus.append((time.process_time() - cpu) / calls * 1e6)
            dist.barrier()
            sizes.append((sent_bytes() - before) / calls / world * hosts)
        medians = torch.tensor([walls[2:], cpus[2:], sizes[2:]], dtype=torch.float64).median(1).values
        most = torch.tensor([medians[1], resident()], dtype=torch.float64)
        dist.all_reduce(medians)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        wall_us, cpu_us, size = (medians / world).tolist()
        row: dict[str, object] = {"pattern": name, "ranks": world, "hosts": hosts, "wall us": wall_us, "cpu us": cpu_us}
        rows.append({**row, "bytes": size, "most cpu us": most[0].item(), "MB so far": most[1].item()})
    return rows


def run_ranks(args: argparse.Namespace) -> None:
    """The ranks of this host, forked: each measures, and rank 0 leaves the rows in a file."""
    context = multiprocessing.get_context("fork")
    first, count = args.ranks
    processes = [context.Process(target=run_rank, args=(args, rank)) for rank in range(first, first + count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(int(any(process.exitcode for process in processes)))


def run_rank(args: argparse.Namespace, rank: int) -> None:
    torch.set_num_threads(1)
    world, hosts = args.worlds[0], args.hosts
    dist.init_process_group("gloo", init_method=f"file://{args.rows}.store", rank=rank, world_size=world)
    ranks.leave(measure(CHANNELS, hosts, args.rounds, args.calls), args.rows)
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def namespaces(hosts: int) -> Iterator[list[tuple[list[str], str]]]:
    """For each host, the command that runs another there, and the device between them: one of namespaces that end here.

    A single host of a user who is not root is this machine.
    """
    if hosts == 1 and (os.geteuid() != 0 or shutil.which("ip") is None):
        yield [([], "lo")]
        return
    names = [f"sbn-{os.getpid()}-{host}" for host in range(hosts)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        if hosts == 2:
            ends = ["sbn0", "type", "veth", "peer", "sbn1", "netns", names[1]]
            subprocess.run(["ip", "-n", names[0], "link", "add", *ends], check=True)
            for host, name in enumerate(names):
                address = ["address", "add", f"10.78.0.{host + 1}/24", "dev", f"sbn{host}"]
                subprocess.run(["ip", "-n", name, *address], check=True)
                subprocess.run(["ip", "-n", name, "link", "set", f"sbn{host}", "up"], check=True)
        devices = ["lo"] if hosts == 1 else ["sbn0", "sbn1"]
        yield [(["ip", "netns", "exec", name], device) for name, device in zip(names, devices, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def launch(world: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run this program on so many ranks; the rows that they measured."""
    with tempfile.TemporaryDirectory() as folder, namespaces(args.hosts) as places:
        path = Path(folder) / "rows.json"
        share = world // args.hosts
        options = {"rows": path, "worlds": world, "hosts": args.hosts, "rounds": args.rounds, "calls": args.calls}
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
        running = [
            subprocess.Popen(
                [*prefix, *command, "--ranks", str(host * share), str(share)],
                env={**os.environ, "OMP_NUM_THREADS": "1", DEVICE: device},
            )
            for host, (prefix, device) in enumerate(places)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"the ranks on {args.hosts} hosts ended with {codes}")
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    own = bool(places[0][0])  # else other programs use the device as well
    return [{**row, "bytes": row["bytes"] if own else ""} for row in rows]


# ---- both, side by side


def join(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's rows for all worlds, with what was measured beside them."""
    found = {(row["pattern"], row["ranks"]): row for row in measured}
    blank = dict.fromkeys(("hosts", "bytes", "wall us", "cpu us", "most cpu us", "MB so far"), "")
    worlds = sorted({*MODEL_WORLDS, *(row["ranks"] for row in measured)})
    rows = []
    for name in patterns(2, CHANNELS):
        for world in worlds:
            legs = patterns(world, CHANNELS)[name]
            total = functools.reduce(both, [cost for cost, _ in legs])
            seen = {key: found.get((name, world), blank)[key] for key in blank}
            rows.append(
                {
                    "pattern": name, "ranks": world, "channels": CHANNELS, **dataclasses.asdict(total),
                    "model us": sum(cost.time(network) for cost, network in legs),
                    **{f"measured {key}": value for key, value in seen.items()},
                }
            )  # fmt: skip
    return rows


def plot(path: Path) -> None:
    """Model as lines, measurements as points, from the CSV: time with gloo, time on a fabric, bytes."""
    import pictures

    rows = timing.read_csv(path)
    names = list(dict.fromkeys(row["pattern"] for row in rows))
    algorithms = ["torch", "syncbn all_reduce", "syncbn one hop", "syncbn two levels"]
    dashes = {"gloo": "-", "sockets": ":", "NCCL": "--", "MPI": "-."}
    title = f"{CHANNELS} channels, forward + backward: model (lines), measured (points; {timing.where(rows)})"
    with pictures.figure(path.with_suffix(".png"), title, panels=3, height=3.6) as (gloo, fabric, sizes):
        for name in names:
            mine = [row for row in rows if row["pattern"] == name]
            carrier, algorithm = name.split(": ")
            look = pictures.other(algorithms.index(algorithm), len(algorithms), name, ls=dashes[carrier])
            measured = look | {"ls": "", "label": None} | ({"marker": "^"} if carrier == "sockets" else {})
            look["marker"] = ""
            axes, worlds = gloo if name.startswith(("gloo", "sockets")) else fabric, [row["ranks"] for row in mine]
            axes.plot(worlds, [row["model us"] for row in mine], **look)
            # Messages of one hop have the same bytes over gloo and over sockets: a wide line shows beneath another.
            wide = {"lw": 5, "alpha": 0.35} if name.startswith("sockets") else {}
            sizes.plot(worlds, [row["bytes"] for row in mine], **look | wide)
            seen = [row for row in mine if row["measured wall us"] != ""]
            for key, fill in (("measured wall us", {}), ("measured cpu us", {"mfc": "white"})):
                gloo.plot([row["ranks"] for row in seen], [row[key] for row in seen], **measured | fill)
            # What goes over Unix sockets does not show in the counters of the network.
            seen = [row for row in seen if row["measured bytes"] != "" and "two levels" not in name]
            if not name.startswith("sockets"):
                sizes.plot([row["ranks"] for row in seen], [row["measured bytes"] for row in seen], **measured)
        gloo.set(title="gloo, sockets (filled: wall, open: processor)", ylabel="µs per layer and step")
        fabric.set(title="NCCL, MPI (model only)", ylabel="µs per layer and step")
        sizes.set(title="bytes sent by a rank", ylabel="bytes per layer and step")
        for axes in (gloo, fabric, sizes):
            axes.set(xlabel="ranks", xscale="log", yscale="log")
            pictures.ticks(axes.xaxis, [2, 8, 32, 128, 512, 4096])
        pictures.legend_below([gloo, fabric, sizes], columns=3)


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
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2: as root, in network namespaces")
    parser.add_argument("--ranks", type=int, nargs=2, help=argparse.SUPPRESS)  # first, and how many
    ranks.add_rows_option(parser)
    args = parser.parse_args()
    if args.rows is not None:
        run_ranks(args)
        return
    measured = [row for world in args.worlds for row in launch(world, args)]
    for row in measured:
        size = row["bytes"] if row["bytes"] == "" else f"{row['bytes']:10.0f} bytes"
        times = f"{row['wall us']:9.0f} us  {row['cpu us']:9.0f} us cpu, at most {row['most cpu us']:9.0f}"
        print(f"{row['pattern']:>25} W={row['ranks']:<3} {times} {size} {row['MB so far']:6.0f} MB")
    rows = join(measured)
    path = timing.write_csv("scaling.csv" if args.hosts == 1 else "scaling-hosts.csv", rows)
    plot(path)
    print(f"{table(rows)}\n{timing.machine()}\nwritten: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
