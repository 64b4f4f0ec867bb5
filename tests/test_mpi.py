"""The mpi4py backend: programs of ``programs/mpi`` under mpiexec, and imports that must fail well."""

from __future__ import annotations

import socket

import pytest

from helpers.commands import PROGRAMS, mpiexec, needs_mpi4py, needs_mpiexec, python

pytestmark = [pytest.mark.mpi, needs_mpi4py, needs_mpiexec]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_collectives(ranks: int) -> None:
    done = mpiexec(ranks, "mpi/collectives.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed check_") == (21 if ranks > 1 else 17), done.stdout


@pytest.mark.parametrize("ranks", [*(pytest.param(few, marks=pytest.mark.slow) for few in (2, 3)), 4])
def test_training(ranks: int) -> None:
    done = mpiexec(ranks, "mpi/training.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed check_") == 6, done.stdout


def test_environment_variables() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = mpiexec(2, "mpi/scenarios.py", "environment", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert done.returncode == 0, done.stdout


def test_exit_delivers_what_was_sent() -> None:
    done = mpiexec(2, "mpi/scenarios.py", "late_receive")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("scenario", ["deadline", "other_size", "interrupted"])
def test_dead_group(scenario: str) -> None:
    """The rank that waits gets an error it can handle, and its exit ends the rank that sleeps for a minute."""
    done = mpiexec(2, "mpi/scenarios.py", scenario)
    assert done.returncode not in (0, -6, 134), done.stdout
    assert "survived" in done.stdout and "this exit ends all ranks (MPI_Abort)" in done.stdout, done.stdout


def test_exception_on_one_rank_ends_all() -> None:
    done = mpiexec(2, "mpi/scenarios.py", "exception")  # its peer would wait for half an hour
    assert done.returncode == 1, done.stdout


def test_killed_rank_ends_all() -> None:
    assert mpiexec(2, "mpi/scenarios.py", "killed").returncode not in (0, -6, 134)


def test_thread_level_too_low() -> None:
    done = mpiexec(2, "mpi/scenarios.py", "thread_level")
    assert done.returncode == 0 and "mpi4py.rc.thread_level = 'multiple'" in done.stdout, done.stdout


def test_started_without_mpiexec() -> None:
    done = python(PROGRAMS / "mpi" / "scenarios.py", "alone")
    assert done.returncode == 1, done.stdout
    assert "WORLD_SIZE is 2, but this process was started without mpiexec" in done.stdout
    assert f"`mpiexec -n 2 python -m mpi4py {PROGRAMS / 'mpi' / 'scenarios.py'} alone`" in done.stdout


def test_ranks_of_another_launcher() -> None:
    done = mpiexec(2, "mpi/scenarios.py", "other_ranks")
    assert done.returncode == 0 and "to torch.distributed this is rank" in done.stdout, done.stdout


def test_import_without_mpi4py() -> None:
    done = python("-c", "import sys; sys.modules['mpi4py'] = None; import syncbn.mpi")
    assert done.returncode == 1
    assert "syncbn.mpi needs mpi4py" in done.stdout and "pip install mpi4py mpich (the extra [mpi])" in done.stdout


def test_import_without_mpi_library() -> None:
    done = python("-c", "import syncbn.mpi", MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    assert done.returncode == 1
    assert "could not load one" in done.stdout and "pip install mpi4py mpich (the extra [mpi])" in done.stdout


def test_import_of_the_package_leaves_mpi_alone() -> None:
    done = python("-c", "import sys, syncbn; assert 'mpi4py' not in sys.modules")
    assert done.returncode == 0, done.stdout
