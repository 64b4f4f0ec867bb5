"""Statistics as a service: covariances over ranks with gradients, and statistics as values that merge."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from helpers.links import SEE_EACH_RANK, recorded
from helpers.oracle import TOLERANCE, close, rows
from helpers.ranks import outcomes, peers_of, run_ranks
from syncbn import Statistics, functional, merge_running_statistics

C = 4
SIZES = (5, 0, 2)


def data(sizes: Sequence[int], dtype: torch.dtype = torch.float64, positions: tuple[int, ...] = (3,)) -> list[Tensor]:
    """Inputs of channels that depend on each other, off centre."""
    mix = torch.randn(C, C)
    return [
        (torch.einsum("ij,nj...->ni...", mix, torch.randn(n, C, *positions)) + torch.arange(C).view(C, 1) * 3.0).to(
            dtype
        )
        for n in sizes
    ]


def exact(leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of all rows."""
    whole = torch.cat(list(leaves))
    mean = whole.mean(0)
    return mean, (whole - mean).T @ (whole - mean) / len(whole)


# ---- covariance over ranks


def loss_of(mean: Tensor, covariance: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a * mean.double() ** 2).sum() + (b * covariance.double() ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_global_covariance(world: int, dtype: torch.dtype) -> None:
    xs = data(SIZES[:world], dtype)
    a, b = torch.randn(world, C).double(), torch.randn(world, C, C).double()  # not symmetric

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        x = xs[rank].clone().requires_grad_()
        count, mean, covariance = functional.global_covariance(x, process_group=peers_of(group))
        loss_of(mean, covariance, a[rank], b[rank]).backward()
        assert x.grad is not None
        return count, mean, covariance, x.grad

    results = run_ranks(world, body)
    leaves = [rows(x).requires_grad_() for x in xs]
    mean, covariance = exact(leaves)
    sum((loss_of(mean, covariance, a[r], b[r]) for r in range(world)), torch.zeros(())).backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rank, (count, found_mean, found, dx) in enumerate(results):
        assert count == len(torch.cat(leaves)) and count.dtype == torch.float64
        assert found.dtype == found_mean.dtype == wide and torch.equal(found, found.T)
        close(found_mean, mean, *TOLERANCE[wide], "mean")
        close(found, covariance, *TOLERANCE[wide], "covariance")
        assert torch.equal(found, results[0][2]), "ranks must have equal bits"
        grad = leaves[rank].grad
        assert grad is not None
        close(rows(dx), grad, 4 * TOLERANCE[dtype][0], 4 * TOLERANCE[dtype][1], "dx")


def test_second_derivatives_of_the_covariance() -> None:
    """Of a penalty on the gradient, as of one process."""
    xs = data((3, 4))

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    def body(rank: int, group: Any) -> Tensor:
        x = xs[rank].clone().requires_grad_()
        _, mean, covariance = functional.global_covariance(x, process_group=group)
        penalty(x, torch.einsum("ij,nj...->ni...", covariance, x - mean.view(C, 1))).backward()
        assert x.grad is not None
        return x.grad

    results = run_ranks(2, body)
    leaves = [rows(x).requires_grad_() for x in xs]
    mean, covariance = exact(leaves)
    y = (torch.cat(leaves) - mean) @ covariance
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    torch.cat(gradients).square().sum().backward()
    for leaf, dx in zip(leaves, results, strict=True):
        assert leaf.grad is not None
        close(rows(dx) / leaf.grad.abs().max(), leaf.grad / leaf.grad.abs().max(), 1e-11, 1e-11, "second derivative")


def test_masked_covariance() -> None:
    """Over the valid positions alone, whatever the padding holds; there dx is zero."""
    xs = data((3, 2))
    masks = [torch.rand(len(x), 1, 3) < 0.6 for x in xs]
    for x, mask in zip(xs, masks, strict=True):
        x.masked_fill_(~mask, float("nan"))

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        x = xs[rank].clone().requires_grad_()
        count, mean, covariance = functional.global_covariance(x, process_group=group, mask=masks[rank])
        (mean.sum() + covariance.square().sum()).backward()
        assert x.grad is not None
        return count, mean, covariance, x.grad

    results = run_ranks(2, body)
    leaves = [rows(x)[rows(m)[:, 0] > 0].requires_grad_() for x, m in zip(xs, masks, strict=True)]
    mean, covariance = exact(leaves)
    (2 * (mean.sum() + covariance.square().sum())).backward()
    for rank, (count, found_mean, found, dx) in enumerate(results):
        assert count == len(torch.cat(leaves))
        close(found_mean, mean, 1e-12, 1e-12, "mean")
        close(found, covariance, 1e-12, 1e-12, "covariance")
        valid = rows(masks[rank])[:, 0] > 0
        grad = leaves[rank].grad
        assert grad is not None
        close(rows(dx)[valid], grad, 1e-11, 1e-11, "dx")
        assert torch.equal(rows(dx)[~valid], torch.zeros(int((~valid).sum()), C).double())


def test_covariance_does_not_cancel() -> None:
    """Where each rank is seen, triples travel: an offset of 2^27 standard deviations costs nothing but its own ulp."""
    zs = [(torch.randn(n, C).double() * 2**20).round() / 2**20 for n in (9, 4)]

    def body(rank: int, group: Any) -> Tensor:
        return functional.global_covariance(zs[rank] + 2.0**27, process_group=group)[2]

    _, covariance = exact(zs)
    for found in run_ranks(2, body):
        close(found, covariance, 0.0, 2.0**27 * 2**-50, "covariance")


def test_covariance_is_one_exchange_each_way() -> None:
    triangle = C * (C + 1) // 2

    def body(rank: int, group: Any) -> None:
        x = torch.randn(3, C, requires_grad=True)
        functional.global_covariance(x, process_group=group)[2].sum().backward()

    with recorded() as seen:
        run_ranks(2, body)
    assert sorted({width for _, _, width in seen}) == [C + triangle, 1 + C + triangle]
    assert len(seen) == 4


def test_wide_covariance() -> None:
    """Beyond what a first frame holds."""
    xs = [torch.randn(n, 200).double() for n in (4, 3)]
    results = run_ranks(2, lambda rank, group: functional.global_covariance(xs[rank], process_group=group)[2])
    for found in results:
        close(found, exact(xs)[1], 1e-11, 1e-12, "covariance")


def test_covariance_of_nothing_is_zero(world: int) -> None:
    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        return functional.global_covariance(torch.zeros(0, C), process_group=peers_of(group))

    for count, mean, covariance in run_ranks(world, body):
        assert count == 0 and torch.equal(mean, torch.zeros(C)) and torch.equal(covariance, torch.zeros(C, C))


def test_a_wrong_call_raises_on_every_rank(way: str) -> None:
    def body(rank: int, group: Any) -> Any:
        x = torch.ones(2, C, dtype=torch.int64 if rank == 1 else torch.float32)
        functional.global_covariance(x, process_group=group)

    first, second = outcomes(2, body)
    assert isinstance(first, syncbn.RankMismatchError) and isinstance(second, ValueError)
    assert "global_covariance" in str(first)
    if way in SEE_EACH_RANK:
        assert "int64" in str(first)


def test_covariance_meets_moments() -> None:
    def body(rank: int, group: Any) -> Any:
        call = functional.global_covariance if rank else functional.global_moments
        call(torch.ones(2, C), process_group=group)

    for error in outcomes(2, body):
        assert isinstance(error, syncbn.RankMismatchError)
        assert "global_covariance" in str(error) and "global_moments" in str(error)


def test_a_rank_that_is_not_finite_is_named() -> None:
    def body(rank: int, group: Any) -> Tensor:
        x = torch.full((2, C), float("inf") if rank else 1.0)
        return functional.global_covariance(x, process_group=group)[2]

    with pytest.warns(RuntimeWarning, match=r"came from rank 1\."):
        results = run_ranks(2, body)
    assert all(found.isnan().all() for found in results)


# ---- values


def matches(statistics: Statistics, x: Tensor, tolerance: float = 1e-12) -> None:
    matrix = rows(x)
    assert statistics.count == len(matrix)
    close(statistics.mean, matrix.mean(0), tolerance, tolerance, "mean")
    close(statistics.var, matrix.var(0, correction=0), tolerance, tolerance, "var")
    close(statistics.unbiased_var, matrix.var(0), tolerance, tolerance, "unbiased var")
    if statistics.m2.dim() == 2:
        close(statistics.covariance, exact([matrix])[1], tolerance, tolerance, "covariance")


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_statistics_merge_exactly(dtype: torch.dtype, covariance: bool) -> None:
    xs = data((4, 0, 1, 6), dtype)
    parts = [Statistics.of(x, covariance=covariance) for x in xs]
    whole = torch.cat(xs)
    matches(parts[0].merge(*parts[1:]), whole)
    matches(parts[3].merge(parts[1]).merge(parts[2].merge(parts[0])), whole)
    matches(parts[0], xs[0])  # as it was


@pytest.mark.parametrize("covariance", [False, True])
def test_statistics_over_ranks(world: int, covariance: bool) -> None:
    """Streaming: each rank merges its batches, and then the ranks do."""
    batches = [[data((n, n + 1), torch.float32) for n in range(rank + 1)] for rank in range(world)]

    def body(rank: int, group: Any) -> Statistics:
        total = Statistics.of(torch.zeros(0, C), covariance=covariance)
        for pair in batches[rank]:
            for x in pair:
                total = total.merge(Statistics.of(x, covariance=covariance))
        return total.over_ranks(peers_of(group))

    results = run_ranks(world, body)
    for statistics in results:
        matches(statistics, torch.cat([x for rank in batches for pair in rank for x in pair]))
        assert all(torch.equal(value, results[0].state_dict()[name]) for name, value in statistics.state_dict().items())


def test_masked_statistics() -> None:
    [x] = data((5,))
    mask = torch.rand(5, 1, 3) < 0.5
    valid = rows(x)[rows(mask)[:, 0] > 0]
    for covariance in (False, True):
        matches(Statistics.of(x.masked_fill(~mask, float("nan")), mask=mask, covariance=covariance), valid)
    with pytest.raises(ValueError, match="mask must have shape"):
        Statistics.of(x, mask=mask[:2])


def test_statistics_are_saved_and_loaded() -> None:
    statistics = Statistics.of(data((5,))[0], covariance=True)
    file = io.BytesIO()
    torch.save(statistics.state_dict(), file)
    file.seek(0)
    loaded = Statistics.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.m2, statistics.m2) and torch.equal(loaded.mean, statistics.mean)
    assert loaded.count == statistics.count
    with pytest.raises(KeyError, match="m2"):
        Statistics.from_state_dict({"count": torch.ones(()), "mean": torch.ones(3)})


