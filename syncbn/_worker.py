"""What happens inside a rank before its script runs. Started by ``syncbn.launch``, by path ::

    python _worker.py [--mpi] [--check] script.py arguments
    python _worker.py [--mpi] [--check] -m module arguments

* Under ``mpiexec``: set the variables that torchrun would have set.
* Give the rank cores of its own, if there are ``SYNCBN_PIN`` or more for each (0 or not set: never), and on a single
  host the loopback interface for gloo.
* After a restart: keep this attempt's keys in the store apart from those of the attempts before.
* Die with the agent of torchrun, so that no rank outlives the job.

torch is imported only where it is needed, so that threads and cores are settled before it looks at them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Prepare the rank, then run its script in this process as ``__main__``."""
    arguments = sys.argv[1:]
    under_mpi, check = (_take(arguments, option) for option in ("--mpi", "--check"))
    _fix_path(arguments)
    if under_mpi:
        join_mpi()
    else:
        die_with_parent()
    world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if least := _cores_per_rank():
        # torchrun numbers the ranks of a host one after the other, also where all have LOCAL_RANK=0.
        pin(int(os.environ["LOCAL_RANK"]) if under_mpi else int(os.environ["RANK"]) % here, here, least)
    if world == here and any(name == "lo" for _, name in socket.if_nameindex()):
        # gloo would ask for the address of the host's name, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    separate_attempts()
    if check:
        _beside("_check").run()
    if arguments:
        try:
            run(arguments)
        except KeyboardInterrupt:  # Ctrl-C: one line for the job is the launcher's, and none for each rank
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush()
            os._exit(128 + signal.SIGINT)


def run(arguments: list[str]) -> None:
    """Run ``script.py arguments`` or ``-m module arguments`` in this process, as Python itself would."""
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _cores_per_rank() -> int:
    """``SYNCBN_PIN``: the least for which ranks are pinned; 0 for never."""
    least = os.environ.get("SYNCBN_PIN") or "0"
    if not least.isdecimal():
        sys.exit(f"syncbn-launch: error: SYNCBN_PIN must be a number of cores per rank (0: do not pin), got {least!r}")
    return int(least)


def _take(arguments: list[str], option: str) -> bool:
    if arguments[:1] != [option]:
        return False
    del arguments[0]
    return True


def _fix_path(arguments: list[str]) -> None:
    """Make ``sys.path`` what it would be without this program in between."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    if arguments and not sys.flags.safe_path:
        first = os.getcwd() if arguments[0] == "-m" else str(Path(arguments[0]).resolve().parent)
        sys.path.insert(0, first)
    if importlib.util.find_spec("syncbn") is None:  # a bare checkout
        sys.path.append(str(here.parent))


def _beside(name: str) -> Any:
    """A module that lies beside this file, without importing the package around it."""
    spec = importlib.util.spec_from_file_location(f"syncbn.{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is missing beside {__file__}: install syncbn again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def die_with_parent() -> None:
    """Ask Linux to end this process when the process that started it ends, however that ends."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


# ---- MPI


def join_mpi() -> None:
    """Set the variables of torchrun from ``MPI.COMM_WORLD``.

    Raises:
        RuntimeError: ``mpiexec`` and the MPI library of mpi4py do not belong together.

    Collectives: one split, one gather and one broadcast over ``MPI.COMM_WORLD``.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    started = int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or world.size)
    if started != world.size:
        raise RuntimeError(
            f"mpiexec started {started} ranks, but mpi4py sees {world.size}: they belong to different MPIs. mpi4py "
            f"uses {MPI.Get_library_version().splitlines()[0]}; put the mpiexec of that MPI first in PATH."
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.rank, node.size
    node.Free()
    hosts = world.gather(MPI.Get_processor_name(), root=0)
    meeting = world.bcast(_meeting_point(hosts, local_size == world.size) if hosts else None, root=0)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_size),
        MASTER_ADDR=meeting[0],
        MASTER_PORT=meeting[1],
    )
    if hasattr(os, "sched_getaffinity") and os.environ.get("SYNCBN_THREADS") == "1":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_size)))


def _meeting_point(hosts: list[str], one_host: bool) -> tuple[str, str]:
    """Address and free port of this host, as its peers see it; what the environment says goes first."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_host else None)
    if address is None:
        other = next((host for host in hosts if host != hosts[0]), None)
        if other is None:
            sys.exit(
                f"syncbn-launch: MPI runs on several hosts that all call themselves {hosts[0]!r}, so where ranks are "
                "to meet cannot be found out. Give the hosts different names, or set MASTER_ADDR to the address of "
                "rank 0's host."
            )
        address = _address_towards(other)
    return address, os.environ.get("MASTER_PORT", port)


def _address_towards(peer: str) -> str:
    """The address from which this host would send to a peer (nothing is sent), else the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


# ---- cores


def pin(index: int, count: int, least: int = 1) -> None:
    """Keep this process on its share of the cores it may use: share ``index`` of ``count``.

    Neighbours in the machine stay together: cores are ordered by package and core, so that the threads of one core
    are shared between ranks only where the shares do not come out even. Nothing happens where there are fewer than
    ``least`` cores per share.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=_place)
    if len(cores) >= count * least:
        os.sched_setaffinity(0, cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def _place(cpu: int) -> tuple[int, int, int]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return (0, cpu, cpu)
    return (package, core, cpu)


# ---- restarts


def separate_attempts() -> None:
    """After a restart by torchrun, put this attempt's keys under a prefix of their own in the store.

    The agent keeps one store through all attempts. What a dead attempt wrote there (the addresses at which its ranks
    listened, above all) is what the ranks of the next attempt would find, and dial: without the prefix they run
    into "connection refused" and use up the restarts.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch._C._distributed_c10d import PrefixStore, Store

    # By name from sys.modules: the package has a function of the same name. The function is private, but it is the
    # one place that init_process_group, init_device_mesh and rpc all go through; the test of restarts watches it.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    create = rendezvous._create_c10d_store

    def create_for_attempt(*args: Any, **kwargs: Any) -> Store:
        return PrefixStore(f"attempt_{attempt}", create(*args, **kwargs))

    rendezvous._create_c10d_store = create_for_attempt


if __name__ == "__main__":
    main()
