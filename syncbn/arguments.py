"""What is wrong with the arguments of a layer: shapes, data types, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import masked

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
        or mask_error(input, mask)
    )


def input_error(input: Any, channels: int | None, check: Callable[[Tensor], None] | None = None) -> Exception | None:
    """What is wrong with an input; None if nothing is."""
    if not isinstance(input, Tensor):
        return TypeError(f"expected a tensor of shape (N, C, *) as input, got {type(input).__name__}: {input!r:.80}")
    if input.layout is not torch.strided or input.is_nested:
        kind = "nested" if input.is_nested else str(input.layout)
        return TypeError(f"expected a dense tensor of shape (N, C, *) as input, got a {kind} one; convert it first")
    shape = tuple(input.shape)
    if input.dtype not in DTYPES:
        return ValueError(
            f"expected a float16, bfloat16, float32 or float64 input, got {input.dtype} of shape {shape}; "
            "convert it first"
        )
    if input.dim() < 2:
        return ValueError(f"expected an input of at least 2 dimensions (N, C, *), got {input.dim()}-D, shape {shape}")
    if channels is not None and input.shape[1] != channels:
        return ValueError(
            f"expected {channels} channels (num_features) in dimension 1 of the input, got {input.shape[1]}: "
            f"shape {shape}"
        )
    if check is not None:
        try:
            check(input)
        except ValueError as error:
            return error
    return None


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
    channels = input.shape[1]
    for name, tensor in zip(vectors._fields, vectors, strict=True):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            return ValueError(f"{name} must have shape ({channels},) for this input, got {tuple(tensor.shape)}")
        if tensor is not None and not tensor.is_floating_point():
            return ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}; {name}.float() is one")
    if residual is not None and (residual.shape != input.shape or not residual.is_floating_point()):
        return ValueError(
            f"residual must be a floating point tensor of the input's shape {tuple(input.shape)}, "
            f"got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    return None
