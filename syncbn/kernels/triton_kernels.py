# mypy: ignore-errors
# ruff: noqa: SIM102, PIE808
"""The Triton programs of ``syncbn.kernels.triton``: what one block of threads does.

All programs see the input the same way, as ``(images, channels, size)`` with offsets

    (image * channels + channel) * size + position

which is the default layout; with ``size = 1`` it is a matrix ``(elements, C)``, channels innermost (``COLUMNS``). A
*tile* is ``BC`` channels by ``BN`` images of ``BP`` positions, seen as ``(BC, BN * BP)``; an *item* is the place of a
tile along images and positions. A program works on one block of channels, and on the items of one *split*.

``units * ALIGN`` is the length of a row of memory (the size, or the channels with ``COLUMNS``). Written so, it tells
the compiler that rows begin at multiples of ``ALIGN``; the compiler loads 16 bytes at a time where ``ALIGN`` is large
enough. ``WIDE`` makes all offsets 64 bits wide.

Reductions: each lane of a tile adds up to ``RUN`` values in float32, about a pivot that is a mean of a ``RUN``-th of
them or more. Then the tile is summed in float32, and all further sums are float64, in an order that the shape alone
fixes. No element is converted to float64: that would cost more than the memory.
"""

import triton
import triton.language as tl

from syncbn import wire

HEAD = tl.constexpr(wire.SLOTS)  # slots in front of a message's payload
HEADER = tl.constexpr(wire.HEAD)  # float64 of the header in front of these, where messages are gathered
BUCKET = tl.constexpr(1024)  # a message is never longer than its content by more than this
RUN = tl.constexpr(32)
UP, DOWN = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)  # powers of two, which are exact in float32 as well


