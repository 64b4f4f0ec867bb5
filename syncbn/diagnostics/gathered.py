"""From what each rank has recorded to one report, the same on all of them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

import torch

from syncbn.comm import Link
from syncbn.diagnostics.estimator import noise_of_groups
from syncbn.diagnostics.recorder import Recorder
from syncbn.diagnostics.report import MIN_GROUPS, NoiseReport, NoiseRow
from syncbn.wire import NOISE, Call


def checked_sizes(group_sizes: Sequence[int] | None) -> list[int] | None:
    """The group sizes asked for, ascending; None if none were."""
    if group_sizes is None:
        return None
    sizes = sorted(set(group_sizes))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"group_sizes must be numbers of ranks, 1 or more, got {list(group_sizes)}")
    return sizes


def same_layers(recorder: Recorder, link: Link) -> bool:
    """Whether all ranks have measured the same calls, equally often: the same answer on all of them."""
    widths = [recorder.layer(name).num_features for name in recorder.names]
    digest = zlib.crc32(json.dumps([recorder.names, widths]).encode())
    mine = torch.tensor([len(widths), digest, recorder.steps], dtype=torch.float64)
    return len({tuple(part.tolist()) for part in link.gather(mine, Call(NOISE))}) == 1


def report_of(recorder: Recorder, link: Link, sizes: list[int] | None, threshold: float) -> NoiseReport:
    """Gather what all ranks have recorded, and estimate the noise of each layer at each group size that it serves."""
    measurements = recorder.steps * link.size
    if sizes is None:
        sizes = [2**i for i in range(max(1, measurements // MIN_GROUPS).bit_length())]
    kept = [k for k in sizes if measurements >= MIN_GROUPS * k]
    rows = []
    for name in recorder.names:
        layer = recorder.layer(name)
        own = recorder.samples(name)
        ranks = link.gather(own.flatten(), Call(NOISE, name))
        line = torch.stack([part.view_as(own) for part in ranks], 1).flatten(0, 1)
        values = line[:, 0].mean().item()
        for k in kept:
            groups, numbers = noise_of_groups(line, k, layer.eps)
            rows.append(NoiseRow(name, layer.num_features, values, k, groups, *numbers))
    return NoiseReport(tuple(rows), threshold, link.size, recorder.steps, tuple(k for k in sizes if k not in kept))
