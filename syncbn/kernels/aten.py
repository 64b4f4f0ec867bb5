"""The plain forms of ``reference`` on ATen operations: CPU, and any other device.

Element-wise work is done in the *compute dtype*: float64 for float64 input, else float32. Nothing here reads a
value back from a device, and for a given shape, layout and number of threads the results are deterministic.

Two layouts are worked on without a copy. *Columns*: channels are innermost in memory (2-D input,
channels_last, pooled maps), seen as a matrix (elements, C). *Rows*: the default layout, seen as a matrix
(N * C, positions). Inputs larger than the cache are worked on in slices of matrix rows, over which several
operations pass while they are in it; on CPU the only temporaries have the size of a slice.

Why these operations (``benchmarks/kernels.py`` prints the candidates with their errors; the numbers here are for
8x64x56x56 float32 at mean / std of 1000):

* Every element is centred in opmath, ``d = x - pivot``, with the pivot rounded to opmath and its remainder
  folded into per-channel float64 vectors. The output is then off by 7e-7; ``alpha * x + beta`` by 1e-4. Where all
  means are within ``_NEAR`` standard deviations of zero, centring gains no digits; on a CPU, where looking is cheap,
  it is then left out, and one pass with it.
* ``alpha * x + beta`` with values per channel is what ``native_batch_norm`` does in evaluation mode, in one
  vectorized pass over rows; over columns it is one ``addcmul``. The gradient is such a pass over x, and then an
  ``addcmul_`` of the output's gradient.
* Two sums in one read come from ``native_batch_norm_backward`` in evaluation mode with unit variance, which
  returns ``(sum a * (b - pivot), sum a)``, vectorized in both layouts. For the statistics both operands are a
  slice of d. Reading x itself instead saves the slice and loses the variance (16 % off, and more for columns).
  PyTorch's own statistics are a scalar loop for rows, and for columns sum whole columns in float32: quick, but
  their variance is off by 2e-5 here, and in proportion to (mean / std)^2; the slices of d stay at 3e-7. On a
  CPU x itself is read first, about zero; channels with |mean| > std are then done again about a pivot.
* Its float32 partial sums run over at most a slice and at most ``_MAX_RUN`` positions; these add up in float64.
* Broadcast operands that are constant along the inner dimension are vectorized only one at a time, hence ``mul_``
  and ``add_`` where rows cannot have evaluation mode's loop, and columns one ``addcmul``.
* Narrow columns are joined to rows of some hundred values, for longer loops.
* Small inputs are converted to float64 and summed directly: fewer calls, which is all that counts there.

The functions write with ``out=``, so they are for use where autograd does not record (inside a
``torch.autograd.Function``, under ``no_grad``, or on tensors that require no gradient).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from syncbn.channels import along_channels, compute_dtype, has_columns, reduced_dims

__all__ = ["gradient_sums", "input_gradient", "moments", "normalize", "relu_gradient"]

# Bytes of opmath a thread takes at a time: within its share of the cache, large against the cost of a call.
_SLICE_BYTES = 1 << 21
# Longest run of a row that is summed in float32. In longer sums of values with few bits (bfloat16, or float32 far
# from zero) the roundings do not cancel: runs of 16384 lose 1.5e-5 of the variance at mean / std of 1e5.
_MAX_RUN = 1 << 12
# Rows of narrow columns are joined to about this many values: shorter sums, and longer vectorized loops.
_WIDTH = 512
# Up to this many standard deviations off zero, an output that is not centred first is as exact as one that is.
_NEAR = 2.0
# Up to this many elements in all that is read, the fewest calls win over the fewest bytes.
_SMALL = 1 << 15

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def moments(x: Tensor, *, raw: bool = False) -> Tensor:
    """See ``reference``.

    With a local pivot p and ``d = x - p``: ``mean = p + sum(d) / n``, ``m2 = sum(d^2) - sum(d)^2 / n``, and the raw
    sums are ``n * mean`` and ``m2 + n * mean^2`` in float64. The pivot is the mean of an eighth of the elements:
    for any data the squared distance of such a mean from the full mean is at most seven variances, so the
    subtraction costs less than one digit. On a CPU it is zero for the channels with ``|mean| <= std``.
    """
    if x.numel() == 0:
        return x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float64)
    count = x.numel() // x.shape[1]
    if x.numel() <= _SMALL and x.dtype is not torch.float64:
        return _small_moments(x, count, raw)
    sums = _plain_sums(x, None, None) if _may_read(x) and x.dtype is compute_dtype(x) else None
    if sums is not None:
        packed, far = _moments_near_zero(sums, count, raw)
        if far is None:
            return packed
        pivot, total, square = _again_where_far(x, sums, far)
    else:
        pivot, total, square = _centred_sums(x)
    shifted = torch.add(total, pivot, alpha=count)
    if raw:
        first, second = shifted, square.addcmul(pivot, total + shifted)
    else:
        first, second = shifted / count, square.addcmul(total, total, value=-1 / count).clamp_(min=0)
    return torch.cat((pivot.new_full((1,), count), first, second))


def _small_moments(x: Tensor, count: int, raw: bool) -> Tensor:
    """``moments`` in float64 throughout, in as few calls as possible."""
    channels = x.shape[1]
    wide = x.to(torch.float64)
    packed = wide.new_full((2 * channels + 1,), count)
    first, second = packed[1 : channels + 1], packed[channels + 1 :]
    torch.sum(wide, reduced_dims(x), out=first)
    torch.sum(wide.square_(), reduced_dims(x), out=second)
    if not raw:
        first.div_(count)
        second.addcmul_(first, first, value=-count).clamp_(min=0)
    return packed


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
    y = torch.empty_like(x)
    if x.numel() > 0:
        _write_output(y, x, mean, invstd, weight, bias, residual, relu=relu)
    return y


def relu_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``reference``.

    The output is recomputed slice by slice by the very operations of ``normalize``, so the sign is that of the
    forward pass to the last bit, and nothing but x (and the residual) has to be kept for the backward pass.
    """
    masked = torch.empty_like(x)
    if x.numel() > 0:
        _write_output(masked, x, mean, invstd, weight, bias, residual, grad=grad)
    return masked


