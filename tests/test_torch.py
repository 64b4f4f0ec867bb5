"""What the package takes from PyTorch that is private: that it is there, that it does what it is here for, and that the
fallback works without it.

One test or more for each entry of ``syncbn._torch``. A new release of PyTorch in which one of them fails has changed
something that this package uses; the fallback keeps users going meanwhile.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import syncbn
from helpers.processes import run_processes
from helpers.ranks import run_ranks
from syncbn import _torch

CPU = torch.device("cpu")
PACKAGE = Path(syncbn.__file__).parent


def test_the_base_classes() -> None:
    for number in "123":
        assert issubclass(getattr(nn, f"BatchNorm{number}d"), _torch.BatchNormBase)
        assert issubclass(getattr(nn, f"LazyBatchNorm{number}d"), _torch.LazyNormBase)
    assert issubclass(nn.SyncBatchNorm, _torch.BatchNormBase)
    assert not issubclass(nn.InstanceNorm1d, _torch.BatchNormBase)


def test_is_lazy() -> None:
    layer = nn.LazyBatchNorm1d()
    assert _torch.is_lazy(layer.weight) and _torch.is_lazy(layer.running_mean)
    layer(torch.randn(4, 3))
    assert not _torch.is_lazy(layer.weight) and not _torch.is_lazy(layer.running_mean)


# ---- process groups


def test_the_backend_of_a_group() -> None:
    def body(rank: int, group: Any) -> None:
        backend = _torch.backend_of(group, CPU)
        assert isinstance(backend, dist.ProcessGroupGloo)
        assert _torch.has_backend(group, CPU) and not _torch.has_backend(group, torch.device("xpu"))
        assert _torch.timeout_of(group, CPU) == datetime.timedelta(seconds=7)
        x = torch.ones(1)
        backend.allreduce([x], dist.AllreduceOptions()).wait()  # type: ignore[attr-defined]
        assert x.item() == 2

    run_ranks(2, body, timeout=7.0)


class WithoutBackends:
    """A group of which nothing private is known."""


def test_without_the_backend_of_a_group() -> None:
    group = WithoutBackends()
    assert _torch.backend_of(group, CPU) is group
    assert not _torch.has_backend(group, CPU)
    assert _torch.timeout_of(group, CPU) == dist.constants.default_pg_timeout > datetime.timedelta(0)


def test_fake_groups() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not _torch.is_fake(run_ranks(1, lambda rank, group: group)[0])
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        world = dist.group.WORLD
        assert world is not None
        assert _torch.is_fake(world)
    finally:
        dist.destroy_process_group()


def test_registered_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0])]
        assert _torch.registered_groups() == groups
        with monkeypatch.context() as patch:
            patch.setattr(dist.distributed_c10d._world, "__class__", WithoutGroups)
            assert _torch.registered_groups() == [dist.group.WORLD]
    finally:
        dist.destroy_process_group()


def test_the_default_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _torch.default_group() is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert _torch.default_group() is dist.group.WORLD is not None
        monkeypatch.setattr(_torch, "_c10d_world", None)
        assert _torch.default_group() is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    assert _torch.default_group() is None


def test_meshes_and_their_parts() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        assert _torch.root_of(mesh) is mesh and _torch.root_of(mesh["b"]) is mesh
        assert _torch.root_of(object) is object  # as if it knew of no root
        part = torch.ones(2, requires_grad=True)
        kept = _torch.part_of(DTensor.from_local(part.detach(), mesh["a"], [Replicate()], run_check=False))
        assert type(kept) is Tensor and kept.data_ptr() == part.data_ptr()
    finally:
        dist.destroy_process_group()


def test_groups_within_groups_and_their_class() -> None:
    class Holder(dist.ProcessGroup):
        parent: Any = None

    [inner] = run_ranks(1, lambda rank, group: group)
    outer, outermost = Holder(0, 1), Holder(0, 1)  # type: ignore[call-arg]
    outer.parent, outermost.parent = inner, outer
    assert _torch.within(outermost) is _torch.within(inner) is inner
    assert _torch.within(Holder(0, 1)).parent is None  # type: ignore[call-arg]
    backend = _torch.backend_of(inner, torch.device("cpu"))
    assert _torch.is_gloo(backend) and _torch.is_gloo(SimpleNamespace(wrapped_pg=backend))
    assert not _torch.is_gloo(outer) and not _torch.is_gloo(SimpleNamespace(name=lambda: "gloo"))


class WithoutGroups(dist.distributed_c10d._World):
    """The table of groups without what is read there."""

    @property
    def pg_map(self) -> Any:
        raise AttributeError("pg_map")


# ---- autograd


def test_transforms_active(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _torch._transforms_active is torch._C._are_functorch_transforms_active
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(_torch.transforms_active())
        return x.square().sum()

    torch.func.grad(loss)(torch.ones(2))
    assert seen == [True] and not _torch.transforms_active()
    monkeypatch.setattr(_torch, "_transforms_active", None)
    assert _torch.transforms_active()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@pytest.mark.parametrize("private", [True, False])
def test_apply(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the private name it is the public one."""
    bound: list[Any] = []
    public = Double.apply
    monkeypatch.setattr(Double, "apply", lambda *args: (bound.append(args), public(*args))[1])
    if not private:
        monkeypatch.setattr(_torch, "_transforms_active", None)
    x = torch.ones(3, requires_grad=True)
    _torch.apply(Double, x, 2.0).sum().backward()
    assert x.grad is not None and x.grad.eq(2).all()
    assert len(bound) == (0 if private else 1)


