"""Random programs of all ranks, one of which ends in the middle: interrupted at any line, dropped, killed, stopped.

The other ranks complete calls, with the right numbers, or raise an error that names that rank and no other. Ranks are
threads (``play``), or forked processes (``python -m programs.ends``, which reads one scenario a line), for ends that
only a process can have; or ranks of MPI (``mpiexec ... programs/ends.py mpi``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers.links import WAYS, travel
from helpers.oracle import close, whole_batch
from helpers.ranks import make_group, outcomes
from syncbn import uneven, wire
from syncbn.steps import vote

PACKAGE = str(Path(syncbn.__file__).parent)
WIDTHS = [1, 3, 17, 300, 600, wire.FRAME // 2 - 1, wire.FRAME // 2, 20_000]
KINDS = ["layer", "layer", "layer", "forward", "vote", "moments", "joined", "population"]
DOUBLE = torch.float64


class Interrupt(BaseException):
    """What nobody but a test raises."""


RAISED: dict[str, type[BaseException]] = {
    error.__name__: error
    for error in (
        KeyboardInterrupt,
        SystemExit,
        Interrupt,
        TimeoutError,
        ValueError,
        RuntimeError,
        ConnectionResetError,
    )
}
DEATHS = ["kill", "exit", "leave", "raise", "abort"]  # of a process; "stop" wakes up again
WITHIN = 0.2  # seconds in which ranks hear of a death over a socket


class Call(NamedTuple):
    """One call that all ranks make; ``rows``: of each rank's batch (of each of its batches)."""

    kind: str
    width: int
    rows: Sequence[int]

    def data(self, rank: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * number + rank)
        return torch.randn(self.rows[rank], self.width, generator=generator, dtype=DOUBLE) + rank


class Scenario(NamedTuple):
    """
    Attributes:
        end: a key of ``RAISED``, an entry of ``DEATHS``, "stop", "drop", or "" for none.
        where: in which lines: those of ``syncbn.comm``, or of the whole package.
        moment: how many of them the rank that ends runs before that; or, if negative, how many microseconds, after
            which a signal comes.
        warm: whether all have made an exchange before.
        waits: whether ranks that are done wait for the others, and do not drop their group.
    """

    world: int
    way: str
    calls: list[Call]
    rank: int
    end: str
    where: str
    moment: int
    warm: bool
    waits: bool
    timeout: float


def scenario(seed: int, processes: bool = False, ways: Sequence[str] = tuple(WAYS)) -> Scenario:
    draw = random.Random(seed)
    world = draw.randint(2, 4)
    calls = [
        Call(
            draw.choice(KINDS),
            draw.choice(WIDTHS[:-1] if draw.random() < 0.9 else WIDTHS),
            [draw.randint(1, 4)] * world,
        )
        for _ in range(draw.randint(1, 4))
    ]
    calls = [
        call._replace(rows=[draw.randint(1 + (call.kind == "population"), 4) for _ in range(world)]) for call in calls
    ]
    way = draw.choice(list(ways))
    ends = [*RAISED, *DEATHS, "stop"] if processes else [*RAISED, "drop"]
    end = draw.choice(ends) if draw.random() < 0.97 else ""
    # The first exchange, in which connections are made, is some 400 lines; the others have 50 to 100 of each kind.
    warm = draw.random() < 0.75
    where = draw.choice(["comm", "comm", ""])
    moment = round(math.exp(draw.uniform(0, math.log(1000))))
    if draw.random() < 0.7:
        moment = draw.randint(1, (60 if where else 200) * len(calls) + (0 if warm else 400))
    if processes and draw.random() < 0.5 and end in RAISED:
        moment = -round(math.exp(draw.uniform(math.log(50), math.log(100_000))))
    fast = way == "sockets" and warm and end != "stop"
    return Scenario(
        world, way, calls, draw.randrange(world), end, where, moment, warm, draw.random() < 0.5, 10.0 if fast else 2.0
    )


