"""Start one process per rank: build a torchrun, mpiexec or srun command, and become it.

::

    syncbn-launch -n 4 train.py --epochs 3
    syncbn-launch -n 4 --max-restarts 3 -m package.train
    syncbn-launch --engine mpi -n 4 train.py
    syncbn-launch --engine slurm -n 8 train.py        (inside an allocation)
    syncbn-launch --check -n 4

The same script runs under every engine: each rank finds ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` in its environment, so ``dist.init_process_group()`` works.
What has to happen inside a rank before the script runs is done by ``_worker.py``, which runs the script.

This module needs the standard library alone, and it has no parser for the engines' own options: an option that it does
not know goes to the engine as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

WORKER = str(Path(__file__).with_name("_worker.py"))
"""The program that each rank runs. By path, so that a rank need not import torch to get there."""

AGENT = str(Path(__file__).with_name("_agent.py"))
"""The program that runs torchrun. By path, as there may be no installed package."""

MALLOC = {
    # glibc gives freed blocks back to the system, and the next activation then faults its pages in one by one.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "134217728",
}
"""Settings of glibc's malloc under which a process keeps the memory that it will need again in the next step."""

# Options without a value: only for these (and ours) is the next word not taken as the value of an option.
_SWITCHES = {"--standalone", "--no-python", "--run-path", "--virtual-local-rank", "--oversubscribe"}

# Whoever gives one of these says where the ranks meet, so the launcher does not.
_MEETING = ("standalone", "rdzv-backend", "rdzv-endpoint", "master-addr", "master-port", "node-rank")

# What people call the number of ranks elsewhere; torchrun and mpiexec would say less about them.
_OTHER_COUNTS = {
    *("-np", "--np", "--nproc", "--nprocs", "--num-procs", "--num-processes", "--num-gpus", "--world-size"),
    *("--ranks", "--num-ranks", "--nranks", "--nproc-per-host", "--ntasks"),
}

# What torchrun takes for the number of ranks, besides numbers.
_COUNTS = ("auto", "cpu", "gpu", "xpu")

# Where MPIs look for a host file that no option names.
_HOST_FILES = ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "HYDRA_HOST_FILE")


_VARIABLES = """environment variables:
  OMP_NUM_THREADS              stays as it is; without it, cores / ranks
  SYNCBN_PIN=CORES             pin ranks where there are so many cores for each; 0: never
  MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD    with one of them, malloc stays as it is
  GLOO_SOCKET_IFNAME           the network interface for gloo (default on one host: loopback)
  SYNCBN_CHECK_TIMEOUT         seconds that --check waits for a rank (default: 60)
  PET_NNODES, PET_NPROC_PER_NODE, PET_MASTER_ADDR, ...    torchrun's options, as torchrun reads them
  MASTER_ADDR, MASTER_PORT     with --engine mpi: where the ranks meet
`syncbn --help` has those of the layers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be executed: the command, the variables added to the environment, and what to tell the user."""

    command: list[str]
    environment: dict[str, str]
    note: str

    def shell(self) -> str:
        """The plan as one line for a shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*words, shlex.join(self.command)])


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: our options, those for the engine, and the command of each rank."""

    options: argparse.Namespace
    passed: list[str]
    command: list[str]

    def value(self, name: str) -> str | None:
        """The value of an option for the engine (torchrun reads ``PET_*`` variables too), "" for a switch."""
        for i, word in reversed(list(enumerate(self.passed))):
            key, equals, value = word.partition("=")
            if key.startswith("--") and key[2:].replace("_", "-") == name:
                follows = "" if i + 1 == len(self.passed) or _key(word) in _SWITCHES else self.passed[i + 1]
                return value if equals else follows
        return os.environ.get("PET_" + name.replace("-", "_").upper())

    @property
    def ranks(self) -> int | None:
        """Ranks per host (with mpiexec: ranks in all), where that is a number."""
        count: str | None = self.options.nproc_per_node
        if count is None and self.options.engine != "mpi":
            count = os.environ.get("PET_NPROC_PER_NODE", "1")
        return int(count) if count is not None and count.isdecimal() else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and exit with code 2."""
    print(f"syncbn-launch: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Replace this process by the job (or print it, with ``--dry-run``).

    Args:
        argv: the arguments of the command line, those of this process by default.

    Raises:
        SystemExit: code 2 for a call that cannot work, 0 after ``--dry-run``. Otherwise the exit code is the job's.
    """
    request = parse(sys.argv[1:] if argv is None else argv)
    _check_environment(request)
    plan = make_plan(request)
    print(f"syncbn-launch: {plan.note}", file=sys.stderr, flush=True)
    if request.options.dry_run:
        print(plan.shell())
        raise SystemExit(0)
    os.execve(plan.command[0], plan.command, {**os.environ, **plan.environment})


