"""Masks: batch norm over the valid positions of all ranks is batch norm of the rows that are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from helpers.links import WAYS, forced, recorded, travel
from helpers.oracle import Outcome, assert_matches, close, rows, unrows, whole_batch
from helpers.ranks import outcomes, peers_of, run_ranks, split
from syncbn import RankMismatchError, SyncBatchNorm, functional, masked, wire

C = 3
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def random_masks(xs: Sequence[Tensor], share: float = 0.6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator) < share for x in xs]


def valid_rows(mask: Tensor | None, x: Tensor) -> Tensor:
    """Which of the rows of ``x`` are valid."""
    shape = x.shape[0], 1, *x.shape[2:]
    full = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    return full.movedim(1, -1).reshape(-1)


def masked_batch(
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    gs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    residuals: Sequence[Tensor] | None = None,
    relu: bool = False,
) -> Outcome:
    """As ``oracle.whole_batch``, the statistics being those of the valid rows: nn.BatchNorm1d in float64 on these."""
    channels = xs[0].shape[1]
    norm = nn.BatchNorm1d(channels, momentum=momentum, affine=False, dtype=torch.float64)
    chosen = torch.cat([valid_rows(mask, x) for mask, x in zip(masks, xs, strict=True)])
    leaves = [rows(x).requires_grad_() for x in xs]
    everything = torch.cat([torch.where(torch.isfinite(leaf), leaf, 0) for leaf in leaves])
    normalized = norm(everything[chosen])
    mean, var = everything[chosen].mean(0), everything[chosen].var(0, unbiased=False)
    xhat = (everything - mean) * (var + norm.eps).rsqrt()
    torch.testing.assert_close(xhat[chosen], normalized, rtol=1e-6, atol=1e-6)  # (far data cost the formula digits)
    xhat = xhat.index_put((chosen,), normalized)
    parts = xhat.split([len(leaf) for leaf in leaves])
    weights = [(torch.ones(channels) if weight is None else weight.detach()).double().requires_grad_() for _ in xs]
    biases = [(torch.zeros(channels) if bias is None else bias.detach()).double().requires_grad_() for _ in xs]
    adds = None if residuals is None else [rows(r).requires_grad_() for r in residuals]
    outcome = Outcome(running_mean=norm.running_mean, running_var=norm.running_var)
    loss = torch.zeros((), dtype=torch.float64)
    for rank, part in enumerate(parts):
        y = part * weights[rank] + biases[rank]
        if adds is not None:
            y = y + adds[rank]
        if relu:
            y = y.relu()
        loss = loss + (y * rows(gs[rank])).sum()
        outcome.y.append(unrows(y.detach(), xs[rank]))
    loss.backward()
    for rank, x in enumerate(xs):
        outcome.dx.append(unrows(leaves[rank].grad, x))
        outcome.dweight.append(weights[rank].grad)
        outcome.dbias.append(biases[rank].grad)
        if adds is not None:
            outcome.dresidual.append(unrows(adds[rank].grad, x))
    return outcome


def step(layer: Any, x: Tensor, mask: Tensor | None, g: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual, mask=mask)
    y.backward(g)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "dresidual": None if residual is None else residual.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
    }


def layer_like(x: Tensor, group: Any, **options: Any) -> SyncBatchNorm:
    parameters = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(x.shape[1], process_group=group, dtype=parameters, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(x.shape[1], generator=generator))
        layer.bias.copy_(torch.randn(x.shape[1], generator=generator))
    return layer


def run(
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    gs: Sequence[Tensor],
    residuals: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    def body(rank: int, group: Any) -> dict[str, Any]:
        layer = layer_like(xs[rank], peers_of(group), **options)
        return step(layer, xs[rank], masks[rank], gs[rank], None if residuals is None else residuals[rank])

    return run_ranks(len(xs), body)


# ---- exactness


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=["2-D", "3-D", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_uneven_ranks(shape: tuple[int, ...], dtype: torch.dtype, world: int) -> None:
    """One rank has no sample in three, another no valid position."""
    sizes = (4, 0, 3) if world == 3 else (7,)
    x = (torch.randn(sum(sizes), C, *shape) * 2 + 1).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    xs, gs = split(x, sizes), split(torch.randn_like(x), sizes)
    masks: list[Tensor | None] = [*random_masks(xs)]
    if world == 3:
        masks[2] = torch.zeros_like(masks[2])
    layer = layer_like(x, None)
    expected = masked_batch(xs, masks, gs, layer.weight, layer.bias)
    results = run(xs, masks, gs)
    assert_matches(results, expected, dtype)
    for part, result in zip(xs, results, strict=True):
        assert result["y"].dtype == dtype and result["y"].stride() == part.stride()
        assert result["dx"].dtype == dtype and result["dx"].stride() == part.stride()
        assert result["num_batches_tracked"] == 1


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"momentum": None}], ids=str)
def test_residual_activation_and_cumulative_average(options: dict[str, Any], world: int) -> None:
    xs = [torch.randn(n, C, 6, dtype=torch.float64) for n in (2, 1, 4)[:world]]
    gs, adds = [torch.randn_like(x) for x in xs], [torch.randn_like(x) for x in xs]
    masks = random_masks(xs)
    layer = layer_like(xs[0], None)
    expected = masked_batch(
        xs, masks, gs, layer.weight, layer.bias,
        momentum=options.get("momentum", 0.1), residuals=adds, relu="activation" in options,
    )  # fmt: skip
    assert_matches(run(xs, masks, gs, adds, **options), expected, torch.float64)


Case = tuple[list[Tensor], list[Tensor | None], str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Inputs and masks of some ranks, each with its own size, lengths and padding, and some without a mask."""
    channels = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    offset = draw(st.sampled_from([0.0, -30.0, 1e3]))
    padding = draw(st.sampled_from([0.0, 1.0, 1e4, float("nan"), float("inf")]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    xs: list[Tensor] = []
    masks: list[Tensor | None] = []
    for _ in range(draw(st.integers(1, 4))):
        size, length = draw(st.integers(0, 4)), draw(st.integers(1, 5))
        x = torch.randn(size, channels, length, generator=generator, dtype=torch.float64).add(offset).to(dtype)
        kind = draw(st.sampled_from(["none", "lengths", "positions", "samples"]))
        if kind == "lengths":
            mask = masked.sequence_mask(torch.randint(0, length + 1, (size,), generator=generator), length)
        else:
            shape = {"positions": (size, 1, length), "samples": (size, 1, 1), "none": (1, 1, 1)}[kind]
            mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
        if kind != "none":
            x = torch.where(mask, x, padding)
        xs.append(x)
        masks.append(None if kind == "none" else mask)
    return xs, masks, draw(st.sampled_from(list(WAYS)))


QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LONG = settings(max_examples=3000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(cases())
def test_any_partition_and_mask(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(cases())
def test_fuzz_any_partition_and_mask(case: Case) -> None:
    check(case)


def check(case: Case) -> None:
    xs, masks, way = case
    gs = [torch.randn_like(x) for x in xs]
    n = sum(int(valid_rows(mask, x).sum()) for mask, x in zip(masks, xs, strict=True))

    def body(rank: int, group: Any) -> dict[str, Any]:
        return step(layer_like(xs[rank], peers_of(group)), xs[rank], masks[rank], gs[rank])

    with travel(way):
        results = outcomes(len(xs), body)
    if n == 1:
        assert all(isinstance(result, ValueError) and "more than 1 value" in str(result) for result in results)
    elif n == 0:
        for result in results:
            assert result["num_batches_tracked"] == 0
            assert torch.equal(result["running_mean"], torch.zeros_like(result["running_mean"]))
            assert all(torch.isfinite(result[name]).all() for name in ("y", "dx", "dweight", "dbias"))
    else:
        layer = layer_like(xs[0], None)
        expected = masked_batch(xs, masks, gs, layer.weight, layer.bias)
        valid = torch.cat([rows(x)[valid_rows(mask, x)] for mask, x in zip(masks, xs, strict=True)])
        invstd = float((valid.var(0, correction=0) + 1e-5).rsqrt().max())
        distance = 1 + float(valid.abs().max()) * invstd  # in standard deviations; raw sums lose its square
        error = 64 * (UNIT[torch.float64] * distance**2 + UNIT[xs[0].dtype] * distance)
        for name in ("y", "dx", "dweight", "dbias"):
            values = torch.cat([value.flatten() for value in getattr(expected, name)])
            atol = error * (1 + float(values.abs().max())) * (invstd if name == "dx" else 1.0)
            for rank, result in enumerate(results):
                close(result[name], getattr(expected, name)[rank], error, atol, f"{name} of rank {rank}")
        for name in ("running_mean", "running_var"):
            for result in results:
                close(result[name], getattr(expected, name), error, 8 * UNIT[result[name].dtype], name)
                assert torch.equal(result[name], results[0][name])


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_far_data_are_as_exact_as_without_a_mask(ratio: float, world: int) -> None:
    """Against the same values as a batch of their own, in float32: twice the error without a mask, within rounding."""
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(n, C, 9000, generator=generator).add_(ratio) for n in (8, 3, 5)[:world]]  # no small input
    masks = random_masks(xs, 0.5)
    gs = [torch.randn(x.shape, generator=generator) for x in xs]
    expected = masked_batch(xs, masks, gs)
    packed = [rows(x)[valid_rows(mask, x)].float() for x, mask in zip(xs, masks, strict=True)]

    def body(rank: int, group: Any) -> list[Tensor]:
        layers = [SyncBatchNorm(C, momentum=1.0, process_group=peers_of(group)) for _ in range(2)]
        y = layers[0](xs[rank], mask=masks[rank])
        with forced():
            alone = layers[1](packed[rank])
        valid = valid_rows(masks[rank], xs[rank])
        wanted = rows(expected.y[rank])[valid]
        mean, var = (running for running in (layers[0].running_mean, layers[0].running_var))
        packed_mean, packed_var = layers[1].running_mean, layers[1].running_var
        return [
            torch.stack([(rows(y)[valid] - wanted).abs().max(), (alone - wanted).abs().max()]),
            torch.stack([(mean - packed_mean).abs().max(), (var / packed_var - 1).abs().max()]),
        ]

    for errors, differences in run_ranks(world, body):
        assert errors[0] <= 2 * errors[1] + 1e-6
        assert differences[0] <= 2**-23 * ratio and differences[1] <= 1e-6


def test_half_counts_beyond_its_range(world: int) -> None:
    """70000 valid positions, and values whose squares half cannot hold."""
    x = torch.full((world, 2, 140_000), 300.0, dtype=torch.float16)
    x[..., ::4] = 310
    mask = torch.zeros(world, 1, 140_000, dtype=torch.bool)
    mask[..., :70_000] = True

    def body(rank: int, group: Any) -> SyncBatchNorm:
        layer = SyncBatchNorm(2, momentum=1.0, process_group=peers_of(group))
        layer(x[rank : rank + 1], mask=mask[rank : rank + 1])
        return layer

    for layer in run_ranks(world, body):
        close(layer.running_mean, torch.full((2,), 302.5), 1e-6, 0, "mean")
        n = 70_000 * world
        close(layer.running_var, torch.full((2,), 18.75 * n / (n - 1)), 1e-6, 0, "var")


def test_a_mask_of_all_positions_is_none(world: int) -> None:
    """The same messages: some ranks bring a mask, others do not."""
    xs = [torch.randn(n, C, 4, dtype=torch.float64) for n in (2, 3, 1)[:world]]
    gs = [torch.randn_like(x) for x in xs]
    full = torch.ones(1, 1, 1, dtype=torch.bool)
    layer = layer_like(xs[0], None)
    expected = whole_batch(xs, gs, layer.weight, layer.bias)
    for masks in ([full] * world, [full, None, None][:world]):
        assert_matches(run(xs, masks, gs), expected, torch.float64)


def test_messages_are_those_without_a_mask() -> None:
    xs = [torch.randn(2, C, 4) for _ in range(2)]
    with recorded() as calls:
        run(xs, random_masks(xs), xs)
    assert sorted(call[1:] for call in calls) == [(wire.FORWARD, 2 * C + 1)] * 2 + [(wire.BACKWARD, 2 * C)] * 2


# ---- padding


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_garbage_in_the_padding_changes_nothing(padding: float, options: dict[str, Any], world: int) -> None:
    """A loss that leaves the padding out has the same gradients, to the bit, whatever it holds."""
    xs = [torch.randn(3, C, 5) for _ in range(world)]
    masks = random_masks(xs)
    gs = [torch.randn_like(x) * mask for x, mask in zip(xs, masks, strict=True)]
    garbage = [torch.where(mask, x, padding) for x, mask in zip(xs, masks, strict=True)]
    zeros = [torch.where(mask, x, 0) for x, mask in zip(xs, masks, strict=True)]
    results = run(garbage, masks, gs, **options), run(zeros, masks, gs, **options)
    for mask, bad, good in zip(masks, *results, strict=True):
        assert torch.isfinite(bad["y"]).all() or padding == -3e38
        assert not bad["dx"].masked_select(~mask).any()
        for name in ("y", "dx"):
            assert torch.equal(bad[name].masked_select(mask), good[name].masked_select(mask)), name
        for name in ("dweight", "dbias", "running_mean", "running_var"):
            close(bad[name], good[name], 1e-6, 1e-6, name)


def test_garbage_in_the_padding_and_second_derivatives_of_moments() -> None:
    x = torch.randn(2, C, 4, dtype=torch.float64)
    (mask,) = random_masks([x])
    x = torch.where(mask, x, float("nan")).requires_grad_()
    _, mean, var = functional.global_moments(x, mask=mask)
    (first,) = torch.autograd.grad((mean * var).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    assert second.any() and torch.isfinite(second).all()


def test_what_is_not_finite_at_a_valid_position_is_seen() -> None:
    x = torch.randn(2, C, 4)
    x[0, 1, 0] = float("nan")
    mask = torch.tensor([True, False, True, True]).view(1, 1, 4)
    layer = SyncBatchNorm(C)
    y = layer(x, mask=mask)
    assert y[:, 1].isnan().all() and torch.isfinite(y[:, [0, 2]]).all()
    assert layer.running_mean[1] == 0 and (layer.running_mean[[0, 2]] != 0).all()


def test_padding_left_out_of_the_loss_is_a_batch_of_the_valid_rows(world: int) -> None:
    """The recipe for a PackedSequence, whose data are the valid positions alone: a plain 2-D input."""
    lengths = [torch.tensor(values) for values in ([4, 2, 1], [3, 3], [5])][:world]
    sequences = [torch.randn(len(n), int(n.max()), C, dtype=torch.float64) for n in lengths]
    gs = [torch.randn_like(x) for x in sequences]

    def body(rank: int, group: Any) -> None:
        n, x, g = lengths[rank], sequences[rank].clone().requires_grad_(), gs[rank]
        layer, other = (layer_like(x.mT, peers_of(group)) for _ in range(2))
        mask = masked.sequence_mask(n, x.shape[1])
        y = layer(x.mT, mask=mask).mT
        (gradient,) = torch.autograd.grad((y * g * mask.mT).sum(), x)
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        with forced():
            normalized = packed._replace(data=other(packed.data))
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(normalized, batch_first=True)
        (expected,) = torch.autograd.grad((unpacked * g).sum(), x)
        close((y * mask.mT).detach(), unpacked.detach(), 1e-12, 1e-12, "y")
        close(gradient, expected, 1e-12, 1e-12, "dx")
        close(layer.running_var, other.running_var, 1e-12, 0, "running_var")

    run_ranks(world, body)


# ---- counts of one and of none


def test_one_valid_position_in_the_global_batch(world: int) -> None:
    """Raised on every rank, also where the batch has many positions."""

    def body(rank: int, group: Any) -> str:
        layer = SyncBatchNorm(C, process_group=peers_of(group))
        mask = torch.zeros(4, 1, 5, dtype=torch.bool)
        mask[0, 0, 0] = rank == 0
        # One of the others has no mask, and no sample.
        arguments = (torch.randn(0, C, 5), None) if rank == 1 else (torch.randn(4, C, 5), mask)
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            layer(arguments[0], mask=arguments[1])
        assert layer.num_batches_tracked == 0 and torch.equal(layer.running_var, torch.ones(C))
        layer(torch.randn(2, C))  # in step
        return str(caught.value)

    run_ranks(world, body)


def test_no_valid_position_anywhere(world: int) -> None:
    def body(rank: int, group: Any) -> None:
        layer = layer_like(torch.empty(1, C), peers_of(group))
        x = torch.randn(2, C, 4, requires_grad=True)
        y = layer(x, mask=torch.zeros(2, 1, 4, dtype=torch.bool))
        y.sum().backward()
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_mean, torch.zeros(C)) and torch.equal(layer.running_var, torch.ones(C))
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()

    run_ranks(world, body)


# ---- what is refused

BAD = {
    "per channel": (torch.ones(4, C, 5, dtype=torch.bool), ("(4, 3, 5)", "(4, 1, 5)", "All channels share")),
    "no channel": (torch.ones(4, 5, dtype=torch.bool), ("(4, 5)", "(4, 1, 5)", "mask.unsqueeze(1)")),
    "size": (torch.ones(3, 1, 5, dtype=torch.bool), ("(3, 1, 5)", "(4, 1, 5)", "(4, 3, 5)")),
    "float": (torch.ones(4, 1, 5), ("torch.float32", "boolean", "no weights")),
    "integer": (torch.ones(4, 1, 5, dtype=torch.int64), ("torch.int64", "boolean")),
    "device": (torch.ones(4, 1, 5, dtype=torch.bool, device="meta"), ("meta", "cpu", "(4, 1, 5)")),
}


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize("moments", [False, True], ids=["layer", "global_moments"])
def test_bad_mask_on_one_rank(kind: str, moments: bool) -> None:
    bad, said = BAD[kind]

    def body(rank: int, group: Any) -> None:
        layer = SyncBatchNorm(C, process_group=group)
        x, mask = torch.randn(4, C, 5), bad if rank == 1 else torch.ones(1, 1, 1, dtype=torch.bool)
        with pytest.raises(ValueError if rank == 1 else RankMismatchError) as caught:
            if moments:
                functional.global_moments(x, process_group=group, mask=mask)
            else:
                layer(x, mask=mask)
        assert all(words in str(caught.value) for words in said)
        assert layer.num_batches_tracked == 0
        layer(torch.randn(2, C))  # the group is usable, and in step

    run_ranks(2, body)


@pytest.mark.parametrize("training", [False, True])
def test_bad_mask_without_a_group(training: bool) -> None:
    with pytest.raises(ValueError, match="mask must have shape"):
        SyncBatchNorm(C).train(training)(torch.randn(4, C, 5), mask=torch.ones(5, dtype=torch.bool))


def test_sequence_mask() -> None:
    mask = masked.sequence_mask(torch.tensor([0, 2, 9], dtype=torch.int32), 3)
    assert mask.dtype == torch.bool and mask.shape == (3, 1, 3)
    assert mask.squeeze(1).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert masked.sequence_mask(torch.empty(0, dtype=torch.int64), 3).shape == (0, 1, 3)
    for bad in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1]]), torch.tensor(1)):
        with pytest.raises(ValueError, match="lengths must be an integer tensor") as caught:
            masked.sequence_mask(bad, 3)
        assert str(tuple(bad.shape)) in str(caught.value)


