"""Commands that tests run to their end (Python, the launcher, mpiexec), and programs as modules."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from helpers import nursery

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROGRAMS = ROOT / "tests" / "programs"
LAUNCHER = [sys.executable, str(ROOT / "syncbn" / "launch.py")]  # by path: quick, as torch is not imported
IMPORTS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # where programs find the package and the tests' helpers

MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
needs_mpi4py = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed: the extra [mpi]"
)
needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec in PATH or beside this Python: the extra [mpi]")

Done = subprocess.CompletedProcess[str]


def environment(**variables: str) -> dict[str, str]:
    """That of this process, one thread for each rank, and imports from this checkout first."""
    path = os.pathsep.join(filter(None, [IMPORTS, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


@contextlib.contextmanager
def running(
    *command: str | Path,
    env: Mapping[str, str],
    cwd: Path = ROOT,
    stdin: int | None = None,
    stderr: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own; nothing of it outlives the block."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        text=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(
    *command: str | Path,
    deadline: float = 100.0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stderr: int = subprocess.PIPE,
) -> Done:
    """Run a command to its end, or until a missed deadline ends it and fails the test with what it said.

    It is told to terminate first: mpiexec takes its ranks with it then.
    """
    with running(*command, env=environment() if env is None else env, cwd=cwd, stderr=stderr) as process:
        try:
            out, err = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                out, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
            pytest.fail(f"{command} was not done after {deadline} s:\n{out}{err or ''}")
    return Done(process.args, process.returncode, out, err or "")


def must(done: Done) -> str:
    """What a command that succeeded printed."""
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def load(path: Path) -> ModuleType:
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*arguments: str | Path, **variables: str) -> Done:
    """Run Python; what it prints and its errors are in ``stdout``."""
    return run(sys.executable, *arguments, env=environment(**variables), stderr=subprocess.STDOUT)


def launch(
    ranks: int,
    script: str | Path,
    *arguments: str | Path,
    cwd: Path = ROOT,
    really: bool = False,
    deadline: float = 100.0,
) -> Done:
    """Run a script, or one of the examples, on ranks; with ``really`` under the launcher itself, which takes longer."""
    env = environment(PYTHONWARNINGS="default")
    command = [str(EXAMPLES / script), *map(str, arguments)]
    if really:
        words = [sys.executable, "-m", "syncbn.launch", "-n", str(ranks), *command]
        return run(*words, env=env, cwd=cwd, deadline=deadline)
    code, out, err = nursery.run_job(ranks, command, cwd, env, deadline)
    if code is None:
        pytest.fail(f"{command} on {ranks} ranks was not done after {deadline} s:\n{out}{err}")
    return Done(command, code, out, err)


def mpiexec(ranks: int, program: str, *arguments: str, deadline: float = 60.0, **variables: str) -> Done:
    """Run one of the programs under mpiexec; what it prints and its errors are in ``stdout``."""
    script = [sys.executable, "-m", "mpi4py", PROGRAMS / program, *arguments]
    command = [str(MPIEXEC), *_mpi_options(), "-n", str(ranks), *script]
    return run(*command, deadline=deadline, env=environment(**variables), stderr=subprocess.STDOUT)


def mpi_version() -> str:
    """What mpiexec says of itself."""
    return run(str(MPIEXEC), "--version").stdout


def _mpi_options() -> list[str]:
    """Open MPI refuses to start as root, and more ranks than cores, unless it is told to."""
    version = mpi_version()
    return ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
