"""What ``python -m syncbn doctor`` does: say what is here, and try whether ranks on this host train exactly.

The trials are jobs of real processes, started as the launcher starts them. Whatever they do, they end with the
deadline: each is a session of its own that is ended from here, and a rank ends itself at the deadline as well.

As a program (``python -m syncbn._doctor``) this module is one rank of a trial, or the look at the accelerators, which
happens in a process of its own because a broken driver may hang or abort the process that asks it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

from syncbn import comm, kernels, launch
from syncbn._check import MESSAGE
from syncbn.comm import handshake
from syncbn.comm.base import checks
from syncbn.kernels import native
from syncbn.modules import SyncBatchNorm
from syncbn.wire import MOMENTS, Call

OPTIONAL = ("mpi4py", "mpich", "openmpi", "triton", "lightning", "accelerate", "scikit-learn", "matplotlib", "tqdm")
"""Distributions that parts of the project, or its examples, use where they are installed."""

VARIABLES = (
    *("SYNCBN_", "GLOO_", "NCCL_", "OMP_", "MKL_NUM_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
)
"""How the names of environment variables begin that change what the layers, or their messages, do."""

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
ROUNDS = 100
GRACE = 3.0  # seconds that the other ranks of a trial get after one has failed, and mpiexec to end its own

# Asked in a process of its own, and without MPI_Init: the library may be a broken one, and this process starts mpiexec.
_ASK_MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


_ASSIGNMENT = re.compile(r"\w+=")


class Failure(Exception):
    """A part does not work: one line, what its processes wrote, and the exit code of the first that failed."""

    def __init__(self, line: str, details: str = "", code: int | None = None) -> None:
        super().__init__(line)
        self.details = details
        self.code = code


class Doctor:
    """One examination: what was found, and the processes that were started for it.

    Attributes:
        report: what was found, for JSON.
    """

    def __init__(self, timeout: float, mpi: bool | None, say: Callable[[str, str], None]) -> None:
        self.report: dict[str, Any] = {"works": False, "problems": [], "tests": []}
        self.details: list[str] = []
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._mpi = mpi
        self._say = say
        self._processes: list[subprocess.Popen[bytes]] = []
        self._wrong: list[str] = []  # variables that the processes do without, so that the rest is looked at

    def examine(self) -> bool:
        """Look at everything, then try what is here; whether all of it works."""
        with tempfile.TemporaryDirectory(prefix="syncbn-doctor-", ignore_cleanup_errors=True) as folder:
            try:
                self._examine(Path(folder))
            finally:
                with _no_interruption():
                    self._end_processes(self._processes)
        self.report["works"] = not self.report["problems"]
        return self.report["works"]

    def _examine(self, folder: Path) -> None:
        found = self.report
        found["versions"] = versions()
        self._say("versions", ", ".join(f"{name} {text}" for name, text in found["versions"].items() if text))
        self._say("absent", ", ".join(name for name, text in found["versions"].items() if not text) or "nothing")
        found["settings"] = self._settings()
        self._say("settings", _settings_line(found["settings"]))
        found["launcher"] = launch.settings(_request(2))[1]
        self._say("launcher", f"syncbn-launch -n 2 would give {found['launcher']}")
        found["devices"] = {
            "cpu": cpu() | kernels_on_cpu(found["settings"]["kernels"]),
            "accelerators": [],
            "note": None,
        }
        with self._part("devices"):
            found["devices"] |= self._accelerators(folder)
            self._say("devices", _devices_line(found["devices"]))
        found["mpi"] = {"library": None, "mpiexec": None, "note": None}
        with self._part("mpi"):
            found["mpi"] |= self._look_for_mpi(folder)
            self._say("mpi", _mpi_line(found["mpi"]))
        found["backends"] = backends()
        if self._mpi is not False:
            found["backends"]["mpi4py"] = found["mpi"]["library"] is not None
        here = [name for name, there in found["backends"].items() if there]
        missing = [name for name, there in found["backends"].items() if not there]
        self._say("backends", f"{', '.join(here) or 'none'}; not here: {', '.join(missing) or 'none'}")
        found["kernels"] = _kernels(found["devices"], found["versions"]["triton"])
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
            self._say(f"test {backend}", _trial_line(result))

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failure(f"not done within the {self._timeout:g} s of --timeout")
        return left

    # ---- looking

    def _settings(self) -> dict[str, Any]:
        """What is chosen, None for a value that there is not; and the variables of ``VARIABLES`` that are set."""
        found: dict[str, Any] = {}
        for name, choice in CHOICES.items():
            found[_key(name)] = None
            with self._part("settings"):
                try:
                    found[_key(name)] = choice()
                except ValueError as error:
                    self._wrong.append(name)
                    raise Failure(f"{error}; the trials do without it") from None
        names = sorted(name for name in os.environ if name.startswith(VARIABLES))
        return found | {"environment": {name: os.environ[name] for name in names}}

    def _accelerators(self, folder: Path) -> dict[str, Any]:
        if not _accelerators_possible():
            note = "this host has a GPU driver, but this torch is built for CPUs" if launch._has_gpu() else None
            return {"accelerators": [], "note": note}
        self._ask([sys.executable, "-m", "syncbn._doctor", "devices", str(folder / "devices")], folder / "devices")
        return dict(_reports(folder / "devices")[0])

    def _look_for_mpi(self, folder: Path) -> dict[str, Any]:
        if self._mpi is False:
            return {"note": "not looked at (--no-mpi)"}
        if importlib.util.find_spec("mpi4py") is None:
            if self._mpi:
                raise Failure("--mpi, but mpi4py is not installed: pip install mpi4py mpich")
            return {"note": "mpi4py is not installed"}
        try:
            said = self._ask([sys.executable, "-c", _ASK_MPI], folder / "library")
        except Failure as error:
            advice = "load the cluster's MPI module, or pip install mpich (--no-mpi to leave MPI out)"
            raise Failure(f"mpi4py cannot load an MPI library: {error}; {advice}", error.details) from None
        library = " ".join(said.splitlines()[0].split())
        try:
            plan = self._ask([*_launcher("mpi", 2), "--dry-run", "-m", "syncbn._doctor"], folder / "mpiexec")
        except Failure as error:
            if self._mpi or error.code != 2:  # 2: the launcher refuses, as there is no mpiexec
                raise
            return {"library": library, "note": f"not tried: {error}"}
        return {"library": library, "mpiexec": next(word for word in shlex.split(plan) if not _ASSIGNMENT.match(word))}

    def _ask(self, command: Sequence[str], folder: Path) -> str:
        """What a command prints."""
        folder.mkdir()
        self._run([self._start(command, {}, folder, 0)], folder)
        return (folder / "output-0").read_text(errors="replace")

    # ---- trying

    def _trial(self, backend: str, ranks: int, folder: Path) -> dict[str, Any]:
        """Forward and backward on real ranks, compared with one process that has the whole batch."""
        started = time.monotonic()
        folder.mkdir()
        own = ["-m", "syncbn._doctor", "rank", str(folder), backend, f"{self._left():.1f}"]
        if backend == "mpi4py":
            processes = [self._start([*_launcher("mpi", ranks), *own], {}, folder, 0)]
        else:
            common = launch.settings(_request(ranks))[0] | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            command = [sys.executable, launch.WORKER, *own]
            processes = [
                self._start(command, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, folder, rank)
                for rank in range(ranks)
            ]
        self._run(processes, folder)
        reports = _reports(folder)
        if sorted(reports) != list(range(ranks)):
            raise Failure(f"reports came from ranks {sorted(reports)}, and {ranks} were started")
        return _judge(list(reports.values())) | {"works": True, "seconds": round(time.monotonic() - started, 1)}

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, index: int
    ) -> subprocess.Popen[bytes]:
        with (folder / f"output-{index}").open("wb") as output, (folder / f"errors-{index}").open("wb") as errors:
            process = subprocess.Popen(
                command,
                env={**{name: text for name, text in os.environ.items() if name not in self._wrong}, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _run(self, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
        """Wait until all have ended with code 0.

        Raises:
            Failure: one has not; with what the first of them to fail said.
        """
        while not any(codes := [process.poll() for process in processes]):
            if None not in codes:
                return
            if time.monotonic() > self._end:
                self._end_processes(processes)
                raise Failure(f"not done within the {self._timeout:g} s of --timeout", _output(folder))
            time.sleep(0.02)
        code = next(filter(None, codes))
        self._wait(processes, min(GRACE, self._end - time.monotonic()))
        self._end_processes(processes)
        problems = [report for report in _reports(folder).values() if "problem" in report]
        if problems:
            earliest = min(problems, key=lambda report: report["time"])
            raise Failure(f"rank {earliest['rank']}: {earliest['problem']}", _output(folder))
        how = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
        raise Failure(how + last_words(_output(folder)), _output(folder), code)

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.02)

    def _end_processes(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """End the sessions: first by request, since mpiexec has ranks in sessions of their own to end."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            self._wait(processes, GRACE)


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


