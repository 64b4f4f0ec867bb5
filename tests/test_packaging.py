"""What the package requires, and that everything it names is pinned."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import syncbn
from helpers.commands import ROOT, must, run
from syncbn._doctor import matrix

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [*(ROOT / "syncbn").rglob("*.py"), *(ROOT / "examples").glob("*.py")]


def pins(name: str) -> dict[str, str]:
    """The versions in a file that the tool for pins has written."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


CONSTRAINTS, OLDEST = pins("constraints.txt"), pins("constraints-oldest.txt")


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement such as ``"Foo_bar[baz]>=1"``."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a plain version, or of one with a post-release."""
    return tuple(int(part) for part in text.replace(".post", ".").split("."))


def requirements() -> list[str]:
    """Return every requirement that pyproject.toml names."""
    groups = [*PROJECT["project"]["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()]
    listed = [entry for group in groups for entry in group if isinstance(entry, str)]
    return [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *listed]


def test_torch_is_the_only_runtime_dependency() -> None:
    (torch,) = PROJECT["project"]["dependencies"]
    assert name_of(torch) == "torch"
    least = torch.removeprefix("torch>=")
    assert f"needs PyTorch ({least} or later)" in " ".join((ROOT / "README.md").read_text().split())
    assert f"needs torch {least} or later" in (ROOT / "docs" / "integrations.md").read_text()


@pytest.mark.parametrize("requirement", requirements())
def test_requirement_is_pinned_within_its_bound(requirement: str) -> None:
    least = requirement.split(">=")[1]
    assert version_of(CONSTRAINTS[name_of(requirement)]) >= version_of(least)


def test_pins_are_plain_versions_by_the_tool() -> None:
    assert CONSTRAINTS["torch"] == pins("constraints.in")["torch"] == "2.13.0"
    for found in (CONSTRAINTS, OLDEST):
        assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)*(b[0-9]+|\.post[0-9]+)?", version) for version in found.values())
    for name in ("constraints.txt", "constraints-oldest.txt"):
        assert (ROOT / name).read_text().splitlines()[1] == "#    make pins"


def test_the_oldest_versions_are_those_that_are_asked_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["mpi"], *extras["examples"]]:
        least = version_of(requirement.split(">=")[1])
        assert version_of(OLDEST[name_of(requirement)])[: len(least)] == least, requirement


def test_console_scripts_exist() -> None:
    """One command, and the launcher's older name."""
    scripts = PROJECT["project"]["scripts"]
    assert scripts == {"syncbn": "syncbn.__main__:main", "syncbn-launch": "syncbn.launch:main"}
    for place in scripts.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_written_once() -> None:
    version = PROJECT["project"]["version"]
    assert syncbn.__version__ == version
    files = (
        must(run("git", "ls-files", "*.py", "*.toml", "*.cfg")).split()
        if (ROOT / ".git").exists()
        else ["pyproject.toml"]
    )
    assert [
        name for name in files if re.search(rf"\bversion(__)? *= *[\"']{re.escape(version)}", (ROOT / name).read_text())
    ] in (
        ["pyproject.toml"],
        [],
    )
    assert re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )


def test_classifiers_are_the_pythons_of_the_matrix() -> None:
    named = {
        line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d+$", line)
    }
    assert named == {entry.python for entry in matrix.ENTRIES}
    assert min(named) == PROJECT["project"]["requires-python"].removeprefix(">=")


def test_what_is_written_of_extras_works() -> None:
    """No text asks an index for this package; every extra that a text names is there."""
    extras = set(PROJECT["project"]["optional-dependencies"])
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").iterdir(), *SOURCES]:
        text = path.read_text()
        assert not re.search(r"pip install [^\n`]*(?<![./@\w-])syncbn(?![\w.-]*\.whl)\b(?! @)", text), path
        named = re.findall(r"extras? `?\[?(\w+)\]", text) + re.findall(r"pip install '?\.\[([\w,]+)\]", text)
        assert {extra for names in named for extra in names.split(",")} <= extras, path


def test_the_package_is_typed_and_launch_is_no_package() -> None:
    assert (ROOT / "syncbn" / "py.typed").exists()
    assert not (ROOT / "launch" / "__init__.py").exists()


def test_make_names_its_targets() -> None:
    text = must(run("make", "--no-print-directory", "help"))
    targets = {line.split()[1] for line in text.splitlines()}
    wanted = {
        "venv",
        "test",
        "test-oldest",
        "test-newest",
        "matrix",
        "pins",
        "sanitize",
        "lint",
        "types",
        "docs",
        "demo",
        "fuzz",
        "soak",
        "bench",
        "experiments",
        "pictures",
        "clean",
        "help",
    }
    assert targets == wanted


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    """Without a usable Python, one line says what to do; nothing is made."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = run("make", "venv", "PYTHON=no-such-python", cwd=tmp_path)
    assert result.returncode == 2
    assert "no Python 3.11 or later" in result.stderr and "no-such-python" in result.stderr
    assert not (tmp_path / ".venv").exists()
