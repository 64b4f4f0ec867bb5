"""Ranks as processes, forked from a server that has imported torch and done nothing else: they start quickly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1]


def context() -> Any:
    """The multiprocessing context of such processes."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch.nn.parallel", "syncbn", "programs.faults"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))  # for the server to import from
        forkserver.ensure_running()
    return found


def run(folder: Path, world: int, body: Callable[..., Any], *args: Any, deadline: float = 60.0) -> list[Any]:
    """``body(rank, world, folder, *args)`` on so many ranks: what each returned, or the exception that it raised."""
    processes = [
        context().Process(target=_main, args=(body, rank, world, folder, args), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + deadline
    try:
        for rank, process in enumerate(processes):
            process.join(max(end - time.monotonic(), 0.0))
            assert not process.is_alive(), f"rank {rank} of {world} is not done after {deadline} s"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _main(body: Callable[..., Any], rank: int, world: int, folder: Path, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        result = body(rank, world, folder, *args)
    except Exception as error:
        result = error
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
