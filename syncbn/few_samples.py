"""A word, once, where batch statistics are noise because few samples are behind them, in a job that has more ranks.

Published: at 4 samples or fewer batch norm loses a lot, and next to nothing at 16 (docs/when.md). It is said by rank 0,
to the logger ``syncbn``, in the first step. Not where a layer synchronizes over all ranks: there is nothing to choose.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import _torch
from syncbn._torch import BatchNormBase
from syncbn.groups import resolve_group

FEW = 8
"""Fewer samples than these, over all ranks that share statistics, are worth a word."""

_said = False


def notice_few(samples: int, ranks: int, layer: str) -> None:
    """Say that a layer takes its statistics over few samples, if the job has ranks that it leaves out.

    Args:
        samples: of this rank.
        ranks: that share statistics, each taken to have as many.
        layer: its name, "" for none.
    """
    global _said
    if _said:
        return
    world = resolve_group(None)
    if world is None or world.size() <= ranks or world.rank() != 0:
        return
    _said = True
    logging.getLogger("syncbn").warning(
        "%s takes its statistics over %d sample(s): %d on each of %d rank(s), of the %d of this job. Statistics of so "
        "few are noise. Synchronize over more ranks (syncbn.convert_sync_batchnorm, or a larger process_group), or "
        "take more samples on each; syncbn.diagnostics.measure_noise says how many it takes. (Said once.)",
        f"layer {layer!r}" if layer else "a batch norm layer",
        samples * ranks,
        samples,
        ranks,
        world.size(),
    )


def watch_first_step(model: nn.Module) -> None:
    """Let the first layer of a model that is torch's own local batch norm look at its first batch, in training."""
    if _said or _torch.is_compiled(model):
        return
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNormBase) and not isinstance(layer, nn.SyncBatchNorm) and layer.training:
            first = _FirstBatch(name)
            first.handle = layer.register_forward_pre_hook(first)
            return


class _FirstBatch:
    """A hook that removes itself. An object, so that models that are copied or pickled before can be."""

    handle: Any = None

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Look at the batch."""
        if torch.compiler.is_compiling() or not layer.training or not args or not isinstance(args[0], Tensor):
            return
        self.handle.remove()
        if args[0].dim() > 1 and 0 < len(args[0]) < FEW:
            notice_few(len(args[0]), 1, self.name)
