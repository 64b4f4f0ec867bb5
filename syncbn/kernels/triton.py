"""The per-rank arithmetic of synchronized batch normalization in Triton: CUDA devices.

The functions of `syncbn.kernels.reference`, for float16, bfloat16 and float32 input. Forward and backward over a link
that gives the sum over ranks take three launches each, and nothing else::

    pack_moments             measure             x                -> moments of each split
                             finish_moments      those            -> the message
    (the sum over all ranks)
    normalize_shared         normalize           x, the message   -> y, mean, invstd, count, running statistics

    pack_gradient_sums       sum_gradients       dy, x            -> sums of each split
                             finish_gradients    those            -> the message, dweight, dbias
    (the sum over all ranks)
    shared_input_gradient    input_gradient      dy, x, message   -> dx (and the residual's gradient)

A small input is measured by one program, which writes the message itself. docs/gpu.md says how the work is divided and
why. How many programs share a reduction depends on the shape alone, and no floats are added atomically: results are the
same in every run and on every device. Nothing waits for the device, and nothing is copied to it.

`syncbn.kernels.programs` has the programs. Everything is launched through `_launch`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.kernels import programs
from syncbn.kernels.aten import _has_columns

__all__ = [
    "gradient_sums",
    "input_gradient",
    "moments",
    "normalize",
    "normalize_shared",
    "pack_gradient_sums",
    "pack_moments",
    "relu_gradient",
    "shared_input_gradient",
]

RUN = programs.RUN.value

# Bytes of a tile: 64 for each of 128 threads, in four loads of 16 bytes at a time. Two tensors share them in backward.
_TILE = 8192
# Programs of a reduction, all of which run at once: about four for each multiprocessor of a large GPU.
_PROGRAMS = 512
# Tiles that a program of an element-wise kernel works on at most, for its work per channel to be little beside them.
_TILES = 8
# Elements up to which one program measures the whole input, if it has few channels: a launch less.
_WHOLE = 1 << 14
_WHOLE_CHANNELS = 512
_WHOLE_TILE = 4096
# Elements from which on offsets take 64 bits; below 2^31, for the last tiles reach beyond the end.
_WIDE = (1 << 31) - (1 << 24)


# Multiplications and additions in one, of which nothing here depends that must agree in forward and backward: these
# are written so.
OPTIONS = {"enable_fp_fusion": True}


class _Geometry(NamedTuple):
    """How an input is cut: the arguments of the programs, in their order, and the numbers of blocks and items."""

    images: int
    channels: int
    units: int
    columns: bool
    align: int
    bc: int
    bn: int
    bp: int
    wide: bool
    blocks: int
    items: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.images, self.channels, self.units

    @property
    def tile(self) -> dict[str, Any]:
        return {
            "COLUMNS": self.columns, "ALIGN": self.align, "BC": self.bc, "BN": self.bn, "BP": self.bp,
            "WIDE": self.wide,
        }  # fmt: skip

    def splits(self) -> int:
        """Into how many parts a reduction is divided: programs per block of channels."""
        return max(1, min(self.items, _PROGRAMS // self.blocks))

    def per_split(self) -> int:
        """Items of a program of an element-wise kernel."""
        return max(1, min(_TILES, self.items * self.blocks // (2 * _PROGRAMS)))

    def programs(self) -> int:
        """Programs of an element-wise kernel; one for each block of channels at least."""
        return self.blocks * max(1, -(-self.items // self.per_split()))


@lru_cache(maxsize=4096)
def _cut(
    images: int, channels: int, size: int, columns: bool, elements: int, programs: int, wide_from: int
) -> _Geometry:
    """Tiles of about `elements`, fewer where the input is too small to give all multiprocessors some, or where loads
    are narrow (addresses would fill the registers).

    Channels innermost: up to 128 of them side by side. Else whole images of up to 1024 positions, with as many channels
    as are needed for a tile, so that it is one span of memory; larger images in pieces that leave few lanes idle.
    """
    total = images * channels * size
    row = channels if columns else size
    align = next(a for a in (16, 8, 4, 2, 1) if row % a == 0)
    elements = min(elements, 1024 * align)
    while elements > 1024 and total < elements * programs:
        elements //= 2
    if columns:
        bc, bp = min(_power_of_two(channels), 128, elements), 1
        bn = min(elements // bc, _power_of_two(images))
    else:
        if size <= min(1024, elements):
            bp = _power_of_two(size)
        else:
            pieces = [p for p in (2048, 1024, 512, 256) if p <= elements] or [elements]
            bp = min(pieces, key=lambda p: (-(-size // p) * p, -p))
        bc = min(_power_of_two(channels), max(1, elements // bp), 256)
        bn = min(max(1, elements // (bp * bc)), _power_of_two(images)) if bp >= size else 1
    blocks = -(-channels // bc)
    items = -(-images // bn) * -(-size // bp)
    return _Geometry(images, channels, row // align, columns, align, bc, bn, bp, total >= wide_from, blocks, items)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _geometry(x: Tensor, columns: bool, tensors: int) -> _Geometry:
    channels = x.shape[1]
    elements = max(1, _TILE // (x.itemsize * tensors))
    if columns:
        return _cut(x.numel() // channels, channels, 1, True, elements, _PROGRAMS, _WIDE)
    return _cut(len(x), channels, x.numel() // max(1, len(x) * channels), False, elements, _PROGRAMS, _WIDE)


def _launch(device: torch.device, kernel: Any, number: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Start `number` programs on the device's current stream."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(number,)](*args, num_warps=warps, **OPTIONS, **constants)
    else:
        kernel[(number,)](*args, num_warps=warps, **OPTIONS, **constants)


def probe(device: torch.device) -> None:
    """Compile and launch a kernel that does nothing of use; raises whatever stands in the way."""
    _launch(device, programs.probe, 1, torch.empty(16, device=device), warps=1)


def _laid_out(t: Tensor, columns: bool) -> Tensor:
    """t, or a copy of it with channels innermost or in the default layout; from here on its memory alone counts."""
    if columns:
        return t if t.stride(1) == 1 and t.movedim(1, -1).is_contiguous() else t.movedim(1, -1).contiguous()
    return t.contiguous()


class _Call:
    """An input with the tensors that go with it, laid out alike, and outputs that end up in the layout of x."""

    def __init__(self, x: Tensor, tensors: int = 1) -> None:
        self.x = x
        found = None if x.numel() == 0 else _has_columns(x)
        self.columns = x.dim() == 2 if found is None else found
        self.canonical = found is not None or x.numel() == 0
        self.geometry = _geometry(x, self.columns, tensors)
        self.data = self.laid_out(x)

    def laid_out(self, t: Tensor) -> Tensor:
        if t.numel() == 0 or (self.canonical and t.stride() == self.x.stride()):
            return t
        return _laid_out(t, self.columns)

    def output(self, dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty_like(self.x if self.canonical else self.data, dtype=dtype)

    def restored(self, output: Tensor) -> Tensor:
        """The result with the strides of x."""
        if self.canonical:
            return output
        shaped = output.movedim(-1, 1) if self.columns else output
        return torch.empty_like(self.x, dtype=output.dtype).copy_(shaped)

    def launch(self, kernel: Any, number: int, *args: Any, **constants: Any) -> None:
        _launch(self.x.device, kernel, number, *args, **self.geometry.tile, **constants)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """Local moments per channel: `(count, mean, m2)`, or `(count, sum x, sum x^2)` with `raw`.

    Args:
        x: Input of shape `(N, C, *)`.
        raw: Pack raw sums, which add up over ranks, instead of the mean and the centred sum of squares.

    Returns:
        float64 vector of length `2C + 1`: the elements per channel, then two per channel. Zeros if empty.
    """
    packed = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    _measure(x, packed, 0, 0, headed=False, raw=raw)
    return packed


def pack_moments(x: Tensor, message: Tensor, tag: int, number: int) -> None:
    """Write the raw moments of x into a message: six slots, then `(count, sum x, sum x^2)`, then zeros.

    The slots are `tag, tag^2, 0, 0, broken, broken * number`, where `broken` is 1 if a sum is not finite, else 0.

    Args:
        x: Input of shape `(N, C, *)`, possibly empty.
        message: float64 vector of at least `2C + 7` elements, and at most 1024 more; all of it is written.
        tag: Of the call, below 2^26.
        number: Of this rank, counted from one.
    """
    _measure(x, message, tag, number, headed=True, raw=True)


def _measure(x: Tensor, message: Tensor, tag: int, number: int, *, headed: bool, raw: bool) -> None:
    call = _Call(x)
    cut, channels = call.geometry, x.shape[1]
    flags = {"HEADED": headed, "RAW": raw}
    if x.numel() <= _WHOLE and channels <= _WHOLE_CHANNELS:
        bc = _power_of_two(channels)
        bp = min(cut.bp, max(1, _WHOLE_TILE // bc))
        bn = min(_power_of_two(cut.images), max(1, _WHOLE_TILE // (bc * bp))) if bp == cut.bp else 1
        whole = cut._replace(bc=bc, bn=bn, bp=bp)
        _launch(
            x.device, programs.measure, 1, call.data, message, message, message, message, tag, number, len(message),
            *whole.sizes, 1, **whole.tile, **flags, RUNS=0, WHOLE=True, warps=8,
        )  # fmt: skip
        return
    splits = cut.splits()
    counts = torch.empty(splits, dtype=torch.float64, device=x.device)
    means, squares = torch.empty((2, splits, channels), dtype=torch.float64, device=x.device).unbind()
    call.launch(
        programs.measure, splits * cut.blocks, call.data, counts, means, squares, message, tag, number, len(message),
        *cut.sizes, splits, **flags, RUNS=1 if 0 < cut.items <= splits * RUN else 0, WHOLE=False,
    )  # fmt: skip
    bc, bs = _finish_tile(channels, splits)
    _launch(
        x.device, programs.finish_moments, -(-channels // bc), counts, means, squares, message, number, channels,
        splits, BC=bc, BS=bs, **flags,
    )  # fmt: skip


def _finish_tile(channels: int, splits: int) -> tuple[int, int]:
    """Channels and splits of a tile of partial results: few channels, so that there are many programs."""
    bc = min(_power_of_two(channels), 16)
    return bc, min(_power_of_two(splits), 1024 // bc)


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`y = act((x - mean) * invstd * weight + bias + residual)`, in the dtype and memory layout of x.

    Args:
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`, `1 / sqrt(var + eps)`.
        weight: `(C,)` of any floating dtype, or None for ones.
        bias: `(C,)` of any floating dtype, or None for zeros.
        residual: Added before the activation; same shape as x, or None.
        relu: Whether `act` is the rectifier instead of the identity.

    Returns:
        Tensor with the shape, dtype and layout of x.
    """
    call = _Call(x)
    y = call.output(x.dtype)
    if x.numel() > 0:
        vectors = None, mean.contiguous(), invstd.contiguous(), None
        _normalize(call, y, weight, bias, residual, relu, vectors, None, 0.0)
    return call.restored(y)


