"""The launcher: what it makes of a command line, and what ranks find when it has started them."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from helpers.commands import LAUNCHER, ROOT, Done, load, must, run, running
from syncbn import launch

RECIPES = ROOT / "launch"

OURS = ["OMP_NUM_THREADS", "SYNCBN_PIN", "SYNCBN_THREADS", "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT"]
OURS += launch.MALLOC

# Says what a rank finds, without importing torch.
SHOW = """
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
         "GLOO_SOCKET_IFNAME", "MALLOC_MMAP_MAX_")
found = {name: os.environ.get(name) for name in names}
found |= {"argv": sys.argv[1:], "name": __name__, "path": sys.path[0], "cores": sorted(os.sched_getaffinity(0))}
import importlib.util
found["syncbn"] = importlib.util.find_spec("syncbn") is not None
found["torch"] = "torch" in sys.modules
Path(os.environ["SHOW"], "rank" + os.environ["RANK"]).write_text(json.dumps(found))
sys.exit(int(os.environ.get("CODE", "0")))
"""


def bare(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OURS and not name.startswith("PET_")}
    return kept | extra


def start(*words: str, directory: Path, deadline: float = 90, **extra: str) -> Done:
    return run(*LAUNCHER, *words, cwd=directory, env=bare(**extra), deadline=deadline)


def shown(directory: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(directory.glob("rank*"))]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without settings, a directory with a script in it, 8 cores, no quota and no GPU."""
    for name in [*OURS, *(name for name in os.environ if name.startswith(("PET_", "SLURM_")))]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.py").write_text(SHOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_cores", lambda request: (8, None))
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    return tmp_path


def plan(*argv: str) -> launch.Plan:
    return launch.make_plan(launch.parse(argv))


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# ---- the command line


def test_needs_only_the_standard_library() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('launch', {launch.__file__!r})\n"
        "module = sys.modules['launch'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "top = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(top))"
    )
    assert must(run(sys.executable, "-I", "-S", "-c", code)).strip() in ("['__main__', 'launch']", "['launch']")


@pytest.mark.parametrize(
    ("argv", "passed", "command"),
    [
        ("train.py", "", "train.py"),
        ("-n 4 train.py -n 5 --dry-run", "", "train.py -n 5 --dry-run"),
        ("-n4 --max-restarts 3 train.py", "--max-restarts 3", "train.py"),
        ("--max-restarts=3 -n 2 train.py a", "--max-restarts=3", "train.py a"),
        ("--standalone -n 2 train.py", "--standalone", "train.py"),
        ("--new-switch train.py x", "--new-switch", "train.py x"),
        ("--engine mpi -n 2 --mca btl tcp -- train.py -- x", "--mca btl tcp", "train.py -- x"),
        ("--engine mpi -hosts a,b -n 2 train.py", "-hosts a,b", "train.py"),
        ("--no-pin -m json.tool --dry-run", "", "-m json.tool --dry-run"),
        ("--module json.tool", "", "-m json.tool"),
    ],
)
def test_divides_the_command_line(clean: Path, argv: str, passed: str, command: str) -> None:
    request = launch.parse(shlex.split(argv))
    assert request.passed == shlex.split(passed)
    assert request.command == shlex.split(command)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "no script"),
        ("-n 4", "no script"),
        ("-n 4 missing.py --lr 1", "'missing.py' does not exist"),
        ("-m", "-m needs"),
        ("-m no_such_module.train", "'no_such_module.train' does not exist"),
        ("-n 0 train.py", "-n must be at least 1, got 0"),
        ("-n -3 train.py", "-n must be at least 1, got -3"),
        ("-n", "expected one argument"),
        ("--engine ray train.py", "invalid choice: 'ray' (choose from"),
        ("--engine mpi -n auto train.py", "must be the number of ranks, got 'auto'"),
        ("--engine slurm -n 2 train.py", "no srun in PATH"),
        ("--engine mpi -n 2 train.py", "no mpiexec beside"),
    ],
)
def test_a_call_that_cannot_work_is_one_line_and_code_2(
    clean: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argv: str, says: str
) -> None:
    monkeypatch.setenv("PATH", str(clean))
    monkeypatch.setattr(sys, "executable", str(clean / "python"))
    with pytest.raises(SystemExit) as exit_:
        launch.main(shlex.split(argv))
    out, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert says in err and err.startswith("syncbn-launch: error: ")
    assert err.count("\n") == 1 and not out


