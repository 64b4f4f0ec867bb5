"""Whether a forward is the second one of activation checkpointing, which must not count its batch again."""

from __future__ import annotations

import contextlib
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

# Private as well: the modes of selective checkpointing, and how to step out of them.
_SELECTIVE = tuple(
    mode
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if (mode := getattr(torch.utils.checkpoint, name, None)) is not None
)
_modes_on = getattr(torch._C, "_len_torch_dispatch_stack", None)


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


def unseen() -> contextlib.AbstractContextManager[None]:
    """Within it, selective checkpointing sees no operation: it neither counts them nor replaces them by saved results.

    It counts operations to find its results again, and a layer does not run the same ones twice: the second time it
    updates no statistics. So a synchronized layer is always recomputed as a whole, with its exchange.
    """
    if torch.compiler.is_compiling() or _modes_on is None or _modes_on() == 0:
        return contextlib.nullcontext()
    from torch.utils import _python_dispatch

    stack = _python_dispatch._get_current_dispatch_mode_stack()
    if any(isinstance(mode, _SELECTIVE) for mode in stack):
        return _python_dispatch._disable_current_modes()
    return contextlib.nullcontext()