# ---- the command line


def parse(argv: Sequence[str]) -> Request:
    """Divide a command line into our options, the engine's, and the script with its arguments."""
    parser = _Parser(
        prog="syncbn-launch",
        usage="%(prog)s [options] [options of the engine] script.py [arguments]\n"
        "       %(prog)s [options] [options of the engine] -m module [arguments]",
        description="Start one process per rank. Options that are not listed here go to torchrun (or mpiexec) as "
        "they are; `--` before the script ends them where that is not clear.",
        epilog=_VARIABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = _add_options(parser)
    known = {name: action.nargs == 0 for action in actions for name in action.option_strings}
    known |= {"-h": True, "--help": True}
    ours, passed, rest = _divide(argv, known)
    options = parser.parse_args(ours)
    count = options.nproc_per_node
    if count is not None and (count.lstrip("-").isdecimal() and int(count) < 1):
        fail(f"-n must be at least 1, got {count}")
    if options.engine == "mpi" and count is not None and not count.isdecimal():
        fail(f"with --engine mpi, -n must be the number of ranks, got {count!r}")
    if count is not None and not count.isdecimal() and count not in _COUNTS:
        fail(f"-n must be a number of ranks, or one of {', '.join(_COUNTS)}; got {count!r}")
    if count is not None and count.isdecimal() and int(count) > _MOST_RANKS:
        fail(f"-n {count} is more ranks than a host can have processes ({_MOST_RANKS})")
    request = Request(options, passed, rest)
    nodes = request.value("nnodes")
    if nodes is not None and not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nodes):
        fail(f"--nnodes must be a number of hosts, or LEAST:MOST; got {nodes!r}")
    _check_meeting(request)
    _check_command(request)
    return request


_MOST_RANKS = 1 << 22
"""Linux has no more process ids."""


def chosen_cores() -> str:
    """``SYNCBN_PIN`` in the environment: the least number of cores per rank for which ranks are pinned; "" if not set.

    Raises:
        ValueError: it is no number.
    """
    value = os.environ.get("SYNCBN_PIN", "")
    if not (value or "0").isdecimal():
        raise ValueError(f"SYNCBN_PIN must be a number of cores per rank (0: do not pin), got {value!r}")
    return value


def _check_environment(request: Request) -> None:
    try:
        chosen_cores()
    except ValueError as error:
        fail(str(error))
    seconds = os.environ.get("SYNCBN_CHECK_TIMEOUT", "60")
    if request.options.check and not seconds.replace(".", "", 1).isdecimal():
        fail(f"SYNCBN_CHECK_TIMEOUT must be a number of seconds to wait for a rank, got {seconds!r}")


def _check_meeting(request: Request) -> None:
    """Whether the port at which the ranks of one host are to meet is free, if somebody chose one."""
    option = "MASTER_PORT" if request.options.engine == "mpi" else "--master-port"
    port = os.environ.get(option) if request.options.engine == "mpi" else request.value("master-port")
    if not port or request.value("nnodes") not in (None, "1", "1:1") or request.options.engine == "slurm":
        return
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        fail(f"{option} must be a port below 65536, got {port!r}")
    if request.options.dry_run or (request.options.engine == "mpi" and _several_hosts(request)):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            fail(f"port {port} ({option}) cannot be used here: {error.strerror}. Choose another, or leave it out")


def _add_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    flag = argparse.BooleanOptionalAction
    return [
        parser.add_argument(
            "-n",
            "--nproc-per-node",
            "--nproc_per_node",
            metavar="N",
            help="ranks per host; with --engine mpi, ranks in all (default: what the engine does, mostly 1)",
        ),
        parser.add_argument(
            "--engine", choices=["torchrun", "mpi", "slurm"], default="torchrun", help="what starts the ranks"
        ),
        parser.add_argument("--dry-run", action="store_true", help="print the command and the environment it gets"),
        parser.add_argument(
            "--check",
            action="store_true",
            help="first let all ranks join, report host, device and versions, and time a small all_reduce; "
            "stop if a rank is missing or differs. Without a script, only that",
        ),
        parser.add_argument(
            "--threads", action=flag, default=True, help="set OMP_NUM_THREADS to cores / ranks unless it is set"
        ),
        parser.add_argument(
            "--pin",
            action=flag,
            default=None,
            help="give each rank cores of its own (default: with 2 cores or more per rank, no CPU quota and no GPU)",
        ),
        parser.add_argument(
            "--malloc", action=flag, default=True, help="let glibc keep freed memory, unless MALLOC_* is set"
        ),
    ]