def test_apply_under_a_transform() -> None:
    gradient = torch.func.grad(lambda x: _torch.apply(Double, x, 3.0).sum())(torch.ones(2))
    assert gradient.eq(3).all()


def test_forward_mode_active(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _torch.forward_mode_active()
    with torch.autograd.forward_ad.dual_level():
        assert _torch.forward_mode_active()
        monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
        assert not _torch.forward_mode_active()
        monkeypatch.undo()


def test_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_checkpoint has what follows from it, also without the private name."""
    assert _torch._graph_task_id is torch._C._current_graph_task_id
    seen = []
    x = torch.ones(1, requires_grad=True)
    (y := x * 2).register_hook(lambda _: seen.append(_torch.in_backward()))
    assert not _torch.in_backward()
    y.backward()
    assert seen == [True]
    monkeypatch.setattr(_torch, "_graph_task_id", None)
    assert _torch.in_backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_frames_of_a_checkpoint(reentrant: bool) -> None:
    """What ``checkpointing.recomputing`` looks for on the stack."""
    stacks: list[list[tuple[str, str]]] = []

    def forward(x: Tensor) -> Tensor:
        stacks.append([(frame.filename, frame.function) for frame in inspect.stack(0)])
        return x.square()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    first, second = stacks
    reruns = {(_torch.CHECKPOINT_FILE, name) for name in _torch.CHECKPOINT_RERUNS} | {
        (_torch.CHECKPOINT_FILE, "backward")
    }
    assert not reruns & set(first)
    assert reruns & set(second)
    engine = [place for place, (file, _) in enumerate(second) if file == _torch.ENGINE_FILE]
    assert engine and min(second.index(frame) for frame in reruns & set(second)) < engine[0]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("private", [True, False])
def test_outside_selective_checkpointing(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_torch._SELECTIVE) == 2 and _torch._modes_on is not None
    if not private:
        monkeypatch.setattr(_torch, "_modes_on", None)
    seen: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def forward(x: Tensor) -> Tensor:
        with _torch.outside_selective_checkpointing():
            torch.ones(2).exp()
        return x.sin()

    checkpoint(
        forward, torch.ones(2, requires_grad=True), use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    ).sum().backward()  # fmt: skip
    assert any("sin" in name for name in seen)
    assert any("exp" in name for name in seen) is not private


def test_other_modes_see_what_is_outside_of_selective_checkpointing() -> None:
    with Seen() as mode, _torch.outside_selective_checkpointing():
        torch.ones(2).exp()
    assert any("exp" in name for name in mode.names)


def test_outside_modes() -> None:
    with torch.inference_mode(), _torch.outside_modes():
        assert not torch.ones(2).is_inference()
    with torch.device("meta"), _torch.outside_modes():
        assert torch.ones(2).device == CPU
    with FakeTensorMode(), _torch.outside_modes():
        assert type(torch.ones(2)) is Tensor
    kept: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        with _torch.outside_modes():
            kept.append(torch.ones(2))
        return (x * kept[0]).sum()

    torch.func.vmap(torch.func.grad(loss))(torch.ones(3, 2))
    assert kept[0].add_(1).tolist() == [2.0, 2.0]
    with torch.device("meta"):
        assert torch.ones(2).is_meta  # the modes go on afterwards


def test_outside_modes_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_modes_on", None)
    monkeypatch.setattr(_torch, "_interpreters_cleared", lambda: None)
    with torch.inference_mode(), _torch.outside_modes():
        assert not torch.ones(2).is_inference()
    with FakeTensorMode(), _torch.outside_modes():
        assert type(torch.ones(2)) is not Tensor  # there is no way out

    def loss(x: Tensor) -> Tensor:
        with _torch.outside_modes():
            return (x * torch.ones(2)).sum()

    assert torch.func.grad(loss)(torch.ones(2)).eq(1).all()


def test_interpreters_cleared() -> None:
    assert _torch._interpreters_cleared() is not None


def test_is_shadow() -> None:
    assert not _torch.is_shadow(torch.ones(2)) and not _torch.is_shadow(nn.Parameter(torch.ones(2)))
    assert _torch.is_shadow(torch.ones(2, device="meta"))
    assert _torch.is_shadow(FakeTensorMode().from_tensor(torch.ones(2)))
    assert not _torch.is_shadow(torch.ones(2).as_subclass(OfItsOwn))


class OfItsOwn(Tensor):
    pass


# ---- modules


def broadcasts(rank: int, size: int) -> list[float]:
    """The buffer after a forward, with and without broadcasts; and the attribute afterwards."""
    model = nn.BatchNorm1d(2, momentum=0.0)
    wrapper = DistributedDataParallel(model)
    found = []
    for quiet in (True, False):
        model.running_mean.fill_(rank)
        if quiet:
            with _torch.without_broadcasts(wrapper):
                wrapper(torch.randn(4, 2))
        else:
            wrapper(torch.randn(4, 2))
        found.append(float(model.running_mean[0]))
    return [*found, float(wrapper.require_forward_param_sync)]


def test_without_broadcasts(tmp_path: Path) -> None:
    assert run_processes(2, broadcasts, tmp_path) == [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]


def test_without_broadcasts_and_the_attribute_that_stops_them() -> None:
    """A wrapper of a torch that has no such attribute is let alone afterwards."""

    class Wrapper(DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    wrapper = Wrapper()
    with _torch.without_broadcasts(nn.Sequential(nn.ReLU(), wrapper)):
        assert wrapper.require_forward_param_sync is False
    assert not getattr(wrapper, "require_forward_param_sync", False)


def test_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert not _torch.is_compiled(net)
    assert _torch.is_compiled(torch.compile(net, backend="eager"))
    net[0].compile(backend="eager")
    assert _torch.is_compiled(net)
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    plain = nn.Sequential(nn.Linear(2, 2))
    assert not _torch.is_compiled(plain) and _torch.is_compiled(torch.compile(plain, backend="eager"))


# ---- devices and compilers


def test_is_capturing() -> None:
    assert not _torch.is_capturing(CPU)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        assert not _torch.is_capturing(device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert _torch.is_capturing(device)


def test_any_accelerator_is_asked_for_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "is_current_stream_capturing", lambda: True)
        assert _torch.is_capturing(torch.device(kind))
    assert not _torch.is_capturing(torch.device("mps")) and not _torch.is_capturing(torch.device("meta"))


def test_another_device_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the current stream is asked of the device's own: a model may live elsewhere."""
    current = [0]

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    assert _torch.is_elsewhere(there) and not _torch.is_elsewhere(here)
    assert not _torch.is_elsewhere(CPU) and not _torch.is_elsewhere(torch.device("cuda"))
    assert _torch.is_capturing(there) and not _torch.is_capturing(here) and current == [0]
    with _torch.on_device(there):
        assert current == [1] and not _torch.is_elsewhere(there)
    with _torch.on_device(CPU):
        assert current == [0]


def test_streams_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    _torch.wait_for(torch.device("cuda", 1)), _torch.wait_for(CPU), _torch.wait_for(torch.device("meta"))
    assert waited == [torch.device("cuda", 1)]
    assert _torch.raw_stream(CPU) == 0
    monkeypatch.setattr(_torch, "_raw_stream", lambda index: 100 + index)
    assert _torch.raw_stream(torch.device("cuda", 1)) == 101
    monkeypatch.setattr(_torch, "_raw_stream", None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=200 + device.index))
    assert _torch.raw_stream(torch.device("cuda", 1)) == 201


