"""Starts jobs of ranks whose imports are done already: ``python nursery.py FD``, for ``helpers/nursery.py``.

Of five processes that a launcher starts for four ranks, each imports torch, which takes longer than what most tests
then do. Here one process has imported it, and done nothing else; the ranks are forked from it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parents[2] / "syncbn" / "_worker.py"
NEEDED = (
    "torch.distributed.device_mesh", "torch.nn.parallel", "torch.optim", "torch._dynamo", "numpy", "sklearn.datasets",
    "sklearn.model_selection", "matplotlib.pyplot", "tqdm", "mnist1d.data", "syncbn.diagnostics",
)  # fmt: skip
"""What programs import, the compiler among it: optimizers do, at their first step."""


def main() -> None:
    """Serve jobs, one at a time, until the other end is closed. In a rank: run its program, and return."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in NEEDED:
        with contextlib.suppress(ImportError):  # extras; whoever needs them says so
            importlib.import_module(name)
    gc.freeze()
    while True:
        request, fds, *_ = socket.recv_fds(channel, 1 << 20, 2)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            for fd, place in zip(fds, (1, 2), strict=True):
                os.dup2(fd, place)
                os.close(fd)
            run_job(json.loads(request))
            return
        for fd in fds:
            os.close(fd)
        channel.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def run_job(job: dict[str, Any]) -> None:
    """Start the ranks and end with 0 if all of them did, else with 1. Returns in a rank, when its program has ended.

    What torchrun does for a job on one host: a store on the loopback interface, and the first failure ends the others.
    """
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        left: set[int] = set()
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                listener.close()
                run_rank(rank, job, address)
                return
            left.add(pid)
        from torch.distributed import TCPStore

        options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = TCPStore("127.0.0.1", int(address["MASTER_PORT"]), **options)
    failed = False
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status != 0 and not failed:
            failed = True
            for other in left:
                os.kill(other, signal.SIGTERM)
    del store
    os._exit(int(failed))


def run_rank(rank: int, job: dict[str, Any], address: dict[str, str]) -> None:
    """The launcher's own program for a rank, on the job's script."""
    size = str(job["ranks"])
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    warnings.simplefilter("default")  # PYTHONWARNINGS comes too late
    sys.argv = [str(WORKER), *job["command"]]
    spec = importlib.util.spec_from_file_location("_worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.main()


if __name__ == "__main__":
    main()
