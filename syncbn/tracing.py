"""What tools that take a model apart see of a layer: torch.fx a leaf, torch.jit.script an error with a way out."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.fx.proxy import Proxy, TraceError


def leaf(layer: Any, own_forward: bool, *args: Any, **kwargs: Any) -> Any:
    """The call of a layer as one node of a graph that torch.fx is tracing, whatever the tracer takes for leaves.

    torch.fx keeps modules of ``torch.nn`` whole, and looks into all others; a layer whose control flow depends on its
    input cannot be looked into.

    Args:
        layer: as it was called.
        own_forward: whether what the layer does is more than what the caller knows of it.
        args, kwargs: of the call, None for what was not given.

    Returns:
        A proxy; None where nothing is being traced.

    Raises:
        torch.fx.proxy.TraceError: for what would be in the graph twice, once inside this node and once beside it.
    """
    proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
    if proxy is None:
        return None
    name = f" {layer._layer_name!r}" if layer._layer_name else ""
    if own_forward:
        raise TraceError(
            f"torch.fx cannot look into the forward of {type(layer).__name__}, the class of layer{name}. Let your "
            "tracer's is_leaf_module return True for it."
        )
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise TraceError(
            f"the layer{name} has forward hooks, which torch.fx would record beside the layer, and run twice. Remove "
            "them while tracing, or let your tracer's is_leaf_module return True for the layer."
        )
    tracer: Any = proxy.tracer
    given = {key: value for key, value in kwargs.items() if value is not None}
    while args and args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, given)


def refuse_script(layer: Any) -> NoReturn:
    """Raise RuntimeError: TorchScript knows no Python, so it would have to leave out the other ranks."""
    name = f" {layer._layer_name!r}" if layer._layer_name else ""
    raise RuntimeError(
        f"torch.jit.script cannot compile the synchronized layer{name}: call syncbn.revert_sync_batchnorm(model) "
        "first (on a copy, to go on training). torch.jit.trace and torch.export take a model in eval mode as it is."
    )
