"""Ranks that give up a step together.

An error that one rank catches and survives (out of memory, a bad sample) leaves the others waiting in the next layer.
``vote`` tells them, wherever they are: in a layer's exchange, or in a vote of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from syncbn import _torch
from syncbn.comm import link_of
from syncbn.errors import RankMismatchError
from syncbn.groups import group_device, resolve_group
from syncbn.together import sendable
from syncbn.wire import VOTE, Call


def vote(ok: bool, reason: str = "", *, process_group: Any = None, device: torch.device | str | None = None) -> bool:
    """Say whether this rank's step went well, and hear whether it did on all ranks::

        all_ok = ok_0 and ok_1 and ... and ok_{W-1}

    A rank that failed votes False in place of whatever exchange the others are in. Those that wait in a layer, forward
    or backward, get a ``RankMismatchError`` there, whose ``refused_by`` names it: for them this *was* the vote, so
    they must not vote again. In one exchange all ranks leave the step, and the group stays usable::

        try:
            loss = criterion(model(x), y)
            ok = vote(True)
        except torch.OutOfMemoryError as error:
            ok = vote(False, str(error))
        except syncbn.RankMismatchError as error:
            if not error.refused_by:
                raise  # the ranks really run different layers
            ok = False
        if ok:
            ...

    Vote before DistributedDataParallel's backward starts to average gradients: what it has under way cannot be given
    up. A backward of its own (``model.no_sync()``) may be tried and voted upon in the same way.

    Where ranks see each other's messages (gloo, up to ``comm.LEVELS_LIMIT`` ranks) this works anywhere in a step.
    Where only sums are seen (NCCL, MPI, larger worlds), vote only where all ranks vote, between steps: a message in
    place of a layer's could differ in length from the others', and on a device they would hear it too late.

    Args:
        ok: whether this rank's step went well.
        reason: for the other ranks' error message.
        process_group: that of the layers; as in ``SyncBatchNorm``.
        device: that of the layers' inputs; None for the group's own (CUDA where it has a CUDA backend, else CPU).

    Returns:
        Whether all ranks voted True. Without a process group, or in one of one rank, ``ok``.

    Raises:
        RankMismatchError: a rank is in another call and has not given up.
        PeerLostError: a rank did not take part.

    Collectives:
        One exchange of 1 float64.

    >>> vote(True)
    True
    """
    group = resolve_group(process_group)
    where = group_device(group, device)
    link = link_of(group, where)
    if not ok:
        with _torch.outside_modes():
            link.refuse(Call(VOTE), sendable(reason) or "it gave up this step", 1)
        return False
    try:
        with _torch.outside_modes():
            link.sum(torch.ones(1, dtype=torch.float64, device=where), Call(VOTE))
        link.settle()
    except RankMismatchError as error:
        if not error.refused_by:
            raise
        return False
    return True
