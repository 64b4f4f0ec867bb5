"""Where the recipes for launching are: in the checkout, or where a wheel has put them."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[1] / "launch"
INSTALLED = Path(sysconfig.get_path("data"), "share", "syncbn", "launch")


def folder() -> Path:
    """The folder of the recipes.

    Raises:
        FileNotFoundError: they are neither beside the package nor in this environment.
    """
    for place in (CHECKOUT, INSTALLED):
        if (place / "torchrun.sh").exists():
            return place
    raise FileNotFoundError(f"no recipes in {CHECKOUT} or {INSTALLED}: install syncbn from a wheel or a checkout")


def copy(target: Path) -> None:
    """Copy the recipes into a new folder, to be changed there.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: as ``folder``.
    """
    shutil.copytree(folder(), target)
    for script in target.glob("*.sh"):  # a wheel does not keep who may run a file
        script.chmod(0o755)
