"""The matrix of versions, each in its own environment: ``make test-oldest``, ``make test-newest``, ``make matrix``.

``nox --list`` names the sessions. What follows ``--`` goes to pytest: ``nox -s oldest -- tests/test_exact.py``. Pythons
that are not here are skipped, and said so. Options for pip, such as an index of CPU wheels of PyTorch, come from pip's
own variables (``PIP_EXTRA_INDEX_URL``).
"""

import nox

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
FAST = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow and not gpu and not nccl"]

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["oldest", "pinned", "newest"]


def test(session: nox.Session, *wanted: str) -> None:
    """Install this checkout and what is wanted besides; say the versions; run the tests."""
    session.install("--upgrade", "pip>=25.1", "setuptools>=77")  # (a pip that reads dependency groups)
    session.install("--no-build-isolation", "-e", ".[mpi,examples]", *wanted)
    session.run("syncbn", "version")
    session.run("python", "-P", "-m", "pytest", *(session.posargs or FAST), env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The least versions that the package and its extras ask for, on the oldest Python."""
    test(session, "-c", "constraints-oldest.txt", "--group", "test", "--group", "build")


@nox.session(python=PYTHONS)
def pinned(session: nox.Session) -> None:
    """The versions that a release was tested with, as ``make test`` has them, on each Python."""
    test(session, "-c", "constraints.txt", "--group", "dev")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest of everything, with torchvision and timm, whose networks are tested too, on each Python."""
    test(session, "--upgrade", "--group", "dev", "torchvision", "timm")
