"""The Triton kernels against the reference.

Started by test_triton.py for Triton's interpreter on the CPU (TRITON_INTERPRET=1), and by test_gpu.py for a GPU
(SYNCBN_TEST_DEVICE=cuda). All memory that a kernel is to fill holds NaN before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import batch_norm

from syncbn import kernels as choice
from syncbn.kernels import reference, triton_kernels
from syncbn.kernels import triton as kernels
from syncbn.kernels.composed import Composed
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Report, Shared
from syncbn.wire import SLOTS

# numpy, in which the interpreter computes, warns of what is not finite, and of what older interpreters do with it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")

DEVICE = torch.device(os.environ.get("SYNCBN_TEST_DEVICE", "cpu"))
EPS = 1e-5
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-6}
ROWS, COLUMNS = "rows", "columns"
F16, B16, F32 = TOLERANCE
# As shipped, and so that small tensors take many tiles, splits and blocks of channels.
CUTS = {
    "shipped": {},
    "fine": {"tile": 2048, "programs": 6, "whole": 0, "fold": 0},
    "folded": {"tile": 2048, "programs": 6, "whole": 0},
}
CASES = [
    ((6, 5), COLUMNS, F32, "fine"),
    ((70, 1), COLUMNS, B16, "shipped"),
    ((5, 130), COLUMNS, F32, "shipped"),
    ((24, 65), COLUMNS, F16, "folded"),
    ((4, 3, 1), ROWS, F32, "fine"),
    ((1, 65, 7), ROWS, B16, "folded"),
    ((7, 3, 7, 7), ROWS, F32, "folded"),
    ((2, 130, 3, 3), ROWS, F16, "shipped"),
    ((1, 1, 1013), ROWS, F32, "fine"),
    ((2, 3, 30, 20), ROWS, B16, "folded"),
    ((2, 16, 3, 5), COLUMNS, B16, "fine"),
    ((2, 3, 4, 5, 6), COLUMNS, F32, "shipped"),
    ((2, 3, 4, 3, 2), ROWS, F32, "shipped"),
]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(before)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def cut(monkeypatch: pytest.MonkeyPatch, how: str, **more: int) -> None:
    monkeypatch.setattr(kernels, "SIZES", kernels.Sizes(**(CUTS[how] | more)))


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous() if layout == ROWS else x.movedim(1, -1).contiguous().movedim(-1, 1)


class Example:
    """A layer call: input, gradient, residual, parameters and the exact statistics of the input."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype, mean: float = 2.0) -> None:
        torch.manual_seed(0)
        channels = shape[1]
        self.x, self.grad, self.residual = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(3))
        self.x.add_(mean)
        self.weight, self.bias = torch.rand(channels) + 0.5, torch.randn(channels)
        packed = reference.moments(self.x)
        self.count, self.mean = packed[0], packed[1 : channels + 1]
        self.invstd = (packed[channels + 1 :] / self.count.clamp(min=1) + EPS).rsqrt()

    def stats(self, weight: bool = True) -> tuple[Tensor, ...]:
        return self.x, self.mean, self.invstd, *((self.weight, self.bias) if weight else (None, None))

    @property
    def packed(self) -> Tensor:
        """What the fused forms take for the statistics of the global batch."""
        return torch.cat([self.mean, self.invstd, self.count[None]])


def message(width: int, tag: int = 1, number: int = 1, length: int = 0) -> Message:
    """A message on a device, of so many float64 in all, with raw sums."""
    whole = torch.empty(length or SLOTS + width, dtype=torch.float64)
    return Message(whole, whole[SLOTS : SLOTS + width], True, tag, number)


def shared(payload: Tensor) -> Shared:
    return Shared(payload[None], True)


def assert_same(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype = F32) -> None:
    if expected is None:
        assert actual is None
        return
    assert actual is not None and actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=min(4 * tolerance, 2e-5))


