"""The package as users get it: a wheel made from the source distribution, installed, used from another directory."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import commands
from helpers.commands import ROOT, Done, must
from test_packaging import PROJECT, name_of

COMPILER = os.environ.get("CC", sysconfig.get_config_var("CC")).split()[0]
RECIPES = {path.name for path in (ROOT / "launch").iterdir()}

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]  # a build compiles for a minute, beside other tests
pytest.importorskip("build", reason="build is not installed (dependency group: build)")

TRAIN = """
import torch, torch.distributed as dist
from torch import nn
import syncbn

dist.init_process_group("gloo")
model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
model(torch.full((2, 2), float(dist.get_rank()))).sum().backward()
batches = int(model[1].num_batches_tracked)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}, {batches} batch, {syncbn.__file__}")
dist.destroy_process_group()
"""

USE = """
import torch
from torch import nn

import syncbn

model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
layer = syncbn.SyncBatchNorm(3, activation="relu")
reveal_type(model)
reveal_type(syncbn.revert_sync_batchnorm(model))
reveal_type(layer.forward(torch.zeros(2, 3)))
reveal_type(syncbn.functional.global_moments(torch.zeros(2, 3)))
syncbn.SyncBatchNorm("3")
"""
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on


def run(*command: str | Path, cwd: Path, deadline: float = 300.0, **variables: str) -> Done:
    """A command without this checkout on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return commands.run(*command, cwd=cwd, deadline=deadline, env=kept | variables)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    must(run(*build, "--sdist", cwd=ROOT))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", **SAFELY)
    (source,) = (folder / "source").iterdir()
    must(run(*build, "--wheel", cwd=source, deadline=600.0, CFLAGS="-O0"))  # (a third of the compiler's time)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; its other packages are those of this one, which come after its own."""
    folder = tmp_path_factory.mktemp("user") / "env"
    must(run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent))
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "beside.pth").write_text(str(Path(torch.__file__).parents[1]))
    install(folder, f"{built[1]}")
    return folder


def install(folder: Path, requirement: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    must(run(*pip, "install", "--no-index", "--force-reinstall", "--no-deps", requirement, cwd=folder))


def test_wheel_and_sdist_hold_what_they_should(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    stem = f"syncbn-{PROJECT['project']['version']}"
    assert {name.split("/")[0] for name in names} == {"syncbn", f"{stem}.dist-info", f"{stem}.data"}
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "syncbn").rglob("*.py*") if path.suffix in (".py", ".pyi")
    }
    compiled = {"syncbn/kernels/native/_native.abi3.so", "syncbn/comm/_packets.abi3.so"}
    extensions = compiled if shutil.which(COMPILER) else set()
    assert {name for name in names if name.startswith("syncbn/")} == sources | extensions | {"syncbn/py.typed"}
    assert "-cp311-abi3-" in wheel.name
    data = {name.removeprefix(f"{stem}.data/data/") for name in names if ".data/" in name}
    assert data == {f"share/syncbn/launch/{name}" for name in RECIPES}
    said = zipfile.ZipFile(wheel).read(f"{stem}.dist-info/METADATA").decode()
    assert "Description-Content-Type: text/markdown" in said and "\n# syncbn\n" in said
    assert not re.search(r"\]\((?!https:)", said), "a link into the repository leads nowhere on an index"
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "examples/train.py",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "tests/helpers/ranks.py",
        "docs/mpi.md",
    } <= files
    assert {f"launch/{name}" for name in RECIPES} <= files
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "syncbn").rglob("*.[ch]")} <= files
    assert not [name for name in files if re.search(r"_build|__pycache__|\.venv|out/|\.so$", name)]


