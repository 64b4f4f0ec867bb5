"""After a lost exchange: who is to blame, from what the ranks that are left tell each other through the group's store.

A rank that loses an exchange leaves a note there: the ranks that are gone for sure, those whose connection broke, and
those that did not come. Who left a note is not to blame: it hung up, or did not come, because it lost somebody itself,
in this exchange or the one before. So notes are followed: one names a rank, whose note names another.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

SECONDS = 0.7
"""How long a rank takes at most, after a failure, to find out whose fault it is."""

PATIENCE = 0.4
"""How long it waits for notes that may be written yet, also of a rank that broke a connection just now."""


class Note(NamedTuple):
    """What a rank knows of the ranks that it misses.

    Attributes:
        gone: ranks that are not there any more, for sure.
        broken: ranks to which the connection broke: they are gone, or lost somebody and hung up.
        absent: ranks that have not come, over connections that are whole.
    """

    gone: Sequence[int] = ()
    broken: Sequence[int] = ()
    absent: Sequence[int] = ()


def culprits(group: Any, mine: Note, patience: float = PATIENCE) -> list[int]:
    """The ranks to blame for the end of an exchange, as far as can be known; leaves this rank's note.

    Args:
        group: of the exchange.
        mine: what this rank knows.
        patience: seconds to wait for the notes of those whose fault it may not be.

    Best effort, within ``SECONDS``, in a thread of its own: the store may have died with a rank. Then, and where no
    notes tell more, those of whom this rank knows itself.
    """
    found: list[list[int]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            store = group.get_group_store()
            store.set(_key(group.rank()), json.dumps(mine))
            found.append(_read(store, group.rank(), mine, patience))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return found[0] if found else list(mine.gone or mine.broken or mine.absent)


def _read(store: Any, me: int, mine: Note, patience: float) -> list[int]:
    """Whom this rank's note and those of the ranks that it misses make responsible."""
    if mine.gone:
        return list(mine.gone)
    notes: dict[int, Note] = {}
    started = time.monotonic()
    while True:
        for rank in _missed(mine, *notes.values()) - {me, *notes}:
            if store.check([_key(rank)]):
                notes[rank] = Note(*json.loads(store.get(_key(rank))))
        here = {me, *notes}
        told = sorted({rank for note in notes.values() for rank in note.gone} - here)
        if told:
            return told
        if time.monotonic() > started + patience:
            break
        time.sleep(0.02)
    for missed in (mine.broken, mine.absent, sorted(_missed(*notes.values()))):
        silent = [rank for rank in missed if rank not in here]
        if silent:
            return silent
    # All have said something. Who came late found that the others had hung up, and names nobody who did not come.
    return [rank for rank in mine.absent if not notes[rank].absent]


def _missed(*notes: Note) -> set[int]:
    """Who may have left a note as well, or is to blame."""
    return {rank for note in notes for rank in (*note.broken, *note.absent)}


def _key(rank: int) -> str:
    return f"syncbn/lost/{rank}"
