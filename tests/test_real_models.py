"""Networks of timm and torchvision, where these are installed: two ranks are one process with the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.oracle import close
from helpers.ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

TIMM = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "repvgg_a0": 64,
    "levit_128s": 224,
    "densenet121": 64,  # of BatchNormAct2d, and checkpoints
    "seresnext26t_32x4d": 64,  # deep stem
}
TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "efficientnet_b0": 64,
    "segmentation.lraspp_mobilenet_v3_large": 64,
    "segmentation.deeplabv3_mobilenet_v3_large": 64,
    "segmentation.fcn_resnet50": 64,
}
MODELS = [("timm", name) for name in TIMM] + [("torchvision", name) for name in TORCHVISION]
SIZES = (3, 1)
"""Samples of the ranks."""


def network(library: str, name: str) -> nn.Module:
    """One that draws nothing at random in its forward."""
    pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
        make: Callable[..., nn.Module] = timm.create_model
        model = make(name, pretrained=False, num_classes=5, drop_rate=0.0)
    else:
        from torchvision import models

        kind, _, short = name.rpartition(".")
        place = getattr(models, kind) if kind else models
        options = {"weights_backbone": None, "aux_loss": None} if kind and "lraspp" not in name else {}
        options = {"weights_backbone": None} if "lraspp" in name else options
        model = getattr(place, short)(weights=None, num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ in ("StochasticDepth", "DropPath"):
            setattr(module, "drop_prob" if type(module).__name__ == "DropPath" else "p", 0.0)
    return model.double()


def images(library: str, name: str) -> Tensor:
    size = (TIMM if library == "timm" else TORCHVISION)[name]
    return torch.randn(sum(SIZES), 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """As one tensor of rows, whatever the network returns."""
    y: Any = model(x)
    if isinstance(y, dict):
        y = y["out"]
    if isinstance(y, tuple | list):
        y = torch.stack(tuple(y)).mean(0)
    assert isinstance(y, Tensor)
    return y


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, gradients and buffers after one step."""
    y = outputs(model, x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


def near(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-8) -> None:
    """To rounding, of the largest number: what a network adds up is not exact to the last of each."""
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    close(found, expected, tolerance, tolerance * (1.0 + size), what)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("library", "name"), MODELS, ids=[f"{library}-{name}" for library, name in MODELS])
def test_two_ranks_are_the_whole_batch(library: str, name: str) -> None:
    model = network(library, name)
    classes = [type(module) for module in model.modules()]
    x = images(library, name)
    copies = [copy.deepcopy(model) for _ in SIZES]
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    y, gradients, buffers = trained(model, x)

    def body(rank: int, group: Any) -> Any:
        convert_sync_batchnorm(copies[rank], group)
        return trained(copies[rank], x.split(SIZES)[rank])

    found = run_ranks(2, body, timeout=30.0)
    assert sum(isinstance(module, SyncBatchNorm) for module in copies[0].modules()) == norms > 0
    near(torch.cat([each[0] for each in found]), y, "y")
    for parameter, expected in gradients.items():
        near(sum(each[1][parameter] for each in found), expected, f"gradient of {parameter}")
    for _, _, statistics in found:
        for buffer, expected in buffers.items():
            near(statistics[buffer].double(), expected.double(), buffer)
    with torch.no_grad():
        model.eval()
        for local in copies:
            assert [type(module) for module in revert_sync_batchnorm(local).modules()] == classes
            near(outputs(local.eval(), x), outputs(model, x), "y in eval mode, reverted")


# ---- what these libraries do to models


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timm_freezes_converted_layers(name: str) -> None:
    model = network("timm", name)
    from timm.layers import convert_sync_batchnorm as timms
    from timm.layers import freeze_batch_norm_2d

    outputs(model, images("timm", name))
    expected = freeze_batch_norm_2d(copy.deepcopy(model))
    convert_sync_batchnorm(model)
    with pytest.raises(RuntimeError, match="met the layer 'bn1' of syncbn"):
        timms(model)
    frozen = freeze_batch_norm_2d(model)
    assert [type(module) for module in frozen.modules()] == [type(module) for module in expected.modules()]
    near(outputs(frozen, images("timm", name)), outputs(expected, images("timm", name)), "y")


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s"])
def test_timm_fuses_converted_layers(name: str) -> None:
    model = network("timm", name).float()  # (which is what it fuses to)
    from timm.utils import reparameterize_model

    x = images("timm", name).float()
    outputs(model, x)
    with torch.no_grad():
        expected = outputs(model.eval(), x)
        fused = reparameterize_model(convert_sync_batchnorm(model))
        assert not any(isinstance(module, SyncBatchNorm) for module in fused.modules())
        near(outputs(fused.eval(), x), expected, "y", 1e-4)


@pytest.mark.parametrize(
    ("library", "name", "nodes"),
    [
        ("torchvision", "resnet18", ["layer1", "layer4.1.bn2"]),
        ("timm", "mobilenetv3_small_050", ["conv_stem", "bn1", "blocks"]),
    ],
)
def test_torchvision_extracts_features(library: str, name: str, nodes: list[str]) -> None:
    model, x = network(library, name), images(library, name)
    from torchvision.models.feature_extraction import create_feature_extractor

    expected = create_feature_extractor(copy.deepcopy(model).eval(), nodes)(x)
    found = create_feature_extractor(convert_sync_batchnorm(model).eval(), nodes)(x)
    assert list(found) == nodes
    for node in nodes:
        near(found[node], expected[node], node)


def test_frozen_layers_are_left_as_they_are() -> None:
    network("torchvision", "resnet18")
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    convert_sync_batchnorm(model)
    assert type(model[0]) is FrozenBatchNorm2d and isinstance(model[1], SyncBatchNorm)
