"""After a lost exchange: which ranks are left, told through the group's store."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_SECONDS = 0.5  # that a rank waits, after a failure, to hear which others are left


def lost_ranks(
    group: Any, number: int, among: Sequence[int], is_broken: Callable[[int], bool] = lambda rank: False
) -> list[int]:
    """Those ``among`` the ranks that are to blame for the end of an exchange, as far as can be known.

    Args:
        group: of the exchange; or None, if it is gone.
        number: of the exchange.
        among: ranks that may not have come.
        is_broken: whether the connection to a rank is known to be broken.
    """
    silent = silent_ranks(group, number, among)
    # Of several, some may only wait for this rank, or be late: their connections are whole.
    return silent if len(silent) < 2 else [rank for rank in silent if is_broken(rank)] or silent


def silent_ranks(group: Any, number: int, among: Sequence[int]) -> list[int]:
    """Those ``among`` the ranks that do not say that they failed in the same exchange as this rank, which says so here.

    Best effort, within ``_SECONDS``, in a thread of its own: the store may have died with a rank.
    """
    silent: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            store = group.get_group_store()
            store.set(f"syncbn/failed/{number}/{group.rank()}", "1")
            deadline = time.monotonic() + 0.8 * _SECONDS
            missing = list(among)
            while missing and time.monotonic() < deadline:
                time.sleep(0.02)
                missing = [r for r in missing if not store.check([f"syncbn/failed/{number}/{r}"])]
            silent.extend(missing)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return list(silent)