# ---- what is here


def versions() -> dict[str, str | None]:
    """Of Python, torch, syncbn and the optional packages; None for those that are absent."""
    own = version("syncbn") or f"not installed ({Path(__file__).parent})"
    found = {"python": platform.python_version(), "torch": torch.__version__, "syncbn": own}
    return found | {name: version(name) for name in OPTIONAL}


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


CHOICES: dict[str, Callable[[], str]] = {
    "SYNCBN_CHECKS": checks,
    "SYNCBN_KERNELS": kernels.choice,
    handshake.SWITCH: handshake.chosen,
    "SYNCBN_PIN": launch.chosen_cores,
}
"""The environment variables that choose how layers and ranks run, and what gives the choice, or raises ValueError."""


def cpu() -> dict[str, Any]:
    """Cores that this process may use, and threads that torch takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"machine": platform.machine(), "cores": cores, "threads": torch.get_num_threads()}


def kernels_on_cpu(choice: str | None) -> dict[str, str | None]:
    """Which kernels work on a CPU, with which instructions if they are native, and why if they are not."""
    if choice == "aten":
        return {"kernels": "ATen", "instructions": None, "why": "SYNCBN_KERNELS=aten"}
    if not native.available():
        return {"kernels": "ATen", "instructions": None, "why": native.reason()}
    return {"kernels": "native", "instructions": native.instructions(), "why": None}


def backends() -> dict[str, bool]:
    """Which backends this torch was built with."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl", "xccl", "ucc", "mpi"), False)
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "xccl": dist.is_xccl_available(),
        "ucc": dist.is_ucc_available(),
        "mpi": dist.is_mpi_available(),
    }