# ---- modes


def test_evaluation(world: int) -> None:
    """Running statistics need no mask; without them the local valid positions are measured, and nothing is sent."""
    xs = [torch.randn(3, C, 4, dtype=torch.float64) for _ in range(world)]
    masks = random_masks(xs)

    def body(rank: int, group: Any) -> None:
        layer = layer_like(xs[rank], peers_of(group)).eval()
        if rank == 0:  # the others do not even call
            assert torch.equal(layer(xs[rank], mask=masks[rank]), layer(xs[rank]))
        bare = SyncBatchNorm(C, track_running_stats=False, process_group=peers_of(group)).double().eval()
        if rank == 0:
            alone = masked_batch(xs[:1], masks[:1], xs[:1])
            close(bare(xs[0], mask=masks[0]), alone.y[0], 1e-12, 1e-12, "y")

    run_ranks(world, body)


def test_autograd_checks(world: int) -> None:
    """First and second derivatives of the loss of all ranks, in the input of each."""
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(n, 2, 3, generator=generator, dtype=torch.float64) for n in (2, 1, 2)[:world]]
    masks = random_masks(xs)
    xs[0][~masks[0].expand_as(xs[0])] = float("nan")
    gs = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in xs]
    weight = torch.tensor([0.7, -1.3], dtype=torch.float64)

    def body(rank: int, group: Any) -> list[Tensor]:
        x = xs[rank].clone().requires_grad_()
        y = functional.sync_batch_norm(
            x, None, None, weight, None, training=True, process_group=peers_of(group), mask=masks[rank]
        )
        (first,) = torch.autograd.grad((y**3 * gs[rank]).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2 * (1 + rank)).sum(), x)
        return [first.detach(), second]

    def whole(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        data = torch.cat([leaf.movedim(1, -1).reshape(-1, 2) for leaf in leaves])
        data = torch.where(torch.isfinite(data), data, 0)
        chosen = torch.cat([valid_rows(mask, x) for mask, x in zip(masks, inputs, strict=True)])
        y = (data - data[chosen].mean(0)) * (data[chosen].var(0, unbiased=False) + 1e-5).rsqrt() * weight
        parts = y.split([leaf.numel() // 2 for leaf in leaves])
        loss = sum((part**3 * rows(g)).sum() for part, g in zip(parts, gs, strict=True))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((d**2 * (1 + rank)).sum() for rank, d in enumerate(first)), leaves)
        return [*(d.detach() for d in first), *second]

    expected = whole(xs)
    for rank, (first, second) in enumerate(run_ranks(world, body)):
        close(first, expected[rank], 1e-10, 1e-10, f"first derivative of rank {rank}")
        close(second, expected[world + rank], 1e-9, 1e-9, f"second derivative of rank {rank}")


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck(activation: str | None) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (mask,) = random_masks([x])

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional.sync_batch_norm(
            x, None, None, weight, bias, training=True, residual=residual, activation=activation, mask=mask
        )

    assert torch.autograd.gradcheck(layer, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias, residual))


def test_func_grad(world: int) -> None:
    xs = [torch.randn(2, C, 4, dtype=torch.float64) for _ in range(world)]
    gs, masks = [torch.randn_like(x) for x in xs], random_masks(xs)
    expected = masked_batch(xs, masks, gs)

    def body(rank: int, group: Any) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            y = functional.sync_batch_norm(
                x, None, None, training=True, process_group=peers_of(group), mask=masks[rank]
            )
            return (y * gs[rank]).sum()

        return torch.func.grad(loss)(xs[rank])

    for rank, dx in enumerate(run_ranks(world, body)):
        close(dx, expected.dx[rank], 1e-12, 1e-12, "dx")


def test_vmap_is_refused() -> None:
    mask = torch.ones(2, 1, 4, dtype=torch.bool)

    def layer(x: Tensor) -> Tensor:
        return functional.sync_batch_norm(x, None, None, training=True, mask=mask)

    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(layer)(torch.randn(3, 2, C, 4))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant: bool, world: int) -> None:
    xs = [torch.randn(3, C, 4, dtype=torch.float64) for _ in range(world)]
    gs, masks = [torch.randn_like(x) for x in xs], random_masks(xs)
    plain = run(xs, masks, gs)

    def body(rank: int, group: Any) -> dict[str, Any]:
        layer = layer_like(xs[rank], peers_of(group))

        def forward(x: Tensor, _: Tensor | None, mask: Tensor) -> Any:
            return checkpoint(lambda x: layer(x, mask=mask), x, use_reentrant=use_reentrant)

        x = xs[rank].clone().requires_grad_()
        forward(x, None, masks[rank]).backward(gs[rank])
        return {"dx": x.grad, "dweight": layer.weight.grad, **dict(layer.named_buffers())}

    for result, expected in zip(run_ranks(world, body), plain, strict=True):
        for name, value in result.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tracked", [True, False])