@triton.jit
def _tile(
    item, block, images, channels, size, BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr
):
    """Offset of a tile's first element, the other elements' distances from it, their mask, and elements per channel."""
    index_type: tl.constexpr = tl.int64 if WIDE else tl.int32
    item = tl.cast(item, index_type)
    pieces = tl.cdiv(size, BP)
    image = item // pieces * BN
    position = item % pieces * BP
    channel = tl.cast(block, index_type) * BC
    c = tl.arange(0, BC).to(index_type)
    q = tl.arange(0, BN * BP)
    n = (q // BP).to(index_type)
    p = (q % BP).to(index_type)
    start = (image * channels + channel) * size + position
    distances = (c * size)[:, None] + (n * (channels * size) + p)[None, :]
    mask = (channel + c < channels)[:, None] & ((image + n < images) & (position + p < size))[None, :]
    valid = tl.minimum(images - image, BN) * tl.minimum(size - position, BP)
    return start, distances, mask, valid.to(tl.int32)


@triton.jit
def _number_of_items(images, size, BN: tl.constexpr, BP: tl.constexpr):
    return tl.cdiv(images, BN) * tl.cdiv(size, BP)


@triton.jit
def _reciprocal(n):
    """``1 / n`` in float64 for a count, and 1 for zero, without a division, which has twenty instructions: Newton."""
    rough = 1.0 / n.to(tl.float32)
    r = rough.to(tl.float64)
    r = r * (2.0 - n * r)
    r = r * (2.0 - n * r)
    return tl.where(rough < 1e30, r, 1.0)  # (of what was not float64, lest the compiler compare that)


@triton.jit
def _inverse_root(v):
    """``1 / sqrt(v)`` in float64, to 1e-13, likewise by Newton's method; v may be beyond what float32 holds."""
    rough = v.to(tl.float32)
    large = rough * DOWN > 1
    small = rough * UP < 1
    v = v * tl.where(large, DOWN * DOWN, tl.where(small, UP * UP, 1.0))
    r = tl.rsqrt(v.to(tl.float32)).to(tl.float64)
    r = tl.fma(r, tl.fma(v * r, -0.5 * r, 0.5), r)
    return r * tl.where(large, DOWN, tl.where(small, UP, 1.0))


@triton.jit
def _once(values):
    """The same, computed once for each channel and handed to all threads that need it.

    The compiler would have each thread compute the values of all its channels, and float64 is slow on most devices. It
    does so for what is cheap to load and to compute, but not across a gather, which takes values of other threads.
    """
    return tl.gather(values, tl.arange(0, values.shape[0]), 0)


@triton.jit
def _is_finite(values):
    return values - values == 0


@triton.jit
def _at_least_zero(values):
    return tl.where(values < 0, 0.0, values)  # NaN stays


@triton.jit
def _run_moments(
    x, block, first, step, end, images, channels, size,
    BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of the items ``first, first + step, ...`` below ``end``.

    At most ``RUN`` of them.
    """
    start, distances, mask, valid = _tile(first, block, images, channels, size, BC, BN, BP, WIDE)
    values = tl.load(x + start + distances, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    pivot = tl.sum(values, 1) / valid
    total = tl.zeros([BC, BN * BP], tl.float32)
    square = tl.zeros([BC, BN * BP], tl.float32)
    count = tl.full([], 0, tl.int32)
    for item in range(first, end, step):
        start, distances, mask, valid = _tile(item, block, images, channels, size, BC, BN, BP, WIDE)
        values = tl.load(x + start + distances, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        d = tl.where(mask, values - pivot[:, None], 0.0)
        total += d
        square += d * d
        count += valid
    n = count.to(tl.float64)
    sum_d = _once(tl.sum(total, 1)).to(tl.float64)
    mean_d = sum_d * _reciprocal(n)
    m2 = _at_least_zero(_once(tl.sum(square, 1)).to(tl.float64) - sum_d * mean_d)
    return n, _once(pivot).to(tl.float64) + mean_d, m2


@triton.jit
def _wide(values):
    """As float64, half types by way of float32, which is how devices convert them."""
    if values.dtype.scalar != tl.float64:
        values = values.to(tl.float32).to(tl.float64)
    return values


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """float64 in another dtype, likewise."""
    if dtype != tl.float64:
        values = values.to(tl.float32).to(dtype)
    return values


@triton.jit
def _split_moments(
    x, block, split, splits, images, channels, size,
    BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of one split: items ``split, split + splits, ...``."""
    items = _number_of_items(images, size, BN, BP)
    if RUNS == 1:
        n, mean, m2 = _run_moments(x, block, split, splits, items, images, channels, size, BC, BN, BP, WIDE)
    else:  # none, or many
        n = tl.full([], 0.0, tl.float64)
        mean = tl.zeros([BC], tl.float64)
        m2 = tl.zeros([BC], tl.float64)
        for first in range(split, items, splits * RUN):
            end = tl.minimum(first + splits * RUN, items)
            n_run, mean_run, m2_run = _run_moments(
                x, block, first, splits, end, images, channels, size, BC, BN, BP, WIDE
            )
            union = n + n_run
            delta = mean_run - mean
            share = n_run * _reciprocal(union)
            mean += delta * share
            m2 += m2_run + delta * delta * (n * share)
            n = union
    return n, mean, m2


@triton.jit
def _write_head(message, header, tag, number, length, content, broken):
    """The slots in front of the payload, and zeros behind it; the header, if there is one, in front of all."""
    if header is not None:
        place = tl.arange(0, HEADER)
        tl.store(message - HEADER + place, tl.load(header + place))
    slot = tl.arange(0, 8)
    t = tl.cast(tag, tl.float64)
    values = tl.where(slot == 0, t, 0.0)
    values = tl.where(slot == 1, t * t, values)
    values = tl.where(slot == 4, broken, values)
    values = tl.where(slot == 5, broken * tl.cast(number, tl.float64), values)
    tl.store(message + slot, values, mask=slot < HEAD)
    tail = content + tl.arange(0, BUCKET)
    tl.store(message + tail, tl.zeros([BUCKET], tl.float64), mask=tail < length)


@triton.jit
def _write_pair(target, first, second, place, inside, distance):
    tl.store(target + place, first, mask=inside)
    tl.store(target + distance + place, second, mask=inside)


@triton.jit
def _read_pair(source, place, inside, distance):
    first = tl.load(source + place, mask=inside, other=0.0)
    return first, tl.load(source + distance + place, mask=inside, other=0.0)


@triton.jit
def _report(record, sums, exchange, ranks):
    """Write to the host which exchange it was, and its slots, where they say that the host must look.

    That is where ranks differ, refuse, or are not finite. Memory of the host, which only one program writes: the slots
    first, for the host waits for the number of the exchange. A record that nobody has read yet stays.
    """
    slots = sums - HEAD
    t = tl.load(slots)
    differ = tl.load(slots + 1) * tl.cast(ranks, tl.float64) != t * t
    if differ | (tl.load(slots + 2) != 0) | (tl.load(slots + 4) != 0):
        slot = tl.arange(0, 8)
        empty = tl.load(record + slot * 0) == 0  # (a mask: a branch around the barrier could divide the threads)
        values = tl.load(slots + slot, mask=slot < HEAD, other=0.0)
        tl.store(record + 1 + slot, values, mask=(slot < HEAD) & empty)
        tl.debug_barrier()
        tl.store(record + slot, exchange + slot * 0.0, mask=(slot == 0) & empty)


@triton.jit
def _report_each(record, parts, distance, exchange, ranks):
    """``_report`` where each rank's message was gathered: all headers and slots, if the host must look."""
    fronts = parts - HEAD - HEADER
    word = tl.arange(0, 2 * HEADER)
    in_header = word < HEADER
    first = tl.load(fronts.to(tl.pointer_type(tl.int64), bitcast=True) + word, mask=in_header, other=0)
    look = tl.full([], 0, tl.int32)
    for rank in range(0, ranks):
        front = fronts + rank * distance
        header = tl.load(front.to(tl.pointer_type(tl.int64), bitcast=True) + word, mask=in_header, other=0)
        said = (tl.load(front + HEADER + 2) != 0) | (tl.load(front + HEADER + 4) != 0)
        look += tl.max((header != first).to(tl.int32), 0) + said.to(tl.int32)
    if look > 0:
        empty = tl.load(record + word * 0) == 0
        for rank in range(0, ranks):
            mask = word < HEADER + HEAD
            values = tl.load(fronts + rank * distance + word, mask=mask, other=0.0)
            tl.store(record + 1 + rank * (HEADER + HEAD) + word, values, mask=mask & empty)
        tl.debug_barrier()
        tl.store(record + word, exchange + word * 0.0, mask=(word == 0) & empty)


@triton.jit
def _any_broken(first, second, inside):
    broken = inside & ~(_is_finite(first) & _is_finite(second))
    return tl.max(broken.to(tl.int32), 0)


@triton.jit
def _is_last(counter, programs):
    """Whether this is the last of so many programs to come here; what the others wrote before is to be seen then.

    A counter is zero before and after. Each program releases what it wrote and acquires what others did: the barriers
    extend that from the thread that counts to all threads of the program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _merge_splits(partials, counts, c, inside, channels, splits, BS: tl.constexpr, RAW: tl.constexpr):
    """Moments of all splits of some channels: count and means and squared deviations, or with ``RAW`` sums."""
    means = partials
    squares = partials + splits * channels
    n = tl.full([], 0.0, tl.float64)
    first = tl.zeros_like(c).to(tl.float64)
    second = tl.zeros_like(c).to(tl.float64)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        place = s[:, None] * channels + c[None, :]
        mask = (s < splits)[:, None] & inside[None, :]
        count = tl.load(counts + s, mask=s < splits, other=0.0)
        weighted = count[:, None] * tl.load(means + place, mask=mask, other=0.0)
        n += tl.sum(count, 0)
        first += tl.sum(weighted, 0)
        if RAW:
            mean = tl.load(means + place, mask=mask, other=0.0)
            second += tl.sum(tl.load(squares + place, mask=mask, other=0.0) + weighted * mean, 0)
    if not RAW:
        first = first * _reciprocal(n)
        for start in range(0, splits, BS):
            s = start + tl.arange(0, BS)
            place = s[:, None] * channels + c[None, :]
            mask = (s < splits)[:, None] & inside[None, :]
            count = tl.load(counts + s, mask=s < splits, other=0.0)
            d = tl.load(means + place, mask=mask, other=0.0) - first[None, :]
            second += tl.sum(tl.load(squares + place, mask=mask, other=0.0) + count[:, None] * d * d, 0)
    return n, first, second


@triton.jit(do_not_specialize=["tag", "number", "length", "images", "channels", "units", "splits"])
def measure(
    x, partials, message, header, counters, tag, number, length, images, channels, units, splits,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, RUNS: tl.constexpr, HEADED: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Moments of each split; with ``WHOLE``, the one program there is writes the message at once.

    ``partials`` is ``(means[splits, C], squares[splits, C], counts[blocks, splits], broken[blocks])``. With ``FOLD``,
    the last program of each block of channels merges its splits, so many at a time, and the last of these writes the
    head; ``counters`` are one for the blocks, and one for each block. Without it, ``counts`` is that of one block.
    """
    if COLUMNS:
        channels = units * ALIGN
        size = 1
    else:
        size = units * ALIGN
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    n, mean, m2 = _split_moments(x, block, split, splits, images, channels, size, BC, BN, BP, WIDE, RUNS)
    c = block * BC + tl.arange(0, BC)
    inside = c < channels
    if WHOLE:
        first, second = mean, m2
        if RAW:
            first = n * mean
            second = m2 + first * mean
        payload = message
        if HEADED:
            payload = message + HEAD
            broken = _any_broken(first, second, inside).to(tl.float64)
            _write_head(message, header, tag, number, length, HEAD + 1 + 2 * channels, broken)
        tl.store(payload, n)
        _write_pair(payload + 1, first, second, c, inside, channels)
    else:
        _write_pair(partials, mean, m2, split * channels + c, inside, splits * channels)
        counts = partials + 2 * splits * channels
        if FOLD:
            # Of each block its own: nobody waits for the programs of another one.
            tl.store(counts + block * splits + split, n)
            if _is_last(counters + 1 + block, splits):
                total, first, second = _merge_splits(
                    partials, counts + block * splits, c, inside, channels, splits, FOLD, RAW
                )
                payload = message
                if HEADED:
                    payload = message + HEAD
                _write_pair(payload + 1, first, second, c, inside, channels)
                broken = counts + blocks * splits
                tl.store(broken + block, _any_broken(first, second, inside).to(tl.float64))
                if _is_last(counters, blocks):
                    if HEADED:
                        some = tl.full([], 0.0, tl.float64)
                        for other in range(0, blocks):
                            some = tl.maximum(some, tl.load(broken + other))
                        _write_head(message, header, tag, number, length, HEAD + 1 + 2 * channels, some)
                    tl.store(payload, total)
        else:
            if block == 0:
                tl.store(counts + split, n)
            if HEADED:
                if tl.program_id(0) == 0:
                    _write_head(message, header, tag, number, length, HEAD + 1 + 2 * channels, 0.0)


@triton.jit(do_not_specialize=["number", "channels", "splits"])
def finish_moments(
    partials, message, number, channels, splits,
    BC: tl.constexpr, BS: tl.constexpr, HEADED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Merge the moments of all splits, and write the payload of the message."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    counts = partials + 2 * splits * channels
    n, first, second = _merge_splits(partials, counts, c, inside, channels, splits, BS, RAW)
    payload = message
    if HEADED:
        payload = message + HEAD
        # Many programs may store here, all the same: the zeros were stored by the kernel before.
        broken = _any_broken(first, second, inside) > 0
        tl.store(message + 4, 1.0, mask=broken)
        tl.store(message + 5, tl.cast(number, tl.float64), mask=broken)
    if tl.program_id(0) == 0:
        tl.store(payload, n)
    _write_pair(payload + 1, first, second, c, inside, channels)


@triton.jit
def _read_sums(sums, c, inside, channels, eps):
    """Count, mean, sum of squared deviations and inverse deviation out of ``(n, S[C], Q[C])``."""
    n = tl.load(sums)
    total = tl.load(sums + 1 + c, mask=inside, other=0.0)
    squares = tl.load(sums + 1 + channels + c, mask=inside, other=0.0)
    share = _reciprocal(n)
    mean = total * share
    m2 = _at_least_zero(squares - mean * total)
    return n, mean, m2, _inverse_root(m2 * share + eps)


@triton.jit
def _merge(parts, distance, ranks, c, inside, channels, eps):
    """The same out of each rank's ``(n, mean[C], m2[C])``, merged in rank order."""
    n = tl.full([], 0.0, tl.float64)
    mean = tl.zeros_like(c).to(tl.float64)
    m2 = tl.zeros_like(c).to(tl.float64)
    for rank in range(0, ranks):
        part = parts + rank * distance
        other = tl.load(part)
        delta = tl.load(part + 1 + c, mask=inside, other=0.0) - mean
        union = n + other
        share = other * _reciprocal(union)
        mean += delta * share
        m2 += tl.load(part + 1 + channels + c, mask=inside, other=0.0) + delta * delta * (n * share)
        n = union
    return n, mean, m2, _inverse_root(m2 * _reciprocal(n) + eps)


@triton.jit
def _statistics(sums, distance, ranks, c, inside, channels, eps, GATHERED: tl.constexpr):
    if GATHERED:
        n, mean, m2, deviation = _merge(sums, distance, ranks, c, inside, channels, eps)
    else:
        n, mean, m2, deviation = _read_sums(sums, c, inside, channels, eps)
    return n, mean, m2, deviation


@triton.jit
def _look(record, sums, distance, exchange, ranks, GATHERED: tl.constexpr):
    if GATHERED:
        _report_each(record, sums, distance, exchange, ranks)
    else:
        _report(record, sums, exchange, ranks)


@triton.jit
def _affine(mean, invstd, weight, bias, c, inside):
    """Pivot, scale and shift in float32: ``(x - pivot) * scale + shift`` is the output. The same bits each time."""
    pivot = mean.to(tl.float32)
    rest = (pivot.to(tl.float64) - mean).to(tl.float32)
    scale = invstd.to(tl.float32)
    if weight is not None:
        scale = scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return pivot, scale, tl.fma(rest, scale, shift)


@triton.jit
def _output(values, pivot, scale, shift, residual, place, mask, EVICT: tl.constexpr):
    """What the layer gives before its activation; forward and backward must agree on its sign to the last bit."""
    d = values - pivot[:, None]
    y = tl.fma(d, tl.broadcast_to(scale[:, None], d.shape), tl.broadcast_to(shift[:, None], d.shape))
    if residual is not None:
        y += tl.load(residual + place, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    return y


@triton.jit
def _move(running, values, keep, momentum, c, inside):
    """``running += momentum * (values - running)``, in float32 for float32 and in float64 for others."""
    old = tl.load(running + c, mask=inside, other=0.0)
    if running.dtype.element_ty == tl.float32:
        work: tl.constexpr = tl.float32
    else:
        work: tl.constexpr = tl.float64
    weight = tl.zeros_like(values).to(work) + tl.cast(momentum, work)
    start = _wide(old).to(work)
    moved = _wide(tl.fma(weight, values.to(work) - start, start))
    tl.store(running + c, tl.where(keep, old, _rounded(moved, running.dtype.element_ty)), mask=inside)


@triton.jit
def _remember(running_mean, running_var, n, mean, m2, momentum, c, inside):
    """Move the running statistics, but for an empty batch, and for channels that are not finite in their dtype."""
    var = m2 * _reciprocal(n - 1.0)
    rounded_mean = _rounded(mean, running_mean.dtype.element_ty)
    rounded_var = _rounded(var, running_var.dtype.element_ty)
    keep = ~tl.where(n > 0, _is_finite(rounded_mean) & _is_finite(rounded_var), False)
    _move(running_mean, mean, keep, momentum, c, inside)
    _move(running_var, var, keep, momentum, c, inside)


@triton.jit(do_not_specialize=["ranks", "distance", "images", "channels", "units", "per_split"])
def normalize(
    x, y, residual, weight, bias, sums, stats, running_mean, running_var, batches, record,
    exchange: tl.float64, ranks, distance, momentum: tl.float64, eps: tl.float64, images, channels, units, per_split,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, GATHERED: tl.constexpr, RELU: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Write the output; with ``sums``, first derive mean and invstd, write them, and move the running statistics.

    ``stats`` is ``(mean[C], invstd[C], n)``, read or written. ``sums`` is the sum over ranks, or with ``GATHERED`` the
    first of ``ranks`` triples, ``distance`` float64 apart. With a ``record``, what the slots in front of them
    say of ranks that disagree is written there. The items are taken from the last to the first: the last were read last
    before, and may still be in the cache.
    """
    if COLUMNS:
        channels = units * ALIGN
        size = 1
    else:
        size = units * ALIGN
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    inside = c < channels
    if sums is not None:
        n, mu, m2, deviation = _statistics(sums, distance, ranks, c, inside, channels, eps, GATHERED)
        if split == 0:
            _write_pair(stats, mu, deviation, c, inside, channels)
            if running_mean is not None:
                if not CUMULATIVE:
                    _remember(running_mean, running_var, n, mu, m2, momentum, c, inside)
        if tl.program_id(0) == 0:
            tl.store(stats + 2 * channels, n)
            if record is not None:
                _look(record, sums, distance, exchange, ranks, GATHERED)
            if batches is not None:
                counted = tl.load(batches) + (n > 0).to(tl.int64)
                if CUMULATIVE:
                    # By this program for all channels: another one might read the counter before or after the store.
                    weight_of_new = _reciprocal(counted.to(tl.float64))
                    for other in range(0, blocks):
                        k = other * BC + tl.arange(0, BC)
                        _, mu_k, m2_k, _ = _statistics(sums, distance, ranks, k, k < channels, channels, eps, GATHERED)
                        _remember(running_mean, running_var, n, mu_k, m2_k, weight_of_new, k, k < channels)
                    tl.debug_barrier()  # each warp has read the counter, before one of them stores it
                tl.store(batches, counted)
    else:
        mu, deviation = _read_pair(stats, c, inside, channels)
    pivot, scale, shift = _affine(mu, deviation, weight, bias, c, inside)
    pivot, scale, shift = _once(pivot), _once(scale), _once(shift)
    items = _number_of_items(images, size, BN, BP)
    for k in range(split * per_split, tl.minimum((split + 1) * per_split, items)):
        start, distances, mask, _ = _tile(items - 1 - k, block, images, channels, size, BC, BN, BP, WIDE)
        place = start + distances
        values = tl.load(x + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        out = _output(values, pivot, scale, shift, residual, place, mask, "evict_first")
        if RELU:
            out = tl.where(out <= 0, 0.0, out)  # NaN stays
        tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _masked_gradient(g, out, like: tl.constexpr):
    """The gradient before the rectifier: zero where the output, as it was stored, is not positive."""
    return tl.where(out.to(like).to(tl.float32) <= 0, 0.0, g)


@triton.jit
def _finish(
    partials, stats, message, dweight, dbias, c, inside, channels, splits, BS: tl.constexpr, HEADED: tl.constexpr
):
    """Add up the sums of all splits of some channels; write the payload, and the gradients of the parameters."""
    total = tl.zeros_like(c).to(tl.float64)
    dot = tl.zeros_like(c).to(tl.float64)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        place = s[:, None] * channels + c[None, :]
        mask = (s < splits)[:, None] & inside[None, :]
        some_g, some_gd = _read_pair(partials, place, mask, splits * channels)
        total += tl.sum(some_g, 0)
        dot += tl.sum(some_gd, 0)
    mu, deviation = _read_pair(stats, c, inside, channels)
    pivot = mu.to(tl.float32).to(tl.float64)
    dot = (dot + (pivot - mu) * total) * deviation
    if message is not None:
        payload = message
        if HEADED:
            payload = message + HEAD
        _write_pair(payload, total, dot, c, inside, channels)
    if dweight is not None:
        tl.store(dweight + c, _rounded(dot, dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + c, _rounded(total, dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tag", "number", "length", "images", "channels", "units", "splits"])
def sum_gradients(
    grad, x, residual, weight, bias, stats, partials, message, header, dweight, dbias, counters,
    tag, number, length, images, channels, units, splits,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, RELU: tl.constexpr, HEADED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """``sum g`` and ``sum g * (x - pivot)`` of each split, the pivot being the mean rounded to float32.

    ``partials`` is ``(sum g [splits, C], sum g (x - pivot) [splits, C])``. With ``FOLD``, the last program of each
    block of channels does what ``finish_gradients`` does, for so many splits at a time; ``counters`` has one for each.
    """
    if COLUMNS:
        channels = units * ALIGN
        size = 1
    else:
        size = units * ALIGN
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    inside = c < channels
    mu, deviation = _read_pair(stats, c, inside, channels)
    pivot, scale, shift = _affine(mu, deviation, weight, bias, c, inside)
    pivot = _once(pivot)
    if RELU:
        scale, shift = _once(scale), _once(shift)
    items = _number_of_items(images, size, BN, BP)
    sum_g = tl.zeros([BC], tl.float64)
    sum_gd = tl.zeros([BC], tl.float64)
    for first in range(split, items, splits * RUN):
        total = tl.zeros([BC, BN * BP], tl.float32)
        dot = tl.zeros([BC, BN * BP], tl.float32)
        for item in range(first, tl.minimum(first + splits * RUN, items), splits):
            start, distances, mask, _ = _tile(item, block, images, channels, size, BC, BN, BP, WIDE)
            place = start + distances
            g = tl.load(grad + place, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            values = tl.load(x + place, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if RELU:
                out = _output(values, pivot, scale, shift, residual, place, mask, "evict_last")
                g = _masked_gradient(g, out, x.dtype.element_ty)
            total += g
            dot += g * (values - pivot[:, None])
        sum_g += _once(tl.sum(total, 1)).to(tl.float64)
        sum_gd += _once(tl.sum(dot, 1)).to(tl.float64)
    _write_pair(partials, sum_g, sum_gd, split * channels + c, inside, splits * channels)
    if FOLD:
        if HEADED:
            if tl.program_id(0) == 0:
                _write_head(message, header, tag, number, length, HEAD + 2 * channels, 0.0)
        if _is_last(counters + block, splits):
            _finish(partials, stats, message, dweight, dbias, c, inside, channels, splits, FOLD, HEADED)


@triton.jit(do_not_specialize=["tag", "number", "length", "channels", "splits"])
def finish_gradients(
    partials, stats, message, header, dweight, dbias, tag, number, length, channels, splits,
    BC: tl.constexpr, BS: tl.constexpr, HEADED: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all splits; write the message, and the gradients of the parameters."""
    if HEADED:
        if tl.program_id(0) == 0:
            _write_head(message, header, tag, number, length, HEAD + 2 * channels, 0.0)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < channels
    _finish(partials, stats, message, dweight, dbias, c, inside, channels, splits, BS, HEADED)


@triton.jit(do_not_specialize=["ranks", "distance", "images", "channels", "units", "per_split"])
def input_gradient(
    grad, x, residual, weight, bias, stats, sums, dx, dresidual, record,
    exchange: tl.float64, ranks, distance, images, channels, units, per_split,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, GATHERED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """``dx``, and the gradient behind the rectifier, whichever is asked for; items from the last to the first.

    ``sums``, ``ranks``, ``distance`` and ``record``: as in ``normalize``; what is gathered is added up.
    """
    if COLUMNS:
        channels = units * ALIGN
        size = 1
    else:
        size = units * ALIGN
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    inside = c < channels
    mu, deviation = _read_pair(stats, c, inside, channels)
    pivot, scale, shift = _affine(mu, deviation, weight, bias, c, inside)
    if dx is not None:
        if record is not None:
            if tl.program_id(0) == 0:
                _look(record, sums, distance, exchange, ranks, GATHERED)
        share = _reciprocal(tl.load(stats + 2 * channels))
        sum_g, sum_gx = _read_pair(sums, c, inside, channels)
        if GATHERED:
            for rank in range(1, ranks):
                some_g, some_gx = _read_pair(sums + rank * distance, c, inside, channels)
                sum_g += some_g
                sum_gx += some_gx
        slope = sum_gx * share * deviation
        level = sum_g * share + slope * (pivot.to(tl.float64) - mu)
        slope_of_x = _once(slope.to(tl.float32))
        offset = _once(-level.to(tl.float32) * scale)
    pivot, scale = _once(pivot), _once(scale)
    if RELU:
        shift = _once(shift)
    items = _number_of_items(images, size, BN, BP)
    for k in range(split * per_split, tl.minimum((split + 1) * per_split, items)):
        start, distances, mask, _ = _tile(items - 1 - k, block, images, channels, size, BC, BN, BP, WIDE)
        place = start + distances
        g = tl.load(grad + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        values = tl.load(x + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if RELU:
            out = _output(values, pivot, scale, shift, residual, place, mask, "evict_first")
            g = _masked_gradient(g, out, x.dtype.element_ty)
        if dresidual is not None:
            tl.store(dresidual + place, g.to(dresidual.dtype.element_ty), mask=mask)
        if dx is not None:
            slopes = tl.broadcast_to(slope_of_x[:, None], g.shape)
            d = tl.fma(pivot[:, None] - values, slopes, g)
            scales = tl.broadcast_to(scale[:, None], g.shape)
            out = tl.fma(d, scales, tl.broadcast_to(offset[:, None], g.shape))
            tl.store(dx + place, out.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def probe(x):
    """Next to nothing, to see that kernels can be compiled and launched at all."""
    tl.store(x, 1.0)