# ---- one rank


class Outcome(NamedTuple):
    """What a rank has seen.

    Attributes:
        results: of the calls that it completed.
        error, text: that ended the next; "" for none.
        entered, left: when that call began and ended, on the clock of ``time.monotonic``.
        again: the error of a further call.
        fired: where its end came, "" if it did not; whether that was while a message travelled.
        moment: when it came.
    """

    results: list[list[Tensor]]
    error: str
    text: str
    entered: float
    left: float
    again: str = ""
    fired: str = ""
    travelling: bool = False
    moment: float = 0.0


def run_rank(rank: int, group: Any, plan: Scenario, meet: Callable[[], None], end: Callable[[], None]) -> Outcome:
    """Make the calls until one raises.

    Args:
        meet: waits for all ranks.
        end: what happens at the planned moment, on the rank that ends.
    """
    if plan.warm:
        vote(True, process_group=group)
    meet()
    results: list[list[Tensor]] = []
    error = text = again = ""
    entered = time.monotonic()
    trap = Trap(plan, end) if rank == plan.rank and plan.end else None
    raised: BaseException | None = None
    try:
        if trap is not None:
            trap.arm()
        for number, call in enumerate(plan.calls):
            entered = time.monotonic()
            results.append(run_call(call, number, rank, group))
    except BaseException as caught:
        raised = caught
    finally:
        if trap is not None:
            trap.disarm()
    left = time.monotonic()
    if raised is not None:
        error, text = type(raised).__name__, str(raised)
        raised.__traceback__ = None  # it holds the group
        travelling = trap is not None and trap.travelling
        if error == "PeerLostError" or travelling:
            again = _again(group)
    fired = trap.fired if trap is not None else ""
    return Outcome(
        results, error, text, entered, left, again, fired,
        trap is not None and trap.travelling, trap.moment if trap is not None else 0.0,
    )  # fmt: skip


def _again(group: Any) -> str:
    """What a further call on a dead group says."""
    started = time.monotonic()
    try:
        vote(True, process_group=group)
    except syncbn.PeerLostError as error:
        return "" if time.monotonic() - started < 0.5 else f"after {time.monotonic() - started:.1f} s: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def run_call(call: Call, number: int, rank: int, group: Any) -> list[Tensor]:
    x = call.data(rank, number)
    if call.kind == "vote":
        return [torch.tensor(vote(rank % 2 == 0 or call.width > 20, "planned", process_group=group))]
    if call.kind == "moments":
        return list(syncbn.functional.global_moments(x, process_group=group))
    layer = syncbn.SyncBatchNorm(call.width, momentum=1.0, process_group=group, dtype=DOUBLE)
    layer.layer_name = f"bn{number}"
    if call.kind == "joined":
        seen = []
        for step in uneven.joined([x] * call.rows[rank], process_group=group):
            layer(step.data)
            seen.append(float(step.total))
        return [torch.tensor(seen, dtype=DOUBLE), layer.get_buffer("running_mean")]
    if call.kind == "population":
        model = nn.Sequential(layer)
        syncbn.update_population_stats(model, [x] * (1 + rank % 2), process_group=group)
        return [layer.get_buffer("running_mean"), layer.get_buffer("running_var")]
    if call.kind == "forward":
        with torch.no_grad():
            return [layer(x), layer.running_mean]
    x.requires_grad_()
    y = layer(x)
    y.backward(x.detach().cos())
    assert x.grad is not None
    return [y.detach(), x.grad, layer.running_mean]


