"""Arithmetic of batch normalization on one rank: no process group is known here.

Each module has the same functions. ``reference`` is the ground truth in plain formulas, ``aten`` the fast composition
of PyTorch's own operators for any device, ``triton`` has kernels for CUDA. Which of them works on a tensor is decided
here: Triton for float16, bfloat16 and float32 on CUDA devices of compute capability 8.0 or later, ATen otherwise, also
where Triton is missing or cannot launch a kernel (the logger ``syncbn`` says so, once per device).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import aten

__all__ = ["gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]

HEAD = 6
"""Slots in front of the payload of a message that the fused forms write."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CAPABILITY = (8, 0)
_interpreted = False  # whether CPU tensors go to Triton as well, whose interpreter then works on them: for tests


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """See ``aten.moments``."""
    return _for(x).moments(x, raw=raw)


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """See ``aten.normalize``."""
    return _for(x).normalize(x, mean, invstd, weight, bias, residual, relu)


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``aten.relu_gradient``."""
    return _for(x).relu_gradient(grad, x, mean, invstd, weight, bias, residual)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See ``aten.gradient_sums``."""
    return _for(x).gradient_sums(grad, x, mean, invstd)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """See ``aten.input_gradient``."""
    return _for(x).input_gradient(grad, x, mean, invstd, weight, sums, count)


def fused(x: Tensor) -> Any:
    """The module with the fused forms for a tensor, in which a step takes few launches (``pack_moments``,
    ``normalize_shared``, ``pack_gradient_sums``, ``shared_input_gradient``); None if there is none for it.
    """
    if (x.is_cuda or _interpreted) and x.dtype in _DTYPES and x.shape[1] > 0 and type(x) in _PLAIN:
        return _load_triton(x.device)
    return None


_PLAIN = (Tensor, torch.nn.Parameter)  # (others may have no memory to work on: tensors that only trace shapes)


def _for(x: Tensor) -> Any:
    return (fused(x) if x.is_cuda or _interpreted else None) or aten


@lru_cache
def _load_triton(device: torch.device) -> Any:
    try:
        if device.type == "cuda":
            _check_device(device)
        from syncbn.kernels import triton

        triton.probe(device)
    except Exception as error:  # whatever it is, there is another way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logging.getLogger("syncbn").warning("layers on %s run on ATen operators, not on Triton: %s", device, reason)
        return None
    return triton


def _check_device(device: torch.device) -> None:
    if torch.version.hip is not None:
        raise RuntimeError("the kernels were written for CUDA")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise RuntimeError(f"they need compute capability {_CAPABILITY}, and this device has {capability}")