def _key(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _divide(argv: Sequence[str], known: Mapping[str, bool]) -> tuple[list[str], list[str], list[str]]:
    """Our options, the engine's options, and what each rank runs. ``known``: our options, True for switches."""
    ours: list[str] = []
    passed: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "--":
            return ours, passed, list(argv[i + 1 :])
        plain = not word.startswith("-")
        if plain and "--" in argv[i:] and not Path(word).exists():  # one more value of the option before it
            passed.append(word)
            i += 1
            continue
        if plain or word in ("-m", "--module"):
            return ours, passed, list(argv[i:])
        if _key(word) in _OTHER_COUNTS or (word.startswith("-np") and word[3:].isdecimal()):
            fail(f"{word}: the number of ranks is given by -n, as in -n 2")
        own = word.partition("=")[0] in known or (word.startswith("-n") and word[2:].isdecimal())
        alone = "=" in word or known.get(word, own) or _key(word) in _SWITCHES
        # A new switch of the engine is not in our list: a script that exists is never the value of an option.
        last = alone or i + 1 == len(argv) or (not own and argv[i + 1].endswith(".py") and Path(argv[i + 1]).exists())
        width = 1 if last else 2
        (ours if own else passed).extend(argv[i : i + width])
        i += width
    return ours, passed, []


def _check_command(request: Request) -> None:
    command = request.command
    if not command:
        if request.options.check:
            return
        fail("no script: syncbn-launch -n 4 train.py [arguments], or -m module")
    if command[0] not in ("-m", "--module"):
        script = Path(command[0])
        if request.value("no-python") is None and not script.exists():
            fail(f"script {command[0]!r} does not exist (in {os.getcwd()})")
        if script.is_dir() and not Path(script, "__main__.py").exists():
            fail(f"script {command[0]!r} is a folder without a __main__.py")
        return
    if len(command) == 1:
        fail("-m needs the name of a module")
    command[0] = "-m"
    missing = _missing(command[1])
    if missing is not None:
        where, _, last = missing.rpartition(".")
        if last == "__main__" and where == command[1]:
            fail(f"module {command[1]!r} cannot be run: it is a package without a __main__.py")
        looked = f"{where!r} has no {last!r}" if where else f"looked in {os.getcwd()} and the installed packages"
        fail(f"module {command[1]!r} does not exist ({looked})")


def _missing(module: str) -> str | None:
    """The first part of a module's dotted name that cannot be found from the working directory. Imports nothing."""
    name, path = "", None
    parts = module.split(".")
    for part in parts:
        name = f"{name}.{part}".lstrip(".")
        spec = _spec(name, path)
        if spec is None:
            return name
        path = spec.submodule_search_locations
        if path is None:  # a module: what comes below it, Python will tell
            return None if name == module else f"{name}.{parts[name.count('.') + 1]}"
    return None if _spec(f"{name}.__main__", path) else f"{name}.__main__"


def _spec(name: str, path: Any) -> Any:
    """Where a module is, in the folders of the package around it (None: from the working directory on)."""
    sys.path.insert(0, os.getcwd())
    try:
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        return next((spec for spec in found if spec is not None), None)
    except KeyError:  # a namespace within one: its folders would be asked of modules that are not imported
        folders = [str(Path(folder, name.rpartition(".")[2])) for folder in path]
        folders = [folder for folder in folders if Path(folder).is_dir()]
        return argparse.Namespace(submodule_search_locations=folders) if folders else None
    except (ImportError, ValueError):
        return None
    finally:
        del sys.path[0]


# ---- the commands


def make_plan(request: Request) -> Plan:
    """The command and the environment for a request.

    Raises:
        SystemExit: the engine is not there.
    """
    command = {"torchrun": _torchrun, "mpi": _mpi, "slurm": _slurm}[request.options.engine](request)
    environment, note = settings(request)
    if _needs_own_store(request):
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if request.options.engine == "mpi" and _is_open_mpi(command[0]):
        # Open MPI does not hand the environment on to other hosts.
        for name in environment:
            command[1:1] = ["-x", name]
    return Plan(command, environment, note)


def _rank_command(request: Request, *options: str) -> list[str]:
    check = ["--check"] if request.options.check else []
    return [WORKER, *options, *check, *request.command]


def _torchrun(request: Request) -> list[str]:
    meeting: list[str] = []
    if request.value("nnodes") in (None, "1", "1:1") and not any(request.value(name) is not None for name in _MEETING):
        # A port that the system chooses, so that jobs on one host do not collide; and an address that needs no name.
        meeting = ["--rdzv-backend", "one_host", "--rdzv-endpoint", "127.0.0.1:0"]
        if request.value("local-addr") is None:
            meeting += ["--local-addr", "127.0.0.1"]
    count = request.options.nproc_per_node
    ranks = [] if count is None else ["--nproc-per-node", count]
    body = request.command if request.value("no-python") is not None else _rank_command(request)
    return [sys.executable, AGENT, *meeting, *ranks, *request.passed, *body]


def _mpi(request: Request) -> list[str]:
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if mpiexec is None:
        fail(
            f"--engine mpi: no mpiexec beside {sys.executable} or in PATH; pip install mpi4py mpich (the "
            "extra [mpi]), or load an MPI"
        )
    if importlib.util.find_spec("mpi4py") is None:
        fail(f"--engine mpi: {sys.executable} has no mpi4py; pip install mpi4py mpich (the extra [mpi])")
    options: list[str] = []
    if _is_open_mpi(mpiexec):
        # The ranks pin themselves; Open MPI would bind a pair of ranks to one core each, threads and all.
        options += ["--bind-to", "none"]
        options += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        options += [] if _several_hosts(request) else ["--oversubscribe"]
    count = request.options.nproc_per_node
    ranks = [] if count is None else ["-n", count]
    python = [sys.executable, "-m", "mpi4py"]  # an exception on one rank ends all of them
    return [mpiexec, *ranks, *options, *request.passed, *python, *_rank_command(request, "--mpi")]


def _is_open_mpi(mpiexec: str) -> bool:
    done = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False, timeout=30)
    return "open mpi" in done.stdout.lower() or "open-mpi" in done.stdout.lower()


