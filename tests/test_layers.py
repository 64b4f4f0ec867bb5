"""The house: imports point down, the front door pulls in nothing optional, and the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

PACKAGE = Path(syncbn.__file__).parent

# From the ground up: a module imports only from the floors below it (and a package within itself).
FLOORS: tuple[tuple[str, ...], ...] = (
    ("header", "moments", "recompute", "kernels", "mpi", "launch", "_check", "_worker"),
    ("groups", "traced"),
    ("comm",),
    ("autograd", "steps"),
    ("masked", "uneven"),
    ("functional",),
    ("modules",),
    ("convert",),
    ("accumulation", "manifest", "population"),
    ("diagnostics", "lightning", "_doctor"),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
OPTIONAL = {"triton", "mpi4py", "lightning", "matplotlib", "sklearn", "tqdm", "yaml"}


def unit(path: Path) -> str:
    """The module, or the package, directly below syncbn that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it, dotted; ``from syncbn import comm`` as ``syncbn.comm``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = unit(path)
    assert own in FLOOR, f"{own} has no floor yet: give it one in {Path(__file__).name}"
    for name in imported(path):
        first, *rest = name.split(".")
        if first != "syncbn" or rest[:1] == [own]:
            continue
        assert rest, f"{path.name} imports the front door"
        assert rest[0] in FLOOR, f"{path.name} imports {name}"
        assert FLOOR[rest[0]] < FLOOR[own], f"{own} imports {rest[0]}, which is not below it"


@pytest.mark.parametrize("name", ["moments", "header", "kernels", "functional", "modules"])
def test_who_knows_nothing_of_ranks(name: str) -> None:
    for path in SOURCES:
        if unit(path) == name:
            assert not any(module.startswith("torch.distributed") for module in imported(path))


def test_the_launcher_needs_the_standard_library_alone() -> None:
    path = PACKAGE / "launch.py"
    if path.exists():
        assert {name.split(".")[0] for name in imported(path)} <= sys.stdlib_module_names


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_light() -> None:
    """Nothing optional, no device, no process group; ``torch`` itself is not ours to judge."""
    new = run_python(
        "import sys, torch; before = set(sys.modules);"
        "import syncbn; print(*(set(sys.modules) - before));"
        "assert not torch.cuda.is_initialized();"
        "assert not torch.distributed.is_available() or not torch.distributed.is_initialized()"
    )
    assert "syncbn.functional" in new
    assert not {name.split(".")[0] for name in new} & OPTIONAL
    assert "torch._dynamo" not in new  # which takes longer than torch, and imports Triton
    assert not {"syncbn.mpi", "syncbn.lightning", "syncbn.launch", "syncbn.diagnostics"} & set(new)


def test_the_front_door_shows_names_only() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for node in tree.body)
    assert sorted(syncbn.__all__) == syncbn.__all__
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)


def documented() -> list[str]:
    """Modules with examples in their docstrings, as dotted names; those of optional packages are tested with these."""
    names = []
    for path in SOURCES:
        if unit(path) not in ("mpi", "lightning") and ">>> " in path.read_text():
            names.append(".".join(("syncbn", *path.relative_to(PACKAGE).with_suffix("").parts)))
    return names


@pytest.mark.parametrize("name", documented())
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0, "see the captured output"
