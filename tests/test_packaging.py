"""What the package requires, and that everything it names is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ROOT, must, run

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
CONSTRAINTS = {name: version for name, _, version in (pin.partition("==") for pin in PINS)}


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement such as ``"Foo_bar[baz]>=1"``."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a plain version."""
    return tuple(int(part) for part in text.split("."))


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


def test_pins_are_plain_versions() -> None:
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)*(b[0-9]+)?", version) for version in CONSTRAINTS.values())


def test_console_script_exists() -> None:
    module, _, function = PROJECT["project"]["scripts"]["syncbn-launch"].partition(":")
    assert module == "syncbn.launch"
    import syncbn.launch

    assert callable(getattr(syncbn.launch, function))


def test_the_package_is_typed_and_launch_is_no_package() -> None:
    assert (ROOT / "syncbn" / "py.typed").exists()
    assert not (ROOT / "launch" / "__init__.py").exists()


def test_make_names_its_targets() -> None:
    text = must(run("make", "--no-print-directory", "help"))
    targets = {line.split()[1] for line in text.splitlines()}
    wanted = {
        "venv",
        "test",
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
