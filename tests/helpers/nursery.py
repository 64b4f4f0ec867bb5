"""Jobs of several ranks, as the launcher starts them, whose ranks need not import torch first.

They are forked from a process that has done so: ``programs/nursery.py``, one for each process of pytest.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "programs" / "nursery.py"


def run_job(
    ranks: int, command: list[str], cwd: Path, env: Mapping[str, str], deadline: float
) -> tuple[int | None, str, str]:
    """Run ``script.py arguments`` on ranks of this host to their end.

    Of what the launcher does the job has ranks that its program for a rank prepares, a store, variables, and the end of
    all where one fails; not its checks, its report, nor its settings.

    Returns:
        The code, what was printed, and the errors. The code is None where a missed deadline ended the job.
    """
    request = json.dumps({"ranks": ranks, "command": command, "cwd": str(cwd), "environment": dict(env)})
    channel = _nursery(env["PYTHONPATH"])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        socket.send_fds(channel, [request.encode()], [out.fileno(), err.fileno()])
        job = int(channel.recv(64))
        channel.settimeout(deadline)
        code: int | None
        try:
            code = int(channel.recv(64))
        except TimeoutError:
            os.killpg(job, signal.SIGKILL)
            channel.settimeout(None)
            channel.recv(64)
            code = None
        channel.settimeout(None)
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


@functools.cache
def _nursery(imports: str) -> socket.socket:
    """The connection to a nursery of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": imports, "MPLBACKEND": "Agg"},
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours
