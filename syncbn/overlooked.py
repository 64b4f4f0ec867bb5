"""Normalization by batch statistics that a conversion cannot reach, where it can be recognized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from syncbn._torch import BatchNormBase, LazyNormBase


def overlooked(model: nn.Module) -> list[str]:
    """What in a model goes on normalizing with this rank's own batch, one description each.

    That is batch norm inside what TorchScript compiled or traced, and layers that keep running statistics and derive
    from no batch norm of torch.nn. (A call of ``F.batch_norm`` in a forward cannot be seen.)
    """
    found: list[str] = []
    scripted: list[str] = []  # prefixes of what has been looked into
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(f"{name}." if name else "")
            found += _in_script(name, module)
        elif _keeps_running_statistics(module):
            found.append(f"{name!r} ({type(module).__module__}.{type(module).__qualname__})")
    return found


def _keeps_running_statistics(module: nn.Module) -> bool:
    """Whether it looks like a batch norm and is none of torch's. A frozen one has no momentum."""
    return (
        not isinstance(module, BatchNormBase | LazyNormBase | _InstanceNorm)
        and {"running_mean", "running_var"} <= module._buffers.keys()
        and hasattr(module, "momentum")
    )


def _in_script(name: str, module: Any) -> list[str]:
    """The batch norms of a ScriptModule that use batch statistics in training mode; itself, if it has no such parts."""
    if not _normalizes_batches(module):
        return []
    parts = [
        f"{name}.{inner}".strip(".")
        for inner, part in module.named_modules()
        if "BatchNorm" in getattr(part, "original_name", "")
    ]
    return [f"{part!r} (TorchScript)" for part in parts or [name]]


def _normalizes_batches(module: Any) -> bool:
    """Whether its graph calls batch norm other than in eval mode for good, as a trace of eval mode does."""
    try:
        graph = module.inlined_graph
    except RuntimeError:  # it has no forward
        return True
    nodes = graph.findAllNodes("aten::batch_norm", True)
    return any(list(node.inputs())[5].toIValue() is not False for node in nodes)
