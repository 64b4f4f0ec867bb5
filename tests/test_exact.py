"""The synchronized layer against one process with the whole batch, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from helpers.links import forced
from helpers.oracle import TOLERANCE, assert_matches, close, rows, step, whole_batch
from helpers.ranks import run_ranks
from syncbn import functional

CHANNELS = 4
PARTITIONS = {1: (5,), 2: (4, 1), 3: (2, 0, 5), 5: (2, 1, 0, 3, 1)}
SPATIAL: dict[int, tuple[int, ...]] = {2: (), 3: (7,), 4: (3, 5), 5: (2, 3, 2)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def data(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, with an offset and a scale for each channel, and output gradients."""
    channels = shapes[0][1]
    xs = []
    for shape in shapes:
        scale = torch.linspace(0.5, 3.0, channels).view(1, -1, *[1] * (len(shape) - 2))
        xs.append((torch.randn(shape) * scale + 2.0 * scale - 3.0).to(dtype))
    return xs, [torch.randn(shape).to(dtype) for shape in shapes]


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 1.5, channels).to(dtype), torch.linspace(-1.0, 1.0, channels).to(dtype)


def build(group: Any, weight: Tensor, bias: Tensor, **options: Any) -> syncbn.SyncBatchNorm:
    layer = syncbn.SyncBatchNorm(len(weight), process_group=group, dtype=weight.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def run(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residuals: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    def body(rank: int, group: Any) -> dict[str, Any]:
        layer = build(group, weight, bias, **options)
        return step(layer, xs[rank], gs[rank], None if residuals is None else residuals[rank])

    with forced(len(xs) == 1):
        return run_ranks(len(xs), body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ndim", sorted(SPATIAL))
@pytest.mark.parametrize("world", sorted(PARTITIONS))
def test_equals_the_whole_batch(world: int, ndim: int, dtype: torch.dtype) -> None:
    xs, gs = data([(n, CHANNELS, *SPATIAL[ndim]) for n in PARTITIONS[world]], dtype)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = affine(CHANNELS, parameters)
    results = run(xs, gs, weight, bias)
    assert_matches(results, whole_batch(xs, gs, weight, bias), dtype)
    for x, result in zip(xs, results, strict=True):
        assert result["y"].dtype == result["dx"].dtype == x.dtype
        assert result["num_batches_tracked"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_module_in_half(dtype: torch.dtype) -> None:
    xs, gs = data([(4, CHANNELS, 5), (3, CHANNELS, 5)], dtype)
    weight, bias = affine(CHANNELS, dtype)
    results = run(xs, gs, weight, bias)
    assert_matches(results, whole_batch(xs, gs, weight, bias), dtype)
    assert results[0]["running_mean"].dtype == results[0]["dweight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_uneven_spatial_sizes(dtype: torch.dtype) -> None:
    xs, gs = data([(2, CHANNELS, 3, 5), (1, CHANNELS, 8, 2), (3, CHANNELS, 1, 1), (2, CHANNELS, 0, 4)], dtype)
    weight, bias = affine(CHANNELS, dtype)
    assert_matches(run(xs, gs, weight, bias), whole_batch(xs, gs, weight, bias), dtype)


def test_one_value_per_channel_on_each_rank() -> None:
    xs, gs = data([(1, CHANNELS), (1, CHANNELS)], torch.float64)
    weight, bias = affine(CHANNELS, torch.float64)
    assert_matches(run(xs, gs, weight, bias), whole_batch(xs, gs, weight, bias), torch.float64)


def test_one_value_on_one_rank_and_none_on_the_others() -> None:
    xs, gs = data([(0, CHANNELS, 2), (1, CHANNELS, 2), (0, CHANNELS, 2)], torch.float64)
    weight, bias = affine(CHANNELS, torch.float64)
    assert_matches(run(xs, gs, weight, bias), whole_batch(xs, gs, weight, bias), torch.float64)


def test_empty_rank_has_a_graph_and_zero_gradients() -> None:
    xs, gs = data([(3, CHANNELS, 2), (0, CHANNELS, 2)], torch.float32)
    weight, bias = affine(CHANNELS, torch.float32)
    empty = run(xs, gs, weight, bias)[1]
    assert empty["y"].shape == (0, CHANNELS, 2)
    assert empty["grad_fn"] is not None
    assert torch.equal(empty["dweight"], torch.zeros(CHANNELS))
    assert torch.equal(empty["dbias"], torch.zeros(CHANNELS))
    assert empty["dx"].shape == (0, CHANNELS, 2)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_all_ranks_empty(world: int, momentum: float | None) -> None:
    xs, gs = data([(0, CHANNELS, 2)] * world, torch.float32)
    weight, bias = affine(CHANNELS, torch.float32)
    for result in run(xs, gs, weight, bias, momentum=momentum):
        assert result["y"].shape == (0, CHANNELS, 2)
        assert torch.equal(result["running_mean"], torch.zeros(CHANNELS))
        assert torch.equal(result["running_var"], torch.ones(CHANNELS))
        assert result["num_batches_tracked"] == 0
        assert torch.equal(result["dweight"], torch.zeros(CHANNELS))


def test_empty_batch_without_a_group() -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS)
    result = step(layer, torch.zeros(0, CHANNELS, 3), torch.zeros(0, CHANNELS, 3))
    assert result["y"].shape == (0, CHANNELS, 3)
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("group_of_one", [False, True])
def test_one_rank_is_batch_norm_within_its_rounding(group_of_one: bool) -> None:
    xs, gs = data([(6, CHANNELS, 3, 3)], torch.float32)
    weight, bias = affine(CHANNELS, torch.float32)
    expected = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        expected.weight.copy_(weight)
        expected.bias.copy_(bias)

    def body(rank: int, group: Any) -> dict[str, Any]:
        return step(build(group if group_of_one else None, weight, bias), xs[0], gs[0])

    [result] = run_ranks(1, body)
    for name, value in step(expected, xs[0], gs[0]).items():
        if isinstance(value, Tensor):
            close(result[name], value, 2e-6, 2e-6, name)


# ---- far off centre


def offset_data(ratio: float, side: int, channels_last: bool) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(n, CHANNELS, side, side) for n in (9, 4, 1)]
    std = torch.tensor([1.0, 3.0, 0.5, 2.0]).view(1, -1, 1, 1)
    xs = [torch.randn(shape) * std + ratio * std for shape in shapes]
    gs = [torch.randn(shape) for shape in shapes]
    if channels_last:
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    return xs, gs


@pytest.mark.parametrize("side", [6, 60])  # small inputs are summed in another way than large ones
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e4, 1e5])
def test_float32_far_off_centre(ratio: float, channels_last: bool, side: int) -> None:
    xs, gs = offset_data(ratio, side, channels_last)
    weight, bias = affine(CHANNELS, torch.float32)
    expected = whole_batch(xs, gs, weight, bias)
    plain = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.copy_(bias)
    theirs = step(plain, torch.cat(xs), torch.cat(gs))
    results = run(xs, gs, weight, bias, momentum=1.0)
    exact = torch.cat([rows(x) for x in xs]).var(0)
    for result in results:
        assert ((result["running_var"].double() - exact) / exact).abs().max() < 1e-4
    for name in ("y", "dx"):
        truth = torch.cat(getattr(expected, name))
        ours = (torch.cat([r[name] for r in results]).double() - truth).abs().max()
        size = truth.abs().max()
        assert ours <= 2e-6 * size, name  # at any offset: x is centred before it is scaled
        assert ours <= (theirs[name].double() - truth).abs().max() + 2**-23 * size, name


@pytest.mark.parametrize("ratio", [2.0**17, 2.0**27])
def test_float64_far_off_centre(ratio: float) -> None:
    """In float64 raw sums lose (mean/std)^2 * 1e-16: all of the variance at 2^27. The offset is exact here.

    What is left is the rounding of each rank's mean."""
    shapes = [(9, CHANNELS, 4), (0, CHANNELS, 4), (4, CHANNELS, 4)]
    zs = [(torch.randn(shape).double() * 2**20).round() / 2**20 for shape in shapes]
    gs = [torch.randn(shape).double() for shape in shapes]
    xs = [z + ratio for z in zs]
    assert all(torch.equal(x - ratio, z) for x, z in zip(xs, zs, strict=True))
    weight, bias = affine(CHANNELS, torch.float64)
    expected = whole_batch(zs, gs, weight, bias)
    variance = torch.cat([rows(z) for z in zs]).var(0)
    ulp = ratio * 2**-52  # what a float64 mean resolves
    for rank, result in enumerate(run(xs, gs, weight, bias, momentum=1.0)):
        close(result["running_var"], variance, 1e-12 + ulp, 0.0, "running_var")
        close(result["y"], expected.y[rank], 0.0, 4 * ulp, "y")
        close(result["dx"], expected.dx[rank], 0.0, 16 * ulp, "dx")


def test_ranks_of_different_offsets() -> None:
    """The merge of the ranks' moments: no rank's own mean is near the global one."""
    xs, gs = data([(4, CHANNELS, 3), (2, CHANNELS, 3), (5, CHANNELS, 3)], torch.float64)
    xs = [x + offset for x, offset in zip(xs, (-1000.0, 3.0, 500.0), strict=True)]
    weight, bias = affine(CHANNELS, torch.float64)
    results = run(xs, gs, weight, bias)
    expected = whole_batch(xs, gs, weight, bias)
    assert expected.running_var is not None
    for rank, result in enumerate(results):
        close(result["running_var"], expected.running_var, 1e-12, 0.0, "running_var")
        close(result["y"], expected.y[rank], 1e-11, 1e-11, "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_counts_beyond_the_range_of_half(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 40000).to(dtype)
    layers = run([x, x[:2]], [torch.randn_like(x), torch.randn_like(x[:2])], *affine(2, dtype), momentum=1.0)
    both = torch.cat([rows(x), rows(x[:2])])
    assert len(both) == 200_000
    close(layers[0]["running_mean"], both.mean(0), 2**-8, 1e-4, "running_mean")
    close(layers[0]["running_var"], both.var(0), 2**-8, 1e-4, "running_var")


@pytest.mark.parametrize("variance", [0.0, 1e-8])
def test_small_variance(variance: float) -> None:
    """(One that travels as 1/sqrt(var + eps) has a relative error of 2e-4 at 1e-8, and is below zero for 0.)"""
    xs = [torch.randn(50, 2).double() * variance**0.5 + 1.0, torch.randn(30, 2).double() * variance**0.5 + 1.0]
    results = run(xs, [torch.randn_like(x) for x in xs], *affine(2, torch.float64), momentum=1.0)
    close(results[0]["running_var"], torch.cat(xs).var(0), 1e-12, 0.0, "running_var")


# ---- layouts


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "batch inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    if layout == "expanded batch":
        return x[:1].expand(x.shape)
    return x.contiguous()


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced", "transposed", "batch inside", "expanded", "expanded batch"]
)
@pytest.mark.parametrize("ndim", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, ndim: int, dtype: torch.dtype) -> None:
    xs, gs = data([(n, CHANNELS, *SPATIAL[ndim]) for n in (3, 2)], dtype)
    xs = [strided(x, layout) for x in xs]
    # The gradient comes in yet another layout, and expanded, as that of a sum does.
    gs = [strided(gs[0], "transposed"), gs[1][:1, :1].expand(gs[1].shape)]
    weight, bias = affine(CHANNELS, torch.float64 if dtype == torch.float64 else torch.float32)
    results = run(xs, gs, weight, bias)
    assert_matches(results, whole_batch(xs, gs, weight, bias), dtype)
    for x, result in zip(xs, results, strict=True):
        assert result["y"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs(dtype: torch.dtype, layout: str) -> None:
    """Beyond what fits a cache, and what is summed in one go; one rank stays small."""
    xs, gs = data([(5, CHANNELS, 131, 217), (1, CHANNELS, 131, 217), (2, CHANNELS, 3, 3)], dtype)
    xs = [strided(x, layout) for x in xs]
    weight, bias = affine(CHANNELS, torch.float64 if dtype == torch.float64 else torch.float32)
    adds = [torch.randn_like(x) for x in xs]
    expected = whole_batch(xs, gs, weight, bias, residuals=adds)
    assert_matches(run(xs, gs, weight, bias, residuals=adds), expected, dtype)


def test_ranks_of_different_layouts() -> None:
    xs, gs = data([(3, CHANNELS, 4, 4), (2, CHANNELS, 4, 4)], torch.float32)
    xs[1] = strided(xs[1], "channels_last")
    weight, bias = affine(CHANNELS, torch.float32)
    assert_matches(run(xs, gs, weight, bias), whole_batch(xs, gs, weight, bias), torch.float32)


# ---- residual and activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_relu_and_residual(world: int, residual: bool, channels_last: bool, dtype: torch.dtype) -> None:
    xs, gs = data([(n, CHANNELS, 3, 3) for n in PARTITIONS[world]], dtype)
    adds = [torch.randn_like(x) for x in xs] if residual else None
    if channels_last:
        xs = [strided(x, "channels_last") for x in xs]
    weight, bias = affine(CHANNELS, torch.float64 if dtype == torch.float64 else torch.float32)
    expected = whole_batch(xs, gs, weight, bias, residuals=adds, relu=True)
    results = run(xs, gs, weight, bias, residuals=adds, activation="relu")
    assert_matches(results, expected, dtype)
    zeros = sum(float((result["y"] == 0).sum()) for result in results)
    assert zeros > 10  # the mask of the ReLU was put to the test


@pytest.mark.parametrize("synchronize", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_residual_without_activation(training: bool, synchronize: bool) -> None:
    x, residual = torch.randn(5, CHANNELS, 3), torch.randn(5, CHANNELS, 3)
    layer = syncbn.SyncBatchNorm(CHANNELS).train(training)
    plain = nn.BatchNorm1d(CHANNELS).train(training)
    with forced(synchronize):
        y = layer(x, residual)
    close(y, plain(x) + residual, 1e-5, 1e-5, "y")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("synchronize", [False, True])
def test_residual_of_another_dtype_leaves_the_dtype_of_the_input(synchronize: bool, training: bool) -> None:
    x, residual = torch.randn(5, CHANNELS, 3, dtype=torch.bfloat16), torch.randn(5, CHANNELS, 3)
    layer = syncbn.SyncBatchNorm(CHANNELS, activation="relu").train(training)
    with forced(synchronize):
        assert layer(x, residual).dtype == torch.bfloat16


# ---- several steps, the functional form, and the moments


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_over_steps(momentum: float | None) -> None:
    batches = [data([(3, CHANNELS, 2), (1, CHANNELS, 2), (0, CHANNELS, 2)], torch.float64)[0] for _ in range(4)]
    plain = nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
    for xs in batches:
        plain(torch.cat([rows(x) for x in xs]))

    def body(rank: int, group: Any) -> syncbn.SyncBatchNorm:
        layer = syncbn.SyncBatchNorm(CHANNELS, momentum=momentum, process_group=group, dtype=torch.float64)
        for xs in batches:
            layer(xs[rank])
        return layer

    for layer in run_ranks(3, body):
        for name, value in plain.state_dict().items():
            close(layer.state_dict()[name], value, 1e-12, 1e-12, name)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_functional(eps: float, momentum: float) -> None:
    xs, gs = data([(3, CHANNELS, 2), (4, CHANNELS, 2)], torch.float64)
    weight, bias = affine(CHANNELS, torch.float64)
    expected = whole_batch(xs, gs, weight, bias, eps=eps, momentum=momentum)

    def body(rank: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
        y = functional.sync_batch_norm(
            xs[rank], mean, var, weight, bias, training=True, momentum=momentum, eps=eps, process_group=group
        )
        return y, mean, var

    for rank, (y, mean, var) in enumerate(run_ranks(2, body)):
        close(y, expected.y[rank], 1e-12, 1e-12, "y")
        assert expected.running_mean is not None and expected.running_var is not None
        close(mean, expected.running_mean, 1e-12, 1e-12, "mean")
        close(var, expected.running_var, 1e-12, 1e-12, "var")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_global_moments(world: int, dtype: torch.dtype) -> None:
    xs, _ = data([(n, CHANNELS, 3) for n in PARTITIONS[world]], dtype)
    coefficients = torch.randn(world, 2, CHANNELS).double()

    def loss(mean: Tensor, var: Tensor, rank: int) -> Tensor:
        a, b = coefficients[rank]
        return (a * mean.double() ** 2 + b * var.double()).sum()

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        x = xs[rank].clone().requires_grad_()
        count, mean, var = functional.global_moments(x, process_group=group)
        loss(mean, var, rank).backward()
        assert x.grad is not None
        return count, mean, var, x.grad

    with forced(world == 1):
        results = run_ranks(world, body)
    leaves = [rows(x).requires_grad_() for x in xs]
    var, mean = torch.var_mean(torch.cat(leaves), 0, correction=0)
    sum((loss(mean, var, rank) for rank in range(world)), torch.zeros(())).backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rank, result in enumerate(results):
        assert result[0] == len(torch.cat(leaves)) and result[0].dtype == torch.float64
        assert result[1].dtype == result[2].dtype == wide
        close(result[1], mean, *TOLERANCE[wide], "mean")
        close(result[2], var, *TOLERANCE[wide], "var")
        grad = leaves[rank].grad
        assert grad is not None
        close(rows(result[3]), grad, *TOLERANCE[dtype], "dx")


def test_global_moments_of_nothing_are_zeros() -> None:
    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        return functional.global_moments(torch.zeros(0, 3), process_group=group)

    for count, mean, var in run_ranks(2, body):
        assert count == 0
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.zeros(3))