class Trap:
    """Runs ``end`` after so many lines of the package, or when an alarm rings.

    Attributes:
        fired: the file and line at which it did.
        travelling: whether that was in an exchange.
        moment: on the clock of ``time.monotonic``.
    """

    def __init__(self, plan: Scenario, end: Callable[[], None]) -> None:
        self._left, self._end = plan.moment, end
        self._folder = os.path.join(PACKAGE, plan.where)
        self.fired, self.travelling, self.moment = "", False, 0.0

    def arm(self) -> None:
        if self._left > 0:
            sys.settrace(self._enter)
            return
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, -self._left / 1e6)

    def disarm(self) -> None:
        sys.settrace(None)
        if self._left <= 0 and not self.fired:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _ring(self, _: int, frame: FrameType | None) -> None:
        self._fire(frame)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._step if frame.f_code.co_filename.startswith(self._folder) else None

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self._left -= 1
            if self._left == 0:
                sys.settrace(None)
                self._fire(frame)
        return self._step

    def _fire(self, frame: FrameType | None) -> None:
        self.moment = time.monotonic()
        self.fired = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if name in ("swap", "_reduce") and file.startswith(PACKAGE):
                self.travelling = True
            if name == "__del__":
                self.fired = ""  # Python ignores what is raised there
                return
            frame = frame.f_back
        self._end()


def warm_up() -> None:
    """Import what the first backward of a process imports, which takes seconds."""
    import torch.fx.experimental.symbolic_shapes  # noqa: F401


def throw(name: str) -> None:
    raise RAISED[name]("planned")


# ---- what must come of it


def check(plan: Scenario, seen: Sequence[Outcome | None]) -> None:
    """Compare; the outcome of a rank that died is None."""
    ended = seen[plan.rank]
    dead = ended is None
    happened = dead or ended.fired != ""
    for rank, one in enumerate(seen):
        if one is None:
            assert rank == plan.rank, f"rank {rank} died"
            continue
        for number, result in enumerate(one.results):
            check_result(plan.calls[number], number, rank, result)
        if rank == plan.rank and happened:
            check_ended(plan, one)
        elif one.error or len(one.results) < len(plan.calls):
            assert happened, f"rank {rank}: {one.error}: {one.text}"
            check_peer(plan, rank, one)
    for number in range(min(len(one.results) for one in seen if one is not None)):
        check_alike(plan.calls[number], [one.results[number] for one in seen if one is not None])


def check_ended(plan: Scenario, one: Outcome) -> None:
    if plan.end == "stop":
        assert one.error in ("", "PeerLostError"), f"{one.error}: {one.text}"
    else:
        assert one.error == ("Interrupt" if plan.end == "drop" else plan.end), f"{one.error}: {one.text} at {one.fired}"
        assert "planned" in one.text
    assert not one.again, f"{one.again}, after {one.error} at {one.fired}"


def check_peer(plan: Scenario, rank: int, one: Outcome) -> None:
    if one.error == "PeerLostError":
        assert f"Not arrived: rank {plan.rank}." in one.text, f"rank {rank}: {one.text}"
    else:
        assert one.error == "RankMismatchError", f"rank {rank}: {one.error}: {one.text}"
        assert f"rank {plan.rank} could not make the call" in one.text, f"rank {rank}: {one.text}"
    assert not one.again or one.error == "RankMismatchError", f"rank {rank}: {one.again}"
    took = one.left - one.entered
    assert took < (plan.timeout if plan.timeout < 5.0 else 0.0) + 3.5, f"rank {rank}: after {took} s {one.text}"


@functools.lru_cache(maxsize=64)
def _whole(kind: str, width: int, rows: tuple[int, ...], number: int) -> Any:
    call = Call(kind, width, rows)
    xs = [call.data(rank, number) for rank in range(len(rows))]
    if kind == "population":
        return torch.cat([x for rank, x in enumerate(xs) for _ in range(1 + rank % 2)])
    return torch.cat(xs) if kind in ("moments", "joined") else whole_batch(xs, [x.cos() for x in xs], momentum=1.0)


