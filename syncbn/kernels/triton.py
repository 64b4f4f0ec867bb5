"""The per-rank arithmetic of synchronized batch normalization in Triton: CUDA devices.

The functions of ``syncbn.kernels.reference``, for float16, bfloat16 and float32 input. Forward and backward over a link
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

``syncbn.kernels.triton_kernels`` has the kernels. Everything is launched through ``_launch``.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.channels import has_columns
from syncbn.kernels import triton_kernels
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Shared

fuses_relu = True

RUN = triton_kernels.RUN.value

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
    """Tiles of about ``elements``, fewer where the input is too small to give all multiprocessors some, or where loads
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
    """Start ``number`` programs on the device's current stream."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(number,)](*args, num_warps=warps, **OPTIONS, **constants)
    else:
        kernel[(number,)](*args, num_warps=warps, **OPTIONS, **constants)


def probe(device: torch.device) -> None:
    """Compile and launch a kernel that does nothing of use; raises whatever stands in the way."""
    _launch(device, triton_kernels.probe, 1, torch.empty(16, device=device), warps=1)


def _laid_out(t: Tensor, columns: bool) -> Tensor:
    """t, or a copy of it with channels innermost or in the default layout; from here on its memory alone counts."""
    if columns:
        return t if t.stride(1) == 1 and t.movedim(1, -1).is_contiguous() else t.movedim(1, -1).contiguous()
    return t.contiguous()


class _Call:
    """An input with the tensors that go with it, laid out alike, and outputs that end up in the layout of x."""

    def __init__(self, x: Tensor, tensors: int = 1) -> None:
        self.x = x
        found = None if x.numel() == 0 else has_columns(x)
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
    """See ``reference``."""
    packed = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    _measure(x, packed, 0, 0, headed=False, raw=raw)
    return packed


def pack_moments(x: Tensor, mask: None, message: Message) -> None:
    """See ``reference``; without a mask."""
    headed = message.number > 0
    _measure(
        x, message.whole if headed else message.payload, message.tag, message.number, headed=headed, raw=message.raw
    )


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
            x.device, triton_kernels.measure, 1, call.data, message, message, message, message, tag, number,
            len(message), *whole.sizes, 1, **whole.tile, **flags, RUNS=0, WHOLE=True, warps=8,
        )  # fmt: skip
        return
    splits = cut.splits()
    counts = torch.empty(splits, dtype=torch.float64, device=x.device)
    means, squares = torch.empty((2, splits, channels), dtype=torch.float64, device=x.device).unbind()
    call.launch(
        triton_kernels.measure, splits * cut.blocks, call.data, counts, means, squares, message, tag, number,
        len(message), *cut.sizes, splits, **flags, RUNS=1 if 0 < cut.items <= splits * RUN else 0, WHOLE=False,
    )  # fmt: skip
    bc, bs = _finish_tile(channels, splits)
    _launch(
        x.device, triton_kernels.finish_moments, -(-channels // bc), counts, means, squares, message, number, channels,
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
    """See ``reference``."""
    call = _Call(x)
    y = call.output(x.dtype)
    if x.numel() > 0:
        vectors = None, mean.contiguous(), invstd.contiguous(), None
        _normalize(call, y, weight, bias, residual, relu, vectors, None, 0.0)
    return call.restored(y)


def normalize_shared(
    x: Tensor,
    mask: None,
    shared: Shared,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    running: Running | None,
) -> tuple[Tensor, Tensor, None]:
    """See ``reference``; of raw sums, without a mask. Running statistics that are no plain vectors move before."""
    if running is not None and not _is_plain(running):
        running.move(shared.moments())
        running = None
    call = _Call(x)
    y = call.output(x.dtype)
    channels = x.shape[1]
    stats = torch.empty(2 * channels + 1, dtype=torch.float64, device=x.device)
    vectors = _summed(shared), stats[:channels], stats[channels:], stats[-1]
    _normalize(call, y, weight, bias, residual, relu, vectors, running, eps)
    return call.restored(y), stats, None


def _summed(shared: Shared) -> Tensor:
    return shared.parts[0] if len(shared.parts) == 1 else shared.sum()


def _is_plain(running: Running) -> bool:
    return all(type(t) is Tensor and t.is_contiguous() for t in (running.mean, running.var) if t is not None)


def _normalize(
    call: _Call,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    vectors: tuple[Tensor | None, ...],
    running: Running | None,
    eps: float,
) -> None:
    mean = var = batches = None
    momentum: float | None = 0.0
    if running is not None:
        mean, var, momentum, batches = running.mean, running.var, running.momentum, running.batches
    cumulative = momentum is None
    if cumulative and batches is None:  # an average over nothing that is counted moves nothing
        mean = var = None
        cumulative = False
    if mean is None or var is None:
        mean = var = None
        cumulative = False
    call.launch(
        triton_kernels.normalize, call.geometry.programs(), call.data, y,
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
    """See ``reference``."""
    call = _Call(x, 2)
    masked = call.output(grad.dtype)
    if x.numel() > 0:
        stats = mean.contiguous(), invstd.contiguous()
        _input_gradient(call, grad, stats, weight, bias, residual, True, None, None, None, masked)
    return call.restored(masked)


operands = Operands


def passed_gradient(operands: Operands) -> Tensor:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, _ = operands
    return relu_gradient(grad, x, *_mean_and_invstd(stats), weight, bias, residual)


def _mean_and_invstd(stats: Tensor) -> tuple[Tensor, Tensor]:
    channels = len(stats) // 2
    return stats[:channels], stats[channels:-1]


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See ``reference``."""
    packed = torch.empty(2 * x.shape[1], dtype=torch.float64, device=x.device)
    outputs = packed, None, None
    stats = mean.contiguous(), invstd.contiguous()
    _sum_gradients(grad, x, stats, None, None, None, False, outputs, 0, 0, headed=False)
    return packed


