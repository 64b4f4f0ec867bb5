"""The compiled loops against plain formulas in float64: numbers, layouts, data types, masks, the edges of memory."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.oracle import TOLERANCE
from syncbn.kernels import native
from syncbn.memory import Running
from syncbn.messages import Message, Shared
from syncbn.moments import look, merge, unpack, unpack_raw

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 3),
    (37, 64),
    (5, 1),
    (300, 5),
    (2, 64, 7, 7),
    (3, 16, 9),
    (2, 5, 2, 3, 4),
    (4, 100, 1, 1),
    (1, 1, 70, 70),
]
SHAPES += [(2, 3, 64, 65), (9, 130, 3, 3), (1, 2, 5000)]


@pytest.fixture(autouse=True, params=native._native.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor."""
    native._native.choose(request.param)
    yield request.param
    native._native.choose(native._native.variants()[0])


def spread(vector: Tensor, x: Tensor) -> Tensor:
    return vector.double().view(-1, *[1] * (x.dim() - 2))


def dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


@dataclass
class Case:
    """One rank's operands, and what the formulas make of them."""

    x: Tensor
    grad: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False

    @property
    def valid(self) -> Tensor:
        ones = torch.ones(self.x.shape[0], 1, *self.x.shape[2:], dtype=torch.bool)
        return ones if self.mask is None else ones & self.mask

    @property
    def cleaned(self) -> Tensor:
        x = self.x.double()
        return torch.where(~self.valid & ~x.isfinite(), 0, x)

    def moments(self) -> Tensor:
        x, m = self.cleaned, self.valid.double()
        n = m.sum() * (self.x.shape[1] > 0)
        mean = torch.where(self.valid, x, 0).sum(dims(x)) / n.clamp(min=1)
        m2 = torch.where(self.valid, x - spread(mean, x), 0).square().sum(dims(x))
        return torch.cat([n[None], mean, m2])

    def stats(self) -> Tensor:
        n, mean, m2 = unpack(self.moments())[:3]
        return torch.cat([mean, (m2 / n.clamp(min=1) + EPS).rsqrt(), n[None]])

    def split_stats(self, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels = self.x.shape[1]
        return stats[:channels], stats[channels:-1], stats[-1]

    def output(self, stats: Tensor) -> Tensor:
        mean, invstd, _ = self.split_stats(stats)
        y = (self.cleaned - spread(mean, self.x)) * spread(invstd, self.x)
        if self.weight is not None:
            y = y * spread(self.weight, y)
        if self.bias is not None:
            y = y + spread(self.bias, y)
        if self.residual is not None:
            y = y + self.residual.double()
        return torch.where(y <= 0, 0, y) if self.relu else y

    def gradients(self, stats: Tensor, shut: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(sums, dx, g, xhat)`, where `shut` says where the rectifier is."""
        mean, invstd, n = self.split_stats(stats)
        x = self.cleaned
        xhat = (x - spread(mean, x)) * spread(invstd, x)
        g = torch.where(shut, 0, self.grad.double())
        total, dot = g.sum(dims(x)), (g * xhat).sum(dims(x))
        scale = invstd if self.weight is None else invstd * self.weight.double()
        n = n.clamp(min=1)
        dx = spread(scale, x) * (g - self.valid * (spread(total / n, x) + xhat * spread(dot / n, x)))
        dx = torch.where(~self.valid & ~self.x.double().isfinite(), 0, dx)
        return torch.cat([total, dot]), dx, g, xhat


def message(width: int, raw: bool = False) -> Message:
    """A message whose payload is aligned to 8 bytes and no more, full of NaN."""
    whole = torch.full((width + 8,), math.nan, dtype=torch.float64)
    return Message(whole, whole[7 : 7 + width], raw)


def like(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "columns":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        order = list(range(values.dim()))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "strided":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), math.nan, dtype=values.dtype)
        part = wide[..., 1::2]
        return part.copy_(values)
    return values.contiguous()


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, str, str] = ("rows", "rows", "rows"),
    mask: Tensor | None = None,
    affine: torch.dtype | None = torch.float32,
    residual: torch.dtype | None = None,
    relu: bool = False,
    offset: float = 0.3,
) -> Case:
    channels = shape[1]
    return Case(
        like((torch.randn(shape) + offset).to(dtype), layouts[0]),
        like(torch.randn(shape).to(dtype), layouts[1]),
        mask,
        None if affine is None else (torch.rand(channels) + 0.5).to(affine),
        None if affine is None else torch.randn(channels).to(affine),
        None if residual is None else like(torch.randn(shape).to(residual), layouts[2]),
        relu,
    )


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, scale: float = 1.0) -> None:
    rtol, atol = TOLERANCE[dtype]
    rounded = expected.to(dtype).double()  # a gradient may be too large for float16
    expected = torch.where(rounded.isinf(), rounded, expected)
    torch.testing.assert_close(
        actual.double(), expected, rtol=rtol, atol=atol * scale, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def forward(case: Case, running: Running | None = None) -> tuple[Tensor, Tensor, bool]:
    sent = message(2 * case.x.shape[1] + 1)
    native.pack_moments(case.x, case.mask, sent)
    assert sent.whole[:7].isnan().all() and sent.whole[-1].isnan()
    return native.normalize_shared(
        case.x,
        case.mask,
        Shared(sent.payload[None], False),
        case.weight,
        case.bias,
        case.residual,
        case.relu,
        EPS,
        running,
    )


def check(case: Case) -> None:
    """All five functions on one rank."""
    x, channels, dtype = case.x, case.x.shape[1], case.x.dtype
    expected = case.moments()
    opmath = torch.float64 if dtype is torch.float64 else torch.float32
    for raw in (False, True):
        sent = message(2 * channels + 1, raw)
        native.pack_moments(x, case.mask, sent)
        n, mean, m2 = (unpack_raw if raw else unpack)(sent.payload)[:3]
        assert n == expected[0]
        close(mean, expected[1 : channels + 1], opmath, "mean")
        close(m2 / n.clamp(min=1), expected[channels + 1 :] / n.clamp(min=1), opmath, "variance")
    y, stats, finite = forward(case)
    assert y.shape == x.shape and y.dtype is dtype and y.stride() == torch.empty_like(x).stride()
    close(stats, case.stats(), opmath, "stats")
    assert finite is bool(stats.isfinite().all())
    close(y, case.output(stats), dtype, "y")
    shut = y <= 0 if case.relu else torch.zeros_like(x, dtype=torch.bool)
    sums, dx_expected, g_expected, xhat = case.gradients(stats, shut)
    given = native.operands(case.grad, x, case.mask, stats, case.weight, case.bias, case.residual, case.relu)
    sent = message(2 * channels)
    dweight, dbias = native.pack_gradient_sums(given, sent, (torch.float32, torch.float64))
    assert sent.whole[:7].isnan().all() and sent.whole[-1].isnan()
    assert dweight is not None and dbias is not None
    size = 1 + float((case.grad.double() * xhat).abs().nan_to_num().sum()) / max(channels, 1)
    close(sent.payload, sums, opmath, "sums", size)
    assert torch.equal(dweight, sent.payload[channels:].float()) and torch.equal(dbias, sent.payload[:channels])
    shared = Shared(sums[None], False)
    for wants_g in (False, True):
        dx, g = native.shared_input_gradient(given, shared, wants_g)
        assert dx.dtype is dtype and dx.stride() == torch.empty_like(x).stride()
        close(dx, dx_expected, dtype, "dx", 3.0)
        assert (g is not None) is wants_g
        if g is not None:
            assert torch.equal(g.double(), g_expected) and g.dtype is case.grad.dtype
    if case.relu:
        assert torch.equal(native.passed_gradient(given).double(), g_expected)


@pytest.mark.parametrize("layout", ["rows", "columns", "permuted", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    for residual, relu in itertools.product((False, True), (False, True)):
        check(make(shape, dtype, (layout,) * 3, residual=dtype if residual else None, relu=relu))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape: tuple[int, ...], layout: str) -> None:
    full = (shape[0], 1, *shape[2:])
    for narrowed in range(len(shape)):
        size = [1 if d == narrowed else n for d, n in enumerate(full)]
        for residual, relu in ((False, False), (True, True), (False, True)):
            mask = torch.rand(size) < 0.6
            case = make(
                shape, layouts=(layout,) * 3, mask=mask, relu=relu, residual=torch.float32 if residual else None
            )
            padded, which = ~case.valid.expand(shape), torch.rand(shape)
            case.x = torch.where(
                padded & (which < 0.1), math.inf, torch.where(padded & (which > 0.9), math.nan, case.x)
            )
            case.x = like(case.x, layout)
            check(case)


@pytest.mark.parametrize("layouts", list(itertools.permutations(["rows", "columns", "permuted", "strided"], 3)))
def test_operands_may_have_other_layouts(layouts: tuple[str, str, str]) -> None:
    check(make((3, 20, 5, 6), layouts=layouts, residual=torch.float32, relu=True))


@pytest.mark.parametrize("affine", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_residuals_of_other_dtypes(dtype: torch.dtype, affine: torch.dtype | None) -> None:
    for residual in (None, *DTYPES):
        check(make((4, 12, 5, 5), dtype, ("rows", "columns", "rows"), affine=affine, residual=residual, relu=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameter_gradients_in_half_precision(dtype: torch.dtype) -> None:
    case = make((4, 12, 5, 5), dtype, affine=dtype)
    stats = case.stats()
    sums = case.gradients(stats, torch.zeros_like(case.x, dtype=torch.bool))[0]
    given = native.operands(case.grad, case.x, None, stats, case.weight, case.bias, None, False)
    dweight, dbias = native.pack_gradient_sums(given, None, (dtype, None))
    assert dbias is None and dweight is not None and dweight.dtype is dtype
    close(dweight, sums[12:], dtype, "dweight", 100.0)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 5), (2, 3, 0, 4), (0, 0, 1)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    for relu in (False, True):
        check(make(shape, dtype, (layout,) * 3, residual=dtype, relu=relu))


def test_nothing_valid() -> None:
    for layout in ("rows", "columns"):
        check(make((3, 5, 4, 4), layouts=(layout,) * 3, mask=torch.zeros(3, 1, 1, 1, dtype=torch.bool)))


def test_most_of_the_head_is_padding() -> None:
    """Few valid values come first, so the pivot they give must not be trusted."""
    for layout in ("rows", "columns"):
        mask = torch.rand(40, 1, 9, 9) < 0.01
        mask[20:] = True
        case = make((40, 5, 9, 9), layouts=(layout,) * 3, mask=mask, offset=1e4)
        case.x[:20] += 3.0
        check(case)


@pytest.mark.parametrize("relu", [False, True])
def test_not_a_number_stays_visible(relu: bool) -> None:
    for value in (math.nan, math.inf, -math.inf):
        case = make((3, 6, 4, 4), relu=relu)
        case.x[1, 2, 3, 0] = value
        y, stats, finite = forward(case)
        assert not finite and y[:, 2].isnan().all()
        others = [c for c in range(6) if c != 2]
        assert stats[others].isfinite().all() and y[:, others].isfinite().all()
        given = native.operands(case.grad, case.x, None, stats, case.weight, case.bias, None, relu)
        sums = message(12)
        native.pack_gradient_sums(given, sums, (None, None))
        dx, _ = native.shared_input_gradient(given, Shared(sums.payload[None], False), False)
        assert dx[:, 2].isnan().all() and dx[:, others].isfinite().all()


# What the loops promise of their digits.


def variance_error(x: Tensor) -> float:
    sent = message(2 * x.shape[1] + 1)
    native.pack_moments(x, None, sent)
    n, _, m2 = unpack(sent.payload)[:3]
    exact = x.double().var(dims(x), correction=0)
    return float((m2 / n / exact - 1).abs().max())


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (2, 8, 7, 7), (4096, 24), (2, 3, 130, 130), (70, 300)])
def test_variance_keeps_its_digits(shape: tuple[int, ...], layout: str) -> None:
    for offset, bound in ((0.0, 1e-6), (1e3, 1e-6), (1e5, 1e-4)):
        assert variance_error(like(torch.randn(shape) + offset, layout)) < bound
    half = torch.randn(shape, dtype=torch.float64) + 1e5
    assert variance_error(like(half, layout)) < 1e-10


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_variance_whatever_comes_first(layout: str) -> None:
    """Pivots from a head that is unlike the rest: zeros, an outlier, values in order."""
    x = torch.randn(16, 4, 40, 40) + 1e3
    head, outlier = x.clone(), x.clone()
    head[0] = 0
    outlier[0, :, 0, 0] = 1e6
    order = x.movedim(1, 0).reshape(4, -1).sort().values.view(4, 16, 40, 40).movedim(0, 1)
    constant = torch.full_like(x, 7.0)
    constant[-1, :, -1, -1] = 8.0
    for t in (head, outlier, order, constant):
        assert variance_error(like(t, layout)) < 2e-6


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_squares_that_do_not_fit_float32(layout: str) -> None:
    for shape in ((4, 3, 10, 10), (50, 3, 3)):
        x = like(torch.randn(shape) * 1e25 + 1e26, layout)
        assert variance_error(x) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(8, 16, 28, 28), (2, 32, 7, 7), (256, 48)])
def test_no_less_exact_than_pytorch(shape: tuple[int, ...], layout: str, offset: float) -> None:
    case = make(shape, layouts=(layout,) * 3, offset=offset)
    assert case.weight is not None and case.bias is not None
    exact = Case(case.x.double(), case.grad.double(), None, case.weight.double(), case.bias.double())
    stats = exact.stats()
    dx = exact.gradients(stats, torch.zeros_like(case.x, dtype=torch.bool))[1]
    y_ours, stats_ours, _ = forward(case)
    given = native.operands(case.grad, case.x, None, stats_ours, case.weight, case.bias, None, False)
    sent = message(2 * shape[1])
    native.pack_gradient_sums(given, sent, (None, None))
    dx_ours, _ = native.shared_input_gradient(given, Shared(sent.payload[None], False), False)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
    with torch.no_grad():
        norm.weight.copy_(case.weight)
        norm.bias.copy_(case.bias)
    x = case.x.clone().requires_grad_()
    y_theirs = norm(x)
    y_theirs.backward(case.grad)
    assert x.grad is not None
    for ours, theirs, truth in ((y_ours, y_theirs.detach(), exact.output(stats)), (dx_ours, x.grad, dx)):
        # Near zero both are off by roundings of the last operations alone.
        limit = max(float((theirs - truth).square().mean().sqrt()) * 1.05, 3e-8 * float(truth.abs().max()))
        assert float((ours - truth).square().mean().sqrt()) <= limit


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rectifier_shuts_where_the_output_was_zero(dtype: torch.dtype, layout: str) -> None:
    """Outputs next to zero: also those that only rounding to the dtype makes zero."""
    shape = (4, 9, 11, 3)
    case = make(shape, dtype, (layout,) * 3, residual=dtype, relu=True)
    plain = Case(case.x, case.grad, None, case.weight, case.bias)
    y, stats, _ = forward(plain)
    for scale in (1.0, 1e-3, 1e-6, 1e-7):
        case.residual = -y if scale == 1.0 else None
        if scale != 1.0:
            assert plain.weight is not None and plain.bias is not None
            case.weight, case.bias = plain.weight * scale, torch.zeros_like(plain.bias)
        sent = message(2 * 9 + 1)
        native.pack_moments(case.x, None, sent)
        parts = Shared(sent.payload[None], False)
        operands = case.weight, case.bias, case.residual
        y_relu = native.normalize_shared(case.x, None, parts, *operands, True, EPS, None)[0]
        open_ = native.passed_gradient(native.operands(torch.ones_like(case.x), case.x, None, stats, *operands, True))
        assert torch.equal(open_ != 0, y_relu > 0)


# Behind the exchange.


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_merging_is_that_of_moments(ranks: int, raw: bool) -> None:
    channels = 37
    parts = torch.full((ranks, 2 * channels + 9), math.nan, dtype=torch.float64)[:, : 2 * channels + 1]
    for rank in range(ranks):
        x = torch.randn(0 if rank == 1 else 3 + rank, channels) * (rank + 1) + rank
        native.pack_moments(x, None, (sent := message(2 * channels + 1, raw)))
        parts[rank] = sent.payload
    if raw:
        merged = unpack_raw(parts.sum(0) if ranks > 1 else parts[0])
    else:
        merged = merge([unpack(part) for part in parts.unbind()])
    x = torch.randn(4, channels)
    stats = native.normalize_shared(x, None, Shared(parts, raw), None, None, None, False, EPS, None)[1]
    exact = torch.equal if not raw else torch.allclose
    assert exact(stats[:channels], merged.mean) and stats[-1] == merged.n
    assert exact(stats[channels:-1], merged.invstd(EPS))


def test_statistics_have_the_same_bits_with_every_instruction_set() -> None:
    x = torch.randn(5, 33, 6, 6)
    parts = torch.rand(3, 67, dtype=torch.float64) * 7
    grad = torch.randn_like(x)
    sums = torch.randn(3, 66, dtype=torch.float64)
    results = []
    for name in native._native.variants():
        native._native.choose(name)
        mean, var = torch.zeros(33), torch.ones(33)
        running = Running(mean, var, 0.1)
        y, stats, _ = native.normalize_shared(x, None, Shared(parts, False), None, None, None, True, EPS, running)
        given = native.operands(grad, x, None, stats, None, None, None, True)
        dx, _ = native.shared_input_gradient(given, Shared(sums, False), False)
        results.append((y, stats, mean, var, dx))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def moved_by_both(make_running: Callable[[], Running], x: Tensor, parts: Tensor) -> tuple[Running, Running]:
    """Running statistics, moved by C and by Python."""
    ours, theirs = make_running(), make_running()
    native.normalize_shared(x, None, Shared(parts[None], False), None, None, None, False, EPS, ours)
    theirs.move(look(unpack(parts)))
    return ours, theirs


@pytest.mark.parametrize("counter", [None, torch.int64, torch.int32])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_running_statistics(dtype: torch.dtype | None, momentum: float | None, counter: torch.dtype | None) -> None:
    channels = 20
    start = torch.randn(channels), torch.rand(channels) + 0.5

    def make_running() -> Running:
        mean, var = (None, None) if dtype is None else (t.to(dtype) for t in start)
        return Running(mean, var, momentum, None if counter is None else torch.tensor(3, dtype=counter))

    for values in (torch.randn(6, channels, 3), torch.randn(0, channels, 3), torch.randn(1, channels, 1)):
        x = values.clone()
        sent = message(2 * channels + 1)
        native.pack_moments(x, None, sent)
        if x.numel():
            sent.payload[3], sent.payload[-1], sent.payload[-2] = math.nan, math.inf, 1e300
        ours, theirs = moved_by_both(make_running, x, sent.payload)
        assert (ours.batches is None and theirs.batches is None) or ours.batches == theirs.batches
        if dtype is not None:
            assert ours.mean is not None and ours.var is not None and theirs.mean is not None and theirs.var is not None
            for a, b in ((ours.mean, theirs.mean), (ours.var, theirs.var)):
                torch.testing.assert_close(a, b, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=1e-6)
                assert a.isfinite().all()
            assert dtype is torch.float64 or not x.numel() or ours.var[-2] == start[1].to(dtype)[-2]


def test_running_statistics_that_are_strided() -> None:
    channels = 8
    x = torch.randn(5, channels)
    native.pack_moments(x, None, (sent := message(2 * channels + 1)))

    def make_running() -> Running:
        return Running(torch.zeros(channels, 2)[:, 0], torch.ones(channels, 2)[:, 1], 0.1)

    ours, theirs = moved_by_both(make_running, x, sent.payload)
    assert ours.mean is not None and theirs.mean is not None and ours.mean.any()
    torch.testing.assert_close(ours.mean, theirs.mean)


# Threads.


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_GRAIN", 1)
    native._layouts.clear()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)
    native._layouts.clear()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 3), (7, 4, 50), (2, 2, 20, 20), (50, 7, 2, 2), (3, 200)])
def test_threads(shape: tuple[int, ...], layout: str, three_threads: None) -> None:
    check(make(shape, layouts=(layout,) * 3, residual=torch.float32, relu=True))
    check(make(shape, layouts=(layout,) * 3, mask=torch.rand(shape[0], 1, *shape[2:]) < 0.5))


def test_results_repeat(three_threads: None) -> None:
    for layout in ("rows", "columns"):
        x = like(torch.randn(4, 3, 50, 50) + 10, layout)
        payloads = []
        for _ in range(5):
            native.pack_moments(x, None, (sent := message(7)))
            payloads.append(sent.payload)
        assert all(torch.equal(payloads[0], other) for other in payloads[1:])


def test_ranks_may_be_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [make((4, 32, 20, 20)) for _ in range(8)]
    alone = [forward(case)[0] for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: forward(case)[0], cases))
    assert all(map(torch.equal, alone, together))


# The edges of memory.


class Guard:
    """Allocates for the kernels in the middle of memory full of NaN, and looks whether its edges stay so."""

    MARGIN = 67  # elements: odd, so that outputs are aligned to an element and no more

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.edges: list[Tensor] = []
        empty_like, new_empty = torch.empty_like, Tensor.new_empty

        def guarded_like(t: Tensor, **options: Any) -> Tensor:
            return self.inside(empty_like(t, **options))

        def guarded_new(t: Tensor, *size: Any, **options: Any) -> Tensor:
            return self.inside(new_empty(t, *size, **options))

        patch.setattr(torch, "empty_like", guarded_like)
        patch.setattr(Tensor, "new_empty", guarded_new)

    def inside(self, t: Tensor) -> Tensor:
        size = t.numel()
        buffer = torch.full((size + 2 * self.MARGIN,), math.nan, dtype=t.dtype)
        self.edges += [buffer[: self.MARGIN], buffer[self.MARGIN + size :]]
        return buffer.as_strided(t.size(), t.stride(), self.MARGIN)

    def check(self) -> None:
        assert self.edges and all(edge.isnan().all() for edge in self.edges)


def moved_off_alignment(t: Tensor) -> Tensor:
    """The same tensor, among NaN, at an address that is aligned to an element and no more."""
    buffer = torch.full((t.numel() + 22,), math.nan, dtype=t.dtype)
    dense = torch.empty_like(t)
    return buffer.as_strided(dense.size(), dense.stride(), 11).copy_(t)


def random_case(dice: random.Random) -> Case:
    shape = [dice.choice([0, 1, 2, 3, 5, 9, 17, 40]), dice.choice([1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 130, 300])]
    shape += [dice.choice([1, 2, 3, 4, 7, 8, 13, 16, 21]) for _ in range(dice.randrange(4))]
    while math.prod(shape) > 60000:
        shape[dice.randrange(len(shape))] = 1
    dtype = dice.choice(DTYPES)
    mask = None
    if dice.random() < 0.4:
        full = [shape[0], 1, *shape[2:]]
        mask = torch.rand([size if dice.random() < 0.7 else 1 for size in full]) < dice.random()
    layouts = ["rows", "columns", "permuted", "strided"]
    return make(
        tuple(shape),
        dtype,
        (dice.choice(layouts), dice.choice(layouts), dice.choice(layouts)),
        mask,
        dice.choice([None, torch.float32, dtype]),
        dice.choice([None, None, dtype, torch.float32]),
        dice.random() < 0.5,
        dice.choice([0.0, 0.3, 5.0]),
    )


def fuzz(seed: int, cases: int, patch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(cases):
        case = random_case(dice)
        for name in ("x", "grad", "residual", "weight", "bias"):
            t = getattr(case, name)
            if t is not None and dice.random() < 0.5:
                setattr(case, name, moved_off_alignment(t))
        with patch.context() as inner:
            guard = Guard(inner)
            try:
                check(case)
            except Exception as error:
                operands = {
                    name: (t.shape, t.stride(), t.dtype) for name, t in vars(case).items() if hasattr(t, "shape")
                }
                raise AssertionError(f"case {number} of seed {seed}: {operands}, relu {case.relu}") from error
            guard.check()


def test_fuzz_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(1, 150, monkeypatch)


def test_fuzz_memory_with_threads(monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
    fuzz(2, 100, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10, 20))
def test_fuzz_memory_long(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(seed, 3000, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("shape", [(2, 2, (1 << 29) + 11), ((1 << 12) + 3, (1 << 19) + 1, 1), ((1 << 28) + 5, 9)])
def test_more_elements_than_32_bits_count(shape: tuple[int, ...]) -> None:
    """Signs in turn, and one value far off at the very end."""
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    channels, size = shape[1], 2 * math.prod(shape)
    if free < 2.6 * size:
        pytest.skip(f"needs {(2.6 * size) / 1e9:.0f} GB of free memory")
    x = torch.ones(shape, dtype=torch.float16)
    flat = x.view(-1)
    flat[::2] = -1
    flat[-1] = 100
    sent = message(2 * channels + 1)
    native.pack_moments(x, None, sent)
    n, mean, m2 = unpack(sent.payload)[:3]
    count = math.prod(shape) // channels
    assert n == count > 1
    total = sum(float(part.sum(dtype=torch.float64)) for part in x[:, -1].flatten().split(1 << 26))
    square = count - 1 + 100.0**2
    assert float(mean[-1]) == pytest.approx(total / count, rel=1e-6, abs=1e-8)
    assert float(m2[-1]) == pytest.approx(square - total * total / count, rel=1e-6)
    parts = Shared(sent.payload[None], False)
    y, stats, finite = native.normalize_shared(x, None, parts, None, None, None, False, EPS, None)
    assert finite
    for at in (0, 1, 12345, -2, -1):
        c = at % len(flat) // math.prod(shape[2:]) % channels
        expected = (float(flat[at]) - float(stats[c])) * float(stats[channels + c])
        assert float(y.view(-1)[at]) == pytest.approx(expected, rel=2e-3, abs=1e-6)
    del y
    given = native.operands(x, x, None, stats, None, None, None, False)
    sums = message(2 * channels)
    native.pack_gradient_sums(given, sums, (None, None))
    assert float(sums.payload[channels - 1]) == pytest.approx(total, rel=1e-6, abs=1e-8 * count)
    dx, _ = native.shared_input_gradient(given, Shared(sums.payload[None], False), False)
    # with grad = x the gradient is nearly zero everywhere, and not at all what it was filled with
    assert float(dx.view(-1)[-1].abs()) < 0.1 and float(dx.view(-1)[1].abs()) < 0.1


# The door.


def test_wrong_operands_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    payload = torch.zeros(7, dtype=torch.float64)
    shared = Shared(payload[None], False)
    rest = None, False, EPS, None

    with pytest.raises(ValueError, match="got 6 of"):
        native.pack_moments(x, None, Message(payload, payload[:6], False))
    with pytest.raises(ValueError, match="7 contiguous float64"):
        native.pack_moments(x, None, Message(payload, payload.float(), False))
    with pytest.raises(ValueError, match="float64 on a CPU are needed"):
        native.pack_moments(x, None, Message(payload, payload.new_zeros(14)[::2], False))
    with pytest.raises(ValueError, match="mask must be boolean"):
        native.pack_moments(x, torch.ones(2, 1, 4), Message(payload, payload, False))
    with pytest.raises(ValueError, match="complex64"):
        native.pack_moments(x.to(torch.complex64), None, Message(payload, payload, False))
    with pytest.raises(ValueError, match="got 2 values"):
        native.normalize_shared(x, None, shared, torch.ones(2), None, *rest)
    with pytest.raises(ValueError, match=r"rows of 7 float64.*got \(1, 6\)"):
        native.normalize_shared(x, None, Shared(payload[None, :6], False), None, None, *rest)
    with pytest.raises(ValueError, match="does not go with an input"):
        native.normalize_shared(x, None, shared, None, None, torch.randn(2, 3, 5), *rest[1:])
    with pytest.raises(ValueError, match="running statistics of 3 channels"):
        running = Running(torch.zeros(2), torch.zeros(3), 0.1)
        native.normalize_shared(x, None, shared, None, None, None, False, EPS, running)
    with pytest.raises(ValueError, match="on meta"):
        native.pack_moments(x.to("meta"), None, Message(payload, payload, False))


def test_c_refuses_what_it_can_tell() -> None:
    x = torch.randn(2, 3, 4)
    payload = torch.zeros(7, dtype=torch.float64)
    geometry = native._layout(x).geometry
    c = native._native
    with pytest.raises(ValueError, match="multiple of the element size"):
        c.pack_moments(geometry, 1, x.data_ptr() + 1, 0, False, payload.data_ptr())
    with pytest.raises(ValueError, match="geometry has another length"):
        c.pack_moments(geometry[:-1], 1, x.data_ptr(), 0, False, payload.data_ptr())
    with pytest.raises(ValueError, match="no such geometry"):
        c.pack_moments(native._pack(torch.float32, False, 1 << 40, 1 << 20, 4), 1, 0, 0, False, payload.data_ptr())
    with pytest.raises(TypeError, match="too few"):
        c.pack_moments(geometry, 1, x.data_ptr(), 0, False)
    with pytest.raises(TypeError, match="too many"):
        c.pack_moments(geometry, 1, x.data_ptr(), 0, False, payload.data_ptr(), 0)
    with pytest.raises(ValueError, match="no variant 'mmx'"):
        c.choose("mmx")
    assert not payload.any()


def test_layouts_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_REMEMBERED", 5)
    native._layouts.clear()
    for length in range(1, 20):
        forward(make((2, 3, length)))
        assert len(native._layouts) <= 5
