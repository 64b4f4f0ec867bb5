"""The operators of torch's SyncBatchNorm below ours, which exist on GPUs alone: with stand-ins for them, on a CPU.

The stand-ins take what PyTorch's kernels take and refuse what they refuse (aten/src/ATen/native/cuda/Normalization.cu).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import syncbn
from helpers.oracle import assert_matches, step, whole_batch
from helpers.ranks import run_ranks
from syncbn import kernels
from syncbn.kernels import torch_sync

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WIDE = (torch.float32, torch.float64)
calls: collections.Counter[str] = collections.Counter()


def _shaped(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 2))


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _require(x: Tensor, *vectors: Tensor | None) -> None:
    assert x.numel() > 0, "no kernel is launched for an empty input"
    assert x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    accumulated = torch.float64 if x.dtype is torch.float64 else torch.float32
    for v in vectors:
        assert v is None or (v.dtype is accumulated and v.shape == x.shape[1:2] and v.is_contiguous())


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    calls["stats"] += 1
    _require(x)
    wide = x.double()
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    var = wide.var(_dims(x), correction=0).to(dtype)
    return wide.mean(_dims(x)).to(dtype), (var + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    calls["elemt"] += 1
    _require(x, weight, bias, mean, invstd)
    values = x.to(mean.dtype)
    return ((values - _shaped(mean, x)) * _shaped(invstd * weight, x) + _shaped(bias, x)).to(x.dtype)


def backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor, ...]:
    calls["reduce"] += 1
    _require(x, mean, invstd, weight)
    assert grad.dtype is x.dtype and grad.stride() == x.stride()
    g = grad.double()
    sums = g.sum(_dims(x)), (g * (x.double() - _shaped(mean.double(), x))).sum(_dims(x))
    return *(s.to(mean.dtype) if wanted[0] else torch.empty(0) for s in sums), torch.empty(0), torch.empty(0)


def backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, total: Tensor, dot: Tensor, count: Tensor
) -> Tensor:
    calls["backward"] += 1
    _require(x, mean, invstd, weight, total, dot)
    assert grad.dtype is x.dtype and grad.stride() == x.stride()
    assert count.dtype is torch.int32 and count.dim() == 1
    n = count.sum()
    slope = dot * invstd * invstd / n
    d = grad.to(mean.dtype) - _shaped(total / n, x) - (x.to(mean.dtype) - _shaped(mean, x)) * _shaped(slope, x)
    return (d * _shaped(invstd * weight, x)).to(x.dtype)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, function in (
        ("batch_norm_stats", stats), ("batch_norm_elemt", elemt),
        ("batch_norm_backward_reduce", backward_reduce), ("batch_norm_backward_elemt", backward_elemt),
    ):  # fmt: skip
        monkeypatch.setattr(torch, name, function)
    monkeypatch.setattr(kernels, "is_native", lambda x: False)
    monkeypatch.setattr(kernels, "_torch_sync", lambda x: torch_sync)
    kernels._torch_sync_works.cache_clear()
    calls.clear()
    yield
    kernels._torch_sync_works.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_compared_before_they_are_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels._torch_sync_works(CPU, dtype)
    for name in ("batch_norm_stats", "batch_norm_elemt", "batch_norm_backward_reduce", "batch_norm_backward_elemt"):
        with monkeypatch.context() as patch:
            right = getattr(torch, name)
            wrong: Any = lambda *args, right=right: (  # noqa: E731
                [2 * r for r in right(*args)] if isinstance(right(*args), tuple) else 2 * right(*args)
            )
            patch.setattr(torch, name, wrong)
            if name == "batch_norm_stats" and dtype in WIDE:  # whose mean is put right by the sums about it
                torch_sync.check(CPU, dtype)
                continue
            with pytest.raises(RuntimeError, match="compute something else"):
                torch_sync.check(CPU, dtype)


def test_where_they_do_not_work_nobody_uses_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()  # PyTorch has them on GPUs alone
    kernels._torch_sync_works.cache_clear()
    with caplog.at_level("WARNING", "syncbn"):
        assert not kernels._torch_sync_works(CPU, torch.float32)
        assert not kernels._torch_sync_works(CPU, torch.float32)
    (record,) = caplog.records
    assert "do not run on the operators of torch's SyncBatchNorm" in record.getMessage()
    assert kernels._torch_sync(torch.ones(2, 3)) is None


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_on_them_is_that_of_the_whole_batch(dtype: torch.dtype, relu: bool, columns: bool) -> None:
    sizes, form = (3, 0, 2), torch.channels_last if columns else torch.contiguous_format
    xs, gs, rs = ([torch.randn(n, 6, 5, 4).add(2).to(dtype).contiguous(memory_format=form) for n in sizes]
                  for _ in range(3))  # fmt: skip

    def body(rank: int, group: Any) -> Any:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        layer = syncbn.SyncBatchNorm(6, process_group=group, dtype=wide, activation="relu" if relu else None)
        assert kernels.name_of(kernels.choose(xs[rank], None, False)) == "torch's SyncBatchNorm"
        return step(layer, xs[rank], gs[rank], rs[rank] if relu else None)

    results = run_ranks(3, body)
    if relu and dtype in (torch.float16, torch.bfloat16):
        # The output is rounded before the residual is added, so either side of zero is right where it is that near.
        y = results[0]["y"].double()
        exact = whole_batch(xs, gs, relu=True, residuals=rs).y[0]
        torch.testing.assert_close(y, exact, rtol=3e-2, atol=3e-2)
        assert torch.equal(results[0]["dresidual"] != 0, (results[0]["y"] > 0) & (gs[0] != 0))
    else:
        assert_matches(results, whole_batch(xs, gs, relu=relu, residuals=rs if relu else None), dtype)
    # One pass of each sort on the two ranks that have any input; the output is computed again for the rectifier, and
    # statistics about the mean, where values are no half type's.
    expected = {"stats": 2, "elemt": 4 if relu else 2, "reduce": 4 if dtype in WIDE else 2, "backward": 2}
    assert {name: calls[name] for name in expected} == expected


def test_far_from_zero_the_output_is_centred() -> None:
    x = torch.randn(64, 3, 8).add(1000)
    count, mean, m2 = torch_sync.moments(x).split((1, 3, 3))
    invstd = (m2 / count + 1e-5).rsqrt()
    exact = (x.double() - mean.view(-1, 1)) * invstd.view(-1, 1)
    torch.testing.assert_close(torch_sync.normalize(x, mean, invstd, None, None).double(), exact, rtol=0, atol=2e-6)
    off = torch_sync.normalize(x, mean + 1e-5, invstd, None, None).double()  # less than float32 tells apart
    torch.testing.assert_close(off, exact - 1e-5 * invstd.view(-1, 1), rtol=0, atol=2e-6)
    sums = torch_sync.gradient_sums(x, x, mean + 1e-5, invstd)
    dots = (x.double() * (x.double() - mean.view(-1, 1) - 1e-5)).sum((0, 2)) * invstd
    torch.testing.assert_close(sums[3:], dots, rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_far_from_zero(dtype: torch.dtype, columns: bool) -> None:
    """As exact as those of ``aten`` in float32, though the operator rounds means to it; half types round far more."""
    ratio = {torch.bfloat16: 1e2, torch.float16: 1e3}.get(dtype, 1e5)
    x = torch.randn(64, 3, 8).add(ratio).to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if columns else x
    exact = torch_sync.aten.moments(x.double())
    for raw in (False, True):
        ours = torch_sync.moments(x, raw=raw)
        if raw:
            ours[1:4] /= ours[0]
            ours[4:] -= ours[0] * ours[1:4].square()
        # in units of a deviation, by which outputs are off
        off = (ours[1:4] - exact[1:4]).abs() / (exact[4:] / exact[0]).sqrt()
        assert off.max() < {torch.float64: 1e-10, torch.float32: 1e-7}.get(dtype, 6e-8 * ratio)
        torch.testing.assert_close(ours[4:], exact[4:], rtol=3e-6, atol=0)


def test_any_strides() -> None:
    x = torch.randn(4, 5, 6, 3).permute(2, 1, 3, 0)
    mean, invstd = torch.zeros(5).double(), torch.ones(5).double()
    y = torch_sync.normalize(x, mean, invstd, None, None)
    dx = torch_sync.input_gradient(torch.ones(()).expand_as(x), x, mean, invstd, None, mean.repeat(2), mean[0] + 72)
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(dx, torch.ones_like(x))


def test_what_is_constant_or_not_finite() -> None:
    x = torch.ones(4, 3)
    x[0, 1], x[:2, 2] = torch.nan, torch.tensor([3e38, -3e38])
    moments = torch_sync.moments(x)
    assert moments[:2].tolist() == [4, 1] and 0 <= moments[4] < 1e-30
    assert moments[[2, 5]].isnan().all() and not moments[6].isfinite()
    torch.testing.assert_close(torch_sync.moments(x[:, :1], raw=True), torch.tensor([4.0, 4.0, 4.0]).double())