def pack_gradient_sums(
    operands: Operands, message: Message | None, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, relu = operands
    gradients = tuple(None if d is None else torch.empty(x.shape[1], dtype=d, device=x.device) for d in dtypes)
    headed = message is not None and message.number > 0
    target, tag, number = None, 0, 0
    if message is not None:
        target, tag, number = message.whole if headed else message.payload, message.tag, message.number
    outputs = target, *gradients
    _sum_gradients(grad, x, _mean_and_invstd(stats), weight, bias, residual, relu, outputs, tag, number, headed=headed)
    return gradients


def _sum_gradients(
    grad: Tensor,
    x: Tensor,
    stats: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    outputs: tuple[Tensor | None, ...],
    tag: int,
    number: int,
    *,
    headed: bool,
) -> None:
    call = _Call(x, 2)
    cut, channels = call.geometry, x.shape[1]
    splits = cut.splits()
    totals, dots = torch.empty((2, splits, channels), dtype=torch.float64, device=x.device).unbind()
    if not relu:
        weight = bias = residual = None
    call.launch(
        triton_kernels.sum_gradients, splits * cut.blocks, call.laid_out(grad), call.data,
        None if residual is None else call.laid_out(residual), _vector(weight), _vector(bias), *stats,
        totals, dots, *cut.sizes, splits, RELU=relu,
    )  # fmt: skip
    bc, bs = _finish_tile(channels, splits)
    _launch(
        x.device, triton_kernels.finish_gradients, -(-channels // bc), totals, dots, *stats, *outputs, tag, number,
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
    """See ``reference``."""
    stats = mean.contiguous(), invstd.contiguous()
    return _both_gradients(grad, x, stats, weight, None, None, False, sums.contiguous(), count, False)[0]


def shared_input_gradient(operands: Operands, shared: Shared, wants_g: bool) -> tuple[Tensor, Tensor | None]:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, relu = operands
    return _both_gradients(
        grad, x, _mean_and_invstd(stats), weight, bias, residual, relu, _summed(shared), stats[-1], wants_g
    )


def _both_gradients(
    grad: Tensor,
    x: Tensor,
    stats: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    sums: Tensor,
    count: Tensor,
    wants_g: bool,
) -> tuple[Tensor, Tensor | None]:
    call = _Call(x, 2)
    dx = call.output(x.dtype)
    passed = call.output(grad.dtype) if wants_g else None
    if x.numel() > 0:
        _input_gradient(call, grad, stats, weight, bias, residual, relu, sums, count, dx, passed)
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
        triton_kernels.input_gradient, call.geometry.programs(), call.laid_out(grad), call.data, residual,
        _vector(weight), _vector(bias), *stats, sums, count, dx, passed,
        *call.geometry.sizes, call.geometry.per_split(), RELU=relu,
    )  # fmt: skip
