"""What is wrong with the arguments of a layer: shapes, data types, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import _torch, masked

ACTIVATIONS = (None, "relu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Vectors(NamedTuple):
    """The tensors per channel that a batch norm has, each of shape ``(C,)`` or None."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def error(
    input: Any,
    vectors: Vectors,
    residual: Any,
    mask: Any,
    eps: Any,
    activation: Any = None,
    channels: int | None = None,
    check: Callable[[Tensor], None] | None = None,
) -> Exception | None:
    """What is wrong with the arguments of a layer, as in ``functional.batch_norm``; None if nothing is."""
    return (
        input_error(input, channels, check)
        or _argument_error(input, vectors, residual, activation, eps)
        or (None if mask is None else mask_error(input, mask))
    )


def statistics_error(input: Any, mask: Any) -> Exception | None:
    """What is wrong with an input to take statistics of."""
    return input_error(input, None) or mask_error(input, mask) or float64_error(input)


def input_error(input: Any, channels: int | None, check: Callable[[Tensor], None] | None = None) -> Exception | None:
    """What is wrong with an input; None if nothing is."""
    if not isinstance(input, Tensor):
        return TypeError(f"expected a tensor of shape (N, C, *) as input, got {type(input).__name__}: {input!r:.80}")
    if not is_dense(input):
        return TypeError(f"expected a dense tensor of shape (N, C, *) as input, got {_how_to_give_values(input)}")
    shape = input.shape
    if input.dtype not in DTYPES:
        return ValueError(
            f"expected a float16, bfloat16, float32 or float64 input, got {input.dtype} of shape {tuple(shape)}; "
            "convert it first"
        )
    if len(shape) < 2:
        return ValueError(
            f"expected an input of at least 2 dimensions (N, C, *), got {len(shape)}-D, shape {tuple(shape)}"
        )
    if channels is not None and shape[1] != channels:
        return ValueError(
            f"expected {channels} channels (num_features) in dimension 1 of the input, got {shape[1]}: "
            f"shape {tuple(shape)}"
        )
    if check is not None:
        try:
            check(input)
        except ValueError as error:
            return error
    return None


def _how_to_give_values(input: Tensor) -> str:
    if input.layout is torch.jagged:
        return (
            "a jagged nested one. Its values are one, of shape (sum of lengths, C): normalize these, with "
            "torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets())"
        )
    if input.is_nested:
        return "a nested one; give torch.cat(x.unbind()), of shape (sum of lengths, C)"
    return f"a {input.layout} one; give the features of its points, of shape (points, C)"


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a value at each place of its shape."""
    return tensor.layout is torch.strided and not tensor.is_nested


def float64_error(input: Tensor) -> Exception | None:
    """What is wrong with a device to share statistics from; None if nothing is."""
    if _torch.has_float64(input.device):
        return None
    return TypeError(
        f"shared and masked statistics are computed in float64, which {input.device} does not have: "
        "move the layer and its input to a CPU, or revert it (syncbn.revert_sync_batchnorm)"
    )


def mask_error(input: Tensor, mask: Any) -> Exception | None:
    """What is wrong with a mask; None if nothing is."""
    if not isinstance(mask, Tensor | None):
        return TypeError(f"mask must be a boolean tensor or None, got {type(mask).__name__}")
    return None if mask is None else masked.mask_error(input, mask)


def _argument_error(input: Tensor, vectors: Vectors, residual: Any, activation: Any, eps: Any) -> Exception | None:
    if activation not in ACTIVATIONS:
        return ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not eps > 0:
        return ValueError(f"eps must be a positive number, got {eps}")
    if not isinstance(residual, Tensor | None):
        return TypeError(f"residual must be a tensor of the input's shape or None, got {type(residual).__name__}")
    shape = (input.shape[1],)
    tensors: tuple[Any, ...] = vectors
    for name, tensor in zip(vectors._fields, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            return TypeError(f"{name} must be a tensor of shape ({shape[0]},) or None, got {type(tensor).__name__}")
        if tensor.shape != shape:
            return ValueError(f"{name} must have shape ({shape[0]},) for this input, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            return ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}; {name}.float() is one")
    if residual is not None and not (is_dense(residual) and residual.device == input.device):
        kind = "nested" if residual.is_nested else str(residual.layout).removeprefix("torch.")
        return TypeError(
            f"residual must be dense and on {input.device} like the input, got {kind} on {residual.device}"
        )
    if residual is not None and (residual.shape != input.shape or not residual.is_floating_point()):
        return ValueError(
            f"residual must be a floating point tensor of the input's shape {tuple(input.shape)}, "
            f"got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    return None
