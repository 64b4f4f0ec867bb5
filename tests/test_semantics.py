"""What must happen in the corners: one test for each promise."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from helpers.links import forced, recorded
from helpers.oracle import close, rows, step, unrows, whole_batch
from helpers.ranks import outcomes, run_ranks
from syncbn import RankMismatchError, SyncBatchNorm, functional, kernels, wire

C = 3


def works(group: Any, rank: int) -> None:
    """The group is usable, and in step: a plain layer gives the global mean."""
    layer = SyncBatchNorm(1, process_group=group, momentum=1.0)
    layer(torch.full((2, 1), float(rank)))
    size = group.size()
    assert abs(float(layer.running_mean) - (size - 1) / 2) < 1e-6


def inputs(sizes: Sequence[int], *spatial: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, C, *spatial, dtype=dtype) * 2 + 1 for n in sizes]


# ---- how much is exchanged


def test_one_exchange_forward_and_one_backward() -> None:
    xs = inputs((3, 0, 2), 4)
    with recorded() as calls:
        run_ranks(3, lambda rank, group: step(SyncBatchNorm(C, process_group=group).double(), xs[rank], xs[rank]))
    for rank in range(3):
        mine = [call[1:] for call in calls if call[0] == rank]
        assert mine == [(wire.FORWARD, 2 * C + 1), (wire.BACKWARD, 2 * C)]


def test_no_exchange_backward_when_the_input_needs_no_gradient() -> None:
    xs = inputs((3, 2), 4)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> SyncBatchNorm:
        layer = SyncBatchNorm(C, process_group=group).double()
        layer(xs[rank]).backward(xs[rank])
        return layer

    with recorded() as calls:
        layers = run_ranks(2, body)
    assert [call[1] for call in calls] == [wire.FORWARD] * 2
    for rank, layer in enumerate(layers):
        close(layer.weight.grad, expected.dweight[rank], 1e-12, 1e-12, "dweight")
        close(layer.bias.grad, expected.dbias[rank], 1e-12, 1e-12, "dbias")


def test_no_exchange_backward_without_gradients() -> None:
    def body(rank: int, group: Any) -> None:
        with torch.no_grad():
            assert SyncBatchNorm(C, process_group=group)(torch.randn(3, C)).grad_fn is None

    with recorded() as calls:
        run_ranks(2, body)
    assert [call[1] for call in calls] == [wire.FORWARD] * 2


@pytest.mark.parametrize("track", [True, False])
def test_eval_never_communicates(track: bool) -> None:
    """Without running statistics it uses those of the local batch, as torch does."""
    x = torch.randn(2, 4, C, 5)
    plain = nn.BatchNorm1d(C, track_running_stats=track).eval()
    connected = threading.Barrier(2, timeout=10.0)

    def body(rank: int, group: Any) -> Tensor:
        connected.wait()  # the other would hang up on one that still connects
        layer = SyncBatchNorm(C, track_running_stats=track, process_group=group).eval()
        if rank == 0:  # the other does not even call
            y = layer(x[0].requires_grad_())
            y.sum().backward()
            return y
        return plain(x[0])

    with recorded() as calls:
        ours, theirs = run_ranks(2, body)
    assert calls == []
    close(ours, theirs, 2e-6, 2e-6, "y")


def test_eval_of_converted_subclass_never_communicates() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, training=self.training)

    def body(rank: int, group: Any) -> None:
        if rank == 0:
            syncbn.convert_sync_batchnorm(Own(C), group).eval()(torch.randn(3, C))

    with recorded() as calls:
        run_ranks(2, body)
    assert calls == []


class Spy:
    """A module of kernels that notes which of its functions are called."""

    def __init__(self, kernel: Any, used: list[str]) -> None:
        self.kernel, self.used = kernel, used

    def __getattr__(self, name: str) -> Any:
        if name not in ("fuses_relu", "operands"):
            self.used.append(name)
        return getattr(self.kernel, name)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SYNCBN_KERNELS", "aten")
    kernels._native_works.cache_clear()
    yield
    kernels._native_works.cache_clear()


@pytest.mark.usefixtures("without_native")
def test_the_synchronized_path_runs_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *args: Spy(choose(*args), used))
    layer = SyncBatchNorm(C, activation="relu")
    step(layer, torch.randn(4, C), torch.randn(4, C))
    assert used == []  # one rank: torch's own
    with forced():
        step(layer, torch.randn(4, C), torch.randn(4, C))
    backward = ["passed_gradient", "pack_gradient_sums", "shared_input_gradient"]
    assert used == ["pack_moments", "normalize_shared", *backward]


@pytest.mark.skipif(not kernels.native.available(), reason="the compiled loops were not built")
def test_compiled_loops_also_do_without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *args: Spy(choose(*args), used))
    step(SyncBatchNorm(C), torch.randn(4, C), torch.randn(4, C))
    assert used == ["pack_moments", "normalize_shared", "pack_gradient_sums", "shared_input_gradient"]


# ---- a global count of one


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1, 0)])
def test_global_count_of_one_raises_on_every_rank(sizes: tuple[int, ...]) -> None:
    def body(rank: int, group: Any) -> SyncBatchNorm:
        layer = SyncBatchNorm(C, process_group=group)
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            layer(torch.randn(sizes[rank], C))
        assert str(sizes[rank]) in str(caught.value)
        works(group, rank)
        return layer

    for layer in run_ranks(len(sizes), body):
        assert torch.equal(layer.running_mean, torch.zeros(C))
        assert torch.equal(layer.running_var, torch.ones(C))
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("synchronize", [False, True])
def test_global_count_of_one_without_peers(synchronize: bool) -> None:
    layer = SyncBatchNorm(C)
    with forced(synchronize), pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, C, 1))
    assert torch.equal(layer.running_var, torch.ones(C))
    assert layer.num_batches_tracked == 0


def test_global_moments_of_one_value() -> None:
    count, mean, var = functional.global_moments(torch.tensor([[4.0]]))
    assert (count.item(), mean.item(), var.item()) == (1.0, 4.0, 0.0)


# ---- bad input: the rank that errs says so, the others hear of it, the group stays usable

BAD = {
    "channels": (torch.randn(4, C + 2), ("3", "5", "num_features")),
    "ndim": (torch.randn(4), ("1-D", "(4,)")),
    "integer": (torch.ones(4, C, dtype=torch.int64), ("torch.int64",)),
    "bool": (torch.ones(4, C, dtype=torch.bool), ("torch.bool",)),
    "complex": (torch.ones(4, C, dtype=torch.complex64), ("torch.complex64",)),
    "float8": (torch.ones(4, C).to(torch.float8_e4m3fn), ("float8_e4m3fn",)),
}


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_bad_input_on_one_rank(kind: str, requires_grad: bool) -> None:
    bad, said = BAD[kind]

    def body(rank: int, group: Any) -> str:
        layer = SyncBatchNorm(C, process_group=group)
        good = torch.randn(4, C, requires_grad=requires_grad)
        with pytest.raises(ValueError if rank == 1 else RankMismatchError) as caught:
            layer(bad if rank == 1 else good)
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_var, torch.ones(C))
        works(group, rank)
        return str(caught.value)

    first, own, third = run_ranks(3, body)
    for words in said:
        assert words in own
        assert words in first  # what rank 1 said is passed on
    assert "rank 1" in first and "rank 1" in third


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize("training", [False, True])
def test_bad_input_without_a_group(kind: str, training: bool) -> None:
    bad, said = BAD[kind]
    with pytest.raises(ValueError) as caught:
        SyncBatchNorm(C).train(training)(bad)
    assert all(words in str(caught.value) for words in said)


ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "activation": ({"activation": "gelu"}, ("gelu", "relu")),
    "weight": ({"weight": torch.ones(C + 1)}, ("weight", "(3,)", "(4,)")),
    "bias": ({"bias": torch.ones(C + 1)}, ("bias", "(3,)", "(4,)")),
    "residual shape": ({"residual": torch.ones(4, C + 1)}, ("residual", "(4, 3)", "(4, 4)")),
    "residual dtype": ({"residual": torch.ones(4, C, dtype=torch.int32)}, ("residual", "torch.int32")),
    "momentum": ({"momentum": None}, ("momentum", "None")),
}


@pytest.mark.parametrize("kind", sorted(ARGUMENTS))
def test_bad_argument_on_one_rank(kind: str) -> None:
    changed, said = ARGUMENTS[kind]

    def body(rank: int, group: Any) -> None:
        arguments = dict(changed) if rank == 0 else {}
        error = ValueError if rank == 0 else RankMismatchError
        with pytest.raises(error) as caught:
            functional.sync_batch_norm(
                torch.randn(4, C), torch.zeros(C), torch.ones(C), training=True, process_group=group, **arguments
            )
        assert all(words in str(caught.value) for words in said)
        works(group, rank)

    run_ranks(2, body)


def test_bad_input_to_global_moments() -> None:
    def body(rank: int, group: Any) -> None:
        with pytest.raises(ValueError if rank == 0 else RankMismatchError, match="int64"):
            x = torch.ones(4, C, dtype=torch.int64) if rank == 0 else torch.randn(4, C)
            functional.global_moments(x, process_group=group)
        with pytest.raises(RankMismatchError, match=r"3 channels.*5 channels"):  # both are right by themselves
            functional.global_moments(torch.randn(4, C if rank == 0 else 5), process_group=group)
        works(group, rank)

    run_ranks(2, body)


def test_unknown_activation_of_a_module() -> None:
    with pytest.raises(ValueError, match=r"activation.*gelu"):
        SyncBatchNorm(C, activation="gelu")


def test_converted_layer_goes_on_refusing_other_dimensions() -> None:
    def body(rank: int, group: Any) -> None:
        layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(C), group)
        with pytest.raises(ValueError if rank == 1 else RankMismatchError, match="4D"):
            layer(torch.randn(4, C) if rank == 1 else torch.randn(4, C, 2, 2))
        works(group, rank)

    run_ranks(2, body)


# ---- ranks that disagree


def test_ranks_in_different_layers_of_equal_width() -> None:
    def body(rank: int, group: Any) -> str:
        model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"a": nn.BatchNorm1d(C), "b": nn.BatchNorm1d(C)}), group)
        with pytest.raises(RankMismatchError) as caught:
            model["a" if rank == 0 else "b"](torch.randn(4, C))
        assert torch.equal(model["a"].running_mean, torch.zeros(C))
        works(group, rank)
        return str(caught.value)

    for message in run_ranks(2, body):
        assert "'a'" in message and "'b'" in message and "rank 0" in message and "rank 1" in message


def test_ranks_of_different_widths_and_directions() -> None:
    def body(rank: int, group: Any) -> None:
        with pytest.raises(RankMismatchError, match=r"(?s)3 channels.*20000 channels"):
            width = 20000 if rank else C  # one of them wider than a first message
            SyncBatchNorm(width, process_group=group)(torch.randn(2, width))
        works(group, rank)
        y = SyncBatchNorm(C, process_group=group)(torch.randn(2, C, requires_grad=True))
        with pytest.raises(RankMismatchError, match=r"(?s)backward.*forward|forward.*backward"):
            if rank == 0:
                y.sum().backward()
            else:
                SyncBatchNorm(C, process_group=group)(torch.randn(2, C))
        works(group, rank)

    run_ranks(2, body)


def test_ranks_that_want_different_gradients() -> None:
    """One would wait for the other in the backward."""

    def body(rank: int, group: Any) -> None:
        with pytest.raises(RankMismatchError, match="gradients for"):
            SyncBatchNorm(C, process_group=group)(torch.randn(2, C, requires_grad=rank == 0))
        works(group, rank)

    run_ranks(2, body)


# ---- dtypes and modes


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_no_running_statistics_under_autocast(affine: bool, world: int) -> None:
    xs = inputs((3, 2)[:world], 4, 4, dtype=torch.float32)
    conv = nn.Conv2d(C, C, 3)

    def body(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        layer = SyncBatchNorm(C, affine=affine, track_running_stats=False, process_group=group)
        mine = copy.deepcopy(conv)
        with torch.autocast("cpu", torch.bfloat16):
            h = mine(xs[rank])
            y = layer(h)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        return h.detach(), y.detach()

    with forced(world == 1):
        results = run_ranks(world, body)
    hs = [h for h, _ in results]
    expected = whole_batch(hs, hs)
    for rank, (_, y) in enumerate(results):
        close(y, expected.y[rank], 2**-8 * 1.05, 2e-5, "y")


@pytest.mark.parametrize("world", [1, 2])
def test_track_running_stats_false(world: int) -> None:
    xs = inputs((3, 2)[:world], 4)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> Tensor:
        layer = SyncBatchNorm(C, track_running_stats=False, process_group=group, dtype=torch.float64)
        assert layer.running_mean is None
        y = layer(xs[rank])
        close(layer.eval()(xs[rank]), whole_batch([xs[rank]], [xs[rank]]).y[0], 1e-12, 1e-12, "y in eval")
        return y

    with forced(world == 1):
        for rank, y in enumerate(run_ranks(world, body)):
            close(y, expected.y[rank], 1e-12, 1e-12, "y")


@pytest.mark.parametrize("synchronize", [False, True])
def test_tracking_switched_off_later_leaves_the_buffers(synchronize: bool) -> None:
    """As in torch: ``track_running_stats = False`` on a layer that has buffers."""
    layers = SyncBatchNorm(C), nn.BatchNorm1d(C)
    x = torch.randn(5, C) + 3
    for layer in layers:
        layer.track_running_stats = False
        with forced(synchronize):
            layer(x)
    ours, theirs = (layer.state_dict() for layer in layers)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    close(layers[0].eval()(x), layers[1].eval()(x), 0, 0, "eval")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_without_parameters(affine: bool, bias: bool) -> None:
    xs = inputs((3, 2), 4)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> dict[str, Any]:
        layer = SyncBatchNorm(C, affine=affine, bias=bias, process_group=group, dtype=torch.float64)
        assert (layer.weight is None) == (not affine)
        assert (layer.bias is None) == (not affine or not bias)
        return step(layer, xs[rank], xs[rank])

    for rank, result in enumerate(run_ranks(2, body)):
        close(result["y"], expected.y[rank], 1e-12, 1e-12, "y")
        close(result["dx"], expected.dx[rank], 1e-12, 1e-12, "dx")
        if affine:
            close(result["dweight"], expected.dweight[rank], 1e-12, 1e-12, "dweight")


@pytest.mark.parametrize("bias", [True, False])
def test_reset_parameters(bias: bool) -> None:
    layer = SyncBatchNorm(C, bias=bias)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.add_(3)
    layer.reset_parameters()
    assert layer.state_dict().keys() == fresh.keys()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(frozen: str) -> None:
    xs = inputs((3, 2), 4)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> dict[str, Any]:
        layer = SyncBatchNorm(C, process_group=group, dtype=torch.float64)
        for name in ("weight", "bias") if frozen == "both" else (frozen,):
            getattr(layer, name).requires_grad_(False)
        return step(layer, xs[rank], xs[rank])

    for rank, result in enumerate(run_ranks(2, body)):
        close(result["dx"], expected.dx[rank], 1e-12, 1e-12, "dx")
        for name in ("weight", "bias"):
            if frozen in (name, "both"):
                assert result[f"d{name}"] is None
            else:
                close(result[f"d{name}"], getattr(expected, f"d{name}")[rank], 1e-12, 1e-12, name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_average_reads_nothing_back(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of the cumulative average stays a tensor: ``.item()`` of the counter would wait for a device."""
    layer = SyncBatchNorm(C, momentum=momentum)
    item = Tensor.item

    def guarded(self: Tensor) -> Any:
        assert self.data_ptr() != layer.num_batches_tracked.data_ptr()
        return item(self)

    monkeypatch.setattr(Tensor, "item", guarded)
    monkeypatch.setattr(Tensor, "__float__", lambda self: guarded(self))
    plain = nn.BatchNorm1d(C, momentum=0.1)
    with forced():
        for _ in range(3):
            x = torch.randn(5, C)
            layer(x)
            plain(x)
    assert layer.num_batches_tracked == 3