def check_result(call: Call, number: int, rank: int, result: list[Tensor]) -> None:
    what = f"{call.kind} {number} of rank {rank}"
    if call.kind == "vote":
        assert bool(result[0]) == (call.width > 20), what
        return
    whole = _whole(call.kind, call.width, tuple(call.rows), number)
    if call.kind == "moments":
        expected = [torch.tensor(float(len(whole)), dtype=DOUBLE), whole.mean(0), whole.var(0, correction=0)]
    elif call.kind == "population":
        expected = [whole.mean(0), whole.var(0)]
    elif call.kind == "joined":
        totals = [sum(rows for rows in call.rows if rows > step) for step in range(max(call.rows))]
        xs = [call.data(other, number) for other in range(len(call.rows))]
        last = torch.cat([x for x in xs if len(x) == max(call.rows)])
        expected = [torch.tensor(totals, dtype=DOUBLE), last.mean(0)]
    elif call.kind == "forward":
        expected = [whole.y[rank], whole.running_mean]
    else:
        expected = [whole.y[rank], whole.dx[rank], whole.running_mean]
    for one, other in zip(result, expected, strict=True):
        close(one, other, 1e-9, 1e-9, what)


def check_alike(call: Call, results: Sequence[list[Tensor]]) -> None:
    """What all ranks have to get in equal bits."""
    if call.kind != "vote":
        assert all(torch.equal(one[-1], results[0][-1]) for one in results), call.kind


# ---- ranks as threads


def play(plan: Scenario) -> list[Outcome]:
    """Run a scenario, and check it."""
    warm_up()
    together, done = threading.Barrier(plan.world), threading.Event()
    left = [plan.world]

    def body(rank: int, group: Any) -> Outcome:
        end = functools.partial(throw, "Interrupt" if plan.end == "drop" else plan.end)
        outcome = run_rank(rank, group, plan, lambda: (together.wait(20.0), None)[1], end)
        left[0] -= 1
        if left[0] <= 0:
            done.set()
        if plan.waits and rank != plan.rank:
            done.wait(20.0)
        return outcome

    with travel(plan.way), warnings.catch_warnings():
        seen = outcomes(plan.world, body, timeout=plan.timeout)
    for one in seen:
        if isinstance(one, BaseException):
            raise one
    check(plan, seen)
    return seen


def play_all(first: int, last: int) -> None:
    """The scenarios of these seeds. Groups that were interrupted keep their descriptors, so not too many at a time."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    torch.set_num_threads(1)
    for seed in range(first, last):
        try:
            play(scenario(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


# ---- ranks as processes


def die(plan: Scenario, folder: Path) -> None:
    if plan.end in RAISED:
        throw(plan.end)
    (folder / "died").write_text(repr(time.monotonic()))
    if plan.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.end == "abort":
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()
    if plan.end == "exit":
        os._exit(3)
    if plan.end == "stop":
        waker = os.fork()
        if waker == 0:
            time.sleep(plan.timeout + 1.5)  # others have found out by then
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(waker, 0)
        return
    raise _End(plan.end)


class _End(BaseException):
    """Leave the program: by ``sys.exit``, or with an exception."""


def process_main(rank: int, plan: Scenario, folder: Path) -> None:
    """A rank of its own; leaves by itself, except for the end "leave" or "raise", which are the interpreter's."""
    torch.set_num_threads(1)
    threading.current_thread().name = f"rank {rank}"
    store = dist.FileStore(str(folder / "store"), plan.world)

    def meet(name: str = "here") -> None:
        store.set(f"{name}/{rank}", "")
        store.wait([f"{name}/{other}" for other in range(plan.world)])

    try:
        with travel(plan.way):
            group = make_group(store, rank, plan.world, plan.timeout)
            outcome = run_rank(rank, group, plan, meet, functools.partial(die, plan, folder))
    except _End as end:
        sys.exit(0) if end.args == ("leave",) else None
        raise ValueError("planned") from None
    if outcome.error == "_End":
        if outcome.text == "leave":
            sys.exit(0)
        raise ValueError("planned")
    (folder / f"{rank}.part").write_bytes(pickle.dumps(outcome))
    (folder / f"{rank}.part").rename(folder / f"{rank}.outcome")
    if plan.waits and rank != plan.rank:
        end = time.monotonic() + 10.0
        others = [folder / f"{other}.outcome" for other in range(plan.world) if other != plan.rank]
        while not all(path.exists() for path in others) and time.monotonic() < end:
            time.sleep(0.01)
    os._exit(0)