@pytest.mark.parametrize(("shape", "layout", "dtype", "how"), CASES[::2], ids=str)
def test_functions_are_those_of_the_reference(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, how)
    e = Example(shape, layout, dtype)
    for raw in (False, True):
        assert_same(kernels.moments(e.x, raw=raw), reference.moments(e.x, raw=raw))
    for args in (e.stats(), (*e.stats(weight=False), e.residual, True)):
        assert_same(kernels.normalize(*args), reference.normalize(*args), dtype)
    sums = reference.gradient_sums(e.grad, e.x, e.mean, e.invstd)
    assert_same(kernels.gradient_sums(e.grad, e.x, e.mean, e.invstd), sums)
    args = (e.grad, e.x, e.mean, e.invstd, e.weight.half(), sums, e.count)
    assert_same(kernels.input_gradient(*args), reference.input_gradient(*args), dtype)
    args = (e.grad, *e.stats(), e.residual)
    assert_same(kernels.relu_gradient(*args), reference.relu_gradient(*args), dtype)


@pytest.mark.parametrize(("shape", "layout", "dtype", "how"), [*CASES[1::2], ((0, 3, 4), ROWS, F32, "fine")], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_fused_forms_are_those_of_the_reference(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, how: str, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, how)
    e, channels = Example(shape, layout, dtype), shape[1]
    ours, theirs = (message(2 * channels + 1, 65535, 7, 2 * channels + 40) for _ in range(2))
    kernels.pack_moments(e.x, None, ours)
    reference.pack_moments(e.x, None, theirs)
    assert_same(ours.whole, theirs.whole)
    assert torch.equal(ours.whole[: SLOTS + 1], theirs.whole[: SLOTS + 1])

    sums = shared(2 * theirs.payload)  # as if another rank had the same input
    residual, momentum = (e.residual, None) if relu else (None, 0.1)
    results, buffers = [], []
    for module in (kernels, reference):
        mean, var = torch.full((channels,), 0.5, dtype=dtype), torch.full((channels,), 0.25)
        buffers.append(Running(mean, var, momentum, torch.tensor(3)))
        forward = e.x, None, sums, e.weight, e.bias, residual, relu, EPS, buffers[-1]
        results.append(module.normalize_shared(*forward))
    assert_same(results[0][0], results[1][0], dtype)
    assert_same(results[0][1], results[1][1])
    assert results[0][2] is None
    assert_same(buffers[0].mean, buffers[1].mean, dtype)
    assert_same(buffers[0].var, buffers[1].var)
    assert buffers[0].batches == buffers[1].batches == (4 if e.x.numel() else 3)

    args = Operands(e.grad, e.x, None, e.packed, e.weight, e.bias, residual, relu)
    ours, theirs = (message(2 * channels, 17, 2, 2 * channels + 40) for _ in range(2))
    for dtypes in ((torch.float16, None), (torch.float32, torch.float32)):
        our_gradients = kernels.pack_gradient_sums(args, ours, dtypes)
        their_gradients = reference.pack_gradient_sums(args, theirs, dtypes)
        assert_same(ours.whole, theirs.whole)
        for our, their, kind in zip(our_gradients, their_gradients, dtypes, strict=True):
            assert_same(our, their, kind or F32)
    assert kernels.pack_gradient_sums(args, None, (None, None)) == (None, None)
    if relu:
        assert_same(kernels.passed_gradient(args), reference.passed_gradient(args), dtype)
    rest = args, shared(theirs.payload.clone()), relu
    our_pair, their_pair = kernels.shared_input_gradient(*rest), reference.shared_input_gradient(*rest)
    assert_same(our_pair[0], their_pair[0], dtype)
    assert_same(our_pair[1], their_pair[1], dtype)


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_whichever_program_is_last_merges_all_parts(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and counters of zero behind it; what it must not see before, it does not see."""
    if DEVICE.type == "cpu":
        _programs_come(order, monkeypatch)
    cut(monkeypatch, "folded", tile=512, programs=18)
    e = Example((9, 130), COLUMNS, F32)
    e.x[3, 129] = torch.inf
    layout = kernels._layout(e.x, 1)
    assert layout.cut.blocks > 1 and layout.splits > layout.fold > 0
    results = []
    for again in range(3):
        first, second = message(261, 7, 3, 280), message(260, 7, 3, 280)
        kernels.pack_moments(e.x, None, first)
        args = Operands(e.grad, e.x.nan_to_num(), None, e.packed.nan_to_num(), e.weight, e.bias, None, True)
        gradients = kernels.pack_gradient_sums(args, second, (torch.float32, torch.float16))
        assert not any(counters.any() for counters in kernels._zeros.values())
        results.append([first.whole, second.whole, *gradients])
        if again == 1:  # as in separate launches
            cut(monkeypatch, "fine", tile=512, programs=18)
    assert results[0][0][:6].tolist() == [7, 49, 0, 0, 1, 3]
    for one, two, apart in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
        torch.testing.assert_close(one, apart, rtol=1e-6, atol=1e-6, equal_nan=True)


def _programs_come(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter, which runs one program after the other, run them in another order."""
    from triton.runtime import interpreter

    def other_range(*args: int) -> Any:
        values = range(*args)
        if sys._getframe(1).f_code is not interpreter.GridExecutor.__call__.__code__:
            return values
        return values[::-1] if order == "backwards" else np.random.default_rng(0).permutation(values).tolist()

    monkeypatch.setattr(interpreter, "range", other_range, raising=False)


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
def test_wide_offsets_give_the_same_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "fine")
    e = Example((3, 10, 6, 4), layout, F32)
    sums = reference.gradient_sums(e.grad, e.x, e.mean, e.invstd)

    def all_of_it() -> list[Tensor]:
        return [
            kernels.moments(e.x), kernels.normalize(*e.stats(), residual=e.residual, relu=True),
            kernels.gradient_sums(e.grad, e.x, e.mean, e.invstd),
            kernels.input_gradient(e.grad, e.x, e.mean, e.invstd, e.weight, sums, e.count),
        ]  # fmt: skip

    narrow = all_of_it()
    cut(monkeypatch, "fine", wide=0)
    for ours, theirs in zip(all_of_it(), narrow, strict=True):
        assert torch.equal(ours, theirs)


def test_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "fine")
    e = Example((4, 5, 3, 6), ROWS, F32)
    sums = reference.gradient_sums(e.grad, e.x, e.mean, e.invstd)
    strided = torch.stack([e.x, e.x], -1)[..., 0]
    turned = e.x.transpose(0, -1).contiguous().transpose(0, -1)
    columns = laid_out(e.x, COLUMNS)
    for x, grad in ((strided, e.grad), (turned, columns), (columns, torch.ones(()).expand(e.x.shape))):
        assert_same(kernels.moments(x), reference.moments(x))
        args = (x, e.mean, e.invstd, None, e.bias, grad, True)
        assert_same(kernels.normalize(*args), reference.normalize(*args))
        given = (grad, x, e.mean, e.invstd, e.weight, sums, e.count)
        assert_same(kernels.input_gradient(*given), reference.input_gradient(*given))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_input_gives_zeros(shape: tuple[int, ...]) -> None:
    x, one, zero = torch.zeros(shape), torch.ones(3).double(), torch.zeros(3).double()
    assert torch.equal(kernels.moments(x, raw=True), torch.zeros(7).double())
    assert torch.equal(kernels.gradient_sums(x, x, zero, one), torch.zeros(6).double())
    assert kernels.normalize(x, zero, one, None, None, x, True).shape == shape
    assert kernels.input_gradient(x, x, zero, one, None, torch.zeros(6).double(), zero[0]).shape == shape
    assert kernels.relu_gradient(x, x, zero, one, None, None).shape == shape


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_what_is_not_finite_stays_in_its_channel(
    layout: str, bad: float, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, "fine", programs=2)
    x = torch.randn(3, 4, 6, 4)
    x[position, 1, position, position] = bad
    x = laid_out(x, layout)
    sent = message(9, number=5)
    kernels.pack_moments(x, None, sent)
    assert sent.whole[4] == 1 and sent.whole[5] == 5
    finite = torch.tensor([True, False, True, True])
    assert torch.equal(sent.payload[1:5].isfinite(), finite) and torch.equal(sent.payload[5:].isfinite(), finite)
    running = Running(torch.zeros(4), torch.ones(4), 0.1, torch.tensor(0))
    y, *_ = kernels.normalize_shared(x, None, shared(sent.payload), None, None, None, True, EPS, running)
    assert y[:, 1].isnan().all() and y[:, finite].isfinite().all()
    assert running.mean[1] == 0 and running.var[1] == 1 and (running.mean[finite] != 0).all() and running.batches == 1


