"""One examination: look at what is here, and try it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from syncbn import launch
from syncbn._doctor import looking, matrix, report, trial
from syncbn._doctor.processes import Failure, Processes, reports
from syncbn._doctor.words import one_line

# Asked in a process of its own, and without MPI_Init: the library may be a broken one, and this process starts mpiexec.
_ASK_MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"

_ASSIGNMENT = re.compile(r"\w+=")


class Doctor:
    """One examination: what was found, and the processes that were started for it.

    Attributes:
        report: what was found, for JSON.
    """

    def __init__(self, timeout: float, mpi: bool | None, say: Callable[[str, str], None]) -> None:
        self.report: dict[str, Any] = {"works": False, "problems": [], "tests": []}
        self.details: list[str] = []
        self._mpi = mpi
        self._say = say
        self._processes = Processes(timeout)

    def examine(self) -> bool:
        """Look at everything, then try what is here; whether all of it works."""
        with tempfile.TemporaryDirectory(prefix="syncbn-doctor-", ignore_cleanup_errors=True) as folder:
            try:
                self._examine(Path(folder))
            finally:
                with _no_interruption():
                    self._processes.end()
        self.report["works"] = not self.report["problems"]
        return self.report["works"]

    def _examine(self, folder: Path) -> None:
        found = self.report
        found["versions"] = looking.versions()
        self._say("versions", ", ".join(f"{name} {text}" for name, text in found["versions"].items() if text))
        self._say("absent", ", ".join(name for name, text in found["versions"].items() if not text) or "nothing")
        found["matrix"] = matrix.about(found["versions"]["torch"], found["versions"]["python"])
        self._say("tested", found["matrix"])
        found["system"] = looking.system()
        self._say("system", report.system_line(found["system"]))
        found["settings"] = self._settings()
        self._say("settings", report.settings_line(found["settings"]))
        found["launcher"] = launch.settings(_request(2))[1]
        self._say("launcher", f"syncbn-launch -n 2 would give {found['launcher']}")
        found["devices"] = {
            "cpu": looking.cpu() | looking.kernels_on_cpu(found["settings"]["kernels"]),
            "accelerators": [],
            "note": None,
        }
        with self._part("devices"):
            found["devices"] |= self._accelerators(folder)
            self._say("devices", report.devices_line(found["devices"]))
        found["mpi"] = {"library": None, "mpiexec": None, "note": None}
        with self._part("mpi"):
            found["mpi"] |= self._look_for_mpi(folder)
            self._say("mpi", report.mpi_line(found["mpi"]))
        found["backends"] = looking.backends()
        if self._mpi is not False:
            found["backends"]["mpi4py"] = found["mpi"]["library"] is not None
        here = [name for name, there in found["backends"].items() if there]
        missing = [name for name, there in found["backends"].items() if not there]
        self._say("backends", f"{', '.join(here) or 'none'}; not here: {', '.join(missing) or 'none'}")
        found["kernels"] = looking.kernels_line(found["devices"], found["versions"]["triton"])
        self._say("kernels", found["kernels"])
        self._try("gloo", 2, folder)
        gpus = sum(device["type"] == "cuda" for device in found["devices"]["accelerators"])
        if gpus and found["backends"]["nccl"]:
            self._try("nccl", min(2, gpus), folder)
        if found["mpi"]["mpiexec"] is not None:
            self._try("mpi4py", 2, folder)

    # ---- parts, and their failures

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """What fails within it is one problem, in one line."""
        try:
            yield
        except Exception as error:
            line = str(error) if isinstance(error, Failure) else one_line(error)
            self.report["problems"].append(f"{name}: {line}")
            details = error.details if isinstance(error, Failure) else traceback.format_exc()
            self.details.append(f"---- {name}\n{details.rstrip()}")
            self._say(name, f"FAILED: {line}")

    def _try(self, backend: str, ranks: int, folder: Path) -> None:
        result: dict[str, Any] = {"backend": backend, "ranks": ranks, "works": False}
        self.report["tests"].append(result)
        with self._part(f"test {backend}"):
            result |= self._trial(backend, ranks, folder / backend)
            self._say(f"test {backend}", report.trial_line(result))

    # ---- looking

    def _settings(self) -> dict[str, Any]:
        """What is chosen, None for a value that there is not; and the variables of ``VARIABLES`` that are set."""
        found: dict[str, Any] = {}
        for name, choice in looking.CHOICES.items():
            found[looking.key(name)] = None
            with self._part("settings"):
                try:
                    found[looking.key(name)] = choice()
                except ValueError as error:
                    self._processes.without.append(name)
                    raise Failure(f"{error}; the trials do without it") from None
        names = sorted(name for name in os.environ if name.startswith(looking.VARIABLES))
        return found | {"environment": {name: os.environ[name] for name in names}}

    def _accelerators(self, folder: Path) -> dict[str, Any]:
        if not looking.accelerators_possible():
            note = "this host has a GPU driver, but this torch is built for CPUs" if launch._has_gpu() else None
            return {"accelerators": [], "note": note}
        own = folder / "devices"
        self._processes.ask([sys.executable, "-m", "syncbn._doctor", "devices", str(own)], own)
        return dict(reports(own)[0])

    def _look_for_mpi(self, folder: Path) -> dict[str, Any]:
        if self._mpi is False:
            return {"note": "not looked at (--no-mpi)"}
        if importlib.util.find_spec("mpi4py") is None:
            if self._mpi:
                raise Failure("--mpi, but mpi4py is not installed: pip install mpi4py mpich (the extra [mpi])")
            return {"note": "mpi4py is not installed"}
        try:
            said = self._processes.ask([sys.executable, "-c", _ASK_MPI], folder / "library")
        except Failure as error:
            advice = "load the cluster's MPI module, or pip install mpich (--no-mpi to leave MPI out)"
            raise Failure(f"mpi4py cannot load an MPI library: {error}; {advice}", error.details) from None
        library = " ".join(said.splitlines()[0].split())
        try:
            plan = self._processes.ask([*_launcher("mpi", 2), "--dry-run", "-m", "syncbn._doctor"], folder / "mpiexec")
        except Failure as error:
            if self._mpi or error.code != 2:  # 2: the launcher refuses, as there is no mpiexec
                raise
            return {"library": library, "note": f"not tried: {error}"}
        return {"library": library, "mpiexec": next(word for word in shlex.split(plan) if not _ASSIGNMENT.match(word))}

    # ---- trying

    def _trial(self, backend: str, ranks: int, folder: Path) -> dict[str, Any]:
        """Forward and backward on real ranks, compared with one process that has the whole batch."""
        started = time.monotonic()
        folder.mkdir()
        own = ["-m", "syncbn._doctor", "rank", str(folder), backend, f"{self._processes.left():.1f}"]
        if backend == "mpi4py":
            job = [self._processes.start([*_launcher("mpi", ranks), *own], {}, folder, 0)]
        else:
            common = launch.settings(_request(ranks))[0] | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            command = [sys.executable, launch.WORKER, *own]
            job = [
                self._processes.start(command, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder, rank)
                for rank in range(ranks)
            ]
        self._processes.run(job, folder)
        found = reports(folder)
        if sorted(found) != list(range(ranks)):
            raise Failure(f"reports came from ranks {sorted(found)}, and {ranks} were started")
        return trial.judge(list(found.values())) | {"works": True, "seconds": round(time.monotonic() - started, 1)}


def run(options: argparse.Namespace) -> int:
    """Examine, print, and give the exit code: 0 if all that is here works, 1 if not.

    Args:
        options: ``timeout`` in seconds, ``mpi`` (None: where it is installed), ``json``, ``verbose``.
    """
    doctor = Doctor(options.timeout, options.mpi, (lambda part, line: None) if options.json else _print)
    heard = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN
    ]  # nohup
    before = {number: signal.signal(number, _end_by_signal) for number in heard}
    try:
        works = doctor.examine()
    except KeyboardInterrupt:
        print("syncbn doctor: interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if options.verbose and doctor.details:
        print("\n".join(doctor.details), file=sys.stderr)
    if options.json:
        print(json.dumps(doctor.report, indent=2))
    else:
        count = len(doctor.report["problems"])
        _print("result", "works" if works else f"{count} problem{'s' if count > 1 else ''}")
    return 0 if works else 1


def _print(part: str, line: str) -> None:
    print(f"{part:12} {line}", flush=True)


def _end_by_signal(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _no_interruption() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher(engine: str, ranks: int) -> list[str]:
    return [sys.executable, launch.__file__, "--engine", engine, "-n", str(ranks)]


def _request(ranks: int) -> launch.Request:
    return launch.parse(["-n", str(ranks), "-m", "syncbn._doctor"])