# ---- non-finite input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("world", "synchronize"), [(1, False), (1, True), (2, True)])
def test_non_finite_input(value: float, world: int, synchronize: bool) -> None:
    """The output shows it, in the channel where it is; the running statistics of that channel keep their values."""
    xs = inputs((4, 3)[:world], 2)
    bad = [x.clone() for x in xs]
    bad[-1][0, 1, 0] = value

    def body(rank: int, group: Any) -> tuple[Tensor, SyncBatchNorm]:
        layer = SyncBatchNorm(C, process_group=group, dtype=torch.float64)
        layer(xs[rank])
        before = copy.deepcopy(layer)
        y = layer(bad[rank])
        assert layer.num_batches_tracked == 2
        for name in ("running_mean", "running_var"):
            now, then = getattr(layer, name), getattr(before, name)
            assert torch.equal(now[1], then[1]), name
            assert torch.isfinite(now).all()
            assert not torch.equal(now[0], then[0])
        return y, layer

    with warnings.catch_warnings(), forced(synchronize):
        warnings.simplefilter("ignore", RuntimeWarning)
        results = run_ranks(world, body)
    for y, layer in results:
        assert torch.isnan(y[:, 1]).all()
        assert torch.isfinite(y[:, [0, 2]]).all()
        assert torch.equal(layer.running_var, results[0][1].running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("synchronize", [True, False])
def test_variance_beyond_the_range_of_its_buffer(synchronize: bool, momentum: float | None) -> None:
    """A finite batch whose variance is not finite in the dtype of the buffer."""
    layer = SyncBatchNorm(C, momentum=momentum)
    with forced(synchronize):
        layer(torch.randn(8, C) * torch.tensor([1.0, 1e25, 1.0]))
    assert torch.isfinite(layer.running_var).all()
    assert torch.isfinite(layer.running_mean).all()


# ---- autograd


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_two_forwards_before_one_backward(world: int, activation: str | None) -> None:
    first, second = inputs((4, 3)[:world], 2), inputs((2, 5)[:world], 2)
    expected = [whole_batch(xs, xs, relu=activation is not None) for xs in (first, second)]

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        layer = SyncBatchNorm(C, process_group=group, activation=activation, dtype=torch.float64)
        a, b = first[rank].clone().requires_grad_(), second[rank].clone().requires_grad_()
        loss = (layer(a) * first[rank]).sum() + (layer(b) * second[rank]).sum()
        loss.backward()
        assert a.grad is not None and b.grad is not None and layer.weight.grad is not None
        return a.grad, b.grad, layer.weight.grad

    with forced(world == 1):
        for rank, (da, db, dweight) in enumerate(run_ranks(world, body)):
            close(da, expected[0].dx[rank], 1e-12, 1e-12, "first")
            close(db, expected[1].dx[rank], 1e-12, 1e-12, "second")
            close(dweight, expected[0].dweight[rank] + expected[1].dweight[rank], 1e-12, 1e-12, "dweight")


def test_backward_twice_and_accumulation() -> None:
    xs = inputs((4, 3), 2)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> Tensor:
        x = xs[rank].clone().requires_grad_()
        y = SyncBatchNorm(C, process_group=group, dtype=torch.float64)(x)
        y.backward(xs[rank], retain_graph=True)
        y.backward(xs[rank])
        assert x.grad is not None
        return x.grad

    for rank, dx in enumerate(run_ranks(2, body)):
        close(dx, 2 * expected.dx[rank], 1e-12, 1e-12, "dx")


def test_rank_that_uses_no_output() -> None:
    """It takes part with zeros when its output is in the graph, here with a weight of zero."""
    xs = inputs((4, 3), 2)
    gs = [xs[0], torch.zeros_like(xs[1])]
    expected = whole_batch(xs, gs)
    results = run_ranks(2, lambda r, group: step(SyncBatchNorm(C, process_group=group).double(), xs[r], gs[r]))
    for rank, result in enumerate(results):
        close(result["dx"], expected.dx[rank], 1e-12, 1e-12, "dx")
    assert expected.dx[1].abs().max() > 0.01


class Discard(torch.autograd.Function):
    """Passes no gradient on: its input gets None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_output_whose_gradient_is_none() -> None:
    xs = inputs((4, 3), 2)
    gs = [xs[0], torch.zeros_like(xs[1])]
    expected = whole_batch(xs, gs)

    def body(rank: int, group: Any) -> Tensor:
        x = xs[rank].clone().requires_grad_()
        y = SyncBatchNorm(C, process_group=group, dtype=torch.float64)(x)
        ((y * gs[rank]) if rank == 0 else Discard.apply(y)).sum().backward()
        assert x.grad is not None
        return x.grad

    for rank, dx in enumerate(run_ranks(2, body)):
        close(dx, expected.dx[rank], 1e-12, 1e-12, "dx")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_func_grad(world: int, activation: str | None) -> None:
    xs = inputs((4, 3)[:world], 2)
    gs = inputs((4, 3)[:world], 2)
    weight, bias = torch.rand(C).double() + 0.5, torch.randn(C).double()
    expected = whole_batch(xs, gs, weight, bias, relu=activation is not None)

    def body(rank: int, group: Any) -> tuple[Tensor, ...]:
        def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            y = functional.sync_batch_norm(
                x, None, None, w, b, training=True, process_group=group, activation=activation
            )
            return (y * gs[rank]).sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(xs[rank], weight, bias)

    with forced(world == 1):
        for rank, (dx, dweight, dbias) in enumerate(run_ranks(world, body)):
            close(dx, expected.dx[rank], 1e-12, 1e-12, "dx")
            close(dweight, expected.dweight[rank], 1e-12, 1e-12, "dweight")
            close(dbias, expected.dbias[rank], 1e-12, 1e-12, "dbias")


def test_func_grad_of_a_module_over_ranks() -> None:
    xs = inputs((4, 3), 2)
    expected = whole_batch(xs, xs)

    def body(rank: int, group: Any) -> dict[str, Tensor]:
        layer = SyncBatchNorm(C, process_group=group, dtype=torch.float64)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(layer, parameters, (xs[rank],)) * xs[rank]).sum()

        return torch.func.grad(loss)({k: v.detach() for k, v in layer.named_parameters()})

    for rank, grads in enumerate(run_ranks(2, body)):
        close(grads["weight"], expected.dweight[rank], 1e-12, 1e-12, "dweight")


def test_vmap_gives_a_clear_error() -> None:
    layer = SyncBatchNorm(C, track_running_stats=False)
    with forced():
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(layer)(torch.randn(2, 4, C))
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(functional.global_moments)(torch.randn(2, 4, C))
    torch.testing.assert_close(
        torch.vmap(layer)(torch.ones(2, 4, C)),  # without peers it is batch norm
        torch.zeros(2, 4, C),
    )


# ---- double backward


def penalized(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, relu: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The oracle of the gradient penalty, all ranks' inputs in one graph: gradients of x, and of each rank's weight."""
    norm = nn.BatchNorm1d(C, affine=False, dtype=torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    ws = [weight.detach().clone().requires_grad_() for _ in xs]
    bs = [bias.detach().clone().requires_grad_() for _ in xs]
    parts = norm(torch.cat([leaf.movedim(1, -1).reshape(-1, C) for leaf in leaves])).split([len(rows(x)) for x in xs])
    ys = [unrows(p * w + b, x) for p, w, b, x in zip(parts, ws, bs, xs, strict=True)]
    ys = [y.relu() for y in ys] if relu else ys
    grads = torch.autograd.grad(sum((y**3).sum() for y in ys), leaves + ws, create_graph=True)
    penalty = sum((g**2).sum() for g in grads) + sum((y**2).sum() for y in ys)
    penalty.backward()
    return [leaf.grad for leaf in leaves], [w.grad for w in ws]


@pytest.mark.parametrize("sizes", [(4,), (4, 3), (3, 0, 2)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_double_backward(sizes: tuple[int, ...], activation: str | None) -> None:
    xs = inputs(sizes, 2)
    weight, bias = torch.rand(C).double() + 0.5, torch.randn(C).double()
    dx, dweight = penalized(xs, weight, bias, activation is not None)

    def body(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        layer = SyncBatchNorm(C, process_group=group, activation=activation, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        x = xs[rank].clone().requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad((y**3).sum(), [x, layer.weight], create_graph=True)
        (sum((g**2).sum() for g in grads) + (y**2).sum()).backward()
        assert x.grad is not None and layer.weight.grad is not None
        assert layer.num_batches_tracked == 1
        return x.grad, layer.weight.grad

    with forced(len(sizes) == 1):
        results = run_ranks(len(sizes), body)
        # Which rank gets which part of it is a convention; the sum is what data parallelism makes of it.
        total = sum(dweight)
        assert isinstance(total, Tensor)
        close(sum(w for _, w in results), total, 1e-9, 1e-9 * (1 + float(total.abs().max())), "dweight")
        for rank, (mine, _) in enumerate(results):
            scale = 1 + float(dx[rank].abs().max()) if dx[rank].numel() else 1.0
            close(mine, dx[rank], 1e-9, 1e-9 * scale, f"dx of rank {rank}")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck_and_gradgradcheck(relu: bool, with_residual: bool) -> None:
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(2).double() + 0.5).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    arguments = (x, weight, bias, residual) if with_residual else (x, weight, bias)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.sync_batch_norm(
            x, None, None, weight, bias, training=True, residual=residual, activation="relu" if relu else None
        )

    with forced():
        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments, atol=1e-4)


def test_gradgradcheck_of_global_moments() -> None:
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.global_moments(x)[1:]

    with forced():
        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))


def test_double_backward_of_half_input() -> None:
    """The penalty's gradient in float32 arithmetic, whatever the input's dtype."""
    x64 = torch.randn(8, C, dtype=torch.bfloat16).double()

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = functional.sync_batch_norm(x, None, None, training=True)
        [g] = torch.autograd.grad((y.double() ** 3).sum(), [x], create_graph=True)
        (g.double() ** 2).sum().backward()
        assert x.grad is not None
        return x.grad

    with forced():
        mine, expected = gradient(x64.bfloat16()), gradient(x64)
    close(mine, expected, 0.1, 0.1 * float(expected.abs().max()), "dx")


# ---- degenerate parameters


@pytest.mark.parametrize("value", [0.0, 7.0, 1000.1, 1e5 + 0.1, 1e7])
@pytest.mark.parametrize("positions", [3, 1, 7000])
def test_constant_input(value: float, positions: int) -> None:
    """Without variance the output is the bias, and dx = weight / sqrt(eps) * (g - mean of g)."""
    x, g = torch.full((4, C, positions), value), torch.randn(4, C, positions)
    with forced():
        ours = step(SyncBatchNorm(C), x, g)
    close(ours["y"], torch.zeros_like(x), 0.0, 0.0, "y")
    expected = (g.double() - g.double().mean((0, 2), keepdim=True)) / 1e-5**0.5
    close(ours["dx"], expected, 1e-3, 1e-3, "dx")


def test_module_looks_like_batch_norm() -> None:
    layer, plain = SyncBatchNorm(C, activation="relu"), nn.BatchNorm2d(C)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain(torch.randn(3, C, 2, 2))
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert "activation='relu'" in repr(layer)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


def test_every_rank_reports_in_outcomes() -> None:
    """(the harness itself: an exception of one rank is its result, and no other rank's)"""
    first, second = outcomes(2, lambda rank, group: 1 if rank == 0 else int("x"))
    assert first == 1
    assert isinstance(second, ValueError)


# ---- inputs without the form or the type for it


def test_a_jagged_tensor_is_told_how() -> None:
    """And what the error says works."""
    layer = syncbn.SyncBatchNorm(3)
    parts = [torch.randn(n, 3) for n in (4, 2)]
    x: Any = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    with pytest.raises(TypeError, match=r"nested_tensor_from_jagged\(layer\(x.values\(\)\), x.offsets\(\)\)"):
        layer(x)
    y: Any = torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets())
    y.values().pow(3).sum().backward()
    plain = nn.BatchNorm1d(3)(torch.cat(parts))
    close(y.values(), plain, 1e-5, 1e-5, "values")
    assert x.grad is not None and y.offsets() is x.offsets()


def test_other_tensors_without_a_dense_form_are_told_how() -> None:
    layer = syncbn.SyncBatchNorm(3)
    with warnings.catch_warnings():  # torch says once a process that they may change
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(2, 3)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"torch.cat\(x.unbind\(\)\)"):
        layer(nested)
    with pytest.raises(TypeError, match=r"sparse_coo one; give the features of its points"):
        layer(torch.randn(4, 3).to_sparse())


@pytest.mark.parametrize("function", ["layer", "global_moments", "global_covariance"])
def test_a_device_without_float64_says_so_on_every_rank(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "syncbn._torch.has_float64", lambda device: not threading.current_thread().name.endswith("rank 1")
    )

    def body(rank: int, group: Any) -> Any:
        call = syncbn.SyncBatchNorm(3) if function == "layer" else getattr(functional, function)
        if function == "layer":
            call.process_group = group
            return call(torch.randn(2, 3))
        return call(torch.randn(2, 3), process_group=group)

    first, second = outcomes(2, body)
    assert isinstance(second, TypeError) and "float64, which cpu does not have" in str(second)
    assert isinstance(first, syncbn.RankMismatchError) and "float64" in str(first)
