"""What `docs/integrations.md` says of other libraries: its recipes run, on real ranks, and its versions are tested."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncbn
from helpers.commands import PROGRAMS, ROOT, must, python
from helpers.oracle import close
from helpers.processes import run_processes
from helpers.ranks import run_ranks
from programs.integrations import MICRO, STEPS, data, network, part, run, sgd, squares, state, train
from test_packaging import CONSTRAINTS

PAGE = (ROOT / "docs" / "integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, flags=re.MULTILINE))
RECIPES = {
    title: "".join(re.findall(r"```python[^\n]*\n(.*?)```", text, flags=re.DOTALL)) for title, text in SECTIONS.items()
}
TABLE = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \| .+ \|$", PAGE, flags=re.MULTILINE)
# Each title with the test that runs its recipe.
RUN_BY = {
    "DistributedDataParallel": "test_ddp",
    "FSDP2": "test_fsdp_mixed_precision",
    "DeviceMesh": "test_mesh",
    "DTensor": "test_dtensor",
    "Pipelines": "test_pipeline",
    "Lightning": "test_lightning",
    "Lightning Fabric": "test_lightning",
    "Accelerate": "test_accelerate",
    "Ray Train": "test_ray",
    "timm": "test_timm",
    "Averaged weights": "test_averaged_weights",
    "Statistics of averaged weights": "test_updated_statistics",
    "Fusion": "test_fusion",
    "Quantization-aware training": "test_quantization",
    "Checkpoints": "test_checkpoints",
    "Distributed checkpoints": "test_distributed_checkpoints",
    "TensorBoard": "test_tensorboard",
}
RUNS = [
    "ddp", "fsdp", "fsdp_converted_after", "fsdp_mixed_precision", "averaged_weights", "updated_statistics",
    "quantization", "checkpoints",
]  # fmt: skip
Results = dict[str, list[Any]]


# ---- the page


def test_every_recipe_is_run_and_listed() -> None:
    assert list(RECIPES) == list(RUN_BY) == [title for title, _, _ in TABLE]
    assert all(recipe.count("\n") <= 4 and recipe for recipe in RECIPES.values())
    assert all(callable(globals()[test]) for test in RUN_BY.values())
    assert all(anchor == title.lower().replace(" ", "-") for title, anchor, _ in TABLE)


def test_versions_are_those_that_are_tested() -> None:
    listed = [tuple(entry.split()) for _, _, cell in TABLE if cell != "see there" for entry in cell.split(", ")]
    assert {name for name, _ in listed} == {
        "torch", "lightning", "pytorch-lightning", "accelerate", "safetensors", "tensorboard",
    }  # fmt: skip
    for name, version in listed:
        assert CONSTRAINTS[name] == version, f"docs/integrations.md says {name} {version}"


# ---- on processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the ranks, by run: two processes for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    names = RUNS + [name for name in ("accelerate", "tensorboard") if installed(name)]
    ranks = run_processes(2, run, folder / "processes", folder, RECIPES, names)
    return {name: [rank[name] for rank in ranks] for name in names} | {"folder": [folder]}


@pytest.fixture(scope="module")
def results_of_four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same of four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["mesh", "dtensor", "pipeline"]
    ranks = run_processes(4, run, folder / "processes", folder, RECIPES, names)
    return {name: [rank[name] for rank in ranks] for name in names}


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def of(results: Results, name: str) -> list[Any]:
    for rank, result in enumerate(results[name]):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return results[name]


def whole(size: int = 2, rows: slice = slice(None), each: Callable[[nn.Module], None] = lambda model: None) -> Any:
    """One process with these rows of the batches of ``size`` ranks."""
    model = network()
    optimizer = sgd(model)
    for batch in data(size):
        train(model, optimizer, [batch], rows)
        each(model)
    return state(model)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        close(actual[name], value, tolerance, tolerance, name)


@pytest.mark.integration
def test_ddp(results: Results) -> None:
    for trained in of(results, "ddp"):
        same(trained, whole())


@pytest.mark.integration
@pytest.mark.parametrize("name", ["fsdp", "fsdp_converted_after"])
def test_fsdp(results: Results, name: str) -> None:
    for trained, local, classes in of(results, name):
        same(trained, whole())
        assert local == 3  # of six weights
        assert classes == ["FSDPBatchNorm2d", "BatchNorm2d"]


@pytest.mark.integration
def test_fsdp_mixed_precision(results: Results) -> None:
    """The numbers of bfloat16; evaluation works, and nn.BatchNorm2d's refusal is what the page says."""
    ranks = of(results, "fsdp_mixed_precision")
    for trained, dtypes, refusal in ranks:
        same(trained, whole(), 5e-2)
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]  # of output, weight and statistics
        assert refusal and refusal in SECTIONS["FSDP2"]
        assert torch.equal(trained["1.running_var"], ranks[0][0]["1.running_var"])