def _accelerators_possible() -> bool:
    return bool(torch.version.cuda or torch.version.hip or torch.xpu._is_compiled())


def accelerators() -> dict[str, Any]:
    """The CUDA and XPU devices, the kernels that layers on them run in, and what torch warned of."""
    found: list[dict[str, Any]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            memory = torch.cuda.get_device_properties(index).total_memory
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            device = {"type": "cuda", "index": index, "name": torch.cuda.get_device_name(index)}
            device |= {"capability": capability, "memory_gib": round(memory / 2**30, 1)}
            found.append(device | _kernels_on(torch.device("cuda", index)))
        for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
            found.append({"type": "xpu", "index": index, "name": torch.xpu.get_device_name(index), "kernels": "ATen"})
    note = next((one_line(warning.message) for warning in caught if issubclass(warning.category, UserWarning)), None)
    return {"accelerators": found, "note": None if found else note}


def _kernels_on(device: torch.device) -> dict[str, str | None]:
    """Which kernels work on a device, and, where Triton does not, why: the package logs it."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("syncbn")
    logger.addHandler(handler)
    try:
        name = kernels.name_of(kernels.choose(torch.zeros(1, 1, device=device), None, raw=True))
    finally:
        logger.removeHandler(handler)
    return {"kernels": name, "why": " ".join(said.getvalue().split()) or None}


def _kernels(devices: Mapping[str, Any], triton: str | None) -> str:
    own = devices["cpu"]
    about = own["instructions"] or own["why"]
    each = [f"{own['kernels']} on CPUs ({about})"]
    for device in devices["accelerators"]:
        why = f" ({device['why']})" if device.get("why") else ""
        each.append(f"{device['kernels']} on {device['type']}:{device['index']}{why}")
    if not devices["accelerators"]:
        each.append("on CUDA devices " + ("Triton" if triton else "ATen, as Triton is not installed"))
    return "; ".join(each)


# ---- a trial, in a rank


def rank_of_trial(folder: Path, backend: str, seconds: float) -> dict[str, Any]:
    """Join the group, and measure: largest errors, statistics, time of an exchange.

    Collectives: those of two layers, forward and backward, and 120 exchanges of 513 float64.
    """
    timeout = datetime.timedelta(seconds=seconds)
    device = torch.device("cpu")
    if backend == "mpi4py":
        importlib.import_module("syncbn.mpi")
        dist.init_process_group(backend, init_method="mpi://", timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if backend == "nccl":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        store = FileStore(str(folder / "store"), size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    errors, statistics_of = {}, []
    with comm.forced():  # on a single device too
        for name in TOLERANCE:
            errors[name], running = exactness(getattr(torch, name), device)
            statistics_of += running
        report = {"rank": dist.get_rank(), "errors": errors, "statistics": statistics_of, "latency_us": latency(device)}
        report["way"] = comm.link_of(dist.group.WORLD, device).way()
    dist.destroy_process_group()
    return report


def exactness(dtype: torch.dtype, device: torch.device) -> tuple[float, list[float]]:
    """Largest error of a step of the layer, as ``|a - b| / (1 + |b|)``, and the running statistics it ends with.

    Compared with ``nn.BatchNorm2d`` in float64 on the batch of all ranks, which hold unequal parts of it: the output,
    the gradients of input, weight and bias, and the running statistics.
    """
    rank, size, channels = dist.get_rank(), dist.get_world_size(), 7
    parts = [3 + 2 * index for index in range(size)]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(parts), channels, 5, 3)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(channels, generator=generator, dtype=torch.float64).to(dtype) + 0.5 for _ in range(2))

    layer = SyncBatchNorm(channels, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    mine = x.split(parts)[rank].to(device).requires_grad_()
    y = layer(mine)
    y.backward(g.split(parts)[rank].to(device))

    whole = nn.BatchNorm2d(channels, affine=False, dtype=torch.float64)
    leaf = x.double().requires_grad_()
    own = [tensor.double().view(1, -1, 1, 1).requires_grad_() for tensor in (weight, bias)]
    peers = [tensor.detach() for tensor in own]
    outputs = [
        z * (own if index == rank else peers)[0] + (own if index == rank else peers)[1]
        for index, z in enumerate(whole(leaf).split(parts))
    ]
    torch.cat(outputs).backward(g.double())
    pairs = [
        (y, outputs[rank]),
        (mine.grad, _gradient(leaf).split(parts)[rank]),
        (layer.weight.grad, _gradient(own[0]).flatten()),
        (layer.bias.grad, _gradient(own[1]).flatten()),
        (layer.running_mean, whole.running_mean),
        (layer.running_var, whole.running_var),
    ]
    errors = [
        float(((a.detach().cpu().double() - b.detach()).abs() / (1 + b.detach().abs())).max())
        for a, b in pairs
        if a is not None and b is not None
    ]
    running = [value for name in ("running_mean", "running_var") for value in getattr(layer, name).tolist()]
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if not math.isfinite(worst):
        raise RuntimeError(f"a step of the layer in {dtype} on {device} gave values that are not finite")
    return worst, running


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def latency(device: torch.device) -> float:
    """Median time of a layer's exchange of 256 channels in microseconds, its result read on the host."""
    link = comm.link_of(dist.group.WORLD, device)
    payload = torch.ones(MESSAGE, dtype=torch.float64, device=device)
    times = []
    for _ in range(20 + ROUNDS):
        start = time.perf_counter()
        total = link.sum(payload, Call(MOMENTS))[0].item()
        times.append(time.perf_counter() - start)
        if total != link.size:
            raise RuntimeError(f"the sum of {link.size} ones came out as {total}")
    link.settle()
    return statistics.median(times[20:]) * 1e6


def _judge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    errors = {name: max(report["errors"][name] for report in reports) for name in TOLERANCE}
    for name, bound in TOLERANCE.items():
        if errors[name] > bound:
            raise Failure(f"a step in {name} is off by {errors[name]:.1e} from one process with the whole batch")
    if any(report["statistics"] != reports[0]["statistics"] for report in reports):
        raise Failure("the running statistics of the ranks are not equal")
    ways = [report["way"] for report in reports]
    each = (f"{way} from rank {rank}" for rank, way in enumerate(ways))
    way = ways[0] if len(set(ways)) == 1 else "; ".join(each)
    return {"errors": errors, "way": way, "latency_us": round(max(report["latency_us"] for report in reports), 1)}


def main(arguments: Sequence[str]) -> int:
    """``rank FOLDER BACKEND SECONDS`` or ``devices FOLDER``: leave a report in the folder."""
    job, folder, *rest = arguments
    report: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0"))}
    try:
        if job == "devices":
            report |= accelerators()
        else:
            # Also where Python code cannot run any more, within a call that never returns.
            faulthandler.dump_traceback_later(float(rest[1]) + GRACE, exit=True)
            report |= rank_of_trial(Path(folder), rest[0], float(rest[1]))
    except Exception as error:
        traceback.print_exc()
        report |= {"problem": one_line(error), "time": time.time()}
    partial = Path(folder, f"partial-{report['rank']}")
    partial.write_text(json.dumps(report))
    partial.rename(Path(folder, f"report-{report['rank']}.json"))
    return 1 if "problem" in report else 0


# ---- words


def one_line(error: Any) -> str:
    """An error as one line, without the C++ places that torch adds."""
    text = re.sub(r"\[enforce fail at [^]]*\] ", "", str(error).partition("Exception raised from")[0])
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text[:500]}".removesuffix(": ") if isinstance(error, Exception) else text[:500]


