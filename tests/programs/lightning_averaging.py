"""Stochastic weight averaging with Lightning, on one device and on two. Usage: lightning_averaging.py FOLDER.

Each rank leaves its network's state in FOLDER as ``DEVICES-RANK.pt``. The order of samples is that of the global
batches, whatever the number of devices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from programs.integrations import MICRO, STEPS, data, network, sgd, state
from syncbn import SyncBatchNorm
from syncbn.lightning import SyncBatchNormPlugin

EPOCHS = 4
RANKS = 2


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.synchronized: set[bool] = set()
        self.batches_of_epochs: dict[int, int] = {}

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.synchronized.add(isinstance(self.net[1], SyncBatchNorm))
        self.batches_of_epochs[self.current_epoch] = index + 1
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Mine(torch.utils.data.Sampler[list[int]]):
    """Batches of the indices that are this rank's share of each global batch."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.samples = rank, MICRO * RANKS // ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(STEPS):
            first = step * MICRO * RANKS + self.rank * self.samples
            yield list(range(first, first + self.samples))

    def __len__(self) -> int:
        return STEPS


def main(folder: Path, devices: int) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        plugins=[SyncBatchNormPlugin()] if devices > 1 else [],
        callbacks=[StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=2)],
        max_epochs=EPOCHS,
        precision="64-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    module = Module()
    samples = torch.utils.data.TensorDataset(*map(torch.cat, zip(*data(RANKS), strict=True)))
    sampler = Mine(trainer.global_rank, devices)
    trainer.fit(module, torch.utils.data.DataLoader(samples, batch_sampler=sampler))
    momenta = [layer.momentum for layer in module.net if hasattr(layer, "momentum")]
    found = {"state": state(module.net), "synchronized": module.synchronized, "momenta": momenta}
    found["epochs"] = module.batches_of_epochs
    torch.save(found, folder / f"{devices}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # Lightning starts this program again for rank 1
        main(Path(sys.argv[1]), 1)
    main(Path(sys.argv[1]), RANKS)
