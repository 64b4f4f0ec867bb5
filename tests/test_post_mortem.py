"""Who is to blame for a lost exchange, from the notes that ranks leave each other."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

import syncbn
from helpers.links import link_of, travel
from helpers.ranks import outcomes
from syncbn.comm.post_mortem import Note, culprits
from syncbn.steps import vote


class Group:
    """One rank's group, with the store that all share."""

    def __init__(self, rank: int, store: dist.Store) -> None:
        self._rank, self._store = rank, store

    def rank(self) -> int:
        return self._rank

    def get_group_store(self) -> dist.Store:
        return self._store


CASES: dict[str, tuple[dict[int, Note], dict[int, list[int]]]] = {
    "known for sure": ({0: Note(gone=[2]), 1: Note(gone=[2])}, {0: [2], 1: [2]}),
    "known to one, who hung up": ({0: Note(broken=[1]), 1: Note(gone=[2])}, {0: [2]}),
    "broken by a rank without a note": ({0: Note(broken=[1, 2]), 1: Note(broken=[2])}, {0: [2], 1: [2]}),
    "did not come": ({0: Note(absent=[1, 2]), 1: Note(absent=[2])}, {0: [2], 1: [2]}),
    "broken before absent": ({0: Note(broken=[3], absent=[1])}, {0: [3]}),
    "hosts of two, one lost its neighbour": (
        {0: Note(absent=[1]), 1: Note(absent=[2, 3]), 2: Note(gone=[3])},
        {0: [3], 1: [3]},
    ),
    "a chain": (
        {0: Note(absent=[1]), 1: Note(broken=[2]), 2: Note(absent=[3]), 3: Note(broken=[4])},
        {0: [4], 1: [4], 2: [4]},
    ),
    "came late, and found that the other had hung up": ({0: Note(absent=[1]), 1: Note(broken=[0])}, {0: [1], 1: []}),
    "waited for each other": ({0: Note(absent=[1]), 1: Note(absent=[0])}, {0: []}),
}


@pytest.mark.parametrize("case", CASES)
def test_notes_are_followed_to_who_left_none(case: str) -> None:
    notes, expected = CASES[case]
    store = dist.HashStore()
    for rank, note in notes.items():
        culprits(Group(rank, store), note, 0.0)
    assert {rank: culprits(Group(rank, store), notes[rank], 0.05) for rank in expected} == expected


def test_a_note_may_come_late() -> None:
    store = dist.HashStore()
    late = threading.Timer(0.2, culprits, (Group(1, store), Note(gone=[2])))
    late.start()
    assert culprits(Group(0, store), Note(broken=[1])) == [2]
    late.join()


def test_a_store_that_does_not_answer_costs_a_second() -> None:
    class Silent(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            time.sleep(2.0)

    started = time.monotonic()
    assert culprits(Group(0, Silent()), Note(broken=[1], absent=[2])) == [1]
    assert time.monotonic() - started < 1.5


class Interrupted(BaseException):
    """What nobody but a test raises."""


def test_a_rank_that_did_its_part_and_left_is_not_to_blame() -> None:
    together, done = threading.Barrier(3), threading.Event()

    def interrupt(*_: Any) -> None:
        done.wait(5.0)
        raise Interrupted

    def body(rank: int, group: Any) -> bool:
        vote(True, process_group=group)
        if rank == 1:  # after its frame went to rank 0 by socket, before it goes to rank 2 over gloo
            link_of(group)._carrier._start = interrupt  # type: ignore[attr-defined]
        together.wait()
        answer = vote(True, process_group=group)
        done.set()
        return answer

    with travel("mixed"):
        completed, interrupted, waited = outcomes(3, body, timeout=1.0)
    assert completed is True
    assert isinstance(interrupted, Interrupted)
    assert isinstance(waited, syncbn.PeerLostError)
    assert "Not arrived: rank 1." in str(waited)


@pytest.mark.parametrize("way", ["sockets", "mixed", "two levels"])
def test_an_interrupt_in_the_last_round_of_the_first_exchange_is_told_over_its_connections(way: str) -> None:
    """To a peer that has completed that round, and uses the connection already."""
    rounds = {"sockets": 4, "mixed": 4, "two levels": 6}[way]

    def body(rank: int, group: Any) -> bool:
        carrier = link_of(group)._carrier  # type: ignore[attr-defined]
        tell, left = carrier._tell, [rounds]

        def interrupted(record: bytes) -> list[bytes]:
            records = tell(record)
            left[0] -= 1
            if left[0] == 0 and rank == 0:
                raise Interrupted
            return records

        carrier._tell = interrupted
        return vote(True, process_group=group)

    with travel(way):
        interrupted, *others = outcomes(4, body, timeout=2.0)
    assert isinstance(interrupted, Interrupted)
    for other in others:
        assert isinstance(other, syncbn.PeerLostError)
        assert "Not arrived: rank 0." in str(other)
    neighbours = {"sockets": [1, 2, 3], "mixed": [1], "two levels": [2]}[way]
    for rank in neighbours:
        assert "rank 0: it was interrupted by Interrupted" in str(others[rank - 1])
