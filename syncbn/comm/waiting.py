"""Wait for a backend so that signals are heard: Ctrl-C, or a handler that raises."""

from __future__ import annotations

import atexit
import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any

_idle: list[_Waiter] = []
_left: list[_Waiter] = []
_lock = threading.Lock()


def interruptible(wait: Callable[[], None]) -> None:
    """Call ``wait``, which blocks outside of Python, so that a signal's handler runs meanwhile, and may raise.

    Python runs handlers in the main thread, between its own instructions: there the call is left to another thread. If
    a handler raises, that thread stays behind until the backend returns, and the exchange must not be used any more.
    The program ends after it: to end the interpreter around a thread within a backend aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():
        wait()
        return
    with _lock:
        waiter = _idle.pop() if _idle else _Waiter()
    try:
        error = waiter.run(wait)
    except BaseException:
        _left.append(waiter)
        raise
    with _lock:
        _idle.append(waiter)
    if error is not None:
        raise error


def is_of_backend(error: BaseException, backend: Any) -> bool:
    """Whether a call of a backend failed, and not the handler of a signal that came meanwhile.

    Handlers raise what they like, a RuntimeError for instance. The innermost frame tells them apart: a backend in C++
    has none of its own, and one in Python has those of its package.
    """
    if not isinstance(error, RuntimeError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    package = str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("syncbn", "torch", type(backend).__module__.partition(".")[0])


def bury(*objects: Any) -> None:
    """Never free these, not even when the program ends: buffers that a lost peer may still write to, and backends in
    which a thread may still wait.
    """
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


class _Waiter:
    """A thread that makes one call at a time for another."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="syncbn waiter", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], None]) -> BaseException | None:
        """Make the call; what it raised."""
        self._calls.put(call)
        return self._results.get()

    def finish(self) -> None:
        """Wait for the call that is under way, if there is one, and end."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:
                self._results.put(error)
            else:
                self._results.put(None)


@atexit.register
def _finish() -> None:
    for waiter in _left:
        waiter.finish()
