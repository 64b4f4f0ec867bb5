"""DTensor inputs: exact over the dimensions that shard batch or space, without a gather of activations."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import syncbn
from helpers.links import recorded
from helpers.oracle import TOLERANCE, close
from helpers.processes import run_processes
from syncbn import functional, wire

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="DTensor inputs are for torch 2.13 and later: before, outputs come back replicated",
)

WORLD = 4
C = 5
EXCHANGES = [(wire.FORWARD, 2 * C + 1), (wire.BACKWARD, 2 * C)]
ALL_REDUCE, ALL_GATHER = "c10d_functional.all_reduce", "c10d_functional.all_gather_into_tensor"
Case = Callable[[DeviceMesh, DeviceMesh], dict[str, Any]]


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def data(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator).double() * torch.linspace(0.5, 2, C).view(-1, *[1] * (len(shape) - 2))
        + 3
    )


def layer_of(
    mesh: DeviceMesh, parameters: Any = "plain", plain: bool = False, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """A layer whose parameters and buffers are plain tensors, or DTensors of these placements."""
    layer = (nn.BatchNorm2d if plain else syncbn.SyncBatchNorm)(C, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, C))
        layer.bias.copy_(torch.linspace(-1, 1, C))
    if parameters != "plain":

        def place(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, value in list(module.named_parameters(recurse=False)):
                module.register_parameter(key, nn.Parameter(distribute_tensor(value.data, mesh, parameters)))
            for key, buffer in list(module.named_buffers(recurse=False)):
                if buffer.dim():
                    module.register_buffer(key, distribute_tensor(buffer, mesh, parameters))

        distribute_module(layer, mesh, place)
    return layer


def train(
    layer: Any,
    mesh: DeviceMesh,
    placements: list[Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual: bool,
    mask: bool,
) -> dict[str, Any]:
    x = distribute_tensor(data(shape).to(dtype), mesh, placements).requires_grad_()
    g = distribute_tensor(data(shape, 1).to(dtype), mesh, placements)
    add = distribute_tensor(data(shape, 2).to(dtype), mesh, placements).requires_grad_() if residual else None
    valid = None
    if mask:
        at = [Replicate() if p.is_shard(1) else p for p in placements]
        valid = distribute_tensor(data(shape, 3)[:, :1] > 3, mesh, at)
    with recorded() as exchanges, CommDebugMode() as forward:
        y = layer(x, add, mask=valid)
    with recorded() as backward_exchanges, CommDebugMode() as backward:
        y.backward(g)
    results = {
        "y": y, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad,
        "running_mean": layer.running_mean, "running_var": layer.running_var,
        "dresidual": None if add is None else add.grad,
        "batches": layer.num_batches_tracked, "evaluated": layer.eval()(x.detach()),
    }  # fmt: skip
    return {name: whole(value) for name, value in results.items()} | {
        "placements": [str(t.placements) for t in (y, x.grad)],
        "expected placements": str(tuple(placements)),
        "parameter placements": str(getattr(layer.weight.grad, "placements", "plain")),
        "exchanges": [(kind, width) for _, kind, width in exchanges + backward_exchanges],
        "collectives": [
            {str(kind): count for kind, count in counts.get_comm_counts().items()} for counts in (forward, backward)
        ],
    }


def case(
    placements: list[Any], parameters: Any = "plain", shape: tuple[int, ...] = (6, C, 7, 3), dtype: Any = torch.float64,
    residual: bool = False, mask: bool = False, **options: Any,
) -> Case:  # fmt: skip
    def run(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
        mesh = one if len(placements) == 1 else two
        layer = layer_of(mesh, parameters, dtype=torch.promote_types(dtype, torch.float32), **options)
        return train(layer, mesh, placements, shape, dtype, residual, mask)

    return run


S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
CASES: dict[str, Case] = {
    "batch": case([S0]),
    "batch, replicated parameters": case([S0], [R]),
    "batch, sharded parameters": case([S0], [S0]),
    "rows": case([S2]),
    "rows, a rank without any": case([S2], shape=(2, C, 5, 3)),
    "rows, replicated parameters": case([S2], [R]),
    "channels": case([S1]),
    "channels, sharded parameters": case([S1], [S0]),
    "channels, replicated parameters": case([S1], [R]),
    "copies": case([R]),
    "copies, replicated parameters": case([R], [R]),
    "batch and rows": case([S0, S2]),
    "batch twice": case([S0, S0]),
    "copies of batches": case([R, S0], [R, R]),
    "channels of batches": case([S1, S0], [S0, R]),
    "batches of channels": case([S0, S1]),
    "float32": case([S0, S2], dtype=torch.float32),
    "bfloat16": case([S0, S2], dtype=torch.bfloat16),
    "residual and relu": case([S2, S0], residual=True, activation="relu"),
    "mask": case([S0, S2], mask=True),
    "mask over channels": case([S1, S0], mask=True),
}
OPTIONS = {
    "residual and relu": {"residual": True, "relu": True},
    "mask": {"mask": True},
    "mask over channels": {"mask": True},
}


def slice_of_a_mesh(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
    """Rows over one dimension, which the input knows of; samples over the other, which only the group knows of."""
    torch.manual_seed(0)
    layer = layer_of(two, process_group=(two, "data"))
    x, g = (data((6, C, 7, 3), seed).chunk(2)[two.get_local_rank("data")] for seed in (0, 1))
    leaf = distribute_tensor(x, two["rows"], [S2]).requires_grad_()
    y = layer(leaf)
    y.backward(distribute_tensor(g, two["rows"], [S2]))
    mine = whole(y), whole(leaf.grad)
    parts = [[torch.empty_like(t) for _ in range(2)] for t in mine]
    for every, t in zip(parts, mine, strict=True):
        dist.all_gather(every, t.detach(), group=two.get_group("data"))
    dist.all_reduce(layer.weight.grad, group=two.get_group("data"))
    return {"y": torch.cat(parts[0]), "dx": torch.cat(parts[1]), "dweight": layer.weight.grad, "dbias": None,
            "running_mean": layer.running_mean, "running_var": layer.running_var}  # fmt: skip


def copies_over_a_slice(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
    """The input is whole on the ranks of one dimension; the default group has them all, and counts them once."""
    layer = layer_of(two)
    x, g = (data((6, C, 7, 3), seed).chunk(2)[two.get_local_rank("data")] for seed in (0, 1))
    leaf = distribute_tensor(x, two["rows"], [R]).requires_grad_()
    y = layer(leaf)
    y.backward(distribute_tensor(g, two["rows"], [R]))
    return {"y": whole(y), "dx": whole(leaf.grad), "part": two.get_local_rank("data"),
            "running_mean": layer.running_mean, "running_var": layer.running_var}  # fmt: skip


def sharded_model(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
    """FSDP2 over one dimension of parameters that are DTensors on the other."""
    layer = layer_of(two["rows"], [R], process_group=(two, "data"))
    fully_shard(layer, mesh=two["data"])
    x, g = (data((6, C, 7, 3), seed).chunk(2)[two.get_local_rank("data")] for seed in (0, 1))
    leaf = distribute_tensor(x, two["rows"], [S2]).requires_grad_()
    y = layer(leaf)
    y.backward(distribute_tensor(g, two["rows"], [S2]))
    return {"y": whole(y), "part": two.get_local_rank("data"), "dweight": whole(layer.weight.grad) * 2}  # FSDP averages


def penalty(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
    layer = layer_of(one)
    x = distribute_tensor(data((6, C, 7, 3)), one, [S0]).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return {"dx": whole(x.grad)}


def errors(one: DeviceMesh, two: DeviceMesh) -> dict[str, Any]:
    x = distribute_tensor(data((6, C, 7, 3)), one, [S0])
    partial = DTensor.from_local(data((6, C, 7, 3)), one, [Partial()])
    half = DeviceMesh.from_group(dist.new_subgroups(2)[0], "cpu")  # of nothing larger
    calls = {
        "partial": lambda: layer_of(one)(partial),
        "residual": lambda: layer_of(one)(x, data((6, C, 7, 3))),
        "placements": lambda: layer_of(one)(x, x.redistribute(placements=[S2])),
        "mask": lambda: layer_of(one)(x, mask=distribute_tensor(data((6, C, 7, 3))[:, :1] > 3, one, [R])),
        "parameters": lambda: layer_of(two, [R, R])(x),
        "channels": lambda: syncbn.SyncBatchNorm(C + 1)(x),
        "group": lambda: layer_of(half)(distribute_tensor(data((6, C, 7, 3)), half, [S0])),
        "moments": lambda: functional.global_moments(x),
        "covariance": lambda: functional.global_covariance(x),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    own = layer_of(half, process_group=half)(distribute_tensor(data((6, C, 7, 3)), half, [S0]))
    return {"said": said, "own": whole(own)}


OTHERS: dict[str, Case] = {
    f.__name__: f for f in (slice_of_a_mesh, copies_over_a_slice, sharded_model, penalty, errors)
}


def run_all(rank: int, size: int) -> dict[str, Any]:
    one = init_device_mesh("cpu", (size,))
    two = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "rows"))
    results: dict[str, Any] = {}
    for name, run in (CASES | OTHERS).items():
        try:
            results[name] = run(one, two)
        except Exception:
            results[name] = traceback.format_exc()
            break  # the ranks may be out of step
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(WORLD, run_all, tmp_path_factory.mktemp("ranks"))


def of(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for result in ranks:
        failed = [text for text in result.values() if isinstance(text, str)]
        assert not failed, failed[0]
    return [result[name] for result in ranks]


def expected(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (6, C, 7, 3), relu: bool = False,
             residual: bool = False, mask: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """One process with the whole tensor, in float64."""
    layer = layer_of(None, plain=True)  # type: ignore[arg-type]
    x, g, add = (data(shape, seed).to(dtype).double().requires_grad_() for seed in range(3))
    if mask:
        valid = (data(shape, 3)[:, :1] > 3).expand_as(x)
        var, mean = torch.var_mean(x.movedim(1, -1)[valid[:, 0]], 0, correction=0)
        count = int(valid[:, 0].sum())
        spread = lambda v: v.view(-1, 1, 1)  # noqa: E731
        y = (x - spread(mean)) * spread((var + 1e-5).rsqrt() * layer.weight) + spread(layer.bias)
        with torch.no_grad():
            layer.running_mean.lerp_(mean, 0.1)
            layer.running_var.lerp_(var * count / (count - 1), 0.1)
    else:
        y = layer(x)
    y = y + add if residual else y
    y = y.relu() if relu else y
    y.backward(g.detach())
    return {
        "y": y, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad,
        "running_mean": layer.running_mean, "running_var": layer.running_var, "dresidual": add.grad,
        "evaluated": layer.eval()(x.detach()),
    }  # type: ignore[dict-item]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_tensor(ranks: list[dict[str, Any]], name: str) -> None:
    results = of(ranks, name)
    dtype = results[0]["y"].dtype
    shape = tuple(results[0]["y"].shape)
    truth = expected(dtype, shape, **OPTIONS.get(name, {}))
    for result in results:
        for what, value in truth.items():
            if result[what] is None or (what == "evaluated" and name in OPTIONS):
                continue
            rtol, atol = TOLERANCE[result[what].dtype]
            size = float(value.detach().abs().max())
            close(result[what], value, 2 * rtol, 2 * max(rtol, atol) * max(size, 1.0), f"{what} of {name}")
        assert result["batches"] == 1
        assert result["placements"] == [result["expected placements"]] * 2
        for what in ("running_mean", "running_var", "dweight"):
            assert torch.equal(result[what], results[0][what]), f"{what}: equal bits"


@pytest.mark.parametrize("name", ["batch", "rows", "rows, a rank without any", "batch and rows", "batch twice", "mask"])
def test_messages_have_2c_numbers(ranks: list[dict[str, Any]], name: str) -> None:
    """And nothing else travels, but the sums of the parameters' gradients, for parameters that are whole everywhere."""
    for result in of(ranks, name):
        assert result["exchanges"] == EXCHANGES
        forward, backward = result["collectives"]
        assert forward == {} and set(backward) == {ALL_REDUCE} and result["parameter placements"] == "plain"


