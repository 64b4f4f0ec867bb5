"""Exchanges by a collective of the process group itself, in which each rank hands in one tensor."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.comm.base import Link
from syncbn.comm.gloo import Gloo, is_gloo
from syncbn.comm.post_mortem import Note, culprits
from syncbn.comm.waiting import bury, is_of_backend
from syncbn.errors import RankMismatchError
from syncbn.wire import Call


class Collective(Link):
    """A link that calls the group's collectives. Subclasses say which, and where messages live."""

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self._group = weakref.ref(group)  # weak: links are kept per group
        self._broken = "no rank"

    def _broken_ranks(self, shared: Any) -> str:
        return self._broken

    def _call(self, begin: Callable[..., Any], *args: Any, keeps: Tensor, call: Call, width: int) -> None:
        """Make a collective and wait for it, as far as its device lets the host wait.

        Args:
            begin: of the group and ``args``; returns the work.
            keeps: memory that a peer may write to when all is lost.
            call, width: what it is for.
        """
        group = self._group()
        assert group is not None
        started = time.monotonic()
        try:
            self._wait(begin(group, *args))
        except BaseException as error:
            backend = _torch.backend_of(group, self.device)
            if not is_of_backend(error, backend):
                bury(keeps, args, group, backend)
                raise
            bury(keeps, args)
            waited = time.monotonic() - started
            others = [rank for rank in range(self.size) if rank != self.rank]
            know = Gloo(group, self.device).is_broken if is_gloo(group, self.device) else lambda rank: False
            broken = [rank for rank in others if know(rank)]
            absent = [rank for rank in others if rank not in broken]
            missing = culprits(group, Note(broken=broken, absent=absent))
            self._lost(str(error), call, width, waited, missing)

    def _leave(self, error: BaseException, call: Call, width: int) -> None:
        """An exception came out of an exchange. Unless it is one of ours, the peers cannot know how far it got."""
        if not isinstance(error, RankMismatchError) and self._dead is None:
            self._interrupted(error, call, width)

    def _wait(self, work: Any) -> None:
        if work is not None:  # as some backends return for what is in order on the stream
            work.wait()
