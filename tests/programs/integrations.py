"""What the ranks of ``test_integrations.py`` run: each recipe of ``docs/integrations.md`` within a small program."""

from __future__ import annotations

import copy
import gc
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncbn

MICRO = 3  # samples of a rank in each step
STEPS = 3
CLASSES = 4
IMPORTS = {
    "syncbn": syncbn,
    "torch": torch,
    "dcp": dcp,
    "AveragedModel": AveragedModel,
    "DistributedDataParallel": DistributedDataParallel,
    "MixedPrecisionPolicy": MixedPrecisionPolicy,
    "PipelineStage": PipelineStage,
    "Shard": Shard,
    "distribute_tensor": distribute_tensor,
    "fully_shard": fully_shard,
    "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
    "init_device_mesh": init_device_mesh,
    "update_bn": update_bn,
}


def network(seed: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, CLASSES),
    ).double()  # fmt: skip


def squares(y: Tensor, _: Tensor) -> Tensor:
    return y.square().sum()


def data(ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The global batch of each step."""
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(ranks * MICRO, 2, 6, 6, generator=generator, dtype=torch.float64) * 2 + 1,
            torch.randint(CLASSES, (ranks * MICRO,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def part(rank: int) -> slice:
    return slice(rank * MICRO, (rank + 1) * MICRO)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    model: Any, optimizer: Any, batches: Sequence[tuple[Tensor, Tensor]], rows: slice = slice(None), dtype: Any = None
) -> None:
    for x, labels in batches:
        optimizer.zero_grad()
        y = model(x[rows].to(dtype))
        nn.functional.cross_entropy(y.double(), labels[rows]).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state, gathered where it is sharded."""
    full = {name: getattr(value, "full_tensor", value.clone)() for name, value in model.state_dict().items()}
    return {name: value.detach() for name, value in full.items()}


class Rank:
    """One rank; each method is a run of its own and returns what the test compares."""

    def __init__(self, rank: int, size: int, folder: Path, recipes: dict[str, str]) -> None:
        self.rank, self.folder, self.recipes = rank, folder, recipes
        self.batches, self.rows = data(size), part(rank)

    def follow(self, title: str, **names: Any) -> dict[str, Any]:
        """Run the recipe of this title on ``names``; the names that it leaves."""
        namespace = IMPORTS | names
        exec(compile(self.recipes[title], f"docs/integrations.md: {title}", "exec"), namespace)
        return namespace

    def ddp(self) -> dict[str, Tensor]:
        left = self.follow("DistributedDataParallel", model=network())
        train(left["ddp"], sgd(left["model"]), self.batches, self.rows)
        return state(left["model"])

    def fsdp(self, converted_first: bool = True) -> tuple[dict[str, Tensor], int, list[str]]:
        """Sharded layer by layer: one norm by itself, the other with the rest."""
        model = network()
        if converted_first:
            syncbn.convert_sync_batchnorm(model)
        for layer in (model[0], model[1], model[3], model):
            fully_shard(layer)
        if not converted_first:
            syncbn.convert_sync_batchnorm(model)
        syncbn.check_ranks_agree(model)
        assert isinstance(model[1], syncbn.SyncBatchNorm) and isinstance(model[1], FSDPModule)
        train(model, sgd(model), self.batches, self.rows)
        trained, local = state(model), len(model[1].weight.to_local())  # type: ignore[attr-defined]
        syncbn.revert_sync_batchnorm(model)
        assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[1], FSDPModule)
        train(model, sgd(model), self.batches, self.rows)  # it is sharded still
        return trained, local, [type(model[1]).__name__, type(model[4]).__name__]

    def fsdp_converted_after(self) -> Any:
        return self.fsdp(converted_first=False)

    def fsdp_mixed_precision(self) -> tuple[dict[str, Tensor], list[torch.dtype], str]:
        model = self.follow("FSDP2", model=network().float())["model"]
        train(model, sgd(model), self.batches, self.rows, torch.float32)
        x = self.batches[0][0].float()
        dtypes = [model.eval()(x).dtype, model[1].weight.dtype, model[1].running_var.dtype]
        trained = state(model)
        try:
            syncbn.revert_sync_batchnorm(model)(x)
        except RuntimeError as error:
            return trained, dtypes, str(error)
        return trained, dtypes, ""

    def accelerate(self) -> tuple[str, int, dict[str, Tensor], str]:
        # As its launcher sets them. (The group is there already, so nobody listens on this port.)
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        from accelerate import Accelerator

        accelerator: Any = Accelerator(cpu=True)
        model, samples = network(), torch.utils.data.TensorDataset(*map(torch.cat, zip(*self.batches, strict=True)))
        loader = torch.utils.data.DataLoader(samples, batch_size=MICRO)
        left = self.follow("Accelerate", accelerator=accelerator, model=model, optimizer=sgd(model), loader=loader)
        for x, labels in left["loader"]:
            left["optimizer"].zero_grad()
            accelerator.backward(nn.functional.cross_entropy(left["model"](x), labels))
            left["optimizer"].step()
        inner = accelerator.unwrap_model(left["model"])
        syncbn.revert_sync_batchnorm(inner)
        return type(left["model"]).__name__, len(left["loader"]), state(inner), type(inner[1]).__name__

    def averaged_weights(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        model = syncbn.convert_sync_batchnorm(network())
        ddp, optimizer, steps = DistributedDataParallel(model), sgd(model), iter(self.batches)

        def train_one_step(ddp: Any) -> None:
            train(ddp, optimizer, [next(steps)], self.rows)

        others = [AveragedModel(model), AveragedModel(ddp)]  # the second has a copy of DDP itself
        left = self.follow("Averaged weights", model=model, ddp=ddp, train_one_step=train_one_step)
        others[0].update_parameters(model)
        others[1].update_parameters(ddp)
        for _ in range(STEPS - 1):
            train_one_step(ddp)
            for averaged, source in ((left["ema"], model), (others[0], model), (others[1], ddp)):
                averaged.update_parameters(source)
        if self.rank == 0:  # alone: it does not communicate
            left["ema"].eval()(self.batches[0][0])
        copies = [left["ema"].module, others[0].module, others[1].module.module]
        for layer in (copied[1] for copied in copies):
            assert layer.process_group is model[1].process_group and layer.layer_name == model[1].layer_name == "1"
        return [state(copied) for copied in copies], state(model)

    def updated_statistics(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of all ranks' data; and of one rank's, whose peers do not take part."""
        loader = [x[self.rows] for x, _ in self.batches]
        model = syncbn.convert_sync_batchnorm(network())
        swa = self.follow("Statistics of averaged weights", model=model, loader=loader)["swa"]
        alone = syncbn.revert_sync_batchnorm(copy.deepcopy(swa))
        if self.rank == 0:
            update_bn(loader, alone)
        assert isinstance(swa.module[1], syncbn.SyncBatchNorm) and swa.module[1].momentum == 0.1
        return state(swa.module), state(alone.module)

    def quantization(self) -> tuple[dict[str, Tensor], list[str]]:
        from torch.ao import quantization

        model = network().float()[:3]
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        seen: list[str] = []

        def train_one_step(model: Any) -> None:
            model.apply(quantization.disable_observer).apply(quantization.disable_fake_quant)
            model(self.batches[0][0][self.rows].float())
            model.apply(quantization.enable_observer)
            model(self.batches[1][0][self.rows].float()).sum().backward()
            seen.append(type(model[0].bn).__name__)

        names = ("convert", "fuse_modules_qat", "prepare_qat")
        functions = {name: getattr(quantization, name) for name in names}
        left = self.follow("Quantization-aware training", model=model, train_one_step=train_one_step, **functions)
        norm = left["model"][0].bn
        return state(norm), [*seen, type(norm).__name__, type(left["quantized"][0]).__name__]

    def checkpoints(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Written from a plain model, loaded into a sharded one, and written from that."""
        model = syncbn.convert_sync_batchnorm(network())
        train(DistributedDataParallel(model), sgd(model), self.batches, self.rows)
        self.follow("Distributed checkpoints", model=model, folder=self.folder / "plain")
        sharded = syncbn.convert_sync_batchnorm(network(seed=6))
        fully_shard(sharded)
        holds = {"model": sharded.state_dict()}
        dcp.load(holds, checkpoint_id=self.folder / "plain")
        sharded.load_state_dict(holds["model"])
        dcp.save({"model": sharded.state_dict()}, checkpoint_id=self.folder / "sharded")
        return state(model), state(sharded)

    def tensorboard(self) -> list[tuple[str, int, float]]:
        from torch.utils.tensorboard import SummaryWriter

        from syncbn.diagnostics import NoiseObserver

        observers: list[NoiseObserver] = []

        def observer(*args: Any, **options: Any) -> NoiseObserver:
            observers.append(NoiseObserver(*args, **options))
            return observers[0]

        model = syncbn.convert_sync_batchnorm(network())
        names = {
            "model": model,
            "ddp": DistributedDataParallel(model),
            "rank": self.rank,
            "SummaryWriter": SummaryWriter,
        }
        names["train"] = lambda ddp: [ddp(self.batches[i % STEPS][0][self.rows]).sum().backward() for i in range(50)]
        left = self.follow("TensorBoard", NoiseObserver=observer, folder=str(self.folder / "events"), **names)
        if left["writer"] is not None:
            left["writer"].close()
        assert observers[0].report is not None
        return [(row.layer, row.group_size, row.noise) for row in observers[0].report.rows]

    def mesh(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Each column of the mesh trains on a batch of its own; then all of it on one, replicated and sharded."""
        left = self.follow("DeviceMesh", model=network())
        model, mesh = left["model"], left["mesh"]
        rows = part(2 * mesh.get_local_rank("model") + mesh.get_local_rank("data"))
        train(left["ddp"], sgd(model), self.batches, rows)
        sliced = syncbn.convert_sync_batchnorm(network(), mesh["data"])
        assert sliced[1].process_group is model[1].process_group is mesh.get_group("data")
        train(DistributedDataParallel(sliced, process_group=mesh.get_group("data")), sgd(sliced), self.batches, rows)
        hybrid = syncbn.convert_sync_batchnorm(network())
        fully_shard(hybrid, mesh=mesh)
        train(hybrid, sgd(hybrid), self.batches, rows)
        return state(model), state(sliced), state(hybrid)

    def dtensor(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        left = self.follow("DTensor", model=nn.Sequential(nn.BatchNorm2d(2)).double(), x=data(2)[0][0])
        return state(left["model"]), left["y"].full_tensor(), left["model"][0].weight.grad

    def pipeline(self) -> tuple[int, dict[str, Tensor], list[Tensor]]:
        """The stage, its state, and the gradients of the last batch summed over the ranks that share it."""
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "data"))
        stage, column = mesh.get_local_rank("pipe"), mesh.get_local_rank("data")
        left = self.follow("Pipelines", part=network()[:3] if stage == 0 else network()[3:], mesh=mesh)
        schedule = ScheduleGPipe(left["stage"], MICRO, loss_fn=squares)
        for x, _ in self.batches:
            left["model"].zero_grad()
            schedule.step(*([x[part(column)]] if stage == 0 else []), target=torch.zeros(MICRO))
        gradients = [parameter.grad for parameter in left["model"].parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient, group=mesh.get_group("data"))
        return stage, state(left["model"]), gradients


def run(rank: int, size: int, folder: Path, recipes: dict[str, str], names: list[str]) -> dict[str, Any]:
    """The runs of these names, one after another; the traceback of one that failed is its result."""
    me, results = Rank(rank, size, folder, recipes), {}
    for name in names:
        method: Callable[[], Any] = getattr(me, name)
        try:
            results[name] = method()
        except Exception:
            results[name] = traceback.format_exc()
        gc.collect()
        dist.barrier()
    return results