def test_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        launch.main(["--help"])
    assert exit_.value.code == 0
    assert "--engine {torchrun,mpi,slurm}" in capsys.readouterr().out


# ---- the command and its environment


def test_dry_run_prints_one_line_for_a_shell(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        launch.main(["-n", "4", "--dry-run", "train.py", "a b"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0
    words = shlex.split(out)
    assert out.count("\n") == 1
    assert words[-2:] == ["train.py", "a b"]
    assert {"OMP_NUM_THREADS=2", "SYNCBN_PIN=2", "MALLOC_MMAP_MAX_=0"} <= set(words)
    assert err == (
        "syncbn-launch: 4 ranks on 8 cores, OMP_NUM_THREADS=2, pinned to disjoint cores, malloc keeps freed memory\n"
    )


def test_one_host_meets_on_the_loopback_interface_at_a_port_of_the_systems_choice(clean: Path) -> None:
    command = shlex.join(plan("-n", "2", "train.py").command)
    meeting = "--rdzv-backend one_host --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 --nproc-per-node 2"
    assert f"{launch.AGENT} {meeting}" in command
    assert "--local-addr 10.0.0.1" in shlex.join(plan("--local-addr", "10.0.0.1", "train.py").command)
    assert shlex.join(plan("--local-addr", "10.0.0.1", "train.py").command).count("--local-addr") == 1


@pytest.mark.parametrize(
    "options", ["--standalone", "--nnodes=2 --rdzv-endpoint a:1", "--master_port 29501", "--nnodes 2 --node-rank 1"]
)
def test_leaves_the_meeting_point_to_whoever_names_it(clean: Path, options: str) -> None:
    given = plan(*shlex.split(options), "train.py")
    assert "127.0.0.1:0" not in given.command
    assert given.command[2 : 2 + len(shlex.split(options))] == shlex.split(options)


def test_reads_what_torchrun_reads_from_the_environment(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    monkeypatch.setenv("PET_MASTER_ADDR", "node0")
    given = plan("train.py")
    assert "--rdzv-backend" not in given.command and "--nproc-per-node" not in given.command
    assert given.environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("options", "own_store"),
    [
        ("--nnodes 2 --rdzv-backend c10d --max-restarts 3", True),
        ("--nnodes 1:4 --rdzv-backend=c10d", True),
        ("--nnodes 2 --rdzv-backend c10d", False),
        ("--nnodes 2 --node-rank 1 --max-restarts 3", False),  # static: agents count attempts alike
        ("--max-restarts 3", False),
    ],
)
def test_several_hosts_get_a_new_store_for_each_attempt(clean: Path, options: str, own_store: bool) -> None:
    environment = plan(*shlex.split(options), "train.py").environment
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in environment) is own_store


@pytest.mark.parametrize(
    ("argv", "names", "note"),
    [
        ("--no-threads -n 2", {"SYNCBN_PIN", *launch.MALLOC}, "OMP_NUM_THREADS not set (--no-threads)"),
        ("--no-pin -n 2", {"OMP_NUM_THREADS", *launch.MALLOC}, "not pinned (--no-pin)"),
        ("--no-malloc -n 2", {"OMP_NUM_THREADS", "SYNCBN_PIN"}, "malloc as it is (--no-malloc)"),
        ("-n 5", {"OMP_NUM_THREADS", *launch.MALLOC}, "not pinned (fewer than 2 cores per rank)"),
        ("-n 1", {"OMP_NUM_THREADS", *launch.MALLOC}, "not pinned (one rank)"),
        ("-n auto", {"SYNCBN_PIN", *launch.MALLOC}, "auto ranks on 8 cores, OMP_NUM_THREADS left to torchrun"),
        ("-n 2 --numa-binding node", {"OMP_NUM_THREADS", *launch.MALLOC}, "not pinned (GPUs"),
        ("--pin -n 5", {"OMP_NUM_THREADS", "SYNCBN_PIN", *launch.MALLOC}, "pinned to disjoint cores"),
        ("--pin -n 9", {"OMP_NUM_THREADS", *launch.MALLOC}, "not pinned (fewer cores than ranks)"),
    ],
)
def test_settings_have_off_switches_and_are_reported(clean: Path, argv: str, names: set[str], note: str) -> None:
    given = plan(*shlex.split(argv), "train.py")
    assert set(given.environment) == names
    assert note in given.note and "\n" not in given.note


def test_settings_of_the_user_stay(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SYNCBN_PIN", "0")
    monkeypatch.setenv("LD_PRELOAD", "")
    given = plan("-n", "2", "train.py")
    assert given.environment == {}
    assert "OMP_NUM_THREADS=7 as set, SYNCBN_PIN=0 as set, malloc as it is (LD_PRELOAD is set)" in given.note


def test_without_numpy_torchs_warning_is_said_once(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    assert "PYTHONWARNINGS" not in plan("-n", "2", "train.py").environment
    monkeypatch.setitem(sys.modules, "numpy", None)
    given = plan("-n", "2", "train.py")
    assert given.note.endswith(", no numpy, which scripts may need (pip install numpy)")
    assert given.environment["PYTHONWARNINGS"] == "ignore:Failed to initialize NumPy"
    warn = "import warnings; warnings.warn('Failed to initialize NumPy: no module'); warnings.warn('another')"
    said = run(sys.executable, "-c", warn, env=bare(**given.environment)).stderr
    assert "NumPy" not in said.replace(warn, "") and "another" in said
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert plan("-n", "2", "train.py").environment["PYTHONWARNINGS"] == "error,ignore:Failed to initialize NumPy"


def test_a_cpu_quota_counts_for_threads_and_rules_out_pinning(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cores", lambda request: (64, 4))
    given = plan("-n", "2", "train.py")
    assert given.environment["OMP_NUM_THREADS"] == "2" and "SYNCBN_PIN" not in given.environment
    assert "2 ranks on 4 cores" in given.note


def test_open_mpi_needs_more_words_than_mpich(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(clean / "python"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    mpiexec = executable(clean / "mpiexec", "#!/bin/sh\necho 'mpiexec (Open MPI) 5.0.8'\n")
    command = plan("--engine", "mpi", "-n", "2", "train.py").command
    assert command[0] == str(mpiexec)
    assert {"--bind-to", "--oversubscribe", "-x"} <= set(command)
    assert ("--allow-run-as-root" in command) is (os.geteuid() == 0)
    assert "--oversubscribe" not in plan("--engine", "mpi", "-n", "2", "--hostfile", "h", "train.py").command
    executable(clean / "mpiexec", "#!/bin/sh\necho 'HYDRA build details:'\n")
    command = plan("--engine", "mpi", "-n", "2", "train.py").command
    assert command == [
        str(mpiexec), "-n", "2", str(clean / "python"), "-m", "mpi4py", launch.WORKER, "--mpi", "train.py"
    ]  # fmt: skip


def test_slurm_starts_one_torchrun_per_node(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(clean / "srun", "#!/bin/sh\n")
    executable(clean / "scontrol", "#!/bin/sh\nprintf 'node3\\nnode4\\n'\n")
    monkeypatch.setenv("PATH", f"{clean}:/bin:/usr/bin")
    with pytest.raises(SystemExit):
        plan("--engine", "slurm", "-n", "4", "train.py")
    settings = {"JOB_ID": "31007", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[3-4]", "CPUS_PER_TASK": "16"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    given = plan("--engine", "slurm", "-n", "4", "--max-restarts", "3", "train.py", "x")
    command = shlex.join(given.command)
    assert command.startswith(f"{clean}/srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 ")
    assert "--cpus-per-task 16" in command
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node3:16007 --rdzv-id 31007 --nproc-per-node 4" in command
    assert given.command[-5:] == ["--max-restarts", "3", launch.WORKER, "train.py", "x"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in given.environment


# ---- inside a rank


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return load(Path(launch.WORKER))


@pytest.mark.parametrize(("cores", "count"), [(8, 4), (8, 3), (5, 5), (2, 1)])
def test_shares_of_cores_are_disjoint_and_use_all(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch, cores: int, count: int
) -> None:
    given: list[set[int]] = []
    # Threads i and i + 4 belong to one core.
    monkeypatch.setattr(worker, "_place", lambda cpu: (0, cpu % 4, cpu))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: given.append(set(share)))
    for index in range(count):
        worker.pin(index, count)
    assert len(given) == count and set.union(*given) == set(range(cores))
    assert sum(map(len, given)) == cores
    if (cores, count) == (8, 4):
        assert given == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_too_few_cores_stay_shared(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: pytest.fail("pinned"))
    worker.pin(0, 4)
    worker.pin(0, 2, 2)


# ---- real jobs


@pytest.mark.integration
def test_runs_a_script_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "show.py").write_text(SHOW)
    words = ["-n", "2", "--pin", "scripts/show.py", "--lr", "0.1", "a b"]
    result = start(*words, directory=tmp_path, SHOW=str(tmp_path))
    assert result.returncode == 0, result.stderr
    ranks = shown(tmp_path)
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    for rank in ranks:
        assert rank["argv"] == ["--lr", "0.1", "a b"]
        assert rank["name"] == "__main__" and rank["path"] == str(tmp_path / "scripts")
        assert rank["MASTER_ADDR"] == "127.0.0.1" and rank["GLOO_SOCKET_IFNAME"] == "lo"
        assert rank["MALLOC_MMAP_MAX_"] == "0" and rank["OMP_NUM_THREADS"] is not None
        assert rank["syncbn"] and not rank["torch"]
    cores = [set(rank["cores"]) for rank in ranks]  # type: ignore[call-overload]
    if len(os.sched_getaffinity(0)) >= 2:
        assert not cores[0] & cores[1]


@pytest.mark.integration
def test_runs_a_module_and_a_failure_is_the_jobs_failure(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "show.py").write_text(SHOW)
    words = ["-n", "2", "-m", "package.show", "x"]
    result = start(*words, directory=tmp_path, SHOW=str(tmp_path), CODE="3", GLOO_SOCKET_IFNAME="eth7")
    assert result.returncode == 1  # torchrun's code for any failure of a rank
    note, line = result.stderr.splitlines()
    assert note.startswith("syncbn-launch: 2 ranks")
    assert re.fullmatch(
        r"syncbn-launch: rank [01] \(process \d+ on \S+\) ended with code 3.*\. What it said is above", line
    )
    for rank in shown(tmp_path):
        assert rank["argv"] == ["x"] and rank["name"] == "__main__" and rank["path"] == str(tmp_path)
        assert rank["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.mpi
@pytest.mark.integration
def test_the_same_script_runs_under_mpi(tmp_path: Path) -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    if not (Path(sys.executable).with_name("mpiexec").exists() or shutil.which("mpiexec")):
        pytest.skip("no mpiexec")
    (tmp_path / "show.py").write_text(SHOW)
    result = start("--engine", "mpi", "-n", "3", "show.py", "a b", directory=tmp_path, SHOW=str(tmp_path))
    assert result.returncode == 0, result.stderr
    ranks = shown(tmp_path)
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2"]
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["WORLD_SIZE"] == rank["LOCAL_WORLD_SIZE"] == "3" and rank["argv"] == ["a b"]
        assert rank["MASTER_ADDR"] == "127.0.0.1" and rank["OMP_NUM_THREADS"] is not None


@pytest.mark.integration
def test_slurm_two_nodes_acted_by_one_host(tmp_path: Path) -> None:
    """A stand-in for srun starts the command once per node."""
    body = 'while [ $# -gt 0 ]; do case $1 in *python*) break;; esac; shift; done\n"$@" & "$@" & wait %1 && wait %2\n'
    executable(tmp_path / "srun", f"#!/bin/sh\n{body}")
    (tmp_path / "show.py").write_text(SHOW)
    result = start(
        "--engine", "slurm", "-n", "1", "--local-addr", "127.0.0.1", "show.py", directory=tmp_path, SHOW=str(tmp_path),
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="127.0.0.1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in shown(tmp_path)] == [
        ("0", "0", "2"), ("1", "0", "2")
    ]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(tmp_path: Path, how: signal.Signals) -> None:
    code = "import os, pathlib, time\npathlib.Path('pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
    (tmp_path / "wait.py").write_text(code + "time.sleep(120)\n")
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen([*LAUNCHER, "-n", "2", "wait.py"], cwd=tmp_path, env=bare(), stdout=log, stderr=log)
    try:
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        await_(lambda: all(file.exists() and file.read_text() for file in files), 60)
        job.send_signal(how)
        assert job.wait(30) != 0
        for file in files:
            await_(lambda file=file: not alive(int(file.read_text())), 10)
    finally:
        job.kill()
        job.wait()


def await_(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


JOIN = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
Path(f"joined{dist.get_rank()}").touch()
time.sleep(120)
"""


def processes_of(pid: int) -> list[int]:
    """A process and all that it has started, and they."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(each for child in children for each in processes_of(child))]


def listening(pids: list[int]) -> list[str]:
    """The addresses at which processes take connections over TCP, as the kernel writes them."""
    links = {os.readlink(fd) for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "addresses"), [([], {"0100007F"}), (["--local-addr", "127.0.0.2"], {"0100007F", "0200007F"})]
)
def test_a_job_on_one_host_listens_on_loopback_only(tmp_path: Path, options: list[str], addresses: set[str]) -> None:
    (tmp_path / "join.py").write_text(JOIN)
    with running(*LAUNCHER, "-n", "2", *options, "join.py", cwd=tmp_path, env=bare()) as job:
        await_(lambda: all((tmp_path / f"joined{rank}").exists() for rank in range(2)), 60)
        pids = processes_of(job.pid)
        found = listening(pids)
    assert len(pids) >= 3 and len(found) >= 3  # the agent's store, and gloo in two ranks
    assert set(found) == addresses


# ---- the roll call


@pytest.mark.integration
def test_check_reports_every_rank_and_then_runs_the_job(tmp_path: Path) -> None:
    code = "import torch.distributed as dist\ndist.init_process_group('gloo')\ndist.barrier()\n"
    code += "dist.destroy_process_group()\nprint('job ran', flush=True)\n"
    (tmp_path / "job.py").write_text(code)
    result = start("--check", "-n", "2", "job.py", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"rank {rank}: host " in result.stdout
    assert "device cpu, backend gloo, python 3." in result.stdout
    assert "check passed: 2 ranks, one all_reduce of 513 float64 takes" in result.stdout
    assert result.stdout.count("job ran") == 2


# What is wrong with rank 1, done to it before its first line runs.
FAULTS = {
    "differs": ("import platform; platform.python_version = lambda: '3.99.0'", "python differs: "),
    "missing": ("import time; time.sleep(600)", "rank 1 of 2 did not join within 6 s"),
    "unreachable": ("os.environ['GLOO_SOCKET_IFNAME'] = 'nowhere0'", "rank 1: RuntimeError: "),
}


@pytest.mark.integration
@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_the_rank_that_differs_or_is_missing(tmp_path: Path, fault: str) -> None:
    code, says = FAULTS[fault]
    (tmp_path / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n    {code}\n")
    (tmp_path / "job.py").write_text("print('job ran', flush=True)\n")
    result = start(
        "--check", "-n", "2", "job.py", directory=tmp_path, PYTHONPATH=str(tmp_path), SYNCBN_CHECK_TIMEOUT="6"
    )
    assert result.returncode == 1
    line = next(line for line in result.stderr.splitlines() if "check failed" in line)
    assert says in line and "rank 1" in line
    assert "job ran" not in result.stdout
