"""The house: imports point down, the front door pulls in nothing optional, and the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest

import syncbn
from helpers.commands import must, run
from helpers.floors import FLOOR, FLOORS

PACKAGE = Path(syncbn.__file__).parent

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
OPTIONAL = {"triton", "mpi4py", "lightning", "matplotlib", "sklearn", "tqdm", "yaml"}


def unit(path: Path) -> str:
    """The module, or the package, directly below syncbn that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it, dotted; ``from syncbn import links`` as ``syncbn.comm``."""
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
    assert own in FLOOR, f"{own} has no floor yet: give it one in helpers/floors.py"
    for name in imported(path):
        first, *rest = name.split(".")
        if first != "syncbn" or rest[:1] == [own]:
            continue
        assert rest, f"{path.name} imports the front door"
        assert rest[0] in FLOOR, f"{path.name} imports {name}"
        assert FLOOR[rest[0]] < FLOOR[own], f"{own} imports {rest[0]}, which is not below it"


def test_every_floor_is_of_modules_that_exist() -> None:
    assert {unit(path) for path in SOURCES} == set(FLOOR)
    assert len(FLOOR) == sum(map(len, FLOORS.values())), "a module has two floors"


# Who does the arithmetic, and who keeps what it is done with.
OF_ONE_RANK = ("channels", "masked", "moments", "memory", "messages", "kernels")


@pytest.mark.parametrize("name", [*OF_ONE_RANK, "wire", "autograd", "functional", "modules"])
def test_who_knows_nothing_of_process_groups(name: str) -> None:
    paths = [path for path in SOURCES if unit(path) == name]
    assert paths
    for path in paths:
        assert not any(module.startswith("torch.distributed") for module in imported(path)), path


@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_who_knows_nothing_of_ranks(name: str) -> None:
    """Kernels write into messages and read from them; who sends these, and to whom, they cannot ask."""
    for path in SOURCES:
        if unit(path) == name:
            own = {module.split(".")[1] for module in imported(path) if module.startswith("syncbn.")}
            assert not own - {*OF_ONE_RANK, "wire", "_torch"}, f"{path} imports {own}"


@pytest.mark.parametrize("name", ["wire", "launch"])
def test_who_needs_the_standard_library_alone(name: str) -> None:
    assert {module.split(".")[0] for module in imported(PACKAGE / f"{name}.py")} <= sys.stdlib_module_names


def run_python(code: str) -> list[str]:
    return must(run(sys.executable, "-c", code)).split()


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
    names = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)]
    assert [node.name for node in names if isinstance(node, ast.FunctionDef)] == ["__getattr__", "__dir__"]
    assert len(names) == 2
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
