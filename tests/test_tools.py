"""Tools that take a model apart: torch.fx, quantization by graphs, feature extraction, export, TorchScript."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from helpers.oracle import close
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

C = 4
ROUNDING = 5e-6


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.relu = nn.Conv2d(3, C, 3), norm, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Timms(nn.BatchNorm2d):
    """As timm's: its own call of the function."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return y.relu()


MODELS: dict[str, Callable[[], Net]] = {
    "built": lambda: Net(SyncBatchNorm(C)),
    "built with an activation": lambda: Net(SyncBatchNorm(C, activation="relu")),
    "converted": lambda: convert_sync_batchnorm(Net(nn.BatchNorm2d(C))),
    "converted subclass": lambda: convert_sync_batchnorm(Net(Scaled(C))),
    "converted subclass with its own function": lambda: convert_sync_batchnorm(Net(Timms(C))),
    "built, then reverted": lambda: revert_sync_batchnorm(Net(SyncBatchNorm(C, activation="relu"))),
    "torch's own, reverted": lambda: revert_sync_batchnorm(Net(nn.SyncBatchNorm(C))),
    "converted, then reverted": lambda: revert_sync_batchnorm(convert_sync_batchnorm(Net(nn.BatchNorm2d(C)))),
}


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_a_leaf(name: str, training: bool) -> None:
    model = MODELS[name]().train(training)
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["conv", "norm", "relu"]
    assert len(graph.graph.nodes) == 5
    expected = copy.deepcopy(model)
    close(graph(image()), expected(image()), 0.0, 0.0, "y")
    for mine, theirs in zip(graph.buffers(), expected.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    again = fx.symbolic_trace(graph)
    assert [node.target for node in again.graph.nodes] == [node.target for node in graph.graph.nodes]
    close(again.eval()(image()), expected.eval()(image()), 0.0, 0.0, "y of the second trace")
    loaded = copy.deepcopy(graph.eval())
    close(loaded(image()), expected(image()), 0.0, 0.0, "y of a copy")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(3, activation="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.norm(input=x), x, mask=mask)


def test_residual_and_mask_are_arguments_of_the_node() -> None:
    model = Residual()
    graph = fx.symbolic_trace(model)
    assert [(len(node.args), sorted(node.kwargs)) for node in graph.graph.nodes if node.op == "call_module"] == [
        (1, []),
        (2, ["mask"]),
    ]
    mask = torch.rand(2, 1, 8, 8) > 0.5
    close(graph(image(), mask), copy.deepcopy(model)(image(), mask), 0.0, 0.0, "y")


class Shallow(fx.Tracer):
    """As feature extractors trace: nodes get the names of modules, and few of these are leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.current = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.current = self.current, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.current):
                return self.create_proxy("call_module", self.current, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.current = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        self.names.append(self.current if kind == "call_module" else f"{self.current}.{target}")
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_found_by_name(name: str) -> None:
    if name == "converted, then reverted":  # plain torch.nn, which this tracer looks into
        return
    model, tracer = MODELS[name]().eval(), Shallow()
    graph = tracer.trace(model)
    assert [word for word in tracer.names if word.startswith("norm")] == ["norm"]
    node = next(node for node in graph.nodes if node.target == "norm")
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (node,)
    close(fx.GraphModule(model, graph)(image()), model.norm(model.conv(image())), 0.0, 0.0, "the feature")


@pytest.mark.parametrize("name", ["converted", "built", "built, then reverted"])
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*")
def test_quantization_aware_training_by_graphs(name: str) -> None:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    model = MODELS[name]().train()
    prepared = quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping("fbgemm"), (image(),))
    assert type(prepared.norm) is type(model.norm)
    prepared(image()).sum().backward()
    assert int(prepared.norm.num_batches_tracked) == 1
    quantized = quantize_fx.convert_fx(revert_sync_batchnorm(prepared).eval())
    assert torch.isfinite(quantized(image())).all()


class OwnLayer(SyncBatchNorm):
    """A subclass of ours with more to do: a leaf would have it twice."""

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        return 2.0 * super().forward(input, residual, mask=mask)


def test_what_would_be_in_the_graph_twice_is_refused() -> None:
    with pytest.raises(TraceError, match="cannot look into the forward of OwnLayer"):
        fx.symbolic_trace(Net(OwnLayer(C)))
    model = MODELS["converted"]()
    handle = model.norm.register_forward_hook(lambda layer, args, output: 2.0 * output)
    with pytest.raises(TraceError, match=r"the layer 'norm' has forward hooks"):
        fx.symbolic_trace(model)
    handle.remove()
    assert fx.symbolic_trace(model) is not None


def test_no_tensor_and_no_proxy_is_a_mistake() -> None:
    for layer in (SyncBatchNorm(C), convert_sync_batchnorm(Scaled(C))):
        with pytest.raises(TypeError, match="tensor"):
            layer([1.0, 2.0])


# ---- export


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_of_eval_mode(name: str) -> None:
    model = MODELS[name]().eval()
    traced = torch.jit.trace(model, (image(),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.load(file)(2.0 * image()), model(2.0 * image()), ROUNDING, ROUNDING, "y")


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_of_eval_mode(name: str, strict: bool) -> None:
    model = MODELS[name]().eval()
    size = torch.export.Dim("size", min=1)
    exported = torch.export.export(model, (image(),), dynamic_shapes=({0: size},), strict=strict)
    assert not any("syncbn" in str(node.target) or "c10d" in str(node.target) for node in exported.graph.nodes)
    x = torch.cat([image(), 2.0 * image()])
    close(exported.module()(x), model(x), ROUNDING, ROUNDING, "y")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["converted", "built with an activation"])
def test_onnx(name: str) -> None:
    """ONNX's own evaluator gives the values of evaluation mode, and the graph holds a plain batch normalization."""
    pytest.importorskip("onnx", reason="onnx is not installed (dependency group: integrations)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (dependency group: integrations)")
    from onnx.reference import ReferenceEvaluator

    model = MODELS[name]().eval()
    program: Any = torch.onnx.export(model, (image(),), dynamo=True, optimize=False)
    graph = program.model_proto.graph
    assert {"BatchNormalization", "Relu"} <= {node.op_type for node in graph.node}
    (y,) = ReferenceEvaluator(program.model_proto).run(None, {graph.input[0].name: image().numpy()})
    close(torch.from_numpy(y), model(image()), 1e-5, 1e-5, "y")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["converted", "converted subclass", "built"])
def test_a_script_says_to_revert(name: str) -> None:
    model = MODELS[name]().eval()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script.*syncbn\.revert_sync_batchnorm\(model\)"):
        torch.jit.script(model)
    assert isinstance(model.norm, SyncBatchNorm)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_script_of_what_was_reverted(options: dict[str, Any], activation: str | None) -> None:
    model = revert_sync_batchnorm(nn.Sequential(SyncBatchNorm(3, activation=activation, **options)))
    scripted: Any = torch.jit.script(copy.deepcopy(model))
    for _ in range(2):
        close(scripted(image()), model(image()), 0.0, 0.0, "y")
    for name, value in scripted.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    close(scripted[0](image(), image()), model[0](image(), image()), 0.0, 0.0, "y with a residual")
    close(scripted.eval()(image()), model.eval()(image()), 0.0, 0.0, "y in eval mode")