def _slurm(request: Request) -> list[str]:
    srun = shutil.which("srun")
    if srun is None:
        fail("--engine slurm: no srun in PATH; run it on a Slurm cluster, or use --engine torchrun or mpi")
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        fail("--engine slurm: not in an allocation (SLURM_JOB_ID is not set); use salloc or sbatch launch/slurm.sbatch")
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    if "SLURM_CPUS_PER_TASK" in os.environ:  # srun no longer takes it over from sbatch
        options += ["--cpus-per-task", os.environ["SLURM_CPUS_PER_TASK"]]
    # One port per job, below the ports that systems hand out by themselves.
    endpoint = f"{_first_node()}:{15000 + int(job) % 15000}"
    meeting = ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job]
    count = request.options.nproc_per_node
    ranks = [] if count is None else ["--nproc-per-node", count]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, *ranks, *request.passed]
    return [srun, *options, *torchrun, *_rank_command(request)]


def _first_node() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    if "[" not in nodes:
        return nodes.partition(",")[0]
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        fail(f"--engine slurm: no scontrol in PATH, which is needed to read the node list {nodes}")
    listing = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listing.returncode or not listing.stdout.split():
        fail(f"--engine slurm: scontrol show hostnames {nodes}: {listing.stderr.strip() or 'empty answer'}")
    return listing.stdout.split()[0]


def _needs_own_store(request: Request) -> bool:
    """Whether each attempt needs a store of its own.

    Agents of torchrun keep one store through all attempts, and what a dead attempt wrote there misleads the next.
    On one host the worker keeps attempts apart by a prefix. Over several hosts with the c10d rendezvous, agents count
    attempts differently, so there the store is made anew for each attempt.
    """
    several = request.options.engine == "slurm" or request.value("rdzv-backend") == "c10d"
    least, _, most = (request.value("nnodes") or "1").partition(":")
    return several and (request.value("max-restarts") not in (None, "", "0") or most not in ("", least))


# ---- threads, cores, memory


