"""Whether a forward is the second one of activation checkpointing, which must not count its batch again."""

from __future__ import annotations

import sys
from types import FrameType

import torch
import torch.autograd.graph
import torch.utils.checkpoint

_CHECKPOINT = torch.utils.checkpoint.__file__
_RERUNS = ("recompute_fn", "unpack_hook")  # of the mode without reentry; the other one's is named backward
_ENGINE = torch.autograd.graph.__file__  # where every backward enters the engine

# Private, so tested for: the id of the backward that runs on this thread, -1 outside of any.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)


def recomputing() -> bool:
    """Whether this is called in a forward that a checkpoint runs again during a backward.

    A forward in a backward hook is not: between it and the backward that called the hook stands no checkpoint. So the
    stack is searched from here outwards, up to the innermost backward, for a function of torch.utils.checkpoint, or for
    a function named ``backward``, which is how other libraries' checkpoints run a forward again. Outside of a backward
    (nearly always) one private number says so, and the stack is not looked at.
    """
    if _graph_task_id is not None and _graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _ENGINE:
            return False
        if code.co_name == "backward" or (code.co_filename == _CHECKPOINT and code.co_name in _RERUNS):
            return True
        frame = frame.f_back
    return False
