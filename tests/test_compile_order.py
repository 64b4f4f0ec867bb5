"""Compiled graphs exchange in the order of the program, whatever the sizes, the checkpoints and the partitioner are.

The networks have branches that both hold layers, whose backward could take either first, inside checkpoints. Graphs of
one process are compared with each other; processes with batches of different sizes, one of them empty, train together.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import syncbn
from helpers.links import forced
from helpers.processes import run_processes
from syncbn import PeerLostError, RankMismatchError, compiled, wire

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PARTITIONERS = {"default": default_partition, "min-cut": min_cut_rematerialization_partition}
WAYS = ["loops", "formulas", "device"]  # a device's formulas hold an all-reduce, which a CPU can make as well


def go(way: str, patch: pytest.MonkeyPatch) -> None:
    """Let compiled layers be made of compiled loops, or of formulas with the exchanges of a host or of a device."""
    if way != "loops":
        patch.setattr(compiled.kernels, "loops_for", lambda dtype: False)
    if way == "device":
        patch.setattr(compiled.exchange, "on_host", lambda tensor: False)


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv1d(channels, out, 1), nn.BatchNorm1d(out), nn.ReLU(), nn.Conv1d(out, out, 1), nn.BatchNorm1d(out)
        )
        self.short = nn.Sequential(nn.Conv1d(channels, out, 1), nn.BatchNorm1d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.long(x) + self.short(x))


def everything_again(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


CHECKPOINTS = {
    "no checkpoint": None,
    "checkpoint": {},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, everything_again)},
}


class Net(nn.Module):
    """Two blocks; the last layers are so wide that their messages over a device are longer than the others'."""

    def __init__(self, checkpoints: str, wide: int = 600) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 4), Block(4, wide)])
        self.options = CHECKPOINTS[checkpoints]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.options is None else checkpoint(block, x, use_reentrant=False, **self.options)
        return x


LAYERS = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("long.1", "long.4", "short.1")]


def network(checkpoints: str) -> Net:
    torch.manual_seed(0)
    return syncbn.convert_sync_batchnorm(Net(checkpoints).double())


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with forced():
            yield
    finally:
        dist.destroy_process_group()


def exchanges_of(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    waits = torch.ops._c10d_functional.wait_tensor.default
    return [node for node in graph.graph.nodes if node.target in compiled.exchange.OPERATORS - {waits}]


def depends_on(node: torch.fx.Node, on: torch.fx.Node) -> bool:
    found, left = {node}, [node]
    while left:
        for before in left.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                left.append(before)
    return on in found


def name_of(node: torch.fx.Node) -> Any:
    """``(kind, layer)`` of an exchange; of an all-reduce its length, all that the graph says."""
    if node.target is torch.ops._c10d_functional.all_reduce.default:
        return node.meta["val"].shape[0]
    kinds = {torch.ops.syncbn.measure.default: wire.FORWARD, torch.ops.syncbn.gradient_sums.default: wire.BACKWARD}
    return kinds.get(node.target, node.args[3]), node.args[-2]


def order_of(checkpoints: str, partitioner: str, dynamic: bool | None, batch: int) -> list[list[Any]]:
    """The exchanges of the graphs, forward and backward, for a batch; each must depend on the one before."""
    graphs: list[list[Any]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        exchanges = exchanges_of(graph)
        for one, next_one in itertools.pairwise(exchanges):
            assert depends_on(next_one, one), "a scheduler may turn two exchanges round"
        graphs.append([name_of(node) for node in exchanges])
        return make_boxed_func(graph)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        part = PARTITIONERS[partitioner]
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep, partition_fn=part)

    torch._dynamo.reset()
    run = torch.compile(network(checkpoints), fullgraph=True, backend=backend, dynamic=dynamic)
    run(torch.randn(batch, 3, 2, dtype=torch.float64)).square().sum().backward()
    return graphs


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("checkpoints", "partitioner", "way"),
    [
        ("checkpoint", "min-cut", "loops"),
        ("checkpoint", "min-cut", "device"),
        ("selective", "default", "loops"),
        pytest.param("checkpoint", "default", "formulas", marks=pytest.mark.slow),
        pytest.param("no checkpoint", "min-cut", "loops", marks=pytest.mark.slow),
        pytest.param("selective", "min-cut", "formulas", marks=pytest.mark.slow),
    ],
)
def test_the_order_is_that_of_the_program(
    checkpoints: str, partitioner: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    forward, backward = order_of(checkpoints, partitioner, None, 5)
    others = ((None, 1), (None, 0), (True, 4))
    for dynamic, batch in others[2:] if way == "device" else others:  # (whose graphs take three times as long to make)
        assert order_of(checkpoints, partitioner, dynamic, batch) == [forward, backward]
    if way != "device":
        assert forward == [(wire.FORWARD, name) for name in LAYERS]
        assert sorted(backward) == sorted((wire.BACKWARD, name) for name in LAYERS), "a forward's is made once"
    else:
        assert sorted(forward) == sorted(backward) == [wire.BUCKET] * 3 + [2 * wire.BUCKET] * 3


@pytest.mark.usefixtures("_alone")
def test_without_the_private_names_of_torch_it_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.exchange._torch, "_proxy_mode", None)
    net, x = network("no checkpoint"), torch.randn(4, 3, 2, dtype=torch.float64)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)


# ---- together


def batches(sizes: tuple[int, ...], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, 3, 2, generator=generator, dtype=torch.float64) for size in sizes]


def loss(y: Tensor) -> Tensor:
    return y.pow(3).sum()


def ranks_train(rank: int, size: int, sizes: list[tuple[int, ...]], options: dict[str, Any]) -> list[Any]:
    """Gradients summed over ranks, and running statistics, of a step for each entry of ``sizes``."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        go(options["way"], patch)
        net = network(options["checkpoints"])
        run: Any = net
        if rank not in options.get("eager", ()):
            run = torch.compile(net, fullgraph=True, backend=options["backend"], dynamic=options.get("dynamic"))
        results = []
        for step, at in enumerate(sizes):
            net.zero_grad()
            loss(run(batches(at, step)[rank])).backward()
            gradients = [parameter.grad for parameter in net.parameters()]
            for gradient in gradients:
                dist.all_reduce(gradient)
            results.append(([g.clone() for g in gradients], {k: v.clone() for k, v in net.state_dict().items()}))
        return results


def check(results: list[list[Any]], sizes: list[tuple[int, ...]], checkpoints: str) -> None:
    torch.manual_seed(0)
    whole = Net("no checkpoint").double()
    for step, at in enumerate(sizes):
        whole.zero_grad()
        loss(whole(torch.cat(batches(at, step)))).backward()
        for rank_results in results:
            gradients, state = rank_results[step]
            for gradient, parameter in zip(gradients, whole.parameters(), strict=True):
                scale = float(parameter.grad.abs().max())
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-9 * (1 + scale))
            for name, value in whole.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


SIZES = [(4, 0), (5, 1), (1, 4), (0, 3)]


@pytest.mark.parametrize(
    ("dynamic", "way"),
    [
        (None, "loops"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in itertools.product([None, True], WAYS[1:])),
        pytest.param(True, "loops", marks=pytest.mark.slow),
    ],
)
def test_ranks_with_other_graphs_train_like_the_whole_batch(tmp_path: Path, dynamic: bool | None, way: str) -> None:
    options = {"checkpoints": "checkpoint", "backend": "aot_eager", "dynamic": dynamic, "way": way}
    check(run_processes(2, ranks_train, tmp_path, SIZES, options, deadline=300.0, timeout=250.0), SIZES, "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ranks_with_other_graphs_under_inductor(tmp_path: Path, way: str) -> None:
    sizes = [(4, 1), (5, 2), (1, 4)]  # none empty: inductor's convolution has no backward of one
    options = {"checkpoints": "checkpoint", "backend": "inductor", "way": way}
    check(run_processes(2, ranks_train, tmp_path, sizes, options, deadline=900.0, timeout=850.0), sizes, "checkpoint")


def test_a_compiled_and_an_eager_rank_train_together(tmp_path: Path) -> None:
    options = {"checkpoints": "no checkpoint", "backend": "aot_eager", "eager": (1,), "way": "loops"}
    sizes = SIZES[:2]
    check(run_processes(2, ranks_train, tmp_path, sizes, options, deadline=300.0, timeout=250.0), sizes, "")


# ---- errors


def ranks_err(rank: int, size: int, fault: str) -> str:
    torch.set_num_threads(1)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3)
    run(x).sum().backward()
    try:
        y = run(x)
        if fault == "no backward" and rank == 1:
            run(x)
        elif fault == "late" and rank == 1:
            dist.barrier(group=dist.new_group(timeout=datetime.timedelta(seconds=60)))
        else:
            y.sum().backward()
    except (RankMismatchError, PeerLostError) as error:
        if fault == "late":
            dist.barrier(group=dist.new_group(timeout=datetime.timedelta(seconds=60)))
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_without_a_backward_is_named_with_layers_and_directions(tmp_path: Path) -> None:
    for text in run_processes(2, ranks_err, tmp_path, "no backward", deadline=120.0):
        assert text.startswith("RankMismatchError")
        assert re.search(r"rank 0: backward of layer '2' .*rank 1: forward of layer '1' \(4 channels", text), text


def test_a_rank_that_comes_too_late_may_have_been_compiling(tmp_path: Path) -> None:
    text = run_processes(2, ranks_err, tmp_path, "late", deadline=120.0, timeout=10.0)[0]
    assert re.search(r"PeerLostError: backward of layer '2' .* torch\.compile compiles on each rank by itself", text), (
        text
    )