def settings(request: Request) -> tuple[dict[str, str], str]:
    """The environment that ranks get in addition, and one line about it."""
    cores, quota = _cores(request)
    threads, about_threads = _threads(request, min(cores, quota or cores))
    pin, about_pinning = _pinning(request, cores, quota)
    malloc, about_malloc = _malloc(request)
    numpy, about_numpy = _numpy()
    count = request.ranks
    ranks = f"{count or request.options.nproc_per_node or 'all'} ranks" if count != 1 else "1 rank"
    where = f"{ranks} on {min(cores, quota or cores)} cores"
    notes = [where, about_threads, about_pinning, about_malloc, about_numpy]
    return {**threads, **pin, **malloc, **numpy}, ", ".join(filter(None, notes))


def _several_hosts(request: Request) -> bool:
    """Whether there may be more hosts than this one: whether cores and ranks of this one say little about the job."""
    if request.options.engine == "mpi":
        return bool(request.passed) or any(name in os.environ for name in _HOST_FILES)
    return request.options.engine == "slurm" or request.value("nnodes") not in (None, "1", "1:1")


def _cores(request: Request) -> tuple[int, int | None]:
    """The cores that this process may use, and the whole cores of a CPU quota that is below them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if request.options.engine == "slurm" and os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return int(os.environ["SLURM_CPUS_PER_TASK"]), None
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = max(1, int(limit) // int(period))
    except (OSError, ValueError):  # not there, or "max"
        return cores, None
    return cores, quota if quota < cores else None


def _threads(request: Request, cores: int) -> tuple[dict[str, str], str]:
    if "OMP_NUM_THREADS" in os.environ:
        return {}, f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} as set"
    if not request.options.threads:
        return {}, "OMP_NUM_THREADS not set (--no-threads)"
    if request.options.engine == "mpi" and (request.ranks is None or _several_hosts(request)):
        # How many ranks a host gets is mpiexec's decision: the worker sees it, and divides.
        return {"SYNCBN_THREADS": "1"}, "OMP_NUM_THREADS set on each host"
    if request.ranks is None:
        return {}, "OMP_NUM_THREADS left to torchrun"
    count = max(1, cores // request.ranks)
    return {"OMP_NUM_THREADS": str(count)}, f"OMP_NUM_THREADS={count}"


def _pinning(request: Request, cores: int, quota: int | None) -> tuple[dict[str, str], str]:
    wish = request.options.pin
    ranks = request.ranks
    several = _several_hosts(request)  # another host may have other cores
    if "SYNCBN_PIN" in os.environ:
        return {}, f"SYNCBN_PIN={os.environ['SYNCBN_PIN']} as set"
    if wish is False:
        return {}, "not pinned (--no-pin)"
    if ranks == 1 and not several:
        return {}, "not pinned (one rank)"
    # A rank has more threads than the one that computes (gloo's, a data loader's): alone on one core they wait for
    # each other, and cannot get out of the way of other jobs.
    least = 1 if wish else 2
    if ranks is not None and cores < least * ranks and not several:
        return {}, "not pinned (fewer than 2 cores per rank)" if least == 2 else "not pinned (fewer cores than ranks)"
    if wish is None and quota is not None:
        # Every container on the host would choose the same cores.
        return {}, f"not pinned (CPU quota of {quota}; --pin to insist)"
    if wish is None and (request.value("numa-binding") is not None or _has_gpu()):
        return {}, "not pinned (GPUs: see torchrun --numa-binding; --pin to insist)"
    where = " where a host has enough" if several else ""
    return {"SYNCBN_PIN": str(least)}, f"pinned to disjoint cores{where}"


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _malloc(request: Request) -> tuple[dict[str, str], str]:
    if not request.options.malloc:
        return {}, "malloc as it is (--no-malloc)"
    taken = [name for name in (*MALLOC, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD") if name in os.environ]
    if taken:  # a person, or another allocator, has taken care of it
        return {}, f"malloc as it is ({taken[0]} is set)"
    return dict(MALLOC), "malloc keeps freed memory"


def _numpy() -> tuple[dict[str, str], str]:
    """Without numpy, torch warns as it is imported: said once, here, and not by each process."""
    if importlib.util.find_spec("numpy") is not None:
        return {}, ""
    filters = [*filter(None, [os.environ.get("PYTHONWARNINGS")]), "ignore:Failed to initialize NumPy"]
    return {"PYTHONWARNINGS": ",".join(filters)}, "no numpy, which scripts may need (pip install numpy)"


if __name__ == "__main__":
    main()
