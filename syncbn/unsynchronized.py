"""PyTorch's own batch norm of one rank, where there is nothing to exchange and no kernel of ours for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import _torch
from syncbn.arguments import Vectors
from syncbn.channels import along_channels
from syncbn.checkpointing import unseen
from syncbn.memory import Memory, Running
from syncbn.moments import Moments


def evaluate(input: Tensor, vectors: Vectors, eps: float) -> Tensor:
    """torch's batch norm with the running statistics."""
    wide = _common_dtype(input, vectors)
    x = input if wide is None else input.to(wide)
    mean, var, weight, bias = (_cast(tensor, wide) for tensor in vectors)
    # This rank's part of a DTensor with fewer channels than ranks; torch's raises IndexError.
    if not _torch.in_script_trace() and x.shape[1] == 0:
        for vector in (weight, bias):
            x = x if vector is None else x + along_channels(vector, x)  # nothing, but a graph that leads to both
        return x.to(input.dtype)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps).to(input.dtype)


def local(input: Tensor, vectors: Vectors, eps: float, memory: Memory | None) -> Tensor:
    """torch's own batch norm for one rank: its values to the bit, except that running statistics stay finite."""
    wide = _common_dtype(input, vectors)
    x = input if wide is None else input.to(wide)
    weight, bias = _cast(vectors.weight, wide), _cast(vectors.bias, wide)
    running = None if memory is None else memory.running
    if memory is None or (running is not None and (running.mean is None or running.var is None)):
        y = _without_statistics(x, vectors, weight, bias, eps, wide)
    elif running is not None and running.momentum is not None:
        y = _moving_statistics(x, running, weight, bias, eps, wide)
    else:
        y = _collecting_moments(x, input, memory, weight, bias, eps)
    return y.to(input.dtype)


def without_values(input: Tensor, vectors: Vectors, eps: float) -> Tensor:
    """torch's batch norm of a tensor without values: shapes and memory, and nothing that remembers or communicates."""
    wide = _common_dtype(input, vectors)
    x = input if wide is None else input.to(wide)
    weight, bias = _cast(vectors.weight, wide), _cast(vectors.bias, wide)
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps).to(input.dtype)


def after(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What comes after torch's own batch norm."""
    if residual is not None:
        y = (y + residual).to(y.dtype)
    return F.relu(y) if relu else y


def _without_statistics(
    x: Tensor, vectors: Vectors, weight: Tensor | None, bias: Tensor | None, eps: float, wide: torch.dtype | None
) -> Tensor:
    if vectors.running_mean is None or vectors.running_var is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    with unseen():  # copies, for torch saves them, and a checkpoint wants its second pass to save as much
        copies = vectors.running_mean.to(wide, copy=True), vectors.running_var.to(wide, copy=True)
    return F.batch_norm(x, *copies, weight, bias, True, 0.0, eps)


def _moving_statistics(
    x: Tensor, running: Running, weight: Tensor | None, bias: Tensor | None, eps: float, wide: torch.dtype | None
) -> Tensor:
    assert running.mean is not None and running.var is not None and running.momentum is not None
    # On copies: torch saves the statistics for its backward, and they must not change after that.
    with unseen():
        moved = running.mean.to(wide, copy=True), running.var.to(wide, copy=True)
    y = F.batch_norm(x, *moved, weight, bias, True, running.momentum, eps)
    with unseen():
        may_read = x.device.type == "cpu" and not torch.compiler.is_compiling() and _torch.plainly_eager()
        all_finite = may_read and math.isfinite(torch.add(*moved).sum().item())
        finite = None if all_finite else torch.isfinite(moved[0]) & torch.isfinite(moved[1])
        for kept, new in zip((running.mean, running.var), moved, strict=True):
            kept.copy_(new if finite is None else torch.where(finite, new, kept))
        running.count()
    return y


def _collecting_moments(
    x: Tensor, input: Tensor, memory: Memory, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    channels = x.shape[1]
    # Momentum 1 yields the batch's own mean and unbiased variance.
    with unseen():
        dtype = x.dtype if weight is None else weight.dtype
        mean, var = (torch.zeros(channels, dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    with unseen():
        count = torch.full((), x.numel() / channels, dtype=torch.float64, device=x.device)
        memory.collect(Moments(count, mean.double(), var.double() * (count - 1.0)), input, None)
    return y


def _common_dtype(input: Tensor, vectors: Vectors) -> torch.dtype | None:
    """The dtype to compute in where torch's batch norm refuses this mixture, and the synchronized path does not.

    FSDP's mixed precision, for one, leaves running statistics in float32 beside bfloat16 parameters.
    """
    dtypes = [tensor.dtype for tensor in vectors if tensor is not None]
    least = torch.promote_types(input.dtype, torch.float32)
    if all(dtype == input.dtype for dtype in dtypes) or all(dtype == torch.float32 == least for dtype in dtypes):
        return None
    for dtype in dtypes:
        least = torch.promote_types(least, dtype)
    return least


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