def test_all_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    if _torch.gather_options(in_order=True) is not None:
        assert not _torch.gather_options(in_order=True).asyncOp and _torch.gather_options(in_order=False).asyncOp

    class InPython:  # a group without the form that has one tensor for all
        def __init__(self, group: Any) -> None:
            self.allgather = group.allgather

    def body(rank: int, group: Any) -> None:
        for each in (group, InPython(group)):
            for options in (_torch.gather_options(in_order=False), None):
                output = torch.zeros(6)
                _torch.all_gather(each, output, torch.full((3,), float(rank)), options).wait()
                assert output.tolist() == [0, 0, 0, 1, 1, 1]

    run_ranks(2, body)


def test_has_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(_torch.has_float64(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "meta"))
    assert not _torch.has_float64(torch.device("mps"))
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=False))
    assert not _torch.has_float64(torch.device("xpu"))


def test_assert_async() -> None:
    _torch.assert_async(torch.tensor(True), "wrong")
    with pytest.raises(RuntimeError, match="these are wrong"):
        _torch.assert_async(torch.tensor(False), "these are wrong")
    compiled = torch.compile(lambda x: (_torch.assert_async((x > 0).all(), "not positive"), x + 1)[1], backend="eager")
    assert compiled(torch.ones(2)).eq(2).all()
    with pytest.raises(RuntimeError, match="not positive"):
        compiled(-torch.ones(2))