@pytest.mark.integration
@pytest.mark.skipif(not installed("ray"), reason="ray is not installed (pip install 'ray[train]')")
def test_ray(tmp_path: Path) -> None:
    """Workers that Ray starts: outputs and gradients of the whole batch."""
    must(python(PROGRAMS / "ray_train.py", RECIPES["Ray Train"], tmp_path))
    assert sorted(path.name for path in tmp_path.glob("exact-*")) == ["exact-0", "exact-1"]


@pytest.mark.integration
@pytest.mark.skipif(not installed("accelerate"), reason="accelerate is not installed (dependency group: integrations)")
def test_accelerate(results: Results) -> None:
    for wrapper, steps, trained, reverted in of(results, "accelerate"):
        assert (wrapper, steps, reverted) == ("DistributedDataParallel", STEPS, "BatchNorm2d")
        same(trained, whole())


@pytest.mark.integration
@pytest.mark.skipif(not installed("lightning"), reason="lightning is not installed (extra: lightning)")
def test_lightning(tmp_path: Path) -> None:
    torch.save(RECIPES, tmp_path / "recipes.pt")
    must(python(PROGRAMS / "lightning_script.py", tmp_path))
    for rank in range(2):
        results = torch.load(tmp_path / f"rank-{rank}.pt")
        same(results["fit"], whole())
        same(results["without broadcasts"], whole())
        same(results["fabric"], whole(), 1e-7)  # Fabric rounds outputs to float32
        assert results["seen"] == {("train", "SyncBatchNorm")}
        assert results["after"] == [type(layer).__name__ for layer in network()]
        synchronized, local = {("train", "SyncBatchNorm"), ("validate", "SyncBatchNorm")}, {("test", "BatchNorm2d")}
        assert results["stages"] == synchronized | local
        assert results["own group"]
        assert results["failed"] == ("meant to fail", {("train", "SyncBatchNorm")}, "BatchNorm2d")
        assert "sync_batchnorm=True" in results["both"] and "SyncBatchNormPlugin" in results["both"]


@pytest.mark.integration
@pytest.mark.skipif(not installed("lightning"), reason="lightning is not installed (extra: lightning)")
def test_lightning_averages_weights(tmp_path: Path) -> None:
    """Its last epoch, which only takes statistics, takes those of all ranks: as one process, on the same batches."""
    must(python(PROGRAMS / "lightning_averaging.py", tmp_path))
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone["synchronized"] == {False}
    assert alone["epochs"] == dict.fromkeys(range(5), STEPS)  # 4 of training, and one more
    assert int(alone["state"]["1.num_batches_tracked"]) == STEPS
    for rank in ranks:
        assert rank["synchronized"] == {True}
        same(rank["state"], alone["state"])
        assert (rank["momenta"], rank["epochs"]) == (alone["momenta"], alone["epochs"])


@pytest.mark.integration
@pytest.mark.skipif(not installed("pytorch-lightning"), reason="pytorch-lightning is not installed (integrations)")
def test_the_other_package_of_lightning() -> None:
    """With `lightning` absent, and with both, in either order of imports."""
    must(
        python(
            "-c",
            "import sys; sys.modules['lightning'] = None\n"
            "from syncbn.lightning import SyncBatchNormPlugin\n"
            "import pytorch_lightning\n"
            "plugin = SyncBatchNormPlugin()\n"
            "assert SyncBatchNormPlugin.__bases__ == (pytorch_lightning.plugins.LayerSync,)\n"
            "pytorch_lightning.Trainer(plugins=[plugin], accelerator='cpu', logger=False, enable_checkpointing=False)\n"
            "del sys.modules['lightning']\n"
            "from lightning.pytorch.plugins import LayerSync\n"
            "assert not isinstance(plugin, LayerSync) and isinstance(SyncBatchNormPlugin(), LayerSync)\n",
        )
    )


def test_an_error_says_that_lightning_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "syncbn.lightning", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning \(the extra \[lightning\]\)"):
        importlib.import_module("syncbn.lightning")


