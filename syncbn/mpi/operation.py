"""One operation of the mpi4py backend: MPI requests with buffers, a deadline, and the face of a ``dist.Work``.

An operation is driven by whoever waits for it. One that somebody asked a future of (DDP does), or dropped before it was
done, is driven by one thread of the process: therefore MPI must be initialized with ``MPI_THREAD_MULTIPLE``.

After a missed deadline or an MPI error the group is dead. MPI cannot cancel a collective: the buffers stay alive, and
the exit of the process calls ``MPI_Abort``, since ``MPI_Finalize`` would wait for the pending collective for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from mpi4py import MPI

NO_TIMEOUT = timedelta(0)

# Tests before the processor is offered to others. Where ranks outnumber processors, the peer needs ours: offer at once.
_SPINS = 100 if MPI.COMM_WORLD.Get_size() <= (os.cpu_count() or 1) else 1
_SLEEP_AFTER = 5e-3  # seconds of waiting, after which a wait sleeps between tests: 2 % of the time waited so far
_LONGEST_SLEEP = 1e-3
_DRIVE_INTERVAL = 50e-6  # seconds between the driving thread's tests
_LAST_WORDS = 0.3  # seconds before MPI_Abort: mpiexec drops what it has not forwarded of a rank's output by then

lost: list[str] = []
"""Why groups of this process are dead."""

_graveyard: list[Any] = []  # what MPI may still write to: never freed


class Owner(Protocol):
    """What an operation needs of its group."""

    dead: str | None

    def bury(self, reason: str) -> RuntimeError:
        """Note that the group cannot be used any more; the error to raise."""


class Started(NamedTuple):
    """A request that MPI has begun, what must stay alive, and what brings its result to the caller's tensors."""

    request: Any
    keep: Any
    finish: Callable[[], None] | None = None


class _Unusable(Exception):
    """What has arrived cannot be used."""