@pytest.mark.parametrize("name", ["copies", "copies, replicated parameters", "channels, sharded parameters"])
def test_nothing_travels_where_nobody_holds_other_values(ranks: list[dict[str, Any]], name: str) -> None:
    for result in of(ranks, name):
        assert result["exchanges"] == [] and result["collectives"] == [{}, {}]


def test_channels_with_whole_parameters_gather_numbers_per_channel(ranks: list[dict[str, Any]]) -> None:
    """Running mean and variance forward, the gradients of weight and bias backward; no activations."""
    for name in ("channels", "channels, replicated parameters"):
        for result in of(ranks, name):
            assert result["exchanges"] == [] and result["collectives"] == [{ALL_GATHER: 2}, {ALL_GATHER: 2}]


def test_copies_count_once(ranks: list[dict[str, Any]]) -> None:
    for result in of(ranks, "copies of batches"):
        assert result["exchanges"] == EXCHANGES and result["collectives"] == [{}, {ALL_REDUCE: 2}]
        assert "Replicate" in result["parameter placements"] and "Partial" not in result["parameter placements"]


def test_parameters_keep_their_placements(ranks: list[dict[str, Any]]) -> None:
    for name in ("batch, sharded parameters", "channels, sharded parameters"):
        assert all(result["parameter placements"] == str((S0,)) for result in of(ranks, name))


