"""Normalization by batch statistics that a conversion cannot reach, where it can be recognized."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from syncbn import _torch
from syncbn._torch import BatchNormBase

_MEANS = ("running_mean", "moving_mean")
_SPREADS = ("running_var", "moving_var", "running_std", "moving_std", "moving_variance")
_RATES = ("momentum", "decay")
_FUNCTIONS = (F.batch_norm, torch.batch_norm)
_NAMES = re.compile(r"batch_?norm|batch_?renorm", re.IGNORECASE)
_NO_BATCH_STATISTICS = re.compile("frozen|freeze", re.IGNORECASE)


def overlooked(model: nn.Module) -> list[str]:
    """What in a model goes on normalizing with this rank's own batch, one description each.

    That is batch norm inside what TorchScript compiled or traced, or in a graph of torch.fx or torch.export; and layers
    that derive from no batch norm of torch.nn, keep running statistics or are called batch norm, and hold no batch norm
    themselves. (A call of ``F.batch_norm`` in a forward cannot be seen.)
    """
    found: list[str] = []
    scripted: list[str] = []  # prefixes of what has been looked into
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(f"{name}." if name else "")
            found += _in_script(name, module)
            continue
        if _is_foreign(module):
            found.append(f"{_shown(name)} ({type(module).__module__}.{type(module).__qualname__})")
        if any(map(_normalizes, _graph_nodes(module))):
            found.append(f"{_shown(name)} (a graph of operators)")
        for attribute, function in vars(module).items():
            if isinstance(function, torch.jit.ScriptFunction) and _normalizes_batches(function):
                found.append(f"{f'{name}.{attribute}'.strip('.')!r} (TorchScript)")
    return found


def _shown(name: str) -> str:
    return repr(name) if name else "the model itself"


def _is_foreign(module: nn.Module) -> bool:
    """Whether it is a batch norm, as far as its state and its name tell, and none of torch's. Frozen ones are not."""
    if isinstance(module, BatchNormBase | _InstanceNorm):  # (lazy ones derive from them too)
        return False
    if _NO_BATCH_STATISTICS.search(type(module).__name__):
        return False
    state = {**vars(module), **module._parameters, **module._buffers}
    keeps = all(any(isinstance(state.get(name), Tensor) for name in names) for names in (_MEANS, _SPREADS))
    if keeps:  # a frozen one has no momentum
        return any(hasattr(module, name) for name in _RATES)
    # A wrapper is not meant, nor what was written with torch's own in mind (quantized, fused).
    own = not type(module).__module__.startswith("torch.") and next(module.children(), None) is None
    return own and _NAMES.search(type(module).__name__) is not None


# ---- graphs of torch.fx


def _graph_nodes(module: nn.Module) -> Iterator[fx.Node]:
    graph = getattr(module, "graph", None)
    if isinstance(graph, fx.Graph):
        yield from graph.nodes


def _normalizes(node: fx.Node) -> bool:
    """Whether a node normalizes by batch statistics, which one of eval mode for good does not."""
    if node.op != "call_function":
        return False
    if node.target in _FUNCTIONS:
        names = ["", "", "", "", "", "training"]
    else:
        names = _torch.operator_arguments(node.target)
        if "batch_norm" not in str(node.target) or "backward" in str(node.target) or not names:
            return False
    for name in ("training", "train"):
        if name in names:
            place = names.index(name)
            given = node.args[place] if place < len(node.args) else node.kwargs.get(name, False)
            return given is not False
    return "no_training" not in str(node.target)


# ---- TorchScript


def _in_script(name: str, module: Any) -> list[str]:
    """The batch norms of a ScriptModule that use batch statistics in training mode; itself, if it has no such parts."""
    methods = [getattr(module, method) for method in _torch.script_methods(module)]
    if not any(map(_normalizes_batches, methods)):
        return []
    parts = [
        f"{name}.{inner}".strip(".")
        for inner, part in module.named_modules()
        if "BatchNorm" in getattr(part, "original_name", "")
    ]
    return [f"{_shown(part)} (TorchScript)" for part in parts or [name]]


def _normalizes_batches(compiled: Any) -> bool:
    """Whether a function's graph calls batch norm other than in eval mode for good, as a trace of eval mode does."""
    graph = compiled.inlined_graph
    return any(list(node.inputs())[5].toIValue() is not False for node in graph.findAllNodes("aten::batch_norm", True))
