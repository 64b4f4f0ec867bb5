"""torch.compile without a graph break: values, gradients, statistics and shapes.

Most tests use the backend ``aot_eager``: the same tracing and partitioning, without minutes of C++ compilation. One
process has a default group of its own (one rank), and ``forced()`` makes its layers synchronize over it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import syncbn
import syncbn.compiled
from helpers.links import forced
from helpers.oracle import assert_matches, step, whole_batch
from syncbn import comm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPES = [(6, 5), (4, 3, 7), (3, 4, 5, 6), (2, 3, 4, 3, 2)]


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path) -> Iterator[None]:
    """A default group of one rank over gloo, and a compiler that has seen nothing yet."""
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with forced():
            yield
    finally:
        dist.destroy_process_group()


def compiled(module: nn.Module, backend: Any = "aot_eager", dynamic: bool | None = None) -> Any:
    return torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)


def affine_layer(channels: int, **options: Any) -> syncbn.SyncBatchNorm:
    layer = syncbn.SyncBatchNorm(channels, **options)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_whole_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = affine_layer(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x, g = torch.randn(shape).mul(3).add(2).to(dtype), torch.randn(shape).to(dtype)
    result = step(compiled(layer), x, g)
    result |= {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert_matches([result], whole_batch([x], [g], layer.weight, layer.bias), dtype)
    assert result["num_batches_tracked"] == 1
    assert result["y"].dtype == dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_residual_and_relu_in_both_layouts(layout: str, backend: str) -> None:
    layer = affine_layer(16, activation="relu")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, g, residual = (torch.randn(4, 16, 9, 7).to(memory_format=form) for _ in range(3))
    result = step(compiled(layer, backend), x, g, residual)
    expected = whole_batch([x], [g], layer.weight, layer.bias, residuals=[residual], relu=True)
    assert_matches([result | {"running_mean": layer.running_mean, "running_var": layer.running_var}], expected, x.dtype)
    assert result["y"].is_contiguous(memory_format=form)


def test_the_input_as_its_own_residual_and_one_vector_as_weight_and_bias() -> None:
    """A tensor that is passed twice has both gradients: the compiler of torch 2.12 loses one, that of 2.13 refuses."""
    layer = affine_layer(4, dtype=torch.float64)
    layer.bias = layer.weight
    x, g = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    for values in (lambda net: net(x, x), lambda net: net(x)):
        torch._dynamo.reset()
        expected = torch.autograd.grad(values(layer), [x, layer.weight], g)
        torch.testing.assert_close(torch.autograd.grad(values(compiled(layer)), [x, layer.weight], g), expected)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_inductor_reductions_keep_their_digits(offset: float) -> None:
    layer = syncbn.SyncBatchNorm(4, momentum=1.0, affine=False)
    x = torch.randn(3, 4, 65, 63) + offset
    y = compiled(layer, "inductor", dynamic=True)(x)
    wide = x.double()
    var = wide.var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-4, atol=0)
    expected = nn.functional.batch_norm(wide, None, None, training=True)
    plain = nn.functional.batch_norm(x, None, None, training=True)
    worst = (plain - expected).abs().max()
    assert (y - expected).abs().max() <= worst + 1e-6


def test_batch_sizes_share_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = affine_layer(5)
    run = compiled(layer, counter, dynamic=True)
    frames = set()
    for batch in (3, 2, 7, 12, 4):
        x = torch.randn(batch, 5, 6)
        result = step(run, x, torch.ones_like(x))
        assert_matches([result | {"running_mean": None, "running_var": None}],
                       whole_batch([x], [torch.ones_like(x)], layer.weight, layer.bias), x.dtype)  # fmt: skip
        layer.zero_grad()
        frames.add(counter.frame_count)
    assert len(frames) == 1, "a batch size compiled anew"
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_follow_the_momentum(momentum: float | None) -> None:
    layer = syncbn.SyncBatchNorm(3, momentum=momentum)
    plain = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    run = compiled(layer)
    for _ in range(3):
        x = torch.randn(8, 3) * 2 + 1
        run(x)
        plain(x.double())
    torch.testing.assert_close(layer.running_mean.double(), plain.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_options_compile(options: dict[str, Any]) -> None:
    layer = affine_layer(4, **options)
    x, g = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    result = step(compiled(layer), x, g)
    assert_matches([result], whole_batch([x], [g], layer.weight, layer.bias), x.dtype)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_without_peers_it_is_plain_batch_norm(
    momentum: float | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "_forced", 0)
    layer, plain = syncbn.SyncBatchNorm(4, momentum=momentum), nn.BatchNorm1d(4, momentum=momentum)
    run = compiled(layer, backend)
    x, g = torch.randn(5, 4), torch.randn(5, 4)
    for _ in range(2):
        ours, theirs = step(run, x, g), step(plain, x, g)
        torch.testing.assert_close(ours["y"], theirs["y"])
        torch.testing.assert_close(ours["dx"], theirs["dx"])
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 2


def test_eval_uses_running_statistics() -> None:
    layer = affine_layer(4).eval()
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(compiled(layer)(x), layer(x))


def test_a_frozen_input_and_frozen_parameters() -> None:
    layer = affine_layer(4)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 4)
    compiled(layer)(x).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("order", ["convert first", "compile first"])
def test_convert_before_or_after(order: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    model = copy.deepcopy(plain)
    if order == "convert first":
        run = compiled(syncbn.convert_sync_batchnorm(model))
    else:
        run = compiled(model)
        run(torch.randn(2, 3, 8, 8))
        model.load_state_dict(plain.state_dict())
        syncbn.convert_sync_batchnorm(run)
        assert isinstance(model[1], syncbn.SyncBatchNorm)
        assert model[1]._layer_name == "1"
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(run(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[4].running_var, plain[4].running_var, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    eager = copy.deepcopy(model)
    x = torch.randn(8, 6)

    def run(net: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    y, expected = run(compiled(model)), run(eager)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model[1].running_var, eager[1].running_var, rtol=1e-3, atol=1e-4)
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loops", [True, False])
def test_a_checkpoint_around_a_graph_counts_the_batch_once(
    reentrant: bool, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(syncbn.compiled.kernels, "loops_for", lambda dtype: False)
    layer = affine_layer(3)
    x, g = torch.randn(4, 3, 2) + 2, torch.randn(4, 3, 2)
    expected = step(copy.deepcopy(layer), x, g)
    run = compiled(layer)
    x.requires_grad_()
    checkpoint(run, x, use_reentrant=reentrant).backward(g)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, expected["running_mean"])
    torch.testing.assert_close(x.grad, expected["dx"])
    run(x)  # and outside of it as ever
    assert layer.num_batches_tracked == 2


def test_one_value_per_channel_is_an_error_that_names_the_layer() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"more than 1 value per channel .* has 1: forward of layer '0' \(3 channels"):
        compiled(model)(torch.randn(1, 3))


def test_an_empty_batch_changes_nothing() -> None:
    layer = affine_layer(3)
    run = compiled(layer)
    y = run(torch.randn(0, 3, 4))
    assert y.shape == (0, 3, 4)
    y.sum().backward()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert torch.equal(layer.weight.grad, torch.zeros(3))


def test_statistics_that_are_not_finite_leave_the_running_ones() -> None:
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3)
    x[1, 2] = float("inf")
    with pytest.warns(RuntimeWarning, match="not finite"):
        y = compiled(layer)(x)
    assert y[:, 2].isnan().any()
    assert torch.isfinite(layer.running_mean).all() and torch.isfinite(layer.running_var).all()
    assert layer.running_mean[0] != 0


def test_double_backward_through_a_compiled_model_is_an_error() -> None:
    layer = affine_layer(3)
    x = torch.randn(5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(layer)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_export_after_revert_is_plain_batch_norm() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(2, 2, 4, 4)
    model(x)
    syncbn.revert_sync_batchnorm(model).eval()
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("batch_norm" in target for target in targets)
    assert not any("all_reduce" in target for target in targets)
    torch.testing.assert_close(program.module()(x), model(x))


class SelfMade(nn.BatchNorm1d):
    """Calls ``F.batch_norm`` by itself, as timm's BatchNormAct2d does."""

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return y.relu()


def test_a_subclass_that_calls_batch_norm_itself_breaks_the_graph_and_stays_right() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(SelfMade(3)))
    plain = SelfMade(3)
    x = torch.randn(6, 3)
    y = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"F\.batch_norm"):
        compiled(model)(x)