def check_processes(plan: Scenario, codes: Sequence[int], folder: Path) -> float | None:
    """Check what the ranks left behind; the longest that one took to hear of a death over a socket."""
    paths = [folder / f"{rank}.outcome" for rank in range(plan.world)]
    seen = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    for rank, (one, code) in enumerate(zip(seen, codes, strict=True)):
        assert one is not None or (rank == plan.rank and plan.end in DEATHS), f"rank {rank}: {code}"
        assert one is None or code == 0, f"rank {rank}: {code}"
    check(plan, seen)
    if not (folder / "died").exists() or seen[plan.rank] is not None or plan.way != "sockets":
        return None
    died = float((folder / "died").read_text())
    lost = [one for one in seen if one is not None and one.error]
    return max((one.left - max(died, one.entered) for one in lost), default=None)


def nursery() -> None:
    """Fork the ranks of one scenario after the other: each line of the input is a seed, the ways, and a folder.

    Prints a line when it is ready, and the exit codes after each scenario.
    """
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        seed, ways, folder = json.loads(line)
        plan = scenario(seed, processes=True, ways=ways)
        children = []
        for rank in range(plan.world):
            child = os.fork()
            if child == 0:
                sys.stdin.close()
                process_main(rank, plan, Path(folder))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


# ---- ranks of MPI


def over_mpi(seeds: Sequence[int]) -> None:
    """One scenario after the other, each on a group of its own, interrupted and never ended."""
    import syncbn.mpi  # noqa: F401

    warm_up()
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", init_method="mpi://")
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(timeout=timedelta(seconds=3.0)) for _ in seeds]
    store: Any = dist.distributed_c10d._get_default_store()
    for seed, group in zip(seeds, groups, strict=True):
        plan = scenario(seed, ways=["all-reduce"])
        plan = plan._replace(world=world, rank=plan.rank % world, timeout=3.0)
        plan = plan._replace(calls=[call._replace(rows=([*call.rows] * world)[:world]) for call in plan.calls])

        def meet(name: str = f"{seed}") -> None:
            store.set(f"{name}/{rank}", "")
            store.wait([f"{name}/{other}" for other in range(world)])

        meet(f"before {seed}")  # rank 0 has checked the last one by then
        outcome = run_rank(
            rank, group, plan, meet, functools.partial(throw, "Interrupt" if plan.end == "drop" else plan.end)
        )
        store.set(f"outcome {seed}/{rank}", pickle.dumps(outcome))
        meet(f"over {seed}")
        if rank == 0:
            check_over_mpi(plan, [pickle.loads(store.get(f"outcome {seed}/{other}")) for other in range(world)])
    print(f"rank {rank}: {len(seeds)} scenarios", flush=True)
    sys.stdout.flush()
    time.sleep(0.5)
    os._exit(0)


def check_over_mpi(plan: Scenario, seen: list[Outcome]) -> None:
    """As everywhere, but that a sum does not show who came: a rank that came later than others may be named as well."""

    def named(text: str) -> str:
        ranks = re.search(r"Not arrived: rank ([0-9, ]+)\.", text)
        return f"Not arrived: rank {plan.rank}." if ranks is None or str(plan.rank) in ranks[1] else text

    check(plan, [one._replace(text=f"{one.text} {named(one.text)}") for one in seen])


if __name__ == "__main__":
    if sys.argv[1:2] == ["mpi"]:
        over_mpi(range(int(sys.argv[2]), int(sys.argv[3])))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            nursery()