def last_words(output: str) -> str:
    """The line of a process's output that says why it ended: the last error, or else the last line."""
    lines = [
        " ".join(line.split()).removeprefix("syncbn-launch: error: ") for line in output.splitlines() if line.strip()
    ]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:500]


def _output(folder: Path) -> str:
    paths = [*sorted(folder.glob("output-*")), *sorted(folder.glob("errors-*"))]
    return "".join(path.read_text(errors="replace") for path in paths)


def _reports(folder: Path) -> dict[int, dict[str, Any]]:
    reports = [json.loads(path.read_text()) for path in folder.glob("report-*.json")]
    return {report["rank"]: report for report in sorted(reports, key=lambda report: report["rank"])}


def _launcher(engine: str, ranks: int) -> list[str]:
    return [sys.executable, launch.__file__, "--engine", engine, "-n", str(ranks)]


def _request(ranks: int) -> launch.Request:
    return launch.parse(["-n", str(ranks), "-m", "syncbn._doctor"])


def _settings_line(found: Mapping[str, Any]) -> str:
    chosen = [f"{name}={found[_key(name)]}" for name in CHOICES if found[_key(name)]]
    others = [f"{name}={text}" for name, text in found["environment"].items() if name not in CHOICES]
    if not any(name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_")) for name in found["environment"]):
        others.append("no MALLOC_* (glibc gives memory back after each step on CPUs; syncbn-launch sets them)")
    return ", ".join([*chosen, *others])


def _key(name: str) -> str:
    """What the choice of a variable is called in the report."""
    return name.removeprefix("SYNCBN_").lower()


def _devices_line(found: Mapping[str, Any]) -> str:
    here = found["cpu"]
    parts = [f"{here['machine']}, {here['cores']} cores, {here['threads']} threads in this process"]
    for device in found["accelerators"]:
        about = [f"capability {device['capability']}"] if "capability" in device else []
        about += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        parts.append(f"{device['type']}:{device['index']} {', '.join([device['name'], *about])}")
    if not found["accelerators"]:
        parts.append("no CUDA or XPU device" + (f" ({found['note']})" if found["note"] else ""))
    return "; ".join(parts)


def _mpi_line(found: Mapping[str, Any]) -> str:
    return "; ".join(text for text in (found["library"], found["mpiexec"], found["note"]) if text)


def _trial_line(result: Mapping[str, Any]) -> str:
    errors = ", ".join(f"{error:.0e} in {name}" for name, error in result["errors"].items())
    return (
        f"ok: {result['ranks']} rank{'s' if result['ranks'] > 1 else ''}; forward and backward off by {errors}; "
        f"an exchange of 256 channels takes {result['latency_us']:.0f} us, by {result['way']}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
