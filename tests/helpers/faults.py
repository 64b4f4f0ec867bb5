"""Processes of which one meets a fault: started, woken, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.processes import started
from programs.faults import Fault, process_main


class Rank:
    """A process, and the report that it left."""

    def __init__(self, process: Any, report: Path) -> None:
        self.process = process
        self.code: int = process.exitcode
        self.report: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}


def run_faulty(
    world: int,
    fault: Fault,
    folder: Path,
    timeout: float,
    way: str = "one hop",
    wake: float | None = None,
    convert: Any = None,
) -> list[Rank]:
    """Run the ranks to their end; a stopped one is woken after ``wake`` seconds, or else once the others have ended."""
    with started(world, process_main, folder, fault, timeout, way, convert) as processes:
        _wait(processes, fault, wake)
        assert [process.is_alive() for process in processes] == [False] * world
    assert not any(Path(f"/proc/{process.pid}").exists() for process in processes), "a process was left behind"
    return [Rank(process, folder / f"{rank}.json") for rank, process in enumerate(processes)]


def _wait(processes: Sequence[Any], fault: Fault, wake: float | None) -> None:
    stopped = processes[fault.rank]
    if fault.kind == "stop":
        _wait_until_stopped(stopped.pid)
        if wake is not None:
            time.sleep(wake)
            os.kill(stopped.pid, signal.SIGCONT)
    for process in processes:
        if process is not stopped:
            process.join(20.0)
    if fault.kind == "stop" and wake is None:
        os.kill(stopped.pid, signal.SIGCONT)
    stopped.join(20.0)


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} was not stopped")