def traced(rank: int, size: int) -> list[float]:
    """A compiled sum over ranks, and its input afterwards."""
    x = torch.full((2,), float(rank + 1))
    compiled = torch.compile(lambda x: _torch.traced_sum(x, dist.group.WORLD), backend="aot_eager", fullgraph=True)
    return [*compiled(x).tolist(), *x.tolist()]


def test_traced_sum(tmp_path: Path) -> None:
    assert run_processes(2, traced, tmp_path) == [[3.0, 3.0, 1.0, 1.0], [3.0, 3.0, 2.0, 2.0]]


def test_not_fused_across() -> None:
    x = torch.randn(3)
    assert torch.equal(_torch.not_fused_across(x), x)
    compiled = torch.compile(lambda x: _torch.not_fused_across(x * 2) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), x * 2 + 1)


# ---- that this is all of it


PRIVATE_ELSEWHERE = {
    # Plain classes that torch.distributed does not name, in programs of their own and where a group is written in
    # Python: stores, and the base classes of groups and works.
    ("_check.py", "torch._C"), ("_doctor/trial.py", "torch._C"), ("_worker.py", "torch._C"),
    ("mpi/setup.py", "torch._C"),
    ("mpi/group.py", "torch._C"), ("_doctor/looking.py", "torch.xpu._is_compiled"), ("_agent.py", "torch._C"),
    # The collective by which a compiled graph is recognized, and a base class to look for.
    ("compiled/exchange.py", "torch.ops._c10d_functional"),
    ("overlooked.py", "torch.nn.modules.instancenorm._InstanceNorm"),
}  # fmt: skip