def test_extras_resolve(built: tuple[Path, Path], environment: Path) -> None:
    """By pip, from the wheel's metadata, among the packages that are installed here."""
    extras = PROJECT["project"]["optional-dependencies"]
    for requirements in extras.values():
        for requirement in requirements:
            try:
                importlib.metadata.version(name_of(requirement))
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{requirement} is not installed (an extra)")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--no-index"]
    wanted = f"{built[1]}[{','.join(extras)}]"
    said = must(run(*pip, "--dry-run", wanted, cwd=environment))
    for requirements in (*extras.values(), PROJECT["project"]["dependencies"]):
        for requirement in requirements:
            assert f"Requirement already satisfied: {name_of(requirement)}>=" in said, said
    refused = run(*pip, "--dry-run", f"{built[1]}[no-such-extra]", cwd=environment)
    assert "does not provide the extra" in refused.stdout + refused.stderr


def test_recipe_of_the_wheel_starts_ranks_elsewhere(environment: Path, tmp_path: Path) -> None:
    """From a copy by the command that `launch/README.md` gives, and from where the wheel has put them."""
    command = environment / "bin" / "syncbn"
    assert "    syncbn recipes my_launch\n" in (ROOT / "launch" / "README.md").read_text()
    assert must(run(command, "recipes", "my_launch", cwd=tmp_path)).strip() == "my_launch"
    assert {path.name for path in (tmp_path / "my_launch").iterdir()} == RECIPES
    recipes = Path(must(run(command, "recipes", cwd=tmp_path)).strip())
    assert recipes == environment / "share" / "syncbn" / "launch"
    assert {path.name for path in recipes.iterdir()} == RECIPES
    (tmp_path / "train.py").write_text(TRAIN)
    # (the Python that is first in PATH has no syncbn: the recipe takes that of its own environment)
    settings = {"PATH": "/usr/bin:/bin", "RANKS": "2", "OMP_NUM_THREADS": "1"}
    said = must(run("sh", recipes / "torchrun.sh", "train.py", cwd=tmp_path, **settings))
    for rank in range(2):
        assert f"rank {rank} of 2, 1 batch, {environment}" in said
    assert "train.py" in must(
        run(environment / "bin" / "syncbn-launch", "--dry-run", "-n", "2", "train.py", cwd=tmp_path)
    )


def test_a_type_checker_sees_the_annotations(environment: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed (dependency group: lint)")
    (tmp_path / "use.py").write_text(USE)
    cache = getattr(pytestconfig, "cache", None)  # (none with -p no:cacheprovider)
    options = ["--strict", "--python-executable", environment / "bin" / "python"]
    options += ["--cache-dir", cache.mkdir("mypy") if cache is not None else tmp_path / "cache"]
    done = run(sys.executable, "-m", "mypy", *options, "use.py", cwd=tmp_path)
    revealed = re.findall(r'Revealed type is "(.+)"', done.stdout)
    tensor = "torch._tensor.Tensor"
    assert revealed[:2] == ["torch.nn.modules.container.Sequential"] * 2, done.stdout + done.stderr
    assert revealed[2:] == [tensor, f"tuple[{tensor}, {tensor}, {tensor}]"]
    assert re.findall(r"error: .*", done.stdout) == [
        'error: Argument 1 to "SyncBatchNorm" has incompatible type "str"; expected "int"  [arg-type]'
    ]


def test_without_a_compiler_the_package_installs_and_says_so(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, **SAFELY)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    must(run(*pip, "--target", tmp_path / "packages", source, cwd=tmp_path, CC="no-such-compiler"))
    ask = (
        "from syncbn.comm import packets; from syncbn.kernels import native; "
        "print(native.__file__, packets.swap, native.available(), native.reason())"
    )
    said = must(run(sys.executable, "-c", ask, cwd=tmp_path / "packages"))
    assert str(tmp_path) in said and "None False the compiled extension is missing" in said


def test_the_extension_works_where_the_wheel_is_installed(environment: Path, tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no compiler {COMPILER}")
    ask = (
        "from syncbn.comm import packets; from syncbn.kernels import native; "
        "print(packets.swap is not None, native.available(), native.reason())"
    )
    assert must(run(environment / "bin" / "python", "-c", ask, cwd=tmp_path)) == "True True \n"
