"""The per-rank arithmetic of synchronized batch normalization as compiled loops, for tensors on a CPU.

The functions are those of every kernel module, for float32, float64, bfloat16 and float16. The default layout,
channels-last and matrices are worked on as they are, other strides by way of a copy. Every element is centred in opmath
(float32, or float64 for float64 input) about the mean rounded to opmath, and the remainder goes into the per-channel
shift in float64. Sums run in opmath over at most 4096 elements, and in float64 over these runs.

Results repeat bit for bit for a shape, a layout, a number of threads and a processor. What is computed after the
exchange, from the numbers of all ranks, has equal bits on all of them. ``native.h`` leads through the sources.

The functions allocate outputs and hand addresses to C, so nothing here is seen by autograd: they are for use inside a
``torch.autograd.Function``.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch  # first: the extension then shares its OpenMP library, and with it one pool of threads
from torch import Tensor

from syncbn.messages import write_around
from syncbn.moments import Moments, look

if TYPE_CHECKING:
    from syncbn.memory import Running
    from syncbn.messages import Message, Shared

fuses_relu = True

_reason = ""
try:
    from syncbn.kernels.native import _native
except ImportError as error:
    _reason = f"the compiled extension is missing or cannot be loaded ({error})"

__all__ = [
    "available",
    "instructions",
    "normalize_shared",
    "operands",
    "pack_gradient_sums",
    "pack_moments",
    "passed_gradient",
    "reason",
    "shared_input_gradient",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The data types of inputs, and what C calls them."""

# The largest positive output in opmath that is zero once it is rounded: the rectifier is shut there.
_LIMITS = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
_VECTORS = {torch.float32: 0, torch.float64: 1}
# A thread gets at least this many elements: fewer are done before it has woken up.
_GRAIN = 1 << 15
_REMEMBERED = 4096
_FLOAT64 = torch.float64


def available() -> bool:
    """Whether the extension was built and can be loaded."""
    return not _reason


def reason() -> str:
    """Why the functions here are not available; empty if they are."""
    return _reason


def instructions() -> str:
    """The best instruction set of this processor that there are loops for, where they are available."""
    return _native.variants()[0]


class _Layout(NamedTuple):
    """What is known of all tensors with the same shape, strides and dtype."""

    geometry: bytes  # for C; empty for strides it cannot work on
    channels: int
    most: int  # threads
    limit: float


_layouts: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], _Layout] = {}


def _layout(x: Tensor) -> _Layout:
    key = x.shape, x.stride(), x.dtype
    found = _layouts.get(key)
    if found is None:
        if len(_layouts) >= _REMEMBERED:
            _layouts.clear()
        found = _layouts[key] = _describe(x)
    if not x.is_cpu:
        raise ValueError(f"the native kernels work on tensors on a CPU, got one on {x.device}")
    return found


