"""Ranks as threads of this process, each with its own gloo group: a world builds in milliseconds.

The groups are real (sockets on the loopback interface) and not registered with torch.distributed, so each thread has a
world of its own, and any number of worlds live side by side.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

DEADLINE = 30.0


def make_group(store: dist.Store, rank: int, size: int, timeout: float = 10.0) -> dist.ProcessGroup:
    """An unregistered process group over gloo."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = datetime.timedelta(seconds=timeout)
    backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
    group = dist.ProcessGroup(dist.PrefixStore("group", store), rank, size)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


def run_ranks(size: int, body: Callable[..., Any], *args: Any, timeout: float = 10.0) -> list[Any]:
    """Run ``body(rank, group, *args)`` on ``size`` ranks; the results in rank order.

    Raises the first rank's exception, or fails if a rank is not done within the deadline.
    """
    results = outcomes(size, body, *args, timeout=timeout)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def outcomes(size: int, body: Callable[..., Any], *args: Any, timeout: float = 10.0) -> list[Any]:
    """Like ``run_ranks``, with a rank's exception as its result."""
    store = dist.HashStore()
    results: list[Any] = [None] * size
    connected = threading.Barrier(size)  # one that is done would break off the connections that others make

    def run(rank: int) -> None:
        try:
            group = make_group(store, rank, size, timeout)
            connected.wait(DEADLINE)
            results[rank] = body(rank, group, *args)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, name=f"rank {rank}", args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(DEADLINE)
        assert not thread.is_alive(), f"rank {rank} of {size} is not done after {DEADLINE} s"
    return results


def peers_of(group: Any) -> Any:
    """The group, or None for a group of one rank, which differs from none only in messages to nobody."""
    return group if group.size() > 1 else None


def split(x: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Rows of ``x`` for each rank; each part keeps x's memory format."""
    return [part.clone(memory_format=torch.preserve_format) for part in x.split(list(sizes))]