def test_statistics_of_and_to_a_layer() -> None:
    xs = data((5, 3), torch.float32)
    layers = [nn.BatchNorm1d(C, momentum=1.0).double() for _ in xs]
    for layer, x in zip(layers, xs, strict=True):
        layer(x.double())
    first, second = (Statistics.of_layer(layer, x.numel() / C) for layer, x in zip(layers, xs, strict=True))
    first.merge(second).to_layer(layers[0])
    matches(Statistics.of_layer(layers[0], 8 * 3), torch.cat(xs))
    matches(Statistics.of_layer(layers[1], 3 * 3), xs[1])
    with pytest.raises(ValueError, match="shape \\(7,\\)"):
        first.to_layer(nn.BatchNorm1d(7))
    with pytest.raises(ValueError, match="over 0 value"):
        Statistics.of(torch.zeros(0, C)).to_layer(layers[0])


def test_what_does_not_merge() -> None:
    [x] = data((3,))
    with pytest.raises(ValueError, match="4 channels without covariances with those of 4 channels with"):
        Statistics.of(x).merge(Statistics.of(x, covariance=True))
    with pytest.raises(ValueError, match="variances alone"):
        _ = Statistics.of(x).covariance
    with pytest.raises(ValueError, match="int64"):
        Statistics.of(torch.ones(3, 2, dtype=torch.int64))


