"""Frames between ranks over gloo: a message to every peer under a reserved tag."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.comm.waiting import bury, interruptible, is_of_backend

TAG = 0x53424E
"""Tag of our messages between two ranks ("SBN"): gloo keeps messages of different tags apart."""

_PROBE = TAG + 1
_SOON = 0.001  # seconds; zero means the group's timeout
_GIVEN_UP = "Application timeout"
"""In what gloo says of connections that it closed itself, after a timeout."""


def is_gloo(group: Any, device: torch.device) -> bool:
    """Whether messages of a group from a device go over gloo."""
    return _torch.is_gloo(_torch.backend_of(group, device))


class Gloo:
    """Carries frames to and from ranks of a group.

    gloo delivers a short message into a long buffer, and aborts the process for a long one in a short buffer: so there
    must be room for the longest frame that may come.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._backend = _torch.backend_of(group, device)
        self._receives: dict[int, Any] = {}  # per peer that has not arrived; None before it is begun
        self._sends: dict[int, Any] = {}  # per peer that has not taken this rank's frame

    def start(self, frame: Tensor, rooms: Mapping[int, Tensor]) -> None:
        """Begin to send a frame to some ranks, and to receive theirs.

        Args:
            frame: float64 on the CPU.
            rooms: where the frame of each of these ranks goes.

        Raises:
            RuntimeError: whatever gloo finds wrong.
        """
        self._receives, self._sends = dict.fromkeys(rooms), {}
        for peer, room in rooms.items():  # one by one: where gloo knows already that a peer is gone, this raises
            self._receives[peer] = self._backend.recv([room], peer, TAG)
        for peer in rooms:
            self._sends[peer] = self._backend.send([frame], peer, TAG)

    def send_last(self, frame: Tensor, peers: Sequence[int]) -> None:
        """Send a frame as far as it goes, without waiting: gloo may read it as long as this process lives."""
        for peer in peers:
            with contextlib.suppress(RuntimeError):  # that peer is gone
                bury(self._backend.send([frame], peer, TAG))
        bury(frame)

    def wait(self, deadline: float, look: Callable[[], None] | None = None) -> None:
        """Wait for all that was started.

        Args:
            deadline: of the exchange, on the clock of ``time.monotonic``.
            look: called when all frames are there, before this rank waits until its own is taken.

        Raises:
            RuntimeError: whatever gloo finds wrong; ``missing`` says who had not arrived.
        """
        interruptible(functools.partial(self._wait, deadline, look))

    def _wait(self, deadline: float, look: Callable[[], None] | None) -> None:
        self._wait_for(self._receives, deadline)
        if look is not None:
            look()
        self._wait_for(self._sends, deadline)

    def _wait_for(self, works: dict[int, Any], deadline: float) -> None:
        for peer in list(works):
            works[peer].wait(timedelta(seconds=max(_SOON, deadline - time.monotonic())))
            del works[peer]

    def raised(self, error: BaseException) -> bool:
        """Whether gloo raised an error, and not a signal's handler."""
        return is_of_backend(error, self._backend)

    def is_broken(self, peer: int) -> bool:
        """Whether gloo knows that the connection to a rank is broken.

        It says so when it is asked to receive. (To wait, for however short a time, closes all its connections.)
        """
        room = torch.empty(1, dtype=torch.float64, device="cpu")
        try:
            bury(room, self._backend.recv([room], peer, _PROBE))
        except RuntimeError as error:
            return _GIVEN_UP not in str(error)
        return False

    def missing(self) -> tuple[list[int], list[int]]:
        """After a failure: ranks to which the connection broke before their frame came or this rank's was taken, and
        ranks that have not come over connections that are whole. One that has done its part may have left since.
        """
        broken, absent = [], []
        for peer, work in self._receives.items():
            if self.is_broken(peer):
                if not _is_done(work):
                    broken.append(peer)
            else:
                absent.append(peer)
        for peer, work in self._sends.items():
            if peer not in self._receives and self.is_broken(peer) and not _is_done(work):
                broken.append(peer)
        if not broken:  # nothing is lost by waiting now
            absent = [peer for peer in absent if not _is_done(self._receives[peer])]
        return broken, absent


def _is_done(work: Any) -> bool:
    """Whether the frame has come, or was taken, over a connection that is broken, or that nobody needs any more."""
    with contextlib.suppress(RuntimeError):
        return work is not None and work.wait(timedelta(seconds=_SOON))
    return False
