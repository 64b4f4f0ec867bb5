"""One frame with every peer on this host: Unix sockets beside gloo's send and receive, and its all-reduce.

    python benchmarks/sockets.py                       # 2 to 32 ranks: CSV
    python benchmarks/sockets.py --worlds 2 --busy 2   # beside two processes that compute

It starts itself through the launcher, once for each world size. A frame is that of a layer with 256 channels: 128 bytes
and 513 float64. The ways are measured in turn, so many calls on end after a barrier, and checked first: each rank gets
each peer's frame, or the sum. Reported are medians of the wall time of a call, and the processor time that a rank takes
for it, with all its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.sockets import Sockets

WORLDS = (2, 4, 8, 16, 32)
WIDTH = 16 + 513  # float64: a header and the sums of 256 channels
TAG = 0x53424E


def frame(rank: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def tell(record: bytes) -> Sequence[bytes]:
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    return [bytes(one.tolist()) for one in all_ranks]


def over_sockets(rank: int, world: int) -> Way:
    """The frames of all ranks, of shape ``(world, WIDTH)``, by way of sockets."""
    sockets = Sockets.connect(rank, world, tell)
    assert len(sockets.peers) == world - 1, sockets.peers
    memory = [bytearray(16 * WIDTH) for _ in range(world)]  # room for a farewell
    frames = [torch.frombuffer(one, dtype=torch.float64)[:WIDTH] for one in memory]
    frames[rank].copy_(frame(rank))
    mine = memoryview(memory[rank])[: 8 * WIDTH]
    buffers = [memoryview(memory[peer]) for peer in sockets.peers]

    def swap() -> None:
        sockets.send(mine)
        sockets.receive(buffers, time.monotonic() + 60.0)

    return Way(swap, lambda: torch.stack(frames))


class Way:
    """A way to exchange frames: a call makes one exchange; ``result`` is what the last one brought."""

    def __init__(self, run: Callable[[], None], result: Callable[[], Tensor]) -> None:
        self.run, self.result = run, result


def over_gloo(rank: int, world: int) -> Way:
    group: Any = dist.group.WORLD
    backend = group._get_backend(torch.device("cpu"))
    frames = torch.empty(world, WIDTH, dtype=torch.float64)
    frames[rank] = frame(rank)
    mine = [frames[rank]]
    peers = [(peer, [frames[peer]]) for peer in range(world) if peer != rank]

    def swap() -> None:
        works = [backend.recv(buffer, peer, TAG) for peer, buffer in peers]
        works += [backend.send(mine, peer, TAG) for peer, _ in peers]
        for work in works:
            work.wait()

    return Way(swap, lambda: frames)


def over_all_reduce(rank: int, world: int) -> Way:
    mine, total = frame(rank), torch.empty(WIDTH, dtype=torch.float64)

    def swap() -> None:
        total.copy_(mine)
        dist.all_reduce(total)

    return Way(swap, lambda: total)


def check(ways: dict[str, Way], world: int) -> None:
    expected = torch.stack([frame(rank) for rank in range(world)])
    for name, way in ways.items():
        way.run()
        found = way.result()
        if found.dim() == 1:
            torch.testing.assert_close(found, expected.sum(0), rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(found, expected), name


def measure(ways: dict[str, Way], rounds: int, calls: int) -> list[dict[str, object]]:
    """Medians over the rounds, in microseconds a call; the mean over the ranks."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    processors: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            for _ in range(3):  # ranks leave the barrier at different times
                way.run()
            processor, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                way.run()
            if turn:
                walls[name].append((time.perf_counter() - wall) / calls * 1e6)
                processors[name].append((time.process_time() - processor) / calls * 1e6)
    found = [[statistics.median(walls[name]), statistics.median(processors[name])] for name in ways]
    means = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(means)
    means /= dist.get_world_size()
    return [
        {"way": name, "ranks": dist.get_world_size(), "us": wall, "processor us": processor}
        for name, (wall, processor) in zip(ways, means.tolist(), strict=True)
    ]


def run_rank(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    ways = {
        "sockets": over_sockets(rank, world),
        "gloo send and receive": over_gloo(rank, world),
        "gloo all_reduce": over_all_reduce(rank, world),
    }
    check(ways, world)
    rows = measure(ways, args.rounds, args.calls)
    check(ways, world)
    if rank == 0:
        args.rows.write_text(json.dumps([{**row, "busy": args.busy} for row in rows]))
    dist.destroy_process_group()


def launch(world: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run this program on so many ranks, beside ``args.busy`` processes that compute; the rows that they measured."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "syncbn.launch", "--engine", "torchrun", "-n", str(world), __file__]
            command += ["--rows", str(path), "--busy", str(args.busy)]
            command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
            subprocess.run(command, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows: list[dict[str, Any]] = json.loads(path.read_text())
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="one frame with every peer on this host")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--calls", type=int, default=20, help="calls on end in one measurement")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--name", default="sockets", help="of the CSV in benchmarks/results")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows is not None:
        run_rank(args)
        return
    rows = [row for world in args.worlds for row in launch(world, args)]
    path = timing.write_csv(f"{args.name}.csv", rows)
    for row in rows:
        print(f"{row['ranks']:3} ranks  {row['way']:24} {row['us']:9.1f} us  processor {row['processor us']:8.1f} us")
    print(f"{timing.machine()}\nwritten: {path}")


if __name__ == "__main__":
    main()