def test_statistics_that_do_not_fit_the_running_ones_are_not_taken() -> None:
    x = torch.randn(4, 2)
    x[:, 1] += 1e5
    sent = message(5)
    kernels.pack_moments(x, None, sent)
    mean, var = torch.zeros(2).half(), torch.ones(2).half()
    kernels.normalize_shared(x, None, shared(sent.payload), None, None, None, False, EPS, Running(mean, var, 0.5))
    assert mean[0] != 0 and mean[1] == 0 and var[1] == 1


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e4])
def test_float32_is_never_less_accurate_than_torch(layout: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "fine", tile=4096, programs=4)
    e, channels = Example((6, 4, 24, 20), layout, F32, mean=ratio), 4
    sent = message(2 * channels + 1)
    kernels.pack_moments(e.x, None, sent)
    forward = e.x, None, shared(sent.payload), e.weight, e.bias, None, False, EPS, None
    y, stats, _ = kernels.normalize_shared(*forward)
    args = Operands(e.grad, e.x, None, stats, e.weight, e.bias, None, False)
    sent = message(2 * channels)
    kernels.pack_gradient_sums(args, sent, (None, None))
    dx, _ = kernels.shared_input_gradient(args, shared(sent.payload), False)
    invstd = stats[channels:-1]

    def torchs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = e.x.to(dtype).requires_grad_()
        out = batch_norm(leaf, None, None, e.weight.to(dtype), e.bias.to(dtype), True, 0.0, EPS)
        return out.detach(), torch.autograd.grad(out, leaf, e.grad.to(dtype))[0]

    floor = 2 * torch.finfo(torch.float32).eps
    for ours, theirs, exact in zip((y, dx), torchs(torch.float32), torchs(torch.float64), strict=True):
        assert (ours - exact).abs().max() <= max((theirs - exact).abs().max(), floor * exact.abs().max())
    var = e.x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(invstd, (var + EPS).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_far_from_zero_nothing_is_lost(layout: str, ratio: float) -> None:
    e = Example((6, 5, 8, 6), layout, F32, mean=ratio)
    stats = e.mean, e.invstd, e.weight, e.bias
    y = reference.normalize(e.x.double(), *stats)
    torch.testing.assert_close(kernels.normalize(e.x, *stats).double(), y, rtol=0, atol=2e-6)
    # A gradient with a mean, and one that follows the input: both sums are large.
    vectors = e.mean.view(-1, 1, 1), e.invstd.view(-1, 1, 1)
    grad = (1 + (e.x.double() - vectors[0]) * vectors[1]).float()
    sums = reference.gradient_sums(grad, e.x, *stats[:2])
    torch.testing.assert_close(kernels.gradient_sums(grad, e.x, *stats[:2]), sums, rtol=1e-6, atol=0)
    dx = reference.input_gradient(grad.double(), e.x.double(), *stats[:3], sums, e.count)
    ours = kernels.input_gradient(grad, e.x, *stats[:3], sums, e.count)
    torch.testing.assert_close(ours.double(), dx, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
def test_long_runs_and_a_pivot_far_off(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than one run of a program takes, of which the first is no guide to the others."""
    cut(monkeypatch, "fine", tile=256, programs=1)
    x = torch.randn(42, 2, 32) if layout == ROWS else torch.randn(42 * 32, 2)
    x[: 1 if layout == ROWS else 32] += 1e4
    exact = reference.moments(x)
    items = kernels._layout(x, 1).cut.items
    assert items > 32
    ours = kernels.moments(x)
    torch.testing.assert_close(ours[3:], exact[3:], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1:3], exact[1:3], rtol=3e-6, atol=0)
    assert_same(
        kernels.gradient_sums(x * 0 + 1, x, exact[1:3], torch.ones(2).double())[:2], exact[:1].expand(2).clone()
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_mask_follows_the_very_sign_of_the_output(dtype: torch.dtype) -> None:
    e = Example((5, 6, 9, 4), ROWS, dtype)
    # Weights near zero and no bias: many outputs are close to zero, or round to it.
    args = (e.x, e.mean, e.invstd, e.weight * 1e-7, None, e.residual * 1e-7)
    y = kernels.normalize(*args, relu=True)
    assert torch.equal(kernels.relu_gradient(torch.ones_like(y).fill_(1), *args), (y > 0).to(dtype))
    residual = torch.zeros_like(e.x).index_fill_(0, torch.tensor([1]), torch.nan)
    y = kernels.normalize(*args[:5], residual, True)
    assert y[1].isnan().all() and y[0].isfinite().all()
    assert (kernels.relu_gradient(torch.zeros_like(y) + 1, *args[:5], residual)[1] == 1).all()


def test_every_element_is_in_exactly_one_tile() -> None:
    """The division of the work, for many shapes, with the offsets of the programs done again in numpy."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        images, channels, size = (int(2 ** rng.uniform(0, top)) for top in (5, 8, 9))
        columns = bool(rng.integers(2))
        size = 1 if columns else size
        elements = int(rng.choice([64, 1024, 4096]))
        sizes = kernels.Sizes(programs=int(rng.choice([4, 512])))
        g = kernels._cut(images, channels, size, columns, elements, sizes)
        assert g.bc * g.bn * g.bp <= max(elements, 64)
        seen = np.zeros(images * channels * size, dtype=int)
        pieces = -(-size // g.bp)
        n, p = np.divmod(np.arange(g.bn * g.bp), g.bp)
        for split in range(g.programs(sizes) // g.blocks):
            for k in range(split * g.per_split(sizes), min((split + 1) * g.per_split(sizes), g.items)):
                image, position = (g.items - 1 - k) // pieces * g.bn + n, (g.items - 1 - k) % pieces * g.bp + p
                q = (image < images) & (position < size)
                c = np.arange(g.blocks * g.bc)
                c = c[c < channels]
                np.add.at(seen, ((image[q] * channels)[:, None] * size + c * size + position[q][:, None]).ravel(), 1)
        assert (seen == 1).all(), g
        assert g.units * g.align == (channels if columns else size)


HUGE = (1 << 16, 4, 1, 9000)  # 2.36e9 elements


@pytest.mark.parametrize("layout", [ROWS, COLUMNS])
@pytest.mark.parametrize("tensors", [1, 2])
def test_beyond_32_bits_offsets_are_wide(layout: str, tensors: int) -> None:
    """In the variants that ``test_wide_offsets_give_the_same_bits`` runs; and where they are not, all offsets fit."""
    form = torch.channels_last if layout == COLUMNS else torch.contiguous_format
    huge = torch.empty(HUGE, dtype=torch.bfloat16, device="meta", memory_format=form)
    known = kernels._layout(huge, tensors)
    assert huge.numel() > 1 << 31 and known.columns == (layout == COLUMNS) and known.cut.wide
    assert known.cut.tile[-1] is True  # WIDE, the last constant of a tile
    large = torch.empty((1 << 16, 4, 1, 4096), dtype=torch.bfloat16, device="meta", memory_format=form)
    cut = kernels._layout(large, tensors).cut
    # The farthest offset of a masked lane: a tile that begins at the last item and reaches beyond it.
    assert not cut.wide and large.numel() + cut.bn * cut.channels * max(cut.bp, cut.units * cut.align) < 1 << 31


def report() -> Report:
    return Report(torch.zeros(8, dtype=torch.float64, device="cpu", pin_memory=DEVICE.type == "cuda"), 5, 3)


SLOTS_SAID = {
    "agree": ([6.0, 12.0, 0, 0, 0, 0], False),  # three ranks with t = 2
    "differ": ([6.0, 14.0, 0, 0, 0, 0], True),
    "refused": ([6.0, 12.0, 1, 2, 0, 0], True),
    "not finite": ([6.0, 12.0, 0, 0, 2, 3], True),
    "corrupted": ([torch.nan, 12.0, 0, 0, 0, 0], True),
}


@pytest.mark.parametrize("said", SLOTS_SAID)
def test_kernels_report_what_the_slots_say(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, "fine")
    e = Example((4, 5, 6), ROWS, F32)
    slots, reported = SLOTS_SAID[said]
    whole = torch.cat([torch.tensor(slots, dtype=torch.float64), e.count[None], e.count * e.mean, torch.ones(5) * 1e6])
    args = Operands(e.grad, e.x, None, e.packed, e.weight, None, None, False)
    for run in (
        lambda shared: kernels.normalize_shared(e.x, None, shared, e.weight, e.bias, None, False, EPS, None),
        lambda shared: kernels.shared_input_gradient(args, shared, False),
    ):
        told = report()
        run(Shared(whole[None, SLOTS:], True, told))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert not told.unread
        expected = torch.tensor([5.0, *slots] if reported else [0.0] * 7, dtype=torch.float64, device="cpu")
        assert torch.equal(told.record[:7].nan_to_num(7), expected.nan_to_num(7))
        told.record[1:].zero_()
        run(Shared(whole[None, SLOTS:], True, told))  # a record that nobody has read yet stays
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert told.record[0] == expected[0] and not told.record[1:].any()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU tensors")
def test_the_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    x, mask = torch.randn(4, 3), torch.ones(4, 1, dtype=torch.bool)
    monkeypatch.setenv("SYNCBN_KERNELS", "aten")
    choice._native_works.cache_clear()
    monkeypatch.setattr(choice, "_interpreted", True)
    choice._load_triton.cache_clear()
    assert choice.choose(x, None, True) is kernels and choice.plain(x) is kernels
    assert choice.name_of(choice.choose(x, None, True)) == "Triton"
    for other in (choice.choose(x, mask, True), choice.choose(x, None, False)):  # of its plain forms
        assert isinstance(other, Composed) and other.plain is kernels and choice.name_of(other) == "Triton"
    assert choice.choose(x.double(), None, True) is choice._ATEN and choice.plain(x.double()) is choice.aten
    assert choice.choose(torch.empty(2, 0), None, True) is choice._ATEN
    monkeypatch.setattr(choice, "_interpreted", False)
    assert choice.choose(x, None, True) is choice._ATEN and choice.name_of(choice._ATEN) == "ATen"
    monkeypatch.setattr(choice, "_interpreted", True)
    choice._load_triton.cache_clear()
    monkeypatch.setattr(kernels, "probe", lambda device: 1 / 0)
    with caplog.at_level("WARNING", "syncbn"):
        assert choice.choose(x, None, True) is choice._ATEN and choice.plain(x) is choice.aten
    choice._load_triton.cache_clear()
    choice._native_works.cache_clear()
    (record,) = caplog.records
    assert "ZeroDivisionError" in record.getMessage() and record.name == "syncbn"


@triton.jit  # type: ignore[untyped-decorator]
def _apply(n: Any, v: Any, reciprocals: Any, roots: Any, SIZE: tl.constexpr) -> None:
    i = tl.arange(0, SIZE)
    tl.store(reciprocals + i, triton_kernels._reciprocal(tl.load(n + i)))
    tl.store(roots + i, triton_kernels._inverse_root(tl.load(v + i)))


def test_what_stands_for_divisions_and_roots() -> None:
    """Newton's method from float32: for all counts, and variances far beyond what float32 holds."""
    n = torch.cat([torch.arange(500), torch.logspace(3, 11, 12).round()]).double()
    v = torch.logspace(-80, 80, 512, dtype=torch.float64)
    reciprocals, roots = torch.empty_like(n), torch.empty_like(v)
    _apply[(1,)](n, v, reciprocals, roots, 512)
    assert reciprocals[0] == 1 and (reciprocals[1:] * n[1:] - 1).abs().max() <= 3e-16
    assert (roots * v.sqrt() - 1).abs().max() <= 1e-13


def test_the_number_of_slots_is_one_number() -> None:
    assert triton_kernels.HEAD.value == SLOTS
