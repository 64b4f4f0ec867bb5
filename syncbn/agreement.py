"""Compare the synchronized layers of all ranks before they meet in a collective."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import _torch, groups
from syncbn.convert import layer_name
from syncbn.dry_run import check_is_module
from syncbn.errors import RankMismatchError
from syncbn.few_samples import watch_first_step
from syncbn.modules import SyncBatchNorm


def check_ranks_agree(model: nn.Module, process_group: Any = None) -> None:
    """Compare the ordered list of synchronized layers over the ranks, and raise on all of them if it differs.

    Compared per layer: qualified name, class, number of features, eps, momentum, affine, bias, running statistics,
    training mode, activation, and the size of its own process group if it has one. Each layer without a name gets its
    qualified name here, by which later errors call it.

    Call it once, on every rank, after building and converting the model: in a program where it passed, layers of
    different widths can only meet if ranks run their layers in different order, which the headers of the exchanges
    catch. ``convert_sync_batchnorm`` does not call it, since a rank may convert a model of its own (an average, an
    evaluation copy) and would wait for the others.

    If the model holds torch's own batch norm, which sees the samples of one rank, and the first training step shows
    that they are fewer than 8, rank 0 says so once, to the logger ``syncbn``.

    Args:
        model: with ``SyncBatchNorm`` layers anywhere in it.
        process_group: the ranks to compare; as in ``SyncBatchNorm``.

    Raises:
        RankMismatchError: on every rank, with the first layer that differs, what of it differs, and the ranks' sides.
        TypeError: what is no module.

    Collectives:
        Two all_gathers on the group (sizes, then the lists); none where there is no group.
    """
    check_is_module(model)
    mine = _describe_layers(model)
    group = groups.resolve_group(process_group)
    if group is None or group.size() == 1:
        return
    watch_first_step(model)
    every = _gather([json.dumps(line) for line in mine], group)
    for position in range(max(len(lines) for lines in every)):
        here = [lines[position] if position < len(lines) else "null" for lines in every]
        if len(set(here)) > 1:
            told = _difference([json.loads(line) for line in here])
            raise RankMismatchError(
                f"the synchronized layers differ between ranks, first at position {position}: {told}. "
                f"(Compared over global ranks {groups.group_ranks(group)}; the model has {len(mine)} synchronized "
                "layers here.) Build the same model, in the same mode, on every rank."
            )


def _difference(layers: list[dict[str, Any] | None]) -> str:
    """What differs between the ranks' layers at one position, None being no further layer: the name, or else fields."""
    fields = ["name"]
    everyone = [layer for layer in layers if layer is not None]
    if len(everyone) == len(layers) and len({layer["name"] for layer in everyone}) == 1:
        fields = [name for name in everyone[0] if len({json.dumps(layer[name]) for layer in everyone}) > 1]
    sides: dict[str, list[int]] = {}
    for rank, layer in enumerate(layers):
        shown = [f"{json.dumps(name)}: {json.dumps(layer[name])}" for name in fields] if layer else ["no further layer"]
        sides.setdefault(", ".join(shown), []).append(rank)
    told = "; ".join(f"rank {', '.join(map(str, ranks))}: {side}" for side, ranks in sides.items())
    return told if fields == ["name"] else f"{told} (layer {everyone[0]['name']!r})"


def _describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    lines = []
    for name, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm):
            layer._layer_name = layer._layer_name or layer_name(name)
            group = layer.process_group
            lines.append(
                {
                    "name": layer_name(name),
                    "class": type(layer).__name__,
                    "num_features": layer.num_features,
                    "eps": layer.eps,
                    "momentum": layer.momentum,
                    "affine": layer.affine,
                    "bias": layer.bias is not None,
                    "track_running_stats": layer.track_running_stats,
                    "training": layer.training,
                    "activation": layer._activation,
                    "group_size": None if group is None else group.size(),
                }
            )
    return lines


def _gather(lines: list[str], group: dist.ProcessGroup) -> list[list[str]]:
    """All ranks' lines in rank order. Works on groups that torch.distributed does not know by name."""
    on_cpu = _torch.has_backend(group, torch.device("cpu")) or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    text = "\n".join(lines).encode()
    sizes = _all_gather(torch.tensor([len(text)], device=device), group)
    widest = int(max(int(size.item()) for size in sizes))
    padded = torch.zeros(max(widest, 1), dtype=torch.uint8)
    if text:
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = _all_gather(padded.to(device), group)
    return [
        bytes(part[: int(size.item())].tolist()).decode().splitlines() for part, size in zip(texts, sizes, strict=True)
    ]


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    group.allgather([parts], [tensor]).wait()
    return parts