def test_compiled(tracked: bool) -> None:
    """One graph, with the values of the eager layer; garbage in the padding does no harm."""
    torch._dynamo.reset()
    x, g = torch.randn(4, C, 5, 2), torch.randn(4, C, 5, 2)
    mask = torch.rand(4, 1, 5, 1) < 0.6
    padding = torch.tensor([float("nan"), 7.0])
    x = torch.where(mask, x + 50, padding).requires_grad_()
    eager, layer = (layer_like(x, None, track_running_stats=tracked).train(tracked) for _ in range(2))
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask=mask)
    expected = eager(x, mask=mask)
    close(y.detach(), expected.detach(), 1e-5, 1e-5, "y")
    ours, theirs = (torch.autograd.grad(out, [x, net.weight], g) for out, net in ((y, layer), (expected, eager)))
    close(ours[0], theirs[0], 1e-5, 1e-5, "dx")
    close(ours[1], theirs[1], 1e-5, 1e-5, "dweight")
    for name, buffer in eager.named_buffers():
        close(dict(layer.named_buffers())[name], buffer, 1e-6, 1e-6, name)


def test_global_moments(world: int) -> None:
    xs = [torch.randn(n, C, 4, dtype=torch.float64) for n in (2, 3, 1)[:world]]
    masks = random_masks(xs)
    valid = torch.cat([rows(x)[valid_rows(mask, x)] for x, mask in zip(xs, masks, strict=True)]).requires_grad_()
    ((valid.mean(0) * 2).sum() + valid.var(0, unbiased=False).sum() * 3).backward()

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        x = torch.where(masks[rank], xs[rank], float("nan")).requires_grad_()
        count, mean, var = functional.global_moments(x, process_group=peers_of(group), mask=masks[rank])
        if rank == 0:
            ((mean * 2).sum() + var.sum() * 3).backward()
        else:  # (the loss is the sum of the ranks' losses)
            ((mean + var) * 0).sum().backward()
        assert x.grad is not None
        return count, mean.detach(), var.detach(), x.grad

    start = 0
    for rank, (count, mean, var, dx) in enumerate(run_ranks(world, body)):
        assert count == len(valid)
        close(mean, valid.detach().mean(0), 1e-12, 1e-12, "mean")
        close(var, valid.detach().var(0, unbiased=False), 1e-12, 1e-12, "var")
        chosen = valid_rows(masks[rank], xs[rank])
        close(rows(dx)[chosen], valid.grad[start : start + int(chosen.sum())], 1e-12, 1e-12, "dx")
        assert not rows(dx)[~chosen].any()
        start += int(chosen.sum())


