"""Random partitions, shapes, strides, dtypes and options, against the whole batch in one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.links import forced
from helpers.oracle import close, rows, whole_batch
from helpers.ranks import run_ranks
from syncbn import SyncBatchNorm, functional

LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "flipped"]
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Case(NamedTuple):
    """One random layer with the inputs of all its ranks."""

    shapes: list[tuple[int, ...]]
    layouts: list[str]
    dtype: torch.dtype
    affine: bool
    bias: bool
    relu: bool
    residual: bool
    momentum: float | None
    eps: float
    offset: float
    scale: float
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world = draw(st.integers(1, 4))
    channels = draw(st.integers(1, 6))
    dims = draw(st.integers(0, 3))
    if draw(st.booleans()):  # spatial sizes of their own
        spatial = [tuple(draw(st.integers(0, 4)) for _ in range(dims)) for _ in range(world)]
    else:
        spatial = [tuple(draw(st.integers(1, 4)) for _ in range(dims))] * world
    return Case(
        shapes=[(draw(st.integers(0, 5)), channels, *s) for s in spatial],
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in range(world)],
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])),
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
        relu=draw(st.booleans()),
        residual=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.7, None])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        offset=draw(st.sampled_from([0.0, 1.0, -30.0])),
        scale=draw(st.sampled_from([0.1, 1.0, 8.0])),
        seed=draw(st.integers(0, 2**20)),
    )


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same shape in another layout (and the same values, except where expanded)."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.dim() > 2 and x.shape[-1] > 1:
        return x[..., :1].expand(x.shape)
    if layout == "flipped":
        return x.flip(0).contiguous()
    return x.contiguous()


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = case.shapes[0][1]
    xs = [
        arranged((draw(shape) * case.scale + case.offset).to(case.dtype), layout)
        for shape, layout in zip(case.shapes, case.layouts, strict=True)
    ]
    gs = [draw(shape).to(case.dtype) for shape in case.shapes]
    adds = [draw(shape).to(case.dtype) for shape in case.shapes] if case.residual else None
    parameters = torch.float64 if case.dtype == torch.float64 else torch.float32
    weight = draw((channels,)).to(parameters) if case.affine else None
    bias = draw((channels,)).to(parameters) if case.affine and case.bias else None

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(
            channels, case.eps, case.momentum, case.affine, process_group=group, dtype=parameters, bias=case.bias,
            activation="relu" if case.relu else None,
        )  # fmt: skip
        with torch.no_grad():
            for own, value in ((layer.weight, weight), (layer.bias, bias)):
                if value is not None:
                    own.copy_(value)
        x = xs[rank].detach().requires_grad_()
        residual = None if adds is None else adds[rank].clone().requires_grad_()
        try:
            y = layer(x, residual)
        except ValueError as error:
            return layer, str(error)
        y.backward(gs[rank])
        return layer, (y.detach(), x.grad, None if residual is None else residual.grad)

    with forced(len(xs) == 1):
        results = run_ranks(len(xs), body)
    everything = torch.cat([rows(x) for x in xs])
    first = results[0][0]
    for layer, _ in results:
        assert torch.equal(layer.running_mean, first.running_mean)
        assert torch.equal(layer.running_var, first.running_var)
        assert layer.num_batches_tracked == (1 if len(everything) > 1 else 0)
    if len(everything) == 1:
        assert all(isinstance(said, str) and "more than 1 value" in said for _, said in results)
        return
    assert not any(isinstance(said, str) for _, said in results)
    if len(everything) == 0:
        assert torch.equal(first.running_var, torch.ones_like(first.running_var))
        return
    compare(case, xs, gs, adds, weight, bias, results, everything)


def compare(
    case: Case,
    xs: list[Tensor],
    gs: list[Tensor],
    adds: list[Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    results: Any,
    everything: Tensor,
) -> None:
    options: dict[str, Any] = {"eps": case.eps, "momentum": case.momentum, "residuals": adds}
    # How far a rounding of the input, in the arithmetic of the layer, reaches in the output and in dx.
    invstd = float((everything.var(0, correction=0) + case.eps).rsqrt().max())
    gain = 1.0 if weight is None else 1.0 + float(weight.abs().max())
    arithmetic = UNIT[torch.float64] if case.dtype == torch.float64 else UNIT[torch.float32]
    y_error = 8 * arithmetic * (1 + float(everything.abs().max()) * invstd) * gain
    if case.dtype == torch.float16:
        y_error += 2.0**-24  # below its normal numbers
    dx_error = 32 * y_error * (1 + invstd)
    if case.relu:
        linear = whole_batch(xs, gs, weight, bias, **options)
        assume(all(not y.numel() or bool(((y == 0) | (y.abs() > 4 * y_error)).all()) for y in linear.y))
        assume(adds is not None or weight is None or bool((everything.var(0) > 1e-9).all()))
    expected = whole_batch(xs, gs, weight, bias, relu=case.relu, **options)
    rounding = UNIT[case.dtype]
    for rank, (layer, (y, dx, dresidual)) in enumerate(results):
        close(y, expected.y[rank], rounding, y_error, "y")
        close(dx, expected.dx[rank], 2 * rounding, dx_error, "dx")
        if dresidual is not None:
            close(dresidual, expected.dresidual[rank], 0.0, 0.0, "dresidual")
        assert y.stride() == torch.empty_like(xs[rank]).stride()
        if weight is not None:
            size = 1.0 + len(everything) * float(max(float(g.abs().max()) if g.numel() else 0.0 for g in gs))
            close(layer.weight.grad, expected.dweight[rank], 1e-5, size * y_error / gain, "dweight")
        if bias is not None:
            close(layer.bias.grad, expected.dbias[rank], 1e-5, 1e-5, "dbias")
        for name in ("running_mean", "running_var"):
            value = getattr(expected, name)
            assert value is not None
            close(getattr(layer, name), value, 1e-6, 1e-6, name)


QUICK = settings(max_examples=250, deadline=None, derandomize=True, database=None)
LONG = settings(max_examples=6000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(cases())
def test_any_partition_equals_the_whole_batch(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(cases())
def test_fuzz_any_partition_equals_the_whole_batch(case: Case) -> None:
    check(case)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 100.0, 1e5]),
    seed=st.integers(0, 2**20),
)
def test_global_moments_do_not_depend_on_the_partition(sizes: list[int], offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) + offset

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        return functional.global_moments(x.split(sizes)[rank], process_group=group)

    with forced(len(sizes) == 1):
        results = run_ranks(len(sizes), body)
    for count, mean, var in results:
        assert count == len(x)
        assert torch.equal(mean, results[0][1]) and torch.equal(var, results[0][2])
        if len(x):
            close(mean, x.mean(0), 1e-14, 1e-14, "mean")
            close(var, x.var(0, correction=0), 1e-9, 1e-10, "var")
