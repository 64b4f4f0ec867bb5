"""Batches in rounds: in each round every rank takes one, or says that it has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from syncbn import _torch
from syncbn.comm import Link
from syncbn.together import telling
from syncbn.wire import Call


@dataclass(frozen=True, slots=True)
class Round:
    """What one rank has in a round, and what all have.

    Attributes:
        batch: this rank's; None if it has none.
        done: whether it has none: its loader has run out.
        count: how many samples it has.
        total: how many samples all ranks have.
        takers: how many ranks have a batch.
    """

    batch: Any
    done: bool
    count: int
    total: int
    takers: int


def rounds(
    counted: Iterable[tuple[Any, int]], link: Link, device: torch.device, call: Call, what: str
) -> Iterator[Round]:
    """Take a batch a round, on all ranks of ``link``, until no rank has one.

    A rank whose iterable raises tells the others, which raise as well. Whoever leaves the rounds earlier must leave
    them on all ranks alike: ``takers < link.size`` says that some rank has run out.

    Args:
        counted: this rank's batches, each with its number of samples.
        link: of the ranks that take part.
        device: for the messages.
        call: what ranks that disagree are told, as in ``Link.share``.
        what: the iterable, for the others' message: "its loader".

    Raises:
        RankMismatchError: the iterable of another rank raised, or another rank is in another call.
        PeerLostError: a rank did not take part.
        Exception: whatever the iterable raises, on this rank.

    Collectives:
        One exchange of 2 float64 a round, read on the host, and one at the end.
    """
    batches: Iterator[tuple[Any, int]] | None = None
    while True:
        with telling(link, call, 2, what):
            batches = iter(counted) if batches is None else batches
            taken = next(batches, None)
        done = taken is None
        batch, count = taken or (None, 0)
        total, takers = share_numbers([count, not done], link, device, call)
        if takers == 0:
            return
        yield Round(batch, done, count, total, takers)


def share_numbers(numbers: list[int], link: Link, device: torch.device, call: Call) -> list[int]:
    """The sum of a list of integers over all ranks, on the host."""
    if link.size == 1:  # no need to wait for a device
        return [int(number) for number in numbers]
    with _torch.outside_modes():
        total = link.sum(torch.tensor(numbers, dtype=torch.float64, device=device), call)
        shared = [int(number) for number in total.tolist()]
    link.settle()
    return shared
