"""Frames between ranks over gloo: a message to every peer under a reserved tag."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.comm.waiting import bury, interruptible, is_of_backend

TAG = 0x53424E
"""Tag of our messages between two ranks ("SBN"): gloo keeps messages of different tags apart."""

_PROBE = TAG + 1
_GIVEN_UP = "Application timeout"
"""In what gloo says of connections that it closed itself, after a timeout."""


def is_gloo(group: Any, device: torch.device) -> bool:
    """Whether messages of a group from a device go over gloo."""
    return "gloo" in str(_torch.backend_of(group, device).name()).lower()


class Gloo:
    """Carries frames to and from ranks of a group.

    gloo delivers a short message into a long buffer, and aborts the process for a long one in a short buffer: so there
    must be room for the longest frame that may come.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._backend = _torch.backend_of(group, device)
        self._receives: dict[int, Any] = {}  # per peer that has not arrived; None before it is begun
        self._sends: list[Any] = []

    def start(self, frame: Tensor, rooms: Mapping[int, Tensor]) -> None:
        """Begin to send a frame to some ranks, and to receive theirs.

        Args:
            frame: float64 on the CPU.
            rooms: where the frame of each of these ranks goes.

        Raises:
            RuntimeError: whatever gloo finds wrong.
        """
        self._receives, self._sends = dict.fromkeys(rooms), []
        for peer, room in rooms.items():  # one by one: where gloo knows already that a peer is gone, this raises
            self._receives[peer] = self._backend.recv([room], peer, TAG)
        self._sends = [self._backend.send([frame], peer, TAG) for peer in rooms]

    def send_last(self, frame: Tensor, peers: Sequence[int]) -> None:
        """Send a frame as far as it goes, without waiting: gloo may read it as long as this process lives."""
        for peer in peers:
            with contextlib.suppress(RuntimeError):  # that peer is gone
                bury(self._backend.send([frame], peer, TAG))
        bury(frame)

    def wait(self, look: Callable[[], None] | None = None) -> None:
        """Wait for all that was started.

        Args:
            look: called when all frames are there, before this rank waits until its own is taken.

        Raises:
            RuntimeError: whatever gloo finds wrong; ``missing`` says who had not arrived.
        """
        interruptible(functools.partial(self._wait, look))

    def _wait(self, look: Callable[[], None] | None) -> None:
        for peer in list(self._receives):
            self._receives[peer].wait()
            del self._receives[peer]
        if look is not None:
            look()
        for work in self._sends:
            work.wait()

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

    def missing(self) -> list[int]:
        """After a failure: the ranks that had not arrived. Of those behind the one that failed, some may have."""
        return [
            peer
            for place, (peer, work) in enumerate(self._receives.items())
            if place == 0 or work is None or not work.is_completed() or work.exception() is not None
        ]
