"""The errors that ranks raise when they disagree or get lost."""

from __future__ import annotations

from collections.abc import Sequence


class RankMismatchError(RuntimeError):
    """The ranks of a process group made different calls: other layers, directions, widths or gradient flags, or one of
    them could not make its call at all. Every rank of the group raises in the same call; the group stays usable.

    Attributes:
        refused_by: the ranks of the group that could not make their call or gave up their step (see
            ``syncbn.steps.vote``); -1 for each whose number is not known. Empty if the calls differ.
    """

    def __init__(self, message: str = "", *, refused_by: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.refused_by = tuple(refused_by)


class PeerLostError(RuntimeError):
    """A rank of the process group did not take part in an exchange: it died, left, or came too late.
    The group cannot be used again."""
