"""What the benchmarks share of ranks: joining those of a launcher, and starting some to measure on."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

BACKENDS = ("none", "gloo", "mpi4py")


@contextlib.contextmanager
def joined(backend: str) -> Iterator[dist.ProcessGroup | None]:
    """The ranks that a launcher started, for the length of the block; None for the backend ``none``."""
    if backend == "none":
        yield None
        return
    if backend == "mpi4py":
        importlib.import_module("syncbn.mpi")  # registers the backend
    dist.init_process_group(backend)
    yield dist.group.WORLD
    dist.destroy_process_group()


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Whether this process reports: rank 0, or the only one."""
    return group is None or group.rank() == 0


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """Add the option by which ``measured_on`` tells the ranks where to leave what they measured."""
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)


def leave(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Leave the rows for the program that called ``measured_on``; does so on rank 0."""
    if dist.get_rank() == 0:
        path.write_text(json.dumps(rows))


def measured_on(
    world: int, script: str, options: Mapping[str, object], engine: str = "torchrun", prefix: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run a benchmark on so many ranks of this host; the rows that it left.

    Args:
        options: of the benchmark, by name.
        engine: of the launcher.
        prefix: command that runs the launcher.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [*prefix, sys.executable, "-m", "syncbn.launch", "--engine", engine, "-n", str(world), script]
        for name, value in {"rows": path, **options}.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows
