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

The last program of a reduction of a small input does what ``finish`` does, and a very small one is measured by a single
program, which writes the message itself. docs/gpu.md says how the work is divided and
why. How many programs share a reduction depends on the shape alone, and no floats are added atomically: results are the
same in every run and on every device. Nothing waits for the device, and nothing is copied to it.

``syncbn.kernels.triton_kernels`` has the kernels. Everything is launched through ``_launch``. What a shape leads to is
worked out once (``_layout``), and compiled kernels are kept with it, since Triton takes long to find them again.
"""

from __future__ import annotations

import logging
import sys
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import _torch
from syncbn.channels import has_columns
from syncbn.kernels import triton_kernels
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Shared

fuses_relu = True

RUN = triton_kernels.RUN.value


class Sizes(NamedTuple):
    """How the work is divided, in general.

    Attributes:
        tile: bytes of a tile: 64 for each of 128 threads, in four loads of 16 bytes at a time. Two tensors share them
            in backward.
        programs: of a reduction, all of which run at once: three for each of 132 multiprocessors (H100), nearly four
            for each of 108 (A100); registers let four run. (512, four for each of 132, would leave 80 of an A100's
            to a second round.)
        tiles: that a program of an element-wise kernel works on at most, for its work per channel to be little beside
            them.
        fold: elements up to which the last program of a reduction merges the parts of the others, a launch less; where
            launches take longer than what they launch.
        folded: that it merges then, for each of two results: there are no more parts of its channels. (Of 64 kB, one
            multiprocessor's in a microsecond.)
        whole: elements up to which one program measures the whole input, if it has few channels: a launch less.
        whole_channels, whole_tile: of that program.
        wide: elements from which on offsets take 64 bits; below 2^31, for the last tiles reach beyond the end.
    """

    tile: int = 8192
    programs: int = 396
    tiles: int = 8
    fold: int = 1 << 19
    folded: int = 4096
    whole: int = 1 << 14
    whole_channels: int = 512
    whole_tile: int = 4096
    wide: int = (1 << 31) - (1 << 24)


SIZES = Sizes()

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
    def tile(self) -> tuple[Any, ...]:
        """COLUMNS, ALIGN, BC, BN, BP, WIDE: constants of all kernels that see the input."""
        return self.columns, self.align, self.bc, self.bn, self.bp, self.wide

    def splits(self, sizes: Sizes) -> int:
        """Into how many parts a reduction is divided: programs per block of channels."""
        return max(1, min(self.items, sizes.programs // self.blocks))

    def per_split(self, sizes: Sizes) -> int:
        """Items of a program of an element-wise kernel."""
        return max(1, min(sizes.tiles, self.items * self.blocks // (2 * sizes.programs)))

    def programs(self, sizes: Sizes) -> int:
        """Programs of an element-wise kernel; one for each block of channels at least."""
        return self.blocks * max(1, -(-self.items // self.per_split(sizes)))


def _cut(images: int, channels: int, size: int, columns: bool, elements: int, sizes: Sizes) -> _Geometry:
    """Tiles of about ``elements``, fewer where the input is too small to give all multiprocessors some, or where loads
    are narrow (addresses would fill the registers).

    Channels innermost: up to 128 of them side by side. Else whole images of up to 1024 positions, with as many channels
    as are needed for a tile, so that it is one span of memory; larger images in pieces that leave few lanes idle.
    """
    total = images * channels * size
    row = channels if columns else size
    align = next(a for a in (16, 8, 4, 2, 1) if row % a == 0)
    elements = min(elements, 1024 * align)
    while elements > 1024 and total < elements * sizes.programs:
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
    return _Geometry(images, channels, row // align, columns, align, bc, bn, bp, total >= sizes.wide, blocks, items)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


_COUNTERS = 512  # on a stream: of all blocks of channels, and of each


class _Layout:
    """What a shape with its strides leads to, worked out once.

    Attributes:
        columns: whether the channels are innermost, as they lie or in the copy that is made.
        canonical: whether the input lies so already.
        stride: of the input.
        cut: how the input is cut.
        sizes, tile, wide, splits, per_split, programs: of it.
        reducing: programs of a reduction.
        partials: how many float64 the parts of a reduction take, with the counts of parts.
        finish: programs that merge the parts, and the constants BC and BS of each.
        fold: the constant FOLD: how many parts the last program of a reduction merges at a time; 0 where others do.
        whole: how one program measures the whole input; None if it is too large for one.
        runs: the constant RUNS of ``measure``.
        compiled: kernels that were launched, for ``_launch``.
    """

    __slots__ = (
        "canonical", "columns", "compiled", "cut", "finish", "fold", "partials", "per_split", "programs", "reducing",
        "runs", "sizes", "splits", "stride", "tile", "whole", "wide",
    )  # fmt: skip

    def __init__(self, sizes: Sizes, x: Tensor, tensors: int) -> None:
        found = None if x.numel() == 0 else has_columns(x)
        self.stride = x.stride()
        self.columns = x.dim() == 2 if found is None else found
        self.canonical = found is not None or x.numel() == 0
        channels = x.shape[1]
        elements = max(1, sizes.tile // (x.itemsize * tensors))
        if self.columns:
            cut = _cut(x.numel() // channels, channels, 1, True, elements, sizes)
        else:
            cut = _cut(len(x), channels, x.numel() // max(1, len(x) * channels), False, elements, sizes)
        self.cut, self.sizes, self.tile, self.wide = cut, cut.sizes, cut.tile, cut.wide
        self.splits, self.per_split, self.programs = cut.splits(sizes), cut.per_split(sizes), cut.programs(sizes)
        self.fold = 0
        if 0 < x.numel() <= sizes.fold and cut.blocks < _COUNTERS and cut.bc <= sizes.folded:
            self.splits = min(self.splits, sizes.folded // cut.bc)
            self.fold = min(_power_of_two(self.splits), max(1, 1024 // cut.bc))
        self.reducing = self.splits * cut.blocks
        self.partials = (2 * channels + 1) * self.splits
        if self.fold:
            self.partials += (self.splits + 1) * cut.blocks  # counts of each block, and whether it is finite
        # Few channels of partial results to a program, so that there are many programs: 32 bytes of a row at least.
        bc = min(_power_of_two(channels), max(4, min(16, _power_of_two(channels) // 16)))
        self.finish = -(-channels // bc), (bc, min(_power_of_two(self.splits), 1024 // bc))
        self.runs = 1 if 0 < cut.items <= self.splits * RUN else 0
        self.whole: _Geometry | None = None
        if x.numel() <= sizes.whole and channels <= sizes.whole_channels:
            bc = _power_of_two(channels)
            bp = min(cut.bp, max(1, sizes.whole_tile // bc))
            bn = min(_power_of_two(cut.images), max(1, sizes.whole_tile // (bc * bp))) if bp == cut.bp else 1
            self.whole = cut._replace(bc=bc, bn=bn, bp=bp)
        self.compiled: dict[Any, Any] = {}

    def laid_out(self, t: Tensor) -> Tensor:
        """A tensor of the input's shape, or a copy of it, with the layout of the input or of its copy; from here on
        its memory alone counts.
        """
        if (self.canonical and t.stride() == self.stride) or t.numel() == 0:
            return t
        if self.columns:
            return t if t.stride(1) == 1 and t.movedim(1, -1).is_contiguous() else t.movedim(1, -1).contiguous()
        return t.contiguous()

    def restored(self, output: Tensor, x: Tensor) -> Tensor:
        """The result with the strides of x."""
        if self.canonical:
            return output
        shaped = output.movedim(-1, 1) if self.columns else output
        return torch.empty_like(x, dtype=output.dtype).copy_(shaped)


_known: dict[Any, _Layout] = {}
_MOST = 4096  # layouts to keep


def _layout(x: Tensor, tensors: int) -> _Layout:
    """What the input leads to, where ``tensors`` of its shape are read side by side."""
    key = x.shape, x.stride(), x.dtype, tensors, SIZES
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST:
            _known.clear()
        known = _known[key] = _Layout(SIZES, x, tensors)
    return known


_direct = {"cuda"}  # types of devices on which compiled kernels are launched without Triton's search for them
_logger = logging.getLogger("syncbn")


def _launch(
    layout: _Layout,
    like: Tensor,
    kernel: Any,
    number: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
) -> None:
    """Start ``number`` programs on the current stream of a device.

    Triton finds the compiled kernel by all properties of all arguments, which takes longer than to launch it. Here the
    layout fixes most of them, and those that are left are the key.

    Args:
        layout: of the input.
        like: a tensor on the device.
        kernel: of ``triton_kernels``.
        number: of programs; the same for a layout, a kernel and its constants.
        tensors, numbers, constants: its arguments, in this order.
        warps: of a program.
    """
    device = like.device
    if _torch.is_elsewhere(device):
        with _torch.on_device(device):
            return _launch(layout, like, kernel, number, tensors, numbers, constants, warps)
    key = None
    if device.type in _direct and not layout.wide:  # (an offset that is wide may change the type of a number)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        kinds = [None if t is None else t.dtype for t in tensors]
        low = reduce(or_, addresses) & 15  # code is compiled for multiples of 16, or for others
        lows = low and tuple([address & 15 for address in addresses])
        key = kernel.__name__, device.index, constants, *kinds, lows
        run = layout.compiled.get(key)
        if run is not None:
            try:
                run(addresses, numbers, _torch.raw_stream(device))
                return None
            except (AttributeError, TypeError, ValueError) as error:  # raised before anything is launched
                _launch_as_triton_does(device, error)
    compiled = kernel[(number,)](*tensors, *numbers, *constants, num_warps=warps, **OPTIONS)
    if key is not None and device.type in _direct:
        try:
            layout.compiled[key] = _starter(compiled, number, constants)
        except (AttributeError, TypeError) as error:
            _launch_as_triton_does(device, error)
    return None


_CALL = (
    "self", "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata",
    "launch_enter_hook", "launch_exit_hook", "args",
)  # fmt: skip


def _starter(compiled: Any, number: int, constants: tuple[Any, ...]) -> Any:
    """What starts so many programs of a compiled kernel: a function of addresses, of numbers and of a stream.

    ``compiled[grid]`` is for everybody to use. What it calls takes a third of its time, and is called where it takes
    what it is known to take, and nobody listens to launches.
    """
    documented = compiled[(number, 1, 1)]

    def run(addresses: list[int], numbers: tuple[float, ...], stream: int) -> None:
        documented(*addresses, *numbers, *constants, stream=stream)

    start, knobs = compiled.run, getattr(sys.modules["triton"], "knobs", None)
    code = getattr(type(start).__call__, "__code__", None)
    runtime = getattr(knobs, "runtime", None)
    hooks = [getattr(getattr(runtime, f"launch_{when}_hook", None), "calls", None) for when in ("enter", "exit")]
    if code is None or code.co_varnames[: len(_CALL)] != _CALL or None in hooks:
        return run
    function, metadata, (enter, leave) = compiled.function, compiled.packed_metadata, hooks

    def direct(addresses: list[int], numbers: tuple[float, ...], stream: int) -> None:
        if enter or leave:
            run(addresses, numbers, stream)
        else:
            start(
                number, 1, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *constants
            )  # fmt: skip

    return direct


def _launch_as_triton_does(device: torch.device, error: Exception) -> None:
    """Leave the search for compiled kernels to Triton from now on: this one does not start them as others do."""
    _direct.discard(device.type)
    _logger.info("compiled kernels are not launched directly on %s: %s: %s", device, type(error).__name__, error)


_NOTHING = _Layout(SIZES, torch.empty(0, 1, device="meta"), 1)


def probe(device: torch.device) -> None:
    """Compile and launch a kernel that does nothing of use; raises whatever stands in the way."""
    x = torch.empty(16, device=device)
    _launch(_NOTHING, x, triton_kernels.probe, 1, (x,), (), (), warps=1)


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(like: Tensor) -> Tensor:
    """Zeros, with which the programs of a launch on the current stream find the last one; it leaves zeros.

    Launches on a stream come one after the other. A graph may run on any, beside others: it has zeros of its own, and
    makes them in each of its runs.
    """
    device = like.device
    if _torch.is_capturing(device):
        return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    key = device, _torch.raw_stream(device)
    known = _zeros.get(key)
    if known is None:
        with _torch.outside_modes():
            known = _zeros[key] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return known


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """See ``reference``."""
    packed = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    _measure(x, packed, None, 0, 0, headed=False, raw=raw)
    return packed


def pack_moments(x: Tensor, mask: None, message: Message) -> None:
    """See ``reference``; without a mask."""
    headed = message.number > 0
    target = message.whole if headed else message.payload
    _measure(x, target, message.header, message.tag, message.number, headed=headed, raw=message.raw)


def _measure(
    x: Tensor, message: Tensor, header: Tensor | None, tag: int, number: int, *, headed: bool, raw: bool
) -> None:
    layout = _layout(x, 1)
    data, cut, whole, length = layout.laid_out(x), layout.cut, layout.whole, message.shape[0]
    flags = headed, raw
    if whole is not None:
        _launch(
            layout, x, triton_kernels.measure, 1, (data, None, message, header, None),
            (tag, number, length, *whole.sizes, 1), (*whole.tile, 0, *flags, True, 0), warps=8,
        )  # fmt: skip
        return
    partials, fold = message.new_empty(layout.partials), layout.fold
    _launch(
        layout, x, triton_kernels.measure, layout.reducing,
        (data, partials, message, header, _counters(x) if fold else None),
        (tag, number, length, *layout.sizes, layout.splits), (*layout.tile, layout.runs, *flags, False, fold),
    )  # fmt: skip
    if fold:
        return
    programs, tile = layout.finish
    _launch(
        layout, x, triton_kernels.finish_moments, programs, (partials, message),
        (number, cut.channels, layout.splits), (*tile, *flags),
    )  # fmt: skip


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
    layout = _layout(x, 1)
    data = layout.laid_out(x)
    y = torch.empty_like(data)
    if x.numel() > 0:
        stats = torch.cat([mean, invstd])
        _normalize(layout, data, y, weight, bias, residual, relu, None, stats, None, 0.0)
    return layout.restored(y, x)


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
    """See ``reference``; without a mask. Running statistics that are no plain vectors move before."""
    if running is not None and not _is_plain(running):
        running.move(shared.moments())
        running = None
    layout = _layout(x, 1)
    data = layout.laid_out(x)
    y = torch.empty_like(data)
    stats = shared.parts.new_empty(2 * layout.cut.channels + 1)
    _normalize(layout, data, y, weight, bias, residual, relu, shared, stats, running, eps)
    return layout.restored(y, x), stats, None


_NO_REPORT = None, 0, 0


def _taken(shared: Shared | None) -> tuple[Tensor | None, Tensor | None, tuple[float, int, int], bool]:
    """What ``normalize`` and ``input_gradient`` take of what all ranks have written: ``sums``, ``record``, ``(exchange,
    ranks, distance)`` and ``GATHERED``.
    """
    if shared is None:
        return None, None, (0.0, 0, 0), False
    parts, raw, report = shared
    record, exchange, ranks = _NO_REPORT if report is None else report.taken()
    if raw:
        return parts, record, (float(exchange), ranks, 0), False
    return parts, record, (float(exchange), parts.shape[0], parts.stride(0)), True


def _is_plain(running: Running) -> bool:
    return all(type(t) is Tensor and t.is_contiguous() for t in (running.mean, running.var) if t is not None)


def _normalize(
    layout: _Layout,
    data: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shared: Shared | None,
    stats: Tensor,
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
    sums, record, numbers, gathered = _taken(shared)
    _launch(
        layout, data, triton_kernels.normalize, layout.programs,
        (
            data, y, None if residual is None else layout.laid_out(residual), _vector(weight), _vector(bias),
            sums, stats, mean, var, batches, record,
        ),
        (
            *numbers, 0.0 if momentum is None else float(momentum), float(eps), *layout.sizes, layout.per_split,
        ),
        (*layout.tile, gathered, relu, cumulative),
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
    return _relu_gradient(grad, x, torch.cat([mean, invstd]), weight, bias, residual)


operands = Operands


def passed_gradient(operands: Operands) -> Tensor:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, _ = operands
    return _relu_gradient(grad, x, stats, weight, bias, residual)


def _relu_gradient(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    layout = _layout(x, 2)
    data = layout.laid_out(x)
    masked = _like(data, grad.dtype)
    if x.numel() > 0:
        _input_gradient(layout, grad, data, stats, weight, bias, residual, True, None, None, masked)
    return layout.restored(masked, x)


def _like(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(t) if dtype is t.dtype else torch.empty_like(t, dtype=dtype)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See ``reference``."""
    packed = torch.empty(2 * x.shape[1], dtype=torch.float64, device=x.device)
    outputs = packed, None, None, None
    _sum_gradients(grad, x, torch.cat([mean, invstd]), None, None, None, False, outputs, 0, 0, headed=False)
    return packed


def pack_gradient_sums(
    operands: Operands, message: Message | None, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, relu = operands
    gradients = tuple([None if d is None else stats.new_empty(x.shape[1], dtype=d) for d in dtypes])
    headed = message is not None and message.number > 0
    target, header, tag, number = None, None, 0, 0
    if message is not None:
        target, header = message.whole if headed else message.payload, message.header
        tag, number = message.tag, message.number
    outputs = target, header, *gradients
    _sum_gradients(grad, x, stats, weight, bias, residual, relu, outputs, tag, number, headed=headed)
    return gradients


_NOT_FOLDED = (None,) * 5


def _sum_gradients(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
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
    layout = _layout(x, 2)
    cut = layout.cut
    partials = stats.new_empty(layout.partials)
    if not relu:
        weight = bias = residual = None
    fold, length = layout.fold, 0 if outputs[0] is None else outputs[0].shape[0]
    _launch(
        layout, x, triton_kernels.sum_gradients, layout.reducing,
        (
            layout.laid_out(grad), layout.laid_out(x), None if residual is None else layout.laid_out(residual),
            _vector(weight), _vector(bias), stats, partials,
            *((*outputs, _counters(x)) if fold else _NOT_FOLDED),
        ),
        (tag, number, length, *layout.sizes, layout.splits), (*layout.tile, relu, headed and fold > 0, fold),
    )  # fmt: skip
    if fold:
        return
    programs, tile = layout.finish
    _launch(
        layout, x, triton_kernels.finish_gradients, programs, (partials, stats, *outputs),
        (tag, number, length, cut.channels, layout.splits), (*tile, headed),
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
    stats = torch.cat([mean, invstd, count.view(1)])
    shared = Shared(sums.contiguous()[None], True)
    return _both_gradients(grad, x, stats, weight, None, None, False, shared, False)[0]


def shared_input_gradient(operands: Operands, shared: Shared, wants_g: bool) -> tuple[Tensor, Tensor | None]:
    """See ``reference``; without a mask."""
    grad, x, _, stats, weight, bias, residual, relu = operands
    return _both_gradients(grad, x, stats, weight, bias, residual, relu, shared, wants_g)


def _both_gradients(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shared: Shared,
    wants_g: bool,
) -> tuple[Tensor, Tensor | None]:
    layout = _layout(x, 2)
    data = layout.laid_out(x)
    dx = torch.empty_like(data)
    passed = _like(data, grad.dtype) if wants_g else None
    if x.numel() > 0:
        _input_gradient(layout, grad, data, stats, weight, bias, residual, relu, shared, dx, passed)
    return layout.restored(dx, x), None if passed is None else layout.restored(passed, x)


def _input_gradient(
    layout: _Layout,
    grad: Tensor,
    data: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shared: Shared | None,
    dx: Tensor | None,
    passed: Tensor | None,
) -> None:
    residual = None if residual is None or not relu else layout.laid_out(residual)
    sums, record, numbers, gathered = _taken(shared)
    _launch(
        layout, data, triton_kernels.input_gradient, layout.programs,
        (
            layout.laid_out(grad), data, residual, _vector(weight), _vector(bias), stats, sums, dx, passed, record,
        ),
        (*numbers, *layout.sizes, layout.per_split), (*layout.tile, gathered, relu),
    )  # fmt: skip
