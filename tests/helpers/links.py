"""What the tests know of links: the ways a message travels, links that act a device, and what passes over them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn import comm
from syncbn.comm import Link, handshake
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.comm.handshake import SWITCH, Host
from syncbn.messages import Message, Shared, fill
from syncbn.wire import Call

# For each way, what must stand in the module that chooses links so that messages over gloo take it.
WAYS: dict[str, dict[str, Any]] = {
    "sockets": {},
    "one hop": {},
    "mixed": {},
    "two levels": {"ONE_HOP_LIMIT": 2},
    "all-reduce": {"LEVELS_LIMIT": 0},
}
SEE_EACH_RANK = ("sockets", "one hop", "mixed", "two levels")  # an error names the other ranks and their reasons
ALONE = "alone"  # no message at all: no group, or one of a single rank


class Arrival:
    """Acts the event of a copy to the host: all copies have arrived, or none."""

    arrived = False

    def query(self) -> bool:
        return Arrival.arrived

    def synchronize(self) -> None:
        Arrival.arrived = True


class Late(AllReduceOnDevice):
    """The path of a device, on the CPU: its slots are looked at when they have arrived."""

    def _check_later(self, slots: Tensor, call: Call, width: int, number: int) -> None:
        self._late.append((Arrival(), slots.clone(), call, width, number))


LATE = "late"
_SETTINGS = WAYS | {ALONE: {}, LATE: {"LEVELS_LIMIT": 0, "AllReduceOnHost": Late}}


def pretended_host() -> Host:
    """Where ranks of this name are taken to be: even ones on one host, odd ones on another."""
    return f"host {int(threading.current_thread().name.removeprefix('rank ')) % 2}".encode(), 0, 0


def host_of_two() -> Host:
    """Ranks 0 and 1 on one host, 2 and 3 on another."""
    return f"host {int(threading.current_thread().name.removeprefix('rank ')) // 2}".encode(), 0, 0


@contextlib.contextmanager
def travel(way: str) -> Iterator[None]:
    """Within it, the messages of groups over gloo that are new travel this way; "late": checked as on a device."""
    Arrival.arrived = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "off" if way == "one hop" else "on")
        if way == "two levels":
            patch.setattr(handshake, "this_host", pretended_host)
        if way == "mixed":
            patch.setattr(handshake, "this_host", host_of_two)
        for name, value in _SETTINGS[way].items():
            patch.setattr(comm, name, value)
        yield


def exchange(link: Link, payload: Tensor, call: Call) -> list[Tensor]:
    """What ``payload`` becomes: the payloads of all ranks in rank order, or their sum alone; new tensors."""
    message = link.message(payload.numel(), call)
    fill(message, payload)
    return [part.clone() for part in link.share(message, call).parts.unbind()]


def forced(really: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within it, layers synchronize without peers too; ``really`` says whether it has any effect."""
    return comm.forced() if really else contextlib.nullcontext()


def link_of(group: Any, device: torch.device | str = "cpu") -> Link:
    """This rank's link of a group, which has peers."""
    link = comm.link_of(group, torch.device(device))
    assert not isinstance(link, comm.Alone)
    return link


def connect(group: Any, link: Link, device: torch.device | str = "cpu") -> None:
    """Make this the link of a group for tensors of a device."""
    comm._links[group] = {torch.device(device): link}


def exchanges_made(group: Any, device: torch.device | str = "cpu") -> int:
    """By this rank, over its link of the group."""
    return link_of(group, device).exchanges


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[int, int, int]]]:
    """All exchanges in one hop that ranks of this process make, as (rank, kind, width)."""
    seen: list[tuple[int, int, int]] = []
    share = comm.OneHop.share

    def record(self: comm.OneHop, message: Message, call: Call) -> Shared:
        seen.append((self.rank, call.kind, message.payload.numel()))
        return share(self, message, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm.OneHop, "share", record)
        yield seen


class _Two:
    """As much of a process group as a link asks for: this is rank 0 of two."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


class NoPeers(AllReduceOnDevice):
    """A link on a device, whose sum over ranks is its own message."""

    def __init__(self) -> None:
        super().__init__(_Two(), torch.device("meta"))
        self.messages = 0

    def _reduce(self, message: Tensor, call: Any, width: int) -> None:
        assert message.device.type == "meta"
        self.messages += 1