def test_a_group_adds_ranks_outside_of_the_mesh(ranks: list[dict[str, Any]]) -> None:
    truth = expected()
    for result in of(ranks, "slice_of_a_mesh"):
        for what, value in result.items():
            if value is not None:
                close(value, truth[what], 1e-12, 1e-10, what)


def test_copies_within_the_default_group_count_once(ranks: list[dict[str, Any]]) -> None:
    truth = expected()
    for result in of(ranks, "copies_over_a_slice"):
        part = result.pop("part")
        for what, value in result.items():
            close(value, truth[what] if "running" in what else truth[what].chunk(2)[part], 1e-12, 1e-10, what)


def test_fsdp_over_tensor_parallel_parameters(ranks: list[dict[str, Any]]) -> None:
    truth = expected()
    for result in of(ranks, "sharded_model"):
        close(result["y"], truth["y"].chunk(2)[result["part"]], 1e-12, 1e-10, "y")
        close(result["dweight"], truth["dweight"], 1e-12, 1e-10, "dweight")


def test_second_derivatives(ranks: list[dict[str, Any]]) -> None:
    layer = layer_of(None, plain=True)  # type: ignore[arg-type]
    x = data((6, C, 7, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    for result in of(ranks, "penalty"):
        close(result["dx"] / x.grad.abs().max(), x.grad / x.grad.abs().max(), 1e-10, 1e-10, "dx")


ERRORS = {
    "partial": "ValueError: .*Partial.*a sum over ranks is still to be made.*redistribute",
    "residual": "TypeError: the input is a DTensor, so residual must be one too; got Tensor",
    "placements": "ValueError: residual must be .*redistribute",
    "mask": "ValueError: mask must be .*redistribute",
    "parameters": "ValueError: parameters and running statistics must be on the input's mesh",
    "channels": "ValueError: expected 6 channels",
    "group": "ValueError: .*outside of it, .*process_group",
    "moments": "TypeError: .*to_local",
    "covariance": "TypeError: .*to_local",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(ranks: list[dict[str, Any]], name: str) -> None:
    for result in of(ranks, "errors"):
        said = result["said"].get(name, "nothing")
        assert re.match(ERRORS[name], said, re.DOTALL), said


def test_a_mesh_of_its_own_is_named_as_the_group(ranks: list[dict[str, Any]]) -> None:
    for result in of(ranks, "errors"):
        close(result["own"], expected()["y"], 1e-12, 1e-12, "y")
