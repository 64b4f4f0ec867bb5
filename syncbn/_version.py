"""The version of this package, which is written in ``pyproject.toml`` and nowhere else."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """Of this code: a checkout's own ``pyproject.toml`` goes before what is installed; "unknown" without either."""
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        if project["name"] == "syncbn":
            return str(project["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):  # not a checkout, or another project's
        pass
    try:
        return importlib.metadata.version("syncbn")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