def normalize_shared(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    running: Sequence[Any] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`normalize` by the moments of all ranks, and the running statistics moved towards these, in place.

    Args:
        x: Input of shape `(N, C, *)`, possibly empty.
        sums: float64 `(2C + 1,)`: `(count, sum x, sum x^2)` over all ranks.
        weight, bias, residual, relu: As in `normalize`.
        eps: Added to the variance.
        running: `(running_mean, running_var, momentum, num_batches_tracked)`, any of them None, or None: what to move
            and to count, as `syncbn.moments.Running` does.

    Returns:
        `(y, mean, invstd, count)`, of which the last three are float64 of shapes `(C,)`, `(C,)` and `()`.
    """
    call = _Call(x)
    y = call.output(x.dtype)
    stats = torch.empty((2, x.shape[1]), dtype=torch.float64, device=x.device)
    count = torch.empty((), dtype=torch.float64, device=x.device)
    _normalize(call, y, weight, bias, residual, relu, (sums, stats[0], stats[1], count), running, eps)
    return call.restored(y), stats[0], stats[1], count


def _normalize(
    call: _Call,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    vectors: tuple[Tensor | None, ...],
    running: Sequence[Any] | None,
    eps: float,
) -> None:
    mean, var, momentum, batches = running if running is not None else (None, None, 0.0, None)
    cumulative = momentum is None
    if cumulative and batches is None:  # an average over nothing that is counted moves nothing
        mean = var = None
        cumulative = False
    if mean is None or var is None:
        mean = var = None
        cumulative = False
    call.launch(
        programs.normalize, call.geometry.programs(), call.data, y,
        None if residual is None else call.laid_out(residual), _vector(weight), _vector(bias), *vectors,
        mean, var, batches, 0.0 if momentum is None else float(momentum), float(eps),
        *call.geometry.sizes, call.geometry.per_split(), RELU=relu, CUMULATIVE=cumulative,
    )  # fmt: skip


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gradient before the rectifier: `grad` where the recomputed output is positive or NaN, else zero.

    Args:
        grad: Gradient of the loss with respect to the rectified output, shape of x.
        x: Input of shape `(N, C, *)`; the other arguments are those of `normalize`.

    Returns:
        Tensor with the shape and layout of x and the dtype of grad.
    """
    call = _Call(x, 2)
    masked = call.output(grad.dtype)
    if x.numel() > 0:
        stats = mean.contiguous(), invstd.contiguous()
        _input_gradient(call, grad, stats, weight, bias, residual, True, None, None, None, masked)
    return call.restored(masked)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """`(sum g, sum g * xhat)` per channel, with `xhat = (x - mean) * invstd`.

    Args:
        grad: Gradient of the loss with respect to the normalized output, shape of x.
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`.

    Returns:
        float64 vector of length `2C`. Zeros if empty.
    """
    packed = torch.empty(2 * x.shape[1], dtype=torch.float64, device=x.device)
    outputs = packed, None, None
    _sum_gradients(grad, x, mean, invstd, None, None, None, False, outputs, 0, 0, headed=False)
    return packed


def pack_gradient_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    message: Tensor | None,
    tag: int,
    number: int,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Write `(sum g, sum g * xhat)` into a message, and return both as gradients of the parameters.

    Args:
        grad: Gradient of the loss with respect to the layer's output, shape of x; g is what of it passes the rectifier.
        x, mean, invstd, weight, bias, residual, relu: As in `normalize`.
        message: float64 vector of at least `2C + 6` elements, as in `pack_moments` (where nothing is ever broken), or
            None for none.
        tag, number: As in `pack_moments`.
        dtypes: Of the gradients of weight and bias; None for those that are not wanted.

    Returns:
        `(dweight, dbias)`, each of shape `(C,)` or None: `sum g * xhat` and `sum g`.
    """
    dweight, dbias = (None if d is None else torch.empty(x.shape[1], dtype=d, device=x.device) for d in dtypes)
    outputs = message, dweight, dbias
    _sum_gradients(grad, x, mean, invstd, weight, bias, residual, relu, outputs, tag, number, headed=True)
    return dweight, dbias


def _sum_gradients(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    tag: int,
    number: int,
    *,
    headed: bool,
) -> None:
    call = _Call(x, 2)
    cut, channels = call.geometry, x.shape[1]
    splits = cut.splits()
    totals, dots = torch.empty((2, splits, channels), dtype=torch.float64, device=x.device).unbind()
    mean, invstd = mean.contiguous(), invstd.contiguous()
    if not relu:
        weight = bias = residual = None
    call.launch(
        programs.sum_gradients, splits * cut.blocks, call.laid_out(grad), call.data,
        None if residual is None else call.laid_out(residual), _vector(weight), _vector(bias), mean, invstd,
        totals, dots, *cut.sizes, splits, RELU=relu,
    )  # fmt: skip
    bc, bs = _finish_tile(channels, splits)
    _launch(
        x.device, programs.finish_gradients, -(-channels // bc), totals, dots, mean, invstd, *outputs, tag, number,
        0 if outputs[0] is None else len(outputs[0]), channels, splits, BC=bc, BS=bs, HEADED=headed,
    )  # fmt: skip


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """`dx = weight * invstd * (g - sum_g / n - xhat * sum_gxhat / n)`, in the dtype and layout of x.

    Args:
        grad: Gradient of the loss with respect to the normalized output, shape of x.
        x: Input of shape `(N, C, *)`.
        mean: float64 `(C,)`.
        invstd: float64 `(C,)`.
        weight: `(C,)` of any floating dtype, or None for ones.
        sums: float64 `(2C,)`, the result of `gradient_sums` summed over ranks.
        count: float64 scalar tensor, elements per channel over all ranks. Zero counts as one.

    Returns:
        Tensor with the shape, dtype and layout of x.
    """
    return shared_input_gradient(grad, x, mean, invstd, weight, None, None, False, sums, count, False)[0]


def shared_input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    sums: Tensor,
    count: Tensor,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """`input_gradient` of a layer with residual and rectifier; and with `masked` what of grad passes the rectifier.

    Args:
        grad: Gradient of the loss with respect to the layer's output, shape of x.
        x, mean, invstd, weight, bias, residual, relu: As in `normalize`.
        sums, count: As in `input_gradient`.
        masked: Whether the second result is wanted, which is the gradient of the residual under a rectifier.

    Returns:
        `(dx, g)`: the first in the dtype of x, the second in that of grad, or None.
    """
    call = _Call(x, 2)
    dx = call.output(x.dtype)
    passed = call.output(grad.dtype) if masked else None
    if x.numel() > 0:
        stats = mean.contiguous(), invstd.contiguous()
        _input_gradient(call, grad, stats, weight, bias, residual, relu, sums.contiguous(), count, dx, passed)
    return call.restored(dx), None if passed is None else call.restored(passed)


def _input_gradient(
    call: _Call,
    grad: Tensor,
    stats: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: Tensor | None,
    dx: Tensor | None,
    passed: Tensor | None,
) -> None:
    residual = None if residual is None or not relu else call.laid_out(residual)
    call.launch(
        programs.input_gradient, call.geometry.programs(), call.laid_out(grad), call.data, residual,
        _vector(weight), _vector(bias), *stats, sums, count, dx, passed,
        *call.geometry.sizes, call.geometry.per_split(), RELU=relu,
    )  # fmt: skip
