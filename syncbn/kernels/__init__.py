"""Arithmetic of batch normalization on one rank: no process group is known here.

``reference`` is the ground truth in plain formulas, and says what each function does. The others have the same
functions: ``native`` has compiled loops for CPUs, ``triton`` kernels for CUDA, ``torch_sync`` the operators of torch's
own SyncBatchNorm, and ``aten`` is the fast composition of PyTorch's operators for any device (the plain forms of the
last two, which ``composed`` puts together). Which of them works on a tensor is decided here:

* native on a CPU, where the extension was built;
* Triton for float16, bfloat16 and float32 on CUDA devices of compute capability 8.0 or later;
* the operators of torch's SyncBatchNorm on other CUDA and HIP tensors;
* ATen otherwise.

Where native, Triton or torch's operators cannot work, the logger ``syncbn`` says why, once per device.
``SYNCBN_KERNELS`` in the environment, ``native`` (default) or ``aten``, chooses for CPUs.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import aten, native, torch_sync
from syncbn.kernels.composed import Composed, clean_padding
from syncbn.kernels.values import statistics

__all__ = [
    "choice",
    "choose",
    "clean_padding",
    "is_native",
    "loops_for",
    "moments",
    "name_of",
    "plain",
    "statistics",
]

_ATEN = Composed(aten)
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_CAPABILITY = (8, 0)
_interpreted = False  # whether CPU tensors go to Triton as well, whose interpreter then works on them: for tests


def choose(x: Tensor, mask: Tensor | None, direct: bool) -> Any:
    """What has the fused forms for a tensor: ``pack_moments``, ``normalize_shared``, ``pack_gradient_sums``,
    ``shared_input_gradient`` and ``passed_gradient``; see ``reference``.

    Args:
        x: shape ``(N, C, *)``.
        mask: of its valid positions, or None.
        direct: whether messages live where x does, as Triton's fused forms ask for.
    """
    if is_native(x):
        return native
    triton = _triton(x)
    if triton is None:
        return _ATEN if (other := _torch_sync(x)) is None else _composed(other)
    return triton if direct and mask is None else _composed(triton)


def is_native(x: Tensor) -> bool:
    """Whether the compiled loops work on a tensor."""
    return x.is_cpu and type(x) in _PLAIN and loops_for(x.dtype)


def loops_for(dtype: torch.dtype) -> bool:
    """Whether the compiled loops work on tensors of a data type, on a CPU."""
    return not _interpreted and dtype in native.DTYPES and _native_works()


@lru_cache
def _native_works() -> bool:
    chosen = choice() == "native"
    if chosen and not native.available():
        _say("CPUs", "compiled loops", native.reason())
    return chosen and native.available()


def choice() -> str:
    """``SYNCBN_KERNELS`` in the environment: ``native`` (default) or ``aten``, for tensors on CPUs.

    Raises:
        ValueError: anything else.
    """
    value = os.environ.get("SYNCBN_KERNELS", "").lower() or "native"
    if value not in ("native", "aten"):
        raise ValueError(f"the environment variable SYNCBN_KERNELS must be native or aten, got {value!r}")
    return value


def _say(devices: object, missing: str, reason: str) -> None:
    logging.getLogger("syncbn").warning("layers on %s do not run on %s, but on operators: %s", devices, missing, reason)


def plain(x: Tensor) -> Any:
    """What has the plain forms for a tensor: ``moments``, ``normalize``, ``gradient_sums`` ...; see ``reference``."""
    return _triton(x) or _torch_sync(x) or aten


def name_of(kernel: Any) -> str:
    """What people call a result of ``choose``."""
    if kernel is native or kernel is _ATEN:
        return "native" if kernel is native else "ATen"
    return "torch's SyncBatchNorm" if getattr(kernel, "plain", None) is torch_sync else "Triton"


def moments(x: Tensor) -> Tensor:
    """``(n, mean[C], m2[C])`` of x, packed in one float64 vector; see ``reference.moments``."""
    return plain(x).moments(x)


_PLAIN = (Tensor, torch.nn.Parameter)  # others may have no memory to work on: tensors that only trace shapes


def _triton(x: Tensor) -> Any:
    if not (x.is_cuda or _interpreted) or x.dtype not in _TRITON_DTYPES or x.shape[1] == 0 or type(x) not in _PLAIN:
        return None
    return _load_triton(x.device)


@lru_cache
def _load_triton(device: torch.device) -> Any:
    try:
        if device.type == "cuda":
            _check_device(device)
        from syncbn.kernels import triton

        triton.probe(device)
    except Exception as error:  # whatever it is, there is another way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _say(device, "Triton", reason)
        return None
    return triton


@lru_cache
def _composed(plain: Any) -> Composed:
    return Composed(plain)


def _torch_sync(x: Tensor) -> Any:
    if not x.is_cuda or x.shape[1] == 0 or type(x) not in _PLAIN:
        return None
    return torch_sync if _torch_sync_works(x.device, x.dtype) else None


@lru_cache
def _torch_sync_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        torch_sync.check(device, dtype)
    except Exception as error:  # whatever it is, there is another way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _say(device, "the operators of torch's SyncBatchNorm", reason)
        return False
    return True


def _check_device(device: torch.device) -> None:
    if torch.version.hip is not None:
        raise RuntimeError("the kernels were written for CUDA")
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        raise RuntimeError(f"they need compute capability {_TRITON_CAPABILITY}, and this device has {capability}")