class Operation:
    """One or several MPI requests that are waited for together.

    Attributes:
        done: the operation is over, in success or in failure.
        error: what it failed with.
        result: what its future gives.
        source: for a receive, the rank that sent.
    """

    def __init__(self, group: Owner, name: str, started: Sequence[Started], result: Any, timeout: float) -> None:
        self._group = group
        self._name = name
        self._keep = started
        self._lock = threading.RLock()
        self._timeout = timeout
        self._begun = time.monotonic()
        self._future: torch.futures.Future[Any] | None = None
        self.done = False
        self.error: RuntimeError | None = None
        self.result = result
        self.source = -1
        if len(started) == 1:
            self._test = started[0].request.Test
        else:
            self._test = functools.partial(MPI.Request.Testall, [part.request for part in started])

    def expect(self, nbytes: int) -> None:
        """Make this a receive of so many bytes: it notes its source, and fails on a shorter message."""
        request, status = self._keep[0].request, MPI.Status()

        def test() -> bool:
            if not request.Test(status):
                return False
            self.source = status.Get_source()
            if status.Get_count(MPI.BYTE) != nbytes:
                raise _Unusable(
                    f"rank {self.source} sent {status.Get_count(MPI.BYTE)} bytes, and {nbytes} are "
                    "expected here. The tensors of a send and its receive must have equal size and dtype."
                )
            return True

        self._test = test

    def poll(self) -> bool:
        """Whether the operation is over, after one test; never blocks."""
        if self.done or not self._lock.acquire(blocking=False):
            return self.done
        try:
            if not self.done and self._test():
                self._finish()
        except MPI.Exception as error:
            _graveyard.append(self._keep)
            self._end(self._group.bury(f"{self._name} failed, MPI reports: {error}"))
        except _Unusable as error:
            self._end(RuntimeError(f"{self._name}: {error}"))
        finally:
            self._lock.release()
        return self.done

    def wait(self, timeout: float | None = None) -> None:
        """Test until the operation is over; raises its error if it failed.

        Args:
            timeout: seconds from now; None for the deadline that the operation began with.

        An exception that a signal's handler raises meanwhile leaves the group dead: who caught it cannot know whether
        the other ranks saw this one take part. They hear of it when this process ends.
        """
        try:
            for _ in range(_SPINS):
                if self.poll():
                    break
            else:
                self._wait_long(timeout)
        except BaseException as error:
            self._group.bury(f"{self._name} was interrupted by {type(error).__name__}")
            raise
        if self.error is not None:
            raise self.error

    def _wait_long(self, timeout: float | None) -> None:
        entered = now = time.monotonic()
        deadline = self._begun + self._timeout if timeout is None else entered + timeout
        while not self.poll():
            now = time.monotonic()
            if now > deadline or self._group.dead:
                self._expire(now)
            elif now - entered < _SLEEP_AFTER:
                os.sched_yield()
            else:
                time.sleep(min((now - entered) / 50, _LONGEST_SLEEP))

    def check_deadline(self) -> None:
        """Fail, and with it the group, if time is up or the group is dead."""
        now = time.monotonic()
        if now > self._begun + self._timeout or self._group.dead:
            self._expire(now)

    def _expire(self, now: float) -> None:
        with self._lock:
            if self.done:
                return
            _graveyard.append(self._keep)
            late = f"{self._name}: not all ranks took part within {now - self._begun:.1f} s"
            self._end(self._group.bury(self._group.dead or late))

    def _finish(self) -> None:
        for part in self._keep:
            if part.finish is not None:
                try:
                    with torch.inference_mode():  # a caller's inference tensors may be written to from any thread
                        part.finish()
                except RuntimeError as error:
                    raise _Unusable(str(error)) from error
        self._end()

    def _end(self, error: RuntimeError | None = None) -> None:
        self._keep = ()
        self.error = error
        self.done = True
        if self._future is not None:
            self._resolve(self._future)

    def _resolve(self, future: torch.futures.Future[Any]) -> None:
        if self.error is None:
            future.set_result(self.result)
        else:
            future.set_exception(self.error)

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the result. Waiting for it makes no MPI call, so the driving thread takes the operation over."""
        with self._lock:
            if self._future is None:
                self._future = torch.futures.Future()
                if self.done:
                    self._resolve(self._future)
                else:
                    drive(self)
            return self._future


class Work(dist.Work):
    """The face of an operation in torch.distributed."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self._operation = operation

    def __del__(self) -> None:
        if not self._operation.done:  # nobody can wait any more, and MPI still uses the buffers
            drive(self._operation)

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        """Wait until the operation is over; True, or its error is raised."""
        self._operation.wait(timeout.total_seconds() if timeout > NO_TIMEOUT else None)
        return True

    def synchronize(self) -> None:
        """The same as ``wait``: CPU tensors have no streams."""
        self._operation.wait()

    def is_completed(self) -> bool:
        """Whether the operation is over, in success or in failure."""
        return self._operation.poll()

    def is_success(self) -> bool:
        """Whether it is over and did not fail."""
        return self._operation.done and self._operation.error is None

    def exception(self) -> RuntimeError | None:
        """What it failed with."""
        return self._operation.error

    def result(self) -> Any:
        """The output tensors."""
        return self._operation.result

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the output tensors."""
        return self._operation.get_future()

    def source_rank(self) -> int:
        """For a receive that is over: the rank, in the group, that sent."""
        return self._operation.source

    _source_rank = source_rank


_driven: list[Operation] = []
_wake = threading.Condition()
_driver: threading.Thread | None = None
_exiting = False


def drive(operation: Operation) -> None:
    """Have the driving thread test an operation until it is over."""
    global _driver
    with _wake:
        _driven.append(operation)
        if _driver is None and not _exiting:
            _driver = threading.Thread(target=_run_driver, name="syncbn-mpi", daemon=True)
            _driver.start()
        _wake.notify()


def _run_driver() -> None:
    while True:
        with _wake:
            while not _driven and not _exiting:
                _wake.wait()
            if _exiting:
                return
            operations = list(_driven)
        for operation in operations:
            if not operation.poll():
                operation.check_deadline()
            if operation.done:
                _driven.remove(operation)
        time.sleep(_DRIVE_INTERVAL)


@atexit.register
def _at_exit() -> None:
    """Leave MPI_Finalize nothing to wait for: it comes after this."""
    global _exiting
    with _wake:
        _exiting = True
        _wake.notify()
    if _driver is not None:
        _driver.join()
    for operation in list(_driven):
        with contextlib.suppress(RuntimeError):
            operation.wait()
    if lost:
        print(f"syncbn.mpi: this exit ends all ranks (MPI_Abort), because {lost[0]}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LAST_WORDS)
        MPI.COMM_WORLD.Abort(1)