def _describe(x: Tensor) -> _Layout:
    if x.dtype not in DTYPES or x.dim() < 2:
        raise ValueError(
            f"the native kernels work on (N, C, *) of {', '.join(map(str, DTYPES))}, got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    samples, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    rows = x.is_contiguous()
    columns = x.movedim(1, -1).is_contiguous()
    geometry = b""
    if channels == 1 and (rows or columns):  # the layouts are the same: one long row
        geometry = _pack(x.dtype, False, 1, 1, samples * positions)
    elif columns and (positions == 1 or not rows):
        geometry = _pack(x.dtype, True, samples, channels, positions)
    elif rows:
        geometry = _pack(x.dtype, False, samples, channels, positions)
    return _Layout(geometry, channels, max(1, x.numel() // _GRAIN), _LIMITS[x.dtype])


def _pack(dtype: torch.dtype, columns: bool, samples: int, channels: int, positions: int) -> bytes:
    return struct.pack("5q", DTYPES[dtype], columns, samples, channels, positions)


def _like(t: Tensor, x: Tensor, layout: _Layout) -> Tensor:
    """t, or a copy of it, in the layout and dtype of x."""
    own = _layout(t)
    if own is layout:
        return t
    if t.shape != x.shape:
        raise ValueError(f"a tensor of shape {tuple(t.shape)} does not go with an input of shape {tuple(x.shape)}")
    return t if own.geometry == layout.geometry else torch.empty_like(x).copy_(t)


def _mask_bytes(mask: Tensor, x: Tensor) -> Tensor:
    """The mask with one byte per sample and position, in this order."""
    if mask.dtype is not torch.bool or not mask.is_cpu:
        raise ValueError(f"mask must be boolean and on a CPU, got {mask.dtype} on {mask.device}")
    return mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous()


def _vector(t: Tensor, channels: int) -> Tensor:
    """A per-channel vector that C can read: itself, where it can."""
    if t.numel() != channels or not t.is_cpu:
        raise ValueError(f"a vector of {channels} channels on a CPU is needed, got {t.numel()} values on {t.device}")
    return (t if t.dtype in _VECTORS else t.float()).contiguous()


def _payload(payload: Tensor, width: int) -> int:
    """The address of ``width`` float64."""
    if payload.numel() != width or payload.dtype is not _FLOAT64 or not payload.is_contiguous() or not payload.is_cpu:
        raise ValueError(
            f"{width} contiguous float64 on a CPU are needed, got {payload.numel()} of {payload.dtype} with strides "
            f"{payload.stride()} on {payload.device}"
        )
    return payload.data_ptr()


def _parts(parts: Tensor, width: int) -> Tensor:
    """What all ranks sent, in rows without gaps between values."""
    if parts.shape[1] != width or parts.dtype is not _FLOAT64 or not parts.is_cpu:
        raise ValueError(
            f"rows of {width} float64 on a CPU are needed, got {tuple(parts.shape)} of {parts.dtype} on {parts.device}"
        )
    return parts if width < 2 or parts.stride(1) == 1 else parts.contiguous()


def pack_moments(x: Tensor, mask: Tensor | None, message: Message) -> None:
    """Write the local moments of the valid positions into the message.

    They are ``(n, mean, m2)``, or, for a raw message, ``(n, sum x, sum x^2)``.

    Args:
        x: Input of shape ``(N, C, *)``, any float dtype and strides, possibly empty.
        mask: None, or bool of shape ``(N, 1, *)``, or 1 in place of any dim: True where valid.
        message: Its payload is float64 of length ``2C + 1``; zeros if nothing is valid.
    """
    geometry, channels, most, _ = _layout(x)
    if not geometry:
        x = x.contiguous()
        geometry = _layout(x).geometry
    if mask is not None:
        mask = _mask_bytes(mask, x)
    _native.pack_moments(
        geometry,
        1 if most == 1 else min(most, torch.get_num_threads()),
        x.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        message.raw,
        _payload(message.payload, 2 * channels + 1),
    )
    if message.number:
        write_around(message)


def normalize_shared(
    x: Tensor,
    mask: Tensor | None,
    shared: Shared,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    running: Running | None,
) -> tuple[Tensor, Tensor, bool]:
    """``y = act((x - mean) * invstd * weight + bias + residual)`` by the moments of all ranks.

    Every position is normalized; what is not finite at padded positions counts as zero.

    Args:
        x, mask: As in ``pack_moments``.
        shared: The moments of all ranks, float64 ``(W, 2C + 1)`` in rank order, or their sum.
        weight, bias: ``(C,)`` of any float dtype, or None.
        residual: Added before the activation, shape of x, any float dtype and strides, or None.
        relu: Whether ``act`` is the rectifier.
        eps: Added to the variance.
        running: Running statistics to move in place, or None.

    Returns:
        ``(y, stats, finite)``: y in the dtype, shape and layout of x, float64 ``(mean, invstd, n)``, and whether all
        statistics are finite.
    """
    layout = _layout(x)
    geometry, channels, most, _ = layout
    if not geometry or (residual is not None and residual.dtype is not x.dtype):
        # Copies: of other strides, and in the wider of two data types.
        wide = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype))
        added = None if residual is None else residual.to(wide.dtype)
        wide = wide.contiguous()
        result, stats, finite = normalize_shared(wide, mask, shared, weight, bias, added, relu, eps, running)
        return torch.empty_like(x).copy_(result), stats, finite
    if residual is not None:
        residual = _like(residual, x, layout)
    if mask is not None:
        mask = _mask_bytes(mask, x)
    if weight is not None:
        weight = _vector(weight, channels)
    if bias is not None:
        bias = _vector(bias, channels)
    parts = _parts(shared.parts, 2 * channels + 1)
    y = torch.empty_like(x)
    stats = parts.new_empty(2 * channels + 1)
    moved = _NOT_RUNNING if running is None else _running(running, channels)
    m2 = stats.new_empty(channels) if moved is None else None
    finite = _native.normalize_shared(
        geometry,
        1 if most == 1 else min(most, torch.get_num_threads()),
        x.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        relu,
        parts.data_ptr(),
        parts.shape[0],
        parts.stride(0),
        shared.raw,
        0 if weight is None else weight.data_ptr(),
        0 if weight is None else _VECTORS[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _VECTORS[bias.dtype],
        eps,
        *(_NOT_RUNNING if moved is None else moved),
        y.data_ptr(),
        stats.data_ptr(),
        0 if m2 is None else m2.data_ptr(),
    )
    if m2 is not None and running is not None:
        running.move(look(Moments(stats[2 * channels], stats[:channels], m2)))
    return y, stats, finite


_NOT_RUNNING = (0, 0, 0, 0, 0, 0.0)


def _running(running: Running, channels: int) -> tuple[int, int, int, int, int, float] | None:
    """Running statistics for C: addresses and data types, and the momentum; None if C cannot move them."""
    mean, var, batches = running.mean, running.var, running.batches
    momentum = math.nan if running.momentum is None else running.momentum
    counter = 0
    if batches is not None:
        if batches.dtype is not torch.int64 or batches.numel() != 1:
            return None
        counter = batches.data_ptr()
    if mean is None or var is None:
        return 0, 0, 0, 0, counter, momentum
    kind, other = _VECTORS.get(mean.dtype), _VECTORS.get(var.dtype)
    if kind is None or other is None or not mean.is_contiguous() or not var.is_contiguous():
        return None
    if mean.numel() != channels or var.numel() != channels:
        raise ValueError(f"running statistics of {channels} channels are needed, got {mean.numel()} and {var.numel()}")
    return mean.data_ptr(), kind, var.data_ptr(), other, counter, momentum


class Prepared(NamedTuple):
    """``Operands`` as C takes them.

    Attributes:
        arguments: what the three functions of the backward have in common: addresses, and what is known of them.
        x, grad: as C works on them, perhaps copies.
        stats, relu: as given.
        given: x and grad as they were given.
        kept: other tensors that the addresses belong to.
    """

    arguments: tuple[object, ...]
    x: Tensor
    grad: Tensor
    stats: Tensor
    relu: bool
    given: tuple[Tensor, Tensor]
    kept: tuple[Tensor | None, ...]


def operands(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Prepared:
    """What the three functions of the backward take, from the arguments of ``Operands``."""
    given = x, grad
    layout = _layout(x)
    geometry, channels, most, limit = layout
    if not relu:
        bias = residual = None
    if not geometry or grad.dtype is not x.dtype or (residual is not None and residual.dtype is not x.dtype):
        # Copies: of other strides, and in the widest of the data types.
        dtype = torch.promote_types(x.dtype, grad.dtype)
        dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        x = x.to(dtype).contiguous()
        layout = _layout(x)
        geometry = layout.geometry
    grad = _like(grad, x, layout)
    if residual is not None:
        residual = _like(residual, x, layout)
    if mask is not None:
        mask = _mask_bytes(mask, x)
    if weight is not None:
        weight = _vector(weight, channels)
    if bias is not None:
        bias = _vector(bias, channels)
    arguments = (
        geometry,
        1 if most == 1 else min(most, torch.get_num_threads()),
        x.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        grad.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        relu,
        limit,
        _payload(stats, 2 * channels + 1),
        0 if weight is None else weight.data_ptr(),
        0 if weight is None else _VECTORS[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _VECTORS[bias.dtype],
    )
    return Prepared(arguments, x, grad, stats, relu, given, (mask, residual, weight, bias))


def pack_gradient_sums(
    operands: Prepared, message: Message | None, dtypes: tuple[torch.dtype | None, torch.dtype | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Write ``(sum g, sum g * xhat)`` over all positions into the message.

    g is grad; with ``relu``, zero where the output, computed again bit for bit, is not positive (and not NaN).

    Args:
        operands: From ``operands``.
        message: Its payload is float64 of length ``2C``; or None.
        dtypes: Of the gradients of weight and bias; None for those that are not wanted.

    Returns:
        ``(dweight, dbias)``: ``sum g * xhat`` and ``sum g``.
    """
    stats = operands.stats
    channels = operands.x.shape[1]
    dweight = _gradient(stats, channels, dtypes[0])
    dbias = _gradient(stats, channels, dtypes[1])
    _native.pack_gradient_sums(
        *operands.arguments,
        0 if message is None else _payload(message.payload, 2 * channels),
        0 if dweight is None else dweight.data_ptr(),
        0 if dweight is None else _VECTORS[dweight.dtype],
        0 if dbias is None else dbias.data_ptr(),
        0 if dbias is None else _VECTORS[dbias.dtype],
    )
    if message is not None and message.number:
        write_around(message)
    if dweight is not None and dweight.dtype is not dtypes[0]:
        dweight = dweight.to(dtypes[0])
    if dbias is not None and dbias.dtype is not dtypes[1]:
        dbias = dbias.to(dtypes[1])
    return dweight, dbias


def _gradient(stats: Tensor, channels: int, dtype: torch.dtype | None) -> Tensor | None:
    """Room for a parameter's gradient, of a data type that C can write."""
    return None if dtype is None else stats.new_empty(channels, dtype=dtype if dtype in _VECTORS else _FLOAT64)


def shared_input_gradient(operands: Prepared, shared: Shared, wants_g: bool) -> tuple[Tensor, Tensor | None]:
    """``dx = weight * invstd * (g - m * (sum_g / n + xhat * sum_gxhat / n))``, m the mask, or one.

    Zero where x is not finite and the position is padded.

    Args:
        operands: From ``operands``.
        shared: ``(sum g, sum g * xhat)`` of all ranks, float64 ``(W, 2C)`` in rank order, or their sum.
        wants_g: Whether g is wanted.

    Returns:
        ``(dx, g)``: dx in dtype and layout of x, g in the dtype of grad and the layout of x, or None.
    """
    x, grad = operands.given
    wide = operands.x
    parts = _parts(shared.parts, 2 * wide.shape[1])
    dx = torch.empty_like(wide)
    g = torch.empty_like(wide) if wants_g and operands.relu else None
    _native.input_gradient(
        *operands.arguments,
        parts.data_ptr(),
        parts.shape[0],
        parts.stride(0),
        dx.data_ptr(),
        0 if g is None else g.data_ptr(),
    )
    if wide is not x:
        dx = torch.empty_like(x).copy_(dx)
    return dx, None if not wants_g else _given_back(operands.grad if g is None else g, wide, grad, x)


def _given_back(g: Tensor, wide: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """g in the dtype of grad and the layout of x, instead of those that C worked on."""
    return g if wide is x else torch.empty_like(x, dtype=grad.dtype).copy_(g)


def passed_gradient(operands: Prepared) -> Tensor:
    """g of ``pack_gradient_sums`` under a rectifier: layout of x, dtype of grad. For operands with ``relu``."""
    x, grad = operands.given
    g = torch.empty_like(operands.x)
    _native.relu_gradient(*operands.arguments, g.data_ptr())
    return _given_back(g, operands.x, grad, x)
