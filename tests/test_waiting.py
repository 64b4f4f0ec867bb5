"""Threads that wait for a backend: what is left of one whose caller was interrupted, at whatever moment."""

from __future__ import annotations

import threading
import time

import pytest

from syncbn.comm.waiting import _Waiter, is_of_backend


@pytest.mark.parametrize("moment", ["before the call", "within it", "after it", "after its result"])
def test_a_waiter_can_always_be_finished(moment: str) -> None:
    """The program's end waits for it: it must neither wait for a call that never came nor leave one alone."""
    waiter, done = _Waiter(), threading.Event()

    def call() -> None:
        time.sleep(0.2)
        done.set()

    if moment == "after its result":
        waiter.run(call)
    elif moment != "before the call":
        waiter._calls.put(call)
    if moment == "after it":
        done.wait(5.0)
    finishing = threading.Thread(target=waiter.finish, daemon=True)
    finishing.start()
    finishing.join(5.0)
    assert not finishing.is_alive()
    assert done.is_set() == (moment != "before the call")


def handler() -> None:
    raise RuntimeError("a handler of the user's")


def test_errors_of_handlers_are_not_taken_for_a_backend() -> None:
    with pytest.raises(RuntimeError) as caught:
        handler()
    assert not is_of_backend(caught.value, threading.current_thread())
    assert not is_of_backend(KeyboardInterrupt(), None)