# ---- models that saw different data


def client(x: Tensor, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose running statistics are those of x."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()).to(dtype)
    syncbn.update_population_stats(model, [x.to(dtype)])
    model[0].get_buffer("num_batches_tracked").add_(2)
    return model


def test_merged_models_have_seen_all_the_data() -> None:
    xs = data((6, 1, 3))
    models = [client(x) for x in xs]
    merged = merge_running_statistics([m.state_dict() for m in models], [3 * len(x) for x in xs])
    assert list(merged) == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    whole = rows(torch.cat(xs))
    close(merged["0.running_mean"], whole.mean(0), 1e-12, 1e-12, "mean")
    close(merged["0.running_var"], whole.var(0), 1e-12, 1e-12, "var")
    assert merged["0.num_batches_tracked"] == 6
    by_name = merge_running_statistics([m.state_dict() for m in models], [{"0": 3 * len(x)} for x in xs])
    assert all(torch.equal(by_name[name], value) for name, value in merged.items())
    models[0].load_state_dict(merged, strict=False)
    assert torch.equal(models[0].state_dict()["0.running_var"], merged["0.running_var"])


def test_a_model_that_saw_nothing_counts_for_nothing() -> None:
    [x] = data((4,))
    states = [client(x, torch.float32).state_dict(), nn.Sequential(nn.BatchNorm1d(C)).state_dict()]
    merged = merge_running_statistics(states[::-1], [0, 12])
    for name in ("0.running_mean", "0.running_var"):
        close(merged[name], states[0][name], 1e-6, 1e-6, name)
        assert merged[name].dtype == torch.float32


def test_models_that_do_not_fit_are_refused() -> None:
    state = nn.Sequential(nn.BatchNorm1d(C)).state_dict()
    with pytest.raises(ValueError, match="1 count"):
        merge_running_statistics([state, state], [1])
    with pytest.raises(ValueError, match="same layers"):
        merge_running_statistics([state, nn.BatchNorm1d(C).state_dict()], [1, 1])
    with pytest.raises(ValueError, match="same layers"):
        merge_running_statistics([nn.Linear(2, 2).state_dict()], [1])
    with pytest.raises(ValueError, match="counts are 0"):
        merge_running_statistics([state, state], [0, 0])
