"""Workflows, templates and policies: they parse, name what exists, and agree with the rest of the project."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ROOT, must, run
from syncbn._doctor import matrix
from test_packaging import CONSTRAINTS, PROJECT

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((GITHUB / "workflows").glob("*.yml"))}

pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="not a checkout: a source distribution has no .github")


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def test_workflows_pass_a_linter() -> None:
    linter = Path(sys.executable).with_name("check-jsonschema")
    if not linter.exists() and shutil.which("check-jsonschema") is None:
        pytest.skip("check-jsonschema is not installed (pip install check-jsonschema)")
    program = linter if linter.exists() else "check-jsonschema"
    must(run(program, "--builtin-schema", "vendor.github-workflows", *(GITHUB / "workflows").glob("*.yml")))
    must(run(program, "--builtin-schema", "vendor.dependabot", GITHUB / "dependabot.yml"))


def test_workflows_have_what_a_project_needs() -> None:
    assert set(WORKFLOWS) == {"tests", "wheels", "release"}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] in ({"contents": "read"}, {}), name
        for job in workflow["jobs"].values():
            assert "uses" in job or job["timeout-minutes"] <= 120
        for step in steps(workflow):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    commands = [step.get("run", "") for step in steps(WORKFLOWS["tests"])]
    assert ".ci/run" in commands and "make docs" in commands
    assert any("cibuildwheel" in step.get("run", "") for step in steps(WORKFLOWS["wheels"]))
    # A tag publishes what was built, with the proof of who publishes in place of a token.
    publish = WORKFLOWS["release"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert WORKFLOWS["release"][True]["push"] == {"tags": ["v*"]}  # (YAML reads the key "on" as true)
    assert "secrets." not in json.dumps(WORKFLOWS)


def test_actions_are_named_by_their_commits() -> None:
    """A tag can be moved. The version beside it is for people, and for the tool that proposes new ones."""
    lines = [line for path in (GITHUB / "workflows").glob("*.yml") for line in path.read_text().splitlines()]
    used = [line for line in lines if "@" in line]
    assert len(used) > 10
    for line in used:
        publisher = "pypa/gh-action-pypi-publish@release/v1" in line  # whose makers ask for their branch
        assert publisher or re.search(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_the_matrix_of_the_workflow_is_that_of_nox() -> None:
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE)
    entries = WORKFLOWS["tests"]["jobs"]["matrix"]["strategy"]["matrix"]["include"]
    assert {entry["session"] for entry in entries} == set(sessions)
    pythons = re.search(r"^PYTHONS = (\[.*\])$", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE)
    assert pythons and {entry["python"] for entry in entries} <= set(json.loads(pythons[1]))
    assert {entry.python for entry in matrix.ENTRIES} <= set(json.loads(pythons[1]))


def test_hooks_have_the_pinned_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = [pin for hook in hooks for pin in hook["additional_dependencies"]]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "shellcheck"}
    for pin in pins:
        name, _, version = pin.partition("==")
        assert CONSTRAINTS[name] == version, f".pre-commit-config.yaml says {pin}"


def test_templates_ask_for_what_the_doctor_prints() -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (doctor,) = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "syncbn doctor" in doctor["attributes"]["label"] and doctor["validations"]["required"] is True
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        text = path.read_text()
        assert set(re.findall(r"SYNCBN_\w+", text)) <= {"SYNCBN_KERNELS", "SYNCBN_SOCKETS"}
        for field in yaml.safe_load(text).get("body", []):
            assert field["type"] in ("textarea", "checkboxes") and field["attributes"]["label"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["project"]["version"] and citation["license"] == PROJECT["project"]["license"]
    assert f"## [{citation['version']}] - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_policies_are_there() -> None:
    security, support = (ROOT / "SECURITY.md").read_text(), (ROOT / "docs" / "support.md").read_text()
    for title in ("## What listens", "## What is unpickled", "## How to report"):
        assert title in security
    for title in ("## Versions", "## What may change", "## Releases"):
        assert title in support
    assert PROJECT["project"]["dependencies"][0].removeprefix("torch>=") in support


def test_no_file_names_a_package_index() -> None:
    """Which index packages come from is a matter of whoever installs."""
    names = ("pypi", "pythonhosted", "download.pytorch", "ghcr", "docker", "quay", "nvcr")
    hosts = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\.(?:org|io)\b")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    for name in must(run("git", "ls-files")).split():
        path = ROOT / name
        if path.suffix in (".png", ".svg", ".csv") or not path.is_file():
            continue
        assert not hosts.search(path.read_text(errors="replace")), name
