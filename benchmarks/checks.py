"""What the checks cost: on, off, and without any header, measured in turn in one process.

    python benchmarks/checks.py

Three sides: "on", as it is by default; "off", with SYNCBN_CHECKS=off, where headers travel and only refusals are heard;
"bare", where no header is made either, as if there were no checks at all (it is not to be had, only to be measured).

* ``exchange``: one exchange of a layer of 64 channels on one rank, without a network. "one hop" against so many peers
  whose messages are there already; "all-reduce" in a gloo group of one rank.
* ``step``: forward and backward of a small convolutional network on two ranks over gloo, every layer synchronized.

Writes checks.csv.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import keep_freed_memory, write_csv
from torch import nn

import syncbn
from syncbn import wire
from syncbn.comm import Link, OneHop, link_of
from syncbn.comm.all_reduce import AllReduceOnHost
from syncbn.comm.frames import Frames
from syncbn.wire import FORWARD, INPUT_GRAD, Call

WIDTH = 129
CALLS = 100  # exchanges in one measurement
SIDES = ("on", "off", "bare")


@contextlib.contextmanager
def checks(link: Link, side: str) -> Iterator[None]:
    """The checks of a link as this side has them."""
    encode, tag, before, hear = wire.encode, wire.tag, link._checks, OneHop._hear_refusals
    link._checks = "on" if side == "on" else "off"
    if side == "bare":
        constant = encode(Call(FORWARD), WIDTH, 0)
        wire.encode = lambda call, width, number: constant
        wire.tag = lambda call, width, number=0: 7
        OneHop._hear_refusals = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        wire.encode, wire.tag, link._checks = encode, tag, before
        OneHop._hear_refusals = hear  # type: ignore[method-assign]


class Echo(OneHop):
    """Exchanges with peers that say what this rank says, at once: all of an exchange but the network."""

    def __init__(self, group: Any, size: int) -> None:
        super().__init__(group, torch.device("cpu"))
        self.size = size
        self._frames = Frames(size, wire.HEAD + wire.FRAME)

    def _swap(self, frames: Frames, length: int, call: Call, width: int) -> None:
        own = frames.views[0][: wire.HEADER_BYTES]
        for view in frames.views[1:]:
            view[: wire.HEADER_BYTES] = own


def in_turn(
    sides: dict[str, Callable[[], None]], rounds: int, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Median seconds of each side, and "on-off" and "on-bare": medians of the differences within a round.

    The sides differ by far less than a busy machine wavers from one second to the next, hence the differences. The
    order changes from round to round, that no side always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 3):
        for name in names[turn % 3 :] + names[: turn % 3]:
            if group is not None:
                dist.barrier(group)
            started = time.perf_counter()
            sides[name]()
            if turn >= 3:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for other in ("off", "bare"):
        differences = [on - off for on, off in zip(times["on"], times[other], strict=True)]
        medians[f"on-{other}"] = statistics.median(differences)
    return medians


def one_rank_group() -> dist.ProcessGroup:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    group = dist.group.WORLD
    assert group is not None
    return group


def measure_exchange(name: str, link: Link, peers: int, rounds: int = 600) -> dict[str, object]:
    """Microseconds of one exchange on each side."""
    payload, call = torch.randn(WIDTH, dtype=torch.float64), Call(FORWARD, "layer1.0.bn1", INPUT_GRAD)

    def exchanges(side: str) -> Callable[[], None]:
        def run() -> None:
            with checks(link, side):
                for _ in range(CALLS):
                    message = link.message(WIDTH, call)
                    message.payload.copy_(payload)
                    link.share(message, call)

        return run

    seconds = in_turn({side: exchanges(side) for side in SIDES}, rounds)
    return row(f"exchange, {name}", peers + 1, {side: 1e6 * value / CALLS for side, value in seconds.items()}, 1)


def row(what: str, ranks: int, us: dict[str, float], exchanges: int) -> dict[str, object]:
    """A line of the table: microseconds of each side, and what the checks add in all and to one exchange."""
    return {
        "what": what,
        "ranks": ranks,
        "exchanges": exchanges,
        **{f"{side}_us": us[side] for side in SIDES},
        "on_minus_off_us_per_exchange": us["on-off"] / exchanges,
        "on_minus_bare_us_per_exchange": us["on-bare"] / exchanges,
        "on_over_off": 1 + us["on-off"] / us["off"],
        "on_over_bare": 1 + us["on-bare"] / us["bare"],
    }


def network() -> nn.Sequential:
    """Six convolutions, each with a batch norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in zip((3, 16, 16, 32, 32, 64), (16, 16, 32, 32, 64, 64), strict=True):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def step_on_a_rank(rank: int, world: int, store: str, results: Any, rounds: int) -> None:
    """Forward and backward on each side; rank 0 reports."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(store, world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    net = syncbn.convert_sync_batchnorm(network())
    x = torch.randn(4, 3, 16, 16)
    link = link_of(dist.group.WORLD, x.device)

    def step(side: str) -> Callable[[], None]:
        def run() -> None:
            with checks(link, side):
                net.zero_grad()
                net(x).square().sum().backward()

        return run

    seconds = in_turn({side: step(side) for side in SIDES}, rounds, dist.group.WORLD)
    if rank == 0:
        results.put({side: 1e6 * value for side, value in seconds.items()})
    dist.destroy_process_group()


def measure_step(world: int, rounds: int = 601) -> dict[str, object]:
    """Microseconds of a step on each side, over gloo."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        args = [(rank, world, str(Path(folder) / "store"), results, rounds) for rank in range(world)]
        ranks = [context.Process(target=step_on_a_rank, args=each) for each in args]
        for rank in ranks:
            rank.start()
        us = results.get()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0, rank.exitcode
    return row("step of a network of 6 layers, gloo", world, us, exchanges=12)


def show(rows: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    for line in rows:
        print(
            f"{line['what']:38} {line['ranks']:3} ranks  on {line['on_us']:9.2f} us  off {line['off_us']:9.2f}  "
            f"bare {line['bare_us']:9.2f}  on/off {line['on_over_off']:.4f}  on/bare {line['on_over_bare']:.4f}  "
            f"per exchange: on-off {line['on_minus_off_us_per_exchange']:.2f} us, "
            f"on-bare {line['on_minus_bare_us_per_exchange']:.2f} us"
        )


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    group = one_rank_group()
    rows = [measure_exchange("one hop", Echo(group, size), size - 1) for size in (2, 4, 8, 32)]
    rows.append(measure_exchange("all-reduce", AllReduceOnHost(group, torch.device("cpu")), 0))
    dist.destroy_process_group()
    rows.append(measure_step(2))
    show(rows)
    print(f"written to {write_csv('checks.csv', rows)}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
