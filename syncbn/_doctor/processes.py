"""The processes of the doctor: each a session of its own, all of them over by the deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn._doctor.words import last_words

GRACE = 3.0  # seconds that the other ranks of a trial get after one has failed, and mpiexec to end its own


class Failure(Exception):
    """A part does not work: one line, what its processes wrote, and the exit code of the first that failed."""

    def __init__(self, line: str, details: str = "", code: int | None = None) -> None:
        super().__init__(line)
        self.details = details
        self.code = code


class Processes:
    """What was started, and until when it may run.

    Attributes:
        without: environment variables that the processes do not get.
    """

    def __init__(self, timeout: float) -> None:
        self.without: list[str] = []
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._started: list[subprocess.Popen[bytes]] = []

    def left(self) -> float:
        """Seconds until the deadline.

        Raises:
            Failure: it is over.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failure(self._late())
        return left

    def _late(self) -> str:
        return f"not done within the {self._timeout:g} s of --timeout"

    def ask(self, command: Sequence[str], folder: Path) -> str:
        """What a command prints."""
        folder.mkdir()
        self.run([self.start(command, {}, folder, 0)], folder)
        return (folder / "output-0").read_text(errors="replace")

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, index: int
    ) -> subprocess.Popen[bytes]:
        """Start a command, whose output goes to files ``output-index`` and ``errors-index`` in the folder."""
        with (folder / f"output-{index}").open("wb") as output, (folder / f"errors-{index}").open("wb") as errors:
            process = subprocess.Popen(
                command,
                env={**{name: text for name, text in os.environ.items() if name not in self.without}, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
        """Wait until all have ended with code 0.

        Raises:
            Failure: one has not; with what the first of them to fail said.
        """
        while not any(codes := [process.poll() for process in processes]):
            if None not in codes:
                return
            if time.monotonic() > self._end:
                self._end_of(processes)
                raise Failure(self._late(), _output(folder))
            time.sleep(0.02)
        code = next(filter(None, codes))
        self._wait(processes, min(GRACE, self._end - time.monotonic()))
        self._end_of(processes)
        problems = [report for report in reports(folder).values() if "problem" in report]
        if problems:
            earliest = min(problems, key=lambda report: report["time"])
            raise Failure(f"rank {earliest['rank']}: {earliest['problem']}", _output(folder))
        how = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
        raise Failure(how + last_words(_output(folder)), _output(folder), code)

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.02)

    def _end_of(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """End the sessions: first by request, since mpiexec has ranks in sessions of their own to end."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            self._wait(processes, GRACE)

    def end(self) -> None:
        """End all that is left."""
        self._end_of(self._started)


def _output(folder: Path) -> str:
    paths = [*sorted(folder.glob("output-*")), *sorted(folder.glob("errors-*"))]
    return "".join(path.read_text(errors="replace") for path in paths)


def reports(folder: Path) -> dict[int, dict[str, Any]]:
    """What ranks left in a folder, by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob("report-*.json")]
    return {report["rank"]: report for report in sorted(found, key=lambda report: report["rank"])}
