"""A script as users of Lightning write them; its Trainer starts the second rank. Usage: lightning_script.py FOLDER.

FOLDER holds the recipes as ``recipes.pt``; each rank leaves there what the test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Fabric, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

import syncbn
from programs.integrations import MICRO, STEPS, data, network, part, sgd, state, train
from syncbn.lightning import SyncBatchNormPlugin

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
SETTINGS: dict[str, Any] = {**QUIET, "precision": "64-true", "max_epochs": 1, "enable_checkpointing": False}
SETTINGS["use_distributed_sampler"] = False


class Module(LightningModule):
    """Notes the class and the group of its first norm wherever it is used."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net, self.fails = network(), fails
        self.seen: list[tuple[str, str, Any]] = []

    def note(self, where: str) -> None:
        norm: Any = self.net[1]
        self.seen.append((where, type(norm).__name__, getattr(norm, "process_group", None)))

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.note("train")
        if self.fails:
            raise ValueError("meant to fail")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.note("validate")
        self.net(batch[0])

    def test_step(self, batch: Any, index: int) -> None:
        self.note("test")
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Mine(torch.utils.data.Sampler[int]):
    """This rank's samples of each global batch, in order: Lightning's own sampler would shuffle them."""

    def __iter__(self) -> Iterator[int]:
        for step in range(STEPS):
            rows = part(2 * step + dist.get_rank())
            yield from range(rows.start, rows.stop)

    def __len__(self) -> int:
        return STEPS * MICRO


def batches() -> torch.utils.data.DataLoader[Any]:
    samples = torch.utils.data.TensorDataset(*map(torch.cat, zip(*data(2), strict=True)))
    return torch.utils.data.DataLoader(samples, batch_size=MICRO, sampler=Mine())


def main(folder: Path) -> None:
    recipes: dict[str, str] = torch.load(folder / "recipes.pt")
    results: dict[str, Any] = {}

    module, loader = Module(), batches()
    names: dict[str, Any] = {
        "SyncBatchNormPlugin": SyncBatchNormPlugin,
        "Trainer": lambda **given: Trainer(**given, **SETTINGS),
    }
    left = names | {"module": module, "loader": loader}
    exec(compile(recipes["Lightning"], "docs/integrations.md: Lightning", "exec"), left)
    results["fit"] = state(module.net)
    results["seen"] = {seen[:2] for seen in module.seen}
    results["after"] = [type(layer).__name__ for layer in module.net]

    def trainer(plugin: SyncBatchNormPlugin) -> Trainer:
        strategy = DDPStrategy(forward_sync_buffers=False)
        return Trainer(plugins=[plugin], strategy=strategy, accelerator="cpu", devices=2, **SETTINGS)

    grouped, other = Module(), trainer(SyncBatchNormPlugin(lambda: dist.new_group([0, 1])))
    other.fit(grouped, loader, loader)
    other.test(grouped, loader, verbose=False)
    results["stages"] = {seen[:2] for seen in grouped.seen}
    groups = {group for where, _, group in grouped.seen if where == "train"}
    results["without broadcasts"] = state(grouped.net)
    results["own group"] = len(groups) == 1 and None not in groups

    failing = Module(fails=True)
    try:
        trainer(SyncBatchNormPlugin()).fit(failing, loader)
    except ValueError as error:
        results["failed"] = str(error), {seen[:2] for seen in failing.seen}, type(failing.net[1]).__name__

    try:
        Trainer(plugins=[SyncBatchNormPlugin()], sync_batchnorm=True, accelerator="cpu", devices=2)
    except Exception as error:
        results["both"] = str(error)

    fabric: Any = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    model = network()
    left = {"syncbn": syncbn, "fabric": fabric, "model": model, "optimizer": sgd(model)}
    exec(compile(recipes["Lightning Fabric"], "docs/integrations.md: Lightning Fabric", "exec"), left)
    train(left["model"], left["optimizer"], data(2), part(fabric.global_rank))
    results["fabric"] = state(model)
    torch.save(results, folder / f"rank-{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
