"""What an exchange of each layer takes."""

from __future__ import annotations

import statistics
import time

import torch

from syncbn.comm import Link, link_of
from syncbn.diagnostics.recorder import Recorder
from syncbn.modules import SyncBatchNorm
from syncbn.wire import NOISE, Call

_EXCHANGES = 20  # timed, of which the median counts


def time_exchanges(recorder: Recorder, link: Link, where: torch.device) -> dict[str, float | None]:
    """Median seconds of an exchange per layer, that of the slowest rank; None without peers.

    ``where``: the device over which the link exchanges.
    """
    if link.size == 1:
        return dict.fromkeys(recorder.names)
    known: dict[tuple[int, int], float] = {}
    local = []
    for name in recorder.names:
        layer, own, device = recorder.layer(name), link, where
        if isinstance(layer, SyncBatchNorm):
            device = recorder.device_of[name]
            own = link_of(layer._group.resolve(), device)
        width = 2 * layer.num_features + 1
        if own.size > 1 and (id(own), width) not in known:
            known[id(own), width] = _time_exchange(own, device, width, name)
        local.append(known.get((id(own), width), 0.0))
    every = torch.stack(link.gather(torch.tensor(local, dtype=torch.float64), Call(NOISE)))
    slowest = every.max(0).values.tolist()
    return {name: seconds or None for name, seconds in zip(recorder.names, slowest, strict=True)}


def _time_exchange(link: Link, device: torch.device, width: int, layer: str) -> float:
    payload = torch.zeros(width, dtype=torch.float64, device=device)
    times = []
    for _ in range(_EXCHANGES + 2):
        start = time.perf_counter()
        link.sum(payload, Call(NOISE, layer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    link.settle()
    return statistics.median(times[2:])