def _write_output(
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    relu: bool = False,
    grad: Tensor | None = None,
) -> None:
    """Write into out the (rectified) output, or if given ``grad``, masked by the sign of the output."""
    opmath = compute_dtype(x)
    scale = invstd if weight is None else invstd * weight
    near = _is_near(x, mean, invstd)
    pivot = None if near else mean.to(opmath)
    centre = mean if pivot is None else mean - pivot
    shift = (centre * scale).neg_() if bias is None else torch.addcmul(bias, centre, scale, value=-1)
    vectors = [scale.to(opmath), shift.to(opmath)]
    operands = [x, out, *(t for t in (residual, grad) if t is not None)]
    if near and not relu and len(operands) == 2 and _in_one_pass(x, vectors[0], vectors[1], out):
        return
    for piece, target, *extra in _pieces(operands, vectors if pivot is None else [pivot, *vectors]):
        *p, a, b = extra[len(operands) - 2 :]
        y = target if x.dtype is opmath else torch.empty_like(piece, dtype=opmath)
        _scale_and_shift(torch.sub(piece, *p, out=y) if p else piece, a, b, y)
        if residual is not None:
            y += extra[0]
        if relu:
            y.relu_()
        if y is not target:
            target.copy_(y)
        if grad is not None:
            _threshold_backward(extra[len(operands) - 3].to(x.dtype), target, 0, grad_input=target)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See ``reference``."""
    channels = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(2 * channels, dtype=torch.float64)
    if 2 * x.numel() <= _SMALL:
        return _small_gradient_sums(grad, x, mean, invstd)
    opmath = compute_dtype(x)
    pivot = None if _is_near(x, mean, invstd) else mean.to(opmath)
    packed = _plain_sums(x, grad, pivot)
    if packed is None:
        pivot = mean.to(opmath)
        x, columns = _canonical(x)
        dots, totals = [], []
        for g, piece, about in _summands(grad, x, pivot, columns):
            dot, total = _two_sums(g.to(opmath), piece.to(opmath), about, torch.ones_like(about), columns)
            dots.append(dot)
            totals.append(total)
        packed = _add_up(totals, dots, channels)
    total, dot = packed.unbind()
    dot.addcmul_(mean if pivot is None else mean - pivot, total, value=-1).mul_(invstd)
    return packed.view(-1)


def _small_gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """``gradient_sums`` in float64 throughout, in as few calls as possible."""
    packed = mean.new_empty((2, x.shape[1]))
    total, dot = packed.unbind()
    torch.sum(grad, reduced_dims(x), dtype=torch.float64, out=total)
    torch.sum((x - along_channels(mean, x)).mul_(grad), reduced_dims(x), out=dot)
    dot.mul_(invstd)
    return packed.view(-1)


def _summands(grad: Tensor, x: Tensor, pivot: Tensor, columns: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Aligned pieces of the gradient, of the input in its layout, and the pivot of each of their channels or rows.

    The sums of a piece are taken in one call.
    """
    matrices = _matrix(grad, columns), _matrix(x, columns)
    if columns:
        for g, block in zip(*(_blocks(matrix, columns, x.shape[1]) for matrix in matrices), strict=True):
            about = pivot.repeat(block.shape[1] // x.shape[1])
            step = _rows_per_slice(block)
            yield from zip(_cut(g, step), _cut(block, step), repeat(about), strict=False)
        return
    # N * C rows, not N images of C: memory is then read in its order, in half the time when it is cold.
    step = _rows_per_slice(matrices[1])
    yield from zip(*(_cut(t, step) for t in (*matrices, pivot.repeat(len(x)))), strict=True)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """See ``reference``.

    With ``k = a * invstd * sum_gxhat / n`` and ``d = x - pivot`` the work per element is
    ``a * g - k * d - (a * sum_g / n + k * (pivot - mean))``, where ``a = weight * invstd``.
    """
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    opmath = compute_dtype(x)
    mean_g, mean_dot = (sums / count.clamp(min=1)).view(2, -1).unbind()
    near = _is_near(x, mean, invstd) and grad.dtype is opmath
    pivot = None if near else mean.to(opmath)
    scale = invstd if weight is None else invstd * weight
    slope = mean_dot.mul_(invstd).mul_(scale)
    shift = torch.mul(mean if pivot is None else mean - pivot, slope).addcmul_(mean_g, scale, value=-1)
    vectors = [slope.neg_().to(opmath), shift.to(opmath), scale.to(opmath)]
    if near and _in_one_pass(x, vectors[0], vectors[1], dx, grad, vectors[2]):
        return dx
    for piece, out, g, *p, k, b, a in _pieces((x, dx, grad), vectors if pivot is None else [pivot, *vectors]):
        d = out if x.dtype is opmath else torch.empty_like(piece, dtype=opmath)
        _scale_and_shift(torch.sub(piece, *p, out=d) if p else piece, k, b, d)
        d.addcmul_(g.to(opmath), a)
        if d is not out:
            out.copy_(d)
    return dx


def _moments_near_zero(sums: Tensor, count: int, raw: bool) -> tuple[Tensor, Tensor | None]:
    """``moments`` of sums about zero, and which channels need a pivot, or None if none does.

    About zero the variance is off by ``1 + (mean / std)^2`` times the error of a sum, so these are channels with
    ``|mean| > std``: few or none behind a convolution. Whether there are any is read back, so this is for a CPU.
    """
    channels = sums.shape[1]
    total, square = sums.unbind()
    packed = sums.new_full((2 * channels + 1,), count)
    first, second = packed[1 : channels + 1], packed[channels + 1 :]
    torch.div(total, count, out=first)
    torch.addcmul(square, total, first, value=-1, out=second)
    margin = torch.addcmul(second, total, first, value=-1)
    if not margin.min().item() >= 0:  # NaN is far
        return packed, (margin >= 0).logical_not_()
    if raw:
        packed[1:] = sums.view(-1)
    return packed, None


def _again_where_far(x: Tensor, sums: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(pivot, sum d, sum d^2)``: those about zero, and for the channels that are far from it, about a pivot."""
    index = far.nonzero().squeeze(1)
    if len(index) > x.shape[1] // 4:
        return _centred_sums(x)
    pivot = torch.zeros_like(sums[0])
    total, square = sums.unbind()
    for values, again in zip((pivot, total, square), _centred_sums(x.index_select(1, index)), strict=True):
        values[index] = again
    return pivot, total, square


def _plain_sums(x: Tensor, grad: Tensor | None, pivot: Tensor | None) -> Tensor | None:
    """``(sum g, sum g * (x - pivot))`` per channel in float64, in the fewest calls and without a temporary.

    g is x itself, and the pivot zero, where they are None. None for an input whose runs ``_MAX_RUN`` does not cut into
    equal parts, for strides that are neither rows nor columns, and for dtypes that need a conversion.
    """
    columns, opmath = has_columns(x), compute_dtype(x)
    if columns is None or x.dtype is not opmath or (grad is not None and grad.dtype is not opmath):
        return None
    channels = x.shape[1]
    length = x.numel() // channels if columns else x.numel() // (len(x) * channels)
    width = _WIDTH if grad is None else _WIDTH // 4  # two inputs take more of the innermost cache
    outer = math.gcd(length, max(1, width // channels)) if columns else len(x)
    run = length // outer if columns else length
    parts = _equal_parts(run)
    if run > parts * _MAX_RUN:
        return None
    shape: tuple[int, ...]
    if columns:  # narrow columns are joined, and long ones cut: pieces one after the other
        shape, inner = (parts, run // parts, 1, outer * channels), 1
    else:
        shape, inner = (1, outer * channels * parts, run // parts), parts
    one = x.new_ones(outer * channels * inner)
    about = torch.zeros_like(one)
    if pivot is not None:
        about.view(outer, channels, inner).copy_(pivot.view(1, -1, 1))
    operands = [x] if grad is None else [grad, x]
    if columns:
        matrices = (t.movedim(1, -1).contiguous().view(shape).permute(0, 3, 1, 2) for t in operands)
        cut = [(t,) if parts == 1 else t.split(1) for t in matrices]
    else:
        cut = [(t.contiguous().view(shape),) for t in operands]
    dots, totals = [], []
    for g, piece in zip(cut[0], cut[-1], strict=True):
        _, dot, total = _batch_norm_backward(g, piece, None, about, one, None, None, False, 0.0, [False, True, True])
        dots.append(dot)
        totals.append(total)
    return torch.cat(totals + dots).view(2, -1, channels, inner).sum((1, 3), dtype=torch.float64)


def _centred_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(pivot, sum d, sum d^2)`` in float64 for ``d = x - pivot``."""
    x, columns = _canonical(x)
    channels, opmath = x.shape[1], compute_dtype(x)
    matrix = _matrix(x, columns)
    pivot = _rough_mean(matrix, channels, columns)
    parts = 1 if columns else _equal_parts(matrix.shape[1])
    if columns:
        blocks = _blocks(matrix, columns, channels)
    elif parts > 1:
        blocks = (matrix.view(len(matrix) * parts, -1),)
    else:
        blocks = _cut(matrix, _MAX_RUN, 1)
    about = pivot if parts == 1 else pivot.repeat_interleave(parts)
    squares, totals = [], []
    for block in blocks:
        step = min(_rows_per_slice(block), len(block))
        buffer = block.new_empty((step, block.shape[1]), dtype=opmath)
        zero = about.new_zeros(block.shape[1] if columns else step)
        one = torch.ones_like(zero)
        for piece, p in zip(_cut(block, step), _spread(about, block, step, columns), strict=False):
            width = block.shape[1] if columns else len(piece)
            d = torch.sub(piece, p, out=buffer[: len(piece)])
            square, total = _two_sums(d, d, zero[:width], one[:width], columns)
            squares.append(square)
            totals.append(total)
    sums = _add_up(totals, squares, channels * parts)
    if parts > 1:
        sums = sums.view(2, channels, parts).sum(2)
    return pivot.double(), sums[0], sums[1]


def _equal_parts(length: int) -> int:
    """A number of equal parts of a row, each within ``_MAX_RUN``; 1 if the row is within it, or has no such parts."""
    least = -(-length // _MAX_RUN)
    return next((parts for parts in range(least, 2 * least) if length % parts == 0), 1)


def _rough_mean(matrix: Tensor, channels: int, columns: bool) -> Tensor:
    """Mean of about an eighth of the elements of each channel, in opmath."""
    opmath = compute_dtype(matrix)
    if columns:
        return matrix[: -(-len(matrix) // 8)].mean(0, dtype=opmath)
    samples = matrix.view(-1, channels, matrix.shape[1])
    if len(samples) > 1:
        return samples[: -(-len(samples) // 8)].mean((0, 2), dtype=opmath)
    return matrix[:, : -(-matrix.shape[1] // 8)].mean(1, dtype=opmath)


def _two_sums(a: Tensor, b: Tensor, pivot: Tensor, one: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """``(sum a * (b - pivot), sum a)`` per channel, of matrices or of ``(*, channels, positions)``."""
    if a.dim() == 2:
        same = a is b
        a = a.view(1, len(a), 1, -1).permute(0, 3, 1, 2) if columns else a.unsqueeze(0)
        b = a if same else b.view(1, len(b), 1, -1).permute(0, 3, 1, 2) if columns else b.unsqueeze(0)
    _, dot, total = _batch_norm_backward(a, b, None, pivot, one, None, None, False, 0.0, [False, True, True])
    return dot, total


def _add_up(first: list[Tensor], second: list[Tensor], channels: int) -> Tensor:
    """``(2, C)`` sums in float64 of two lists of partial sums, each of which has the channels innermost."""
    return torch.cat(first + second).view(2, -1, channels).sum(1, dtype=torch.float64)


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """``out <- x * scale + shift``, where out may be x; the fastest of three ways."""
    rows = scale.dim() > 1 and scale.shape[-1] == 1
    if rows and scale.dim() == x.dim():  # each row has values of its own
        done = _in_one_pass(x.unsqueeze(0), scale.view(-1), shift.view(-1), out.unsqueeze(0))
    else:
        done = rows and _in_one_pass(x, scale.view(-1), shift.view(-1), out)
    if done:
        return
    if rows and out.stride(-1) == 1:
        torch.mul(x, scale, out=out).add_(shift)
    else:
        torch.addcmul(shift, x, scale, out=out)


def _in_one_pass(
    x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, other: Tensor | None = None, factor: Tensor | None = None
) -> bool:
    """``out <- x * scale + shift (+ other * factor)`` per channel, if there is a quick way for x: one pass (or two).

    For rows it is the loop of evaluation mode, as broadcast operations take two passes, or vectorize only one of them.
    """
    if not _may_read(x) or x.dtype is not scale.dtype or out.stride() != x.stride():
        return False
    if x.dim() > 2 and x.is_contiguous():
        zero, unused = torch.zeros_like(scale), scale.new_empty(0)
        outputs = out, unused, unused
        torch.native_batch_norm(x, scale, shift, zero, torch.ones_like(zero), False, 0.0, 0.0, out=outputs)
        if other is not None and factor is not None:
            out.addcmul_(other, along_channels(factor, x))
        return True
    if x.numel() <= _SMALL or not has_columns(x) or (other is not None and other.stride() != x.stride()):
        return False
    channels = len(scale)
    joined = math.gcd(x.numel() // channels, max(1, _WIDTH // channels))

    def matrix(t: Tensor) -> Tensor:
        return t.movedim(1, -1).view(-1, joined * channels)

    def tiled(vector: Tensor) -> Tensor:
        return vector if joined == 1 else vector.expand(joined, channels).reshape(-1)

    wide = matrix(out)
    torch.addcmul(tiled(shift), matrix(x), tiled(scale), out=wide)
    if other is not None and factor is not None:
        wide.addcmul_(matrix(other), tiled(factor))
    return True


def _may_read(x: Tensor) -> bool:
    """Whether reading a value is cheap and possible: on a CPU, and not while shapes alone are traced."""
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter)


def _is_near(x: Tensor, mean: Tensor, invstd: Tensor) -> bool:
    """Whether all means are within ``_NEAR`` standard deviations of zero, so that centring would gain no digits."""
    if not _may_read(x) or x.dtype is not compute_dtype(x):
        return False
    return torch.linalg.vector_norm(mean * invstd, math.inf).item() <= _NEAR


def _canonical(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy of it in the default layout if it has neither; and whether it has columns."""
    columns = has_columns(x)
    if columns is None:
        x = x.contiguous()
        columns = has_columns(x)
    return x, bool(columns)


def _matrix(t: Tensor, columns: bool) -> Tensor:
    """t as a contiguous matrix, a copy where its strides ask for it."""
    if columns:
        return t.movedim(1, -1).contiguous().view(-1, t.shape[1])
    return t.contiguous().view(t.shape[0] * t.shape[1], -1)


def _blocks(matrix: Tensor, columns: bool, channels: int) -> Sequence[Tensor]:
    """A matrix with narrow columns joined: all but the last few rows as a wider one, and those."""
    joined = max(1, _WIDTH // channels)
    if not columns or joined == 1 or len(matrix) < joined:
        return (matrix,)
    end = len(matrix) // joined * joined
    wide = matrix[:end].view(-1, joined * channels)
    return (wide, matrix[end:]) if end < len(matrix) else (wide,)


def _fits_slice(x: Tensor) -> bool:
    """Whether x is not worth cutting: it is small, or not on a CPU."""
    return x.device.type != "cpu" or x.numel() * compute_dtype(x).itemsize <= _SLICE_BYTES * torch.get_num_threads()


def _rows_per_slice(t: Tensor) -> int:
    """Entries of the first dimension whose opmath values fill a slice; on other devices than a CPU, all."""
    if t.device.type != "cpu":
        return len(t)
    row_bytes = compute_dtype(t).itemsize * (t.numel() // len(t))
    return max(1, _SLICE_BYTES * torch.get_num_threads() // row_bytes)


def _pieces(tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Slices of tensors that are alike in shape, each with the per-channel vectors shaped to fit.

    The strides of the first two tensors agree; the others are copied if theirs differ where slices are cut.
    """
    x = tensors[0]
    columns = None if _fits_slice(x) else has_columns(x)
    if columns is None:
        yield [*tensors, *(along_channels(vector, x) for vector in vectors)]
        return
    blocks = [_blocks(_matrix(t, columns), columns, x.shape[1]) for t in tensors]
    for group in zip(*blocks, strict=True):
        step = _rows_per_slice(group[0])
        spread = [_spread(vector, group[0], step, columns) for vector in vectors]
        yield from map(list, zip(*(_cut(t, step) for t in group), *spread, strict=False))


def _cut(t: Tensor, step: int, dim: int = 0) -> Sequence[Tensor]:
    """Pieces of ``step`` entries along a dimension."""
    return (t,) if step >= t.shape[dim] else torch.split(t, step, dim)


def _spread(vector: Tensor, block: Tensor, step: int, columns: bool) -> Iterable[Tensor]:
    """For each slice of the block, the values of a per-channel vector that broadcast against it."""
    copies = block.shape[1 if columns else 0] // len(vector)
    spread = vector if copies == 1 else vector.repeat(copies)
    return repeat(spread) if columns else _cut(spread.unsqueeze(1), step)
