"""Random programs on all ranks: right numbers, or the expected error; no hang.

In the first part, programs differ on some ranks. A program is a list of calls of a few layers. What must happen is
worked out beforehand: each call is one or two exchanges, the ranks' lists of exchanges are laid side by side, and where
they first differ every rank must raise.

In the second, a rank ends in the middle: see ``programs/ends.py``. All in all 10,000 scenarios at length.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import syncbn
from helpers.commands import environment, mpiexec, needs_mpi4py, needs_mpiexec, run, running
from helpers.links import SEE_EACH_RANK, WAYS, travel
from helpers.oracle import TOLERANCE, close, rows, unrows
from helpers.ranks import outcomes
from programs import ends
from syncbn import wire
from syncbn.wire import BACKWARD, BIAS_GRAD, FORWARD, INPUT_GRAD, WEIGHT_GRAD

LAYERS = ("a", "b", "c")
CHANNELS = 3
SPATIAL: tuple[tuple[int, ...], ...] = ((), (2,), (3, 1), (2, 1, 2))
BENIGN = ("rows", "dtype", "empty", "nan")
REFUSED = ("channels", "integer")
MALIGNANT = ("skip", "other layer", "eval", "no_grad", "frozen", "wide", *REFUSED)


class Step(NamedTuple):
    """One call of a layer on one rank: forward and backward."""

    layer: str
    spatial: tuple[int, ...] = ()
    rows: int = 3
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    kind: str = ""

    def exchanges(self) -> list[tuple[wire.Call, int]]:
        """The calls that it makes, and their widths in float64."""
        if self.kind in ("skip", "eval"):
            return []
        channels = 2 * CHANNELS if self.kind == "wide" else CHANNELS
        flags = INPUT_GRAD | BIAS_GRAD | (0 if self.kind == "frozen" else WEIGHT_GRAD)
        if self.kind == "no_grad":
            return [(wire.Call(FORWARD, self.layer, 0), 2 * channels + 1)]
        forward = wire.Call(FORWARD, self.layer, flags), 2 * channels + 1
        return [forward, (wire.Call(BACKWARD, self.layer, flags), 2 * channels)]

    def values(self) -> int:
        """Values per channel."""
        return self.rows * math.prod(self.spatial)

    def data(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """Input and output gradient, the same whenever asked."""
        generator = torch.Generator().manual_seed(1000 * number + rank)
        channels = {"wide": 2 * CHANNELS, "channels": CHANNELS + 1}.get(self.kind, CHANNELS)
        shape = (self.rows, channels, *self.spatial)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale + rank
        if self.kind == "nan" and x.numel():
            x[0] = float("nan")
        if self.kind == "integer":
            return x.long(), x
        return x.to(self.dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)


class Scenario(NamedTuple):
    """The programs of all ranks; ``way``: how messages travel."""

    programs: list[list[Step]]
    way: str


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    world = draw(st.integers(2, 4))
    length = draw(st.integers(1, 4))
    calls = [
        Step(
            draw(st.sampled_from(LAYERS)), draw(st.sampled_from(SPATIAL)), scale=draw(st.sampled_from([0.1, 1.0, 30.0]))
        )
        for _ in range(length)
    ]
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    programs = [[call._replace(rows=draw(st.integers(1, 5)), dtype=dtype) for call in calls] for _ in range(world)]
    for _ in range(draw(st.integers(0, 2))):
        rank, number = draw(st.integers(0, world - 1)), draw(st.integers(0, length - 1))
        programs[rank][number] = odd_one(draw, programs[rank][number], draw(st.sampled_from(BENIGN + MALIGNANT)))
    return Scenario(programs, draw(st.sampled_from(list(WAYS))))


def odd_one(draw: st.DrawFn, call: Step, kind: str) -> Step:
    """The call as it is on the rank that differs."""
    if kind == "rows":
        return call._replace(rows=draw(st.integers(6, 40)))
    if kind == "dtype":
        return call._replace(dtype=draw(st.sampled_from([torch.float64, torch.bfloat16])))
    if kind == "empty":
        return call._replace(rows=0)
    if kind == "other layer":
        return call._replace(layer=draw(st.sampled_from([name for name in LAYERS if name != call.layer])))
    return call._replace(kind=kind)


class Expected(NamedTuple):
    """How many calls a rank completes, and the error that ends the next ("" for none)."""

    completed: int
    error: str


def expected(scenario: Scenario) -> list[Expected] | None:
    """What must happen on each rank; None where sums cannot show the difference (16 bits that happen to be equal)."""
    programs = scenario.programs
    queues = [
        deque((number, call, exchange) for number, call in enumerate(program) for exchange in call.exchanges())
        for program in programs
    ]
    exchange = 0
    while all(queues):
        heads = [queue[0] for queue in queues]
        refused = [call.kind in REFUSED for _, call, _ in heads]
        if any(refused) or len({(call, width) for _, _, (call, width) in heads}) > 1:
            tags = {wire.tag(call, width, exchange) for _, _, (call, width) in heads}
            if scenario.way not in SEE_EACH_RANK and not any(refused) and len(tags) == 1:
                return None
            errors = ["ValueError" if bad else "RankMismatchError" for bad in refused]
            return [Expected(head[0], error) for head, error in zip(heads, errors, strict=True)]
        if heads[0][2][0].kind == FORWARD and sum(call.values() for _, call, _ in heads) == 1:
            return [Expected(number, "ValueError") for number, _, _ in heads]
        for queue in queues:
            queue.popleft()
        exchange += 1
    return [
        Expected(queue[0][0], "ValueError" if queue[0][1].kind in REFUSED else "PeerLostError")
        if queue
        else Expected(len(program), "")
        for queue, program in zip(queues, programs, strict=True)
    ]


class Seen(NamedTuple):
    """What a rank has seen: output and input gradient of each completed call, the error, and its statistics."""

    results: list[tuple[Tensor, Tensor | None]]
    error: str
    text: str
    statistics: dict[str, Tensor]


def run_rank(rank: int, group: Any, programs: list[list[Step]], connected: threading.Barrier) -> Seen:
    connected.wait(20.0)  # a rank without any exchange would hang up on those that still connect
    layers = {name: syncbn.SyncBatchNorm(CHANNELS, process_group=group, activation=None) for name in LAYERS}
    for name, layer in layers.items():
        layer.layer_name = name
    results: list[tuple[Tensor, Tensor | None]] = []
    error = text = ""
    for number, call in enumerate(programs[rank]):
        try:
            results.append(run_call(layers[call.layer], group, call, *call.data(rank, number)))
        except (RuntimeError, ValueError) as caught:
            error, text = type(caught).__name__, str(caught)
            break
    statistics = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.named_buffers()}
    return Seen(results, error, text, statistics)


def run_call(layer: Any, group: Any, call: Step, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
    if call.kind == "skip":
        return x, None
    if call.kind == "wide":
        layer = syncbn.SyncBatchNorm(2 * CHANNELS, process_group=group)
        layer.layer_name = call.layer
    if call.kind == "eval":
        x = x.float()  # torch's own, which takes no float64 for a float32 layer
    layer.train(call.kind != "eval")
    layer.weight.requires_grad_(call.kind != "frozen")
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    with torch.set_grad_enabled(call.kind != "no_grad"):
        y = layer(x)
    if y.requires_grad:
        y.backward(g)
    return y.detach(), x.grad


def check(scenario: Scenario) -> None:
    awaited = expected(scenario)
    if awaited is None:
        return
    world = len(scenario.programs)
    started = time.monotonic()
    with travel(scenario.way), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch statistics of layer", RuntimeWarning)
        seen = outcomes(world, run_rank, scenario.programs, threading.Barrier(world), timeout=5.0)
    assert time.monotonic() - started < 6.0
    for rank, (one, want) in enumerate(zip(seen, awaited, strict=True)):
        assert isinstance(one, Seen), one
        assert (len(one.results), one.error) == want, f"rank {rank}: {one}"
        if one.error:
            assert any(word in one.text for word in ("layer '", "channels", "convert it first", "more than 1 value"))
    check_numbers(scenario.programs, seen, awaited)


def check_numbers(programs: list[list[Step]], seen: list[Seen], awaited: list[Expected]) -> None:
    """Calls that all ranks have completed alike, against the whole batch; and statistics against each other."""
    norms = {name: nn.BatchNorm1d(CHANNELS, dtype=torch.float64) for name in LAYERS}
    alike = True
    for number in range(min(want.completed for want in awaited)):
        calls = [program[number] for program in programs]
        if any(call.kind in MALIGNANT for call in calls) or len({call.layer for call in calls}) > 1:
            alike = False  # all ranks differ in the same way, or all the others' calls are to come
            break
        data = [call.data(rank, number) for rank, call in enumerate(calls)]
        xs = [rows(x).requires_grad_() for x, _ in data]
        broken = any(call.kind == "nan" and x.numel() for call, (x, _) in zip(calls, data, strict=True))
        norm = norms[calls[0].layer]
        if not any(call.values() for call in calls):
            continue  # no batch at all, and not counted as one
        if broken:  # NaN everywhere, and the statistics stay as they were
            assert all(one.results[number][0].isnan().all() for one in seen)
            norm.get_buffer("num_batches_tracked").add_(1)
            continue
        ys = norm(torch.cat(xs)).split([len(x) for x in xs])
        torch.stack([(y * rows(g)).sum() for y, (_, g) in zip(ys, data, strict=True)]).sum().backward()
        for rank, one in enumerate(seen):
            y, dx = one.results[number]
            rtol, atol = max(TOLERANCE[call.dtype] for call in calls)  # all ranks' statistics are in it
            like = data[rank][0]
            close(y, unrows(ys[rank].detach(), like), rtol, 2 * atol, f"output {number} of rank {rank}")
            assert dx is not None and xs[rank].grad is not None
            size = 1.0 + float(torch.cat([x.grad for x in xs if x.grad is not None]).abs().max())
            close(dx, unrows(xs[rank].grad, like), rtol, 4 * atol * size, f"gradient {number} of rank {rank}")
    if alike and all(not want.error for want in awaited):
        for name, value in seen[0].statistics.items():
            assert all(torch.equal(one.statistics[name], value) for one in seen), name
            layer, key = name.split(".")
            close(value, getattr(norms[layer], key), 1e-5, 1e-5, name)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
@given(scenarios())
def test_fuzz(scenario: Scenario) -> None:
    check(scenario)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, deadline=None, database=None, suppress_health_check=QUIET)
@given(scenarios())
def test_fuzz_at_length(scenario: Scenario) -> None:
    check(scenario)


# ---- ranks that end in the middle

PARTS = 20


def play_threads(first: int, last: int) -> None:
    """In a process of its own: what backends of interrupted groups keep, threads that work too, ends with it."""
    command = f"from programs.ends import play_all; play_all({first}, {last})"
    done = run(sys.executable, "-c", command, deadline=1200.0, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_fuzz_ends_of_threads() -> None:
    play_threads(0, 25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(65))
def test_fuzz_ends_of_threads_at_length(part: int) -> None:
    """6,500 scenarios."""
    first = 10_000 + 100 * part
    play_threads(first, first + 100)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], None]]:
    """Runs the scenario of a seed with ranks that are processes."""
    command = [sys.executable, "-c", "from programs.ends import nursery; nursery()"]
    ways = list(WAYS)
    with running(*command, env=environment(), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"  # busy machines take long to import

        def scenario(seed: int) -> None:
            folder = tmp_path_factory.mktemp("ranks")
            watch = threading.Timer(60.0, os.killpg, (process.pid, signal.SIGKILL))
            watch.start()
            process.stdin.write(json.dumps([seed, ways, str(folder)]) + "\n")
            process.stdin.flush()
            codes = json.loads(process.stdout.readline() or '["a rank hung"]')
            watch.cancel()
            with _named(seed):
                ends.check_processes(ends.scenario(seed, processes=True, ways=ways), codes, folder)

        yield scenario


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(12))
def test_fuzz_ends_of_processes(nursery: Callable[[int], None], seed: int) -> None:
    nursery(seed)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_fuzz_ends_of_processes_at_length(nursery: Callable[[int], None], part: int) -> None:
    """1,400 scenarios."""
    for seed in range(10_000 + part, 11_400, PARTS):
        nursery(seed)


@pytest.mark.slow
@pytest.mark.mpi
@needs_mpi4py
@needs_mpiexec
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_fuzz_interrupts_over_mpi_at_length(ranks: int) -> None:
    """100 scenarios."""
    done = mpiexec(ranks, "ends.py", "mpi", "100", "150", deadline=500.0)
    assert done.returncode == 0 and done.stdout.count("50 scenarios") == ranks, done.stdout


@contextlib.contextmanager
def _named(seed: int) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
