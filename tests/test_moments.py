"""The value type: counts, means and squared deviations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from syncbn.memory import update_running_stats
from syncbn.moments import Moments, merge, unpack, unpack_raw

C = 3


def of(x: Tensor) -> Moments:
    n = torch.tensor(float(len(x)), dtype=torch.float64)
    mean = x.double().mean(0) if len(x) else torch.zeros(C).double()
    return Moments(n, mean, (x.double() - mean).square().sum(0))


def packed(moments: Moments) -> Tensor:
    return torch.cat([moments.n[None], moments.mean, moments.m2])


def raw(x: Tensor) -> Tensor:
    return torch.cat([torch.tensor([float(len(x))]).double(), x.double().sum(0), x.double().square().sum(0)])


def assert_same(actual: Moments, expected: Moments, rtol: float = 1e-12) -> None:
    for name in ("n", "mean", "m2"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=rtol, atol=1e-13, msg=name)


def test_variances() -> None:
    x = torch.randn(7, C).double()
    moments = of(x)
    torch.testing.assert_close(moments.var, x.var(0, correction=0))
    torch.testing.assert_close(moments.unbiased_var, x.var(0))
    torch.testing.assert_close(moments.invstd(1e-3), (x.var(0, correction=0) + 1e-3).rsqrt())


def test_variances_of_few() -> None:
    assert torch.equal(of(torch.ones(1, C)).unbiased_var, torch.zeros(C).double())
    assert torch.equal(of(torch.ones(0, C)).var, torch.zeros(C).double())


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (0, 3, 0, 1), (0, 0), (1, 1), (2, 0, 7)])
def test_merge_is_the_moments_of_the_union(sizes: tuple[int, ...]) -> None:
    x = torch.randn(sum(sizes), C).double() * 3 + torch.tensor([0.0, 5.0, -100.0])
    assert_same(merge([of(part) for part in x.split(sizes)]), of(x), 1e-11)


def test_merge_does_not_cancel() -> None:
    """Offset 2^30, exactly representable: raw sums would lose all of the variance."""
    z = (torch.randn(20, C).double() * 2**10).round() / 2**10
    moments = merge([of(part) for part in (z + 2.0**30).split((9, 11))])
    torch.testing.assert_close(moments.var, z.var(0, correction=0), rtol=1e-6, atol=0.0)
    assert not torch.allclose(unpack_raw(raw(z + 2.0**30)).var, z.var(0, correction=0), rtol=1e-1)


@pytest.mark.parametrize("count", [2, 3])
def test_merge_returns_new_tensors(count: int) -> None:
    """Its parts may lie in a buffer that the next exchange overwrites."""
    buffer = packed(of(torch.randn(4, C)))
    total = merge([unpack(buffer)] * count)
    before = packed(total)
    buffer.zero_()
    assert torch.equal(packed(total), before)


def test_merge_of_one_part_is_that_part() -> None:
    part = of(torch.randn(4, C))
    assert merge([part]) is part


def test_unpack() -> None:
    moments = of(torch.randn(4, C))
    assert_same(unpack(packed(moments)), moments)


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (0, 3, 0, 1), (0, 0)])
def test_sums_of_raw_sums(sizes: tuple[int, ...]) -> None:
    x = torch.randn(sum(sizes), C) + 1
    total = torch.stack([raw(part) for part in x.split(sizes)]).sum(0)
    assert_same(unpack_raw(total), of(x), 1e-11)


def test_raw_sums_never_give_a_negative_variance() -> None:
    x = torch.full((1000, C), 1e5 + 0.1, dtype=torch.float64)
    assert (unpack_raw(raw(x)).m2 >= 0).all()


def test_non_finite_moments_stay_visible() -> None:
    x = torch.ones(3, C)
    x[0, 1] = float("nan")
    for moments in (merge([of(x), of(torch.ones(2, C))]), unpack_raw(raw(x))):
        assert torch.isnan(moments.mean[1]) and torch.isnan(moments.m2[1])
        assert torch.isfinite(moments.mean[[0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, torch.tensor(0.25, dtype=torch.float64)], ids=str)
def test_update_running_stats(momentum: Any, dtype: torch.dtype) -> None:
    x = torch.randn(6, C) + 1
    mean, var = torch.full((C,), 0.5, dtype=dtype), torch.full((C,), 2.0, dtype=dtype)
    update_running_stats(mean, var, of(x), momentum)
    m = float(momentum)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mean.double(), (1 - m) * 0.5 + m * x.double().mean(0), rtol=rtol, atol=rtol)
    torch.testing.assert_close(var.double(), (1 - m) * 2.0 + m * x.double().var(0), rtol=rtol, atol=rtol)


def test_update_in_half_keeps_what_half_resolves() -> None:
    """A step of 0.001 towards 4 from 3 is half a unit of bfloat16 or less: lost if computed in bfloat16."""
    mean, var = torch.full((C,), 3.0, dtype=torch.float16), torch.ones(C, dtype=torch.float16)
    update_running_stats(mean, var, of(torch.full((4, C), 4.0)), 0.001)
    assert (mean > 3.0).all()


def test_update_with_nothing_changes_nothing() -> None:
    mean, var = torch.randn(C), torch.rand(C)
    before = mean.clone(), var.clone()
    update_running_stats(mean, var, of(torch.zeros(0, C)), 0.5)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    update_running_stats(None, None, of(torch.ones(3, C)), 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_update_keeps_the_last_finite_values(value: float) -> None:
    mean, var = torch.zeros(C), torch.ones(C)
    x = torch.randn(5, C)
    x[2, 1] = value
    update_running_stats(mean, var, of(x), 0.5)
    assert mean[1] == 0.0 and var[1] == 1.0
    torch.testing.assert_close(mean[[0, 2]], 0.5 * x[:, [0, 2]].mean(0))
