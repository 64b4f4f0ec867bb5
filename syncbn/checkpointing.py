"""Whether a forward is the second one of activation checkpointing, which must not count its batch again."""

from __future__ import annotations

import contextlib
import sys
import warnings
from types import FrameType
from typing import Any

from syncbn import _torch


def recomputing() -> bool:
    """Whether this is called in a forward that a checkpoint runs again during a backward.

    A forward in a backward hook is not: between it and the backward that called the hook stands no checkpoint. So the
    stack is searched from here outwards, up to the innermost backward, for a function of torch.utils.checkpoint, or for
    a function named ``backward``, which is how other libraries' checkpoints run a forward again. Outside of a backward
    (nearly always) one number says so, and the stack is not looked at.
    """
    if not _torch.in_backward():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _torch.ENGINE_FILE:
            return False
        if code.co_name == "backward":
            return True
        if code.co_filename == _torch.CHECKPOINT_FILE and code.co_name in _torch.CHECKPOINT_RERUNS:
            return True
        frame = frame.f_back
    return False


def counts(layer: Any, tracked: bool) -> bool:
    """Whether a training forward of a layer is to be remembered: of the passes of a checkpoint, one.

    The first, as a rule. But some checkpoints, and hooks that people write, switch ``track_running_stats`` off (or the
    momentum to 0) in the first pass, so that the second counts, in which PyTorch's layer would count again. So passes
    that were not to be remembered are noted, and each is made up for by a recomputation. Recomputations come in the
    reverse order of the first passes; it is the latest ones that are noted.

    Args:
        layer: whose ``_passes`` is ``(not remembered, remembered after that)``, or None where all were.
        tracked: whether the layer is to remember what it sees.

    Warns:
        UserWarning: passes of both sorts await their recomputation; once per layer.
    """
    skipped, later = layer.__dict__.get("_passes") or (0, 0)
    remembers = tracked and layer.momentum != 0
    if not recomputing():
        if not remembers:
            layer.__dict__["_passes"] = (1 if later else skipped + 1, 0)
        elif skipped:
            layer.__dict__["_passes"] = (skipped, later + 1)
        return tracked
    if not remembers or not skipped:
        return False
    if later:
        _warn_of_mixture(layer)
        layer.__dict__["_passes"] = (skipped, later - 1)
        return False
    layer.__dict__["_passes"] = (skipped - 1, 0)
    return True


def _warn_of_mixture(layer: Any) -> None:
    if "_passes_warned" in layer.__dict__:
        return
    layer.__dict__["_passes_warned"] = True
    name = f"layer {layer._layer_name!r}" if layer._layer_name else "a layer without a name"
    warnings.warn(
        f"{name} is recomputed by a checkpoint, and some of its forwards before were to move the running statistics "
        "and some were not (track_running_stats or the momentum was switched off). Which of them this one repeats "
        "cannot be told; it is taken for the last. Leave the tracking on: a batch counts once in checkpoints, without "
        "further ado. (Said once per layer.)",
        stacklevel=2,
    )


def unseen() -> contextlib.AbstractContextManager[None]:
    """Within it, selective checkpointing sees no operation: it neither counts them nor replaces them by saved results.

    It counts operations to find its results again, and a layer does not run the same ones twice: the second time it
    updates no statistics. So a synchronized layer is always recomputed as a whole, with its exchange.
    """
    return _torch.outside_selective_checkpointing()