@pytest.mark.integration
def test_averaged_weights(results: Results) -> None:
    """As in one process, with buffers averaged and not, and around DDP."""
    plain = network()
    averages = [AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True), AveragedModel(plain)]

    def each(model: nn.Module) -> None:
        for average in averages:
            average.update_parameters(model)

    whole(each=each)
    ema, mean = (state(average.module) for average in averages)
    for copies, trained in of(results, "averaged_weights"):
        for actual, expected in zip(copies, (ema, mean, mean), strict=True):
            same(actual, expected)
        assert torch.equal(copies[1]["1.running_mean"], trained["1.running_mean"])
        assert not torch.equal(copies[0]["1.running_mean"], trained["1.running_mean"])


@pytest.mark.integration
def test_updated_statistics(results: Results) -> None:
    batches = [x for x, _ in data(2)]
    model, first = network(), network()
    update_bn(batches, model)
    update_bn([x[part(0)] for x in batches], first)
    ranks = of(results, "updated_statistics")
    for together, _ in ranks:
        same(together, state(model))
    same(ranks[0][1], state(first))
    same(ranks[1][1], ranks[1][0])  # the other rank did nothing with its copy


@pytest.mark.integration
def test_quantization(results: Results) -> None:
    model = network().float()[:3]
    for x, _ in data(2)[:2]:
        model(x.float())
    for norm, classes in of(results, "quantization"):
        assert classes == ["SyncBatchNorm", "BatchNorm2d", "ConvReLU2d"]
        for name in ("running_mean", "running_var"):
            close(norm[name], state(model)[f"1.{name}"], 1e-4, 1e-4, name)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints(results: Results) -> None:
    """From two ranks, plain and sharded, into one process with nn.BatchNorm2d."""
    import torch.distributed.checkpoint as dcp

    for trained, resharded in of(results, "checkpoints"):
        same(trained, whole())
        same(resharded, trained)
    for name in ("plain", "sharded"):
        model = network(seed=6)
        holds = {"model": model.state_dict()}
        dcp.load(holds, checkpoint_id=results["folder"][0] / name)
        model.load_state_dict(holds["model"])
        same(state(model), whole())


@pytest.mark.integration
@pytest.mark.skipif(
    not installed("tensorboard"), reason="tensorboard is not installed (dependency group: integrations)"
)
def test_tensorboard(results: Results) -> None:
    """One rank's file holds what all ranks found."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks = of(results, "tensorboard")
    (file,) = (results["folder"][0] / "events").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    written = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert ranks[0] == ranks[1] and {(layer, size) for layer, size, _ in ranks[0]} == {
        ("1", 1),
        ("1", 2),
        ("4", 1),
        ("4", 2),
    }
    assert written == {
        f"syncbn_noise/{layer}/group_{size}": [(50, pytest.approx(noise, rel=1e-6))] for layer, size, noise in ranks[0]
    }


@pytest.mark.integration
def test_mesh(results_of_four: Results) -> None:
    for rank, (pair, sliced, hybrid) in enumerate(of(results_of_four, "mesh")):
        column = rank % 2
        same(pair, whole(4, slice(part(2 * column).start, part(2 * column + 1).stop)))
        same(sliced, pair)
        same(hybrid, whole(4))


@pytest.mark.integration
def test_dtensor(results_of_four: Results) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2).double()
    x, _ = data(2)[0]
    y = norm(x)
    y.pow(3).mean().backward()
    for trained, output, gradient in of(results_of_four, "dtensor"):
        close(output, y, 1e-11, 1e-11, "y")
        close(gradient, norm.weight.grad, 1e-11, 1e-11, "dweight")
        same(trained, nn.Sequential(norm).state_dict())


@pytest.mark.integration
def test_pipeline(results_of_four: Results) -> None:
    """Each micro-batch has one sample of each of two ranks."""
    net = network()
    for x, _ in data(4):
        net.zero_grad()
        for one, other in zip(*x[: 2 * MICRO].split(MICRO), strict=True):
            (squares(net(torch.stack([one, other])), x) / MICRO).backward()
    stages = net[:3], net[3:]
    for stage, trained, gradients in of(results_of_four, "pipeline"):
        same(trained, stages[stage].state_dict())
        for gradient, parameter in zip(gradients, stages[stage].parameters(), strict=True):
            assert parameter.grad is not None
            close(gradient, parameter.grad, 1e-10, 1e-10, "gradient")


# ---- in this process


def follow(title: str, **names: Any) -> dict[str, Any]:
    namespace = {"syncbn": syncbn} | names
    exec(compile(RECIPES[title], f"docs/integrations.md: {title}", "exec"), namespace)
    return namespace


def norm_act_networks(source: str) -> tuple[nn.Module, Tensor]:
    """A network with norms that drop and activate, and an input."""
    if source == "stand-in":
        from test_convert import TimmShaped

        return nn.Sequential(nn.Conv2d(2, 6, 3), TimmShaped(6)), data(2)[0][0]
    pytest.importorskip("torchvision", reason="torchvision, which timm needs, is not installed", exc_type=ImportError)
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    if source == "timm layer":
        return nn.Sequential(nn.Conv2d(2, 6, 3), timm.layers.BatchNormAct2d(6)), data(2)[0][0]
    return timm.create_model("mobilenetv3_small_050", num_classes=5, drop_rate=0.0), torch.randn(6, 3, 64, 64).double()


@pytest.mark.parametrize("source", ["timm layer", "timm network", "stand-in"])
def test_timm(source: str) -> None:
    model, x = norm_act_networks(source)
    model.double()
    plain, classes = copy.deepcopy(model), [type(layer) for layer in model.modules()]
    attributes = [set(layer.__dict__) for layer in model.modules()]
    expected = plain(x)
    models = [copy.deepcopy(model) for _ in range(2)]

    def body(rank: int, group: Any) -> Tensor:
        converted = follow("timm", model=models[rank])["model"]
        norms = [layer for layer in converted.modules() if isinstance(layer, syncbn.SyncBatchNorm)]
        assert norms and all(isinstance(layer, cls) for layer, cls in zip(converted.modules(), classes, strict=True))
        for layer in norms:
            layer.process_group = group
        return converted(x[part(rank)])

    close(torch.cat(run_ranks(2, body)), expected, 1e-11, 1e-11, "y")
    for model in models:
        same(state(model), state(plain))
        syncbn.revert_sync_batchnorm(model)
        assert [type(layer) for layer in model.modules()] == classes
        assert [set(layer.__dict__) for layer in model.modules()] == attributes
        close(model(x), copy.deepcopy(plain)(x), 1e-11, 1e-11, "y after the way back")


def trained_pair() -> nn.Sequential:
    """A convolution and a converted norm with statistics."""
    model: Any = network()[:2]
    syncbn.convert_sync_batchnorm(model)
    model(data(2)[0][0])
    return model


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_fusion() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    x = data(2)[1][0]
    synchronized: Any = trained_pair().eval()
    expected = synchronized(x)
    close(fuse_conv_bn_eval(synchronized[0], synchronized[1])(x), expected, 1e-11, 1e-11, "fused while synchronized")
    with pytest.raises(AssertionError, match=r"did not find fuser method for: .*SyncBatchNorm"):
        quantization.fuse_modules(synchronized, [["0", "1"]])
    left = follow("Fusion", model=synchronized, fuse_conv_bn_eval=fuse_conv_bn_eval)
    close(left["fused"](x), expected, 1e-11, 1e-11, "fused after the way back")
    close(quantization.fuse_modules(left["model"], [["0", "1"]])(x), expected, 1e-11, 1e-11, "fused by torch.ao")
    rectifying = syncbn.SyncBatchNorm(6, activation="relu").double().eval()
    alone = fuse_conv_bn_eval(synchronized[0].eval(), rectifying)(x)
    assert alone.min() < 0 <= rectifying(synchronized[0](x)).min()  # as the page warns


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max")
def test_qconfig_is_kept() -> None:
    model: Any = network().float()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.propagate_qconfig_(model)
    model[4].qconfig = quantization.default_qconfig
    before = [layer.qconfig for layer in model]
    for change in (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm):
        change(model)
        assert all(layer.qconfig is config for layer, config in zip(model, before, strict=True))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm2d": network,
    "nn.SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(network()),
    "converted": lambda: syncbn.convert_sync_batchnorm(network(seed=6)),
    "reverted": lambda: syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(network(seed=6))),
}


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_checkpoints(source: str, target: str, tmp_path: Path) -> None:
    """A file of each kind of layer, read into each."""
    torch_files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: integrations")
    trained = network()
    train(trained, sgd(trained), data(2))
    saved = KINDS[source]()
    saved.load_state_dict(trained.state_dict())
    path = tmp_path / "model.safetensors"
    functions = {"save_file": torch_files.save_file, "load_file": torch_files.load_file}
    follow("Checkpoints", model=saved, path=path, **functions)
    read = KINDS[target]()
    read.load_state_dict(torch_files.load_file(path))
    same(state(read), state(trained), 0.0)