def private_names(path: Path) -> set[str]:
    """The private names of torch that a file reads, each up to its first private part."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    parts = [name.split(".") for name in names if name.startswith(("torch.", "dist."))]
    first = [
        next((i for i, part in enumerate(each) if part.startswith("_") and part[1:2] != "_"), None) for each in parts
    ]
    return {".".join(each[: i + 1]) for each, i in zip(parts, first, strict=True) if i is not None}


def test_private_names_are_here_alone() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch.py"
        for name in private_names(path)
    }
    assert found == PRIVATE_ELSEWHERE


def test_plainly_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert _torch.plainly_eager()
    for mode in (Looks(), FlopCounterMode(display=False)):
        with mode:
            assert not _torch.plainly_eager()
    assert torch.func.vmap(lambda x: x + _torch.plainly_eager())(torch.zeros(2)).sum() == 0
    with torch.autograd.forward_ad.dual_level():
        assert not _torch.plainly_eager()
    monkeypatch.setattr(_torch, "_modes_on", None)
    with Looks():
        assert _torch.plainly_eager()


def test_selective_checkpointing_alone_is_plainly_eager() -> None:
    seen = []

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append((_torch._only_selective_checkpointing(), _torch.plainly_eager()))
        return x.sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False, context_fn=contexts).sum().backward()
    assert seen[0] == (True, True)


def test_batched_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(_torch.is_batched(x)) or x)(torch.zeros(2))
    assert seen == [True]
    assert not _torch.is_batched(torch.zeros(2))
    monkeypatch.setattr(_torch, "_batched", ())
    torch.func.vmap(lambda x: seen.append(_torch.is_batched(x)) or x)(torch.zeros(2))
    assert seen[1] is False


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tangents() -> None:
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        assert _torch.has_tangent(forward.make_dual(torch.ones(2), torch.ones(2)))
        assert not _torch.has_tangent(torch.ones(2))
    assert not _torch.has_tangent(torch.ones(2))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_records(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    seen: list[tuple[bool, str]] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append((_torch.in_script_trace(), _torch.tracer()))
        return x + 1

    body(torch.zeros(2))
    torch.jit.trace(body, torch.zeros(2), check_trace=False)
    make_fx(body)(torch.zeros(2))
    assert seen == [(False, ""), (True, "torch.jit.trace"), (False, "make_fx")]
    monkeypatch.setattr(_torch, "_script_trace", None)
    assert not _torch.in_script_trace() and _torch.tracer() == ""


def test_the_graph_of_a_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs: list[Any] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        graphs.append(_torch.traced_graph())
        return x + 1

    traced = make_fx(body)(torch.zeros(2))
    assert graphs[0] is not None and len(graphs[0].nodes) <= len(traced.graph.nodes)
    assert _torch.traced_graph() is None
    monkeypatch.setattr(_torch, "_proxy_mode", None)
    make_fx(body)(torch.zeros(2))
    assert graphs[1] is None


def test_what_a_compiler_leaves_out_of_a_graph() -> None:
    calls: list[int] = []

    @_torch.once_per_graph
    def note() -> None:
        calls.append(1)

    def body(x: torch.Tensor) -> torch.Tensor:
        note()
        return x + 1

    compiled = torch.compile(body, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    before = len(calls)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert before >= 1 and len(calls) == before


def test_how_ddp_looks_for_torchs_own_layer() -> None:
    """Only in its own search is it not shown a layer; test_class_tests.py wraps models."""
    layer = syncbn.SyncBatchNorm(2)
    assert [name for name, _ in layer.named_modules()] == [""]
    assert not _torch.ddp_looks_for_sync_batchnorm()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)

    def init(store: Any) -> None:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            torch.nn.parallel.DistributedDataParallel(model)
        finally:
            dist.destroy_process_group()

    init(dist.HashStore())


def test_what_graphs_call() -> None:
    names = _torch.operator_arguments(torch.ops.aten.batch_norm.default)
    assert names[5] == "training" and names[0] == "input"
    assert _torch.operator_arguments(len) == []


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_methods_of_scripts() -> None:
    assert _torch.script_methods(torch.jit.script(torch.nn.ReLU())) == ["forward"]
    assert _torch.script_methods(torch.nn.Module.__new__(torch.nn.ReLU)) == ["forward"]


def test_a_group_by_its_name() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        assert world is not None and _torch.group_named(world.group_name) is world
    finally:
        dist.destroy_process_group()


def test_every_entry_has_a_test() -> None:
    entries = {name for name, value in vars(_torch).items() if getattr(value, "__module__", "") == _torch.__name__}
    entries = {name for name in entries if inspect.isfunction(getattr(_torch, name))} | set(_torch.__all__)
    here = Path(__file__).read_text()
    assert {name for name in entries if f"_torch.{name}" not in here} == set()