# ---- layers that were something else


def test_converted_layers() -> None:
    """A converted layer takes a mask; a subclass passes it on; a lazy layer learns its width from the masked input."""

    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(input, mask=mask) if mask is not None else super().forward(input)  # type: ignore

    x = torch.randn(4, C, 5, dtype=torch.float64)
    (mask,) = random_masks([x])
    expected = masked_batch([x], [mask], [x])
    for made in (nn.BatchNorm1d(C), Own(C), nn.LazyBatchNorm1d()):
        layer = syncbn.convert_sync_batchnorm(made).double()
        close(layer(x, mask=mask).detach(), expected.y[0], 1e-12, 1e-12, "y")
        close(layer.running_var, expected.running_var, 1e-12, 1e-12, "running_var")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_after_the_reversion(track: bool, momentum: float | None) -> None:
    x = torch.randn(4, C, 5, dtype=torch.float64)
    (mask,) = random_masks([x])
    layers = [SyncBatchNorm(C, momentum=momentum, track_running_stats=track).double() for _ in range(2)]
    syncbn.revert_sync_batchnorm(layers[1])
    assert not isinstance(layers[1], SyncBatchNorm)
    for training in (True, True, False):
        ours, theirs = (layer.train(training)(x, mask=mask) for layer in layers)
        close(theirs, ours, 1e-12, 1e-12, "y")
    for name, buffer in layers[0].named_buffers():
        close(dict(layers[1].named_buffers())[name], buffer, 1e-12, 1e-12, name)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_ranks_train_like_one_process() -> None:
    """Sequences of different lengths on three ranks, the loss weighted by valid positions: one process's gradients."""

    class Net(nn.Module):
        def __init__(self, group: Any) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv1d(C, C, 3, padding=1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(SyncBatchNorm(C, process_group=group, activation="relu") for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for conv, norm in zip((self.first, self.second), self.norms, strict=True):
                x = norm(conv(x.masked_fill(~mask, 0.0)), mask=mask)
            return x

    lengths = torch.tensor([5, 2, 1, 4, 4, 3])
    x = torch.randn(6, C, 5, dtype=torch.float64)
    mask = masked.sequence_mask(lengths, 5)
    sizes, template = (3, 1, 2), Net(None).double()
    xs, masks = x.split(sizes), mask.split(sizes)

    def gradients(group: Any, x: Tensor, mask: Tensor) -> list[Tensor]:
        net = Net(group).double()
        net.load_state_dict(template.state_dict())
        loss = (net(x, mask) * mask).square().sum() / lengths.sum()
        return [
            *torch.autograd.grad(loss, list(net.parameters())),
            *(norm.get_buffer("running_var") for norm in net.norms),
        ]

    count = len(list(template.parameters()))
    expected = gradients(None, x, mask)
    results = run_ranks(3, lambda rank, group: gradients(group, xs[rank], masks[rank]))
    for index, value in enumerate(expected):
        parts = [result[index] for result in results]
        close(sum(parts) if index < count else parts[0], value, 1e-12, 1e-12, f"value {index}")
    # And the padding might as well not be there: two sequences of equal length, cut to it.
    with torch.no_grad():
        short, full = (Net(None).double() for _ in range(2))
        short.load_state_dict(full.state_dict())
        y = full(x[3:5], mask[3:5])
        close(short(x[3:5, :, :4], mask[3:5, :, :4]), y[..., :4], 1e-12, 1e-12, "y without padding")
