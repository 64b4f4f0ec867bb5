"""``python -m syncbn``: the doctor finds what works and what does not, in time, and leaves no process behind."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.commands import ROOT, run
from syncbn import _recipes, kernels, launch
from syncbn.__main__ import main
from syncbn._doctor import examination, looking, matrix, processes, trial


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for the doctor's files, by which its processes are known; an environment that changes nothing."""
    for name in [name for name in os.environ if name.startswith(looking.VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(looking, "accelerators_possible", lambda: False)
    return tmp_path


def left_behind(folder: Path) -> list[str]:
    """Processes that have the folder in their command line; those that have just been ended get a second."""
    found: list[str] = []
    for _ in range(20):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
        if not found:
            break
        time.sleep(0.05)
    return found


def problem(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one problem that the doctor finds, from its JSON."""
    assert main(["doctor", "--no-mpi", "--json", *words]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is False
    assert [test["works"] for test in report["tests"]] == [False]
    (line,) = report["problems"]
    assert "\n" not in line and "Traceback" not in line
    return line


def test_doctor_passes(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[examination.Doctor] = []
    create = examination.Doctor.__init__

    def remember(doctor: examination.Doctor, *args: Any) -> None:
        create(doctor, *args)
        made.append(doctor)

    monkeypatch.setattr(examination.Doctor, "__init__", remember)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--no-mpi"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = dict(line.split(maxsplit=1) for line in output.out.splitlines() if not line.startswith("test "))
    assert lines["result"] == "works"
    assert "test gloo    ok: 2 ranks; forward and backward off by" in output.out
    assert "gloo" in lines["backends"].split(";")[0]
    assert lines["tested"] == matrix.about(torch.__version__, platform.python_version())
    assert str(ROOT / "syncbn") in lines["system"] and sys.executable in lines["system"]
    report = json.loads(json.dumps(made[0].report))
    assert report["works"] is True and report["problems"] == []
    assert report["versions"]["torch"] in lines["versions"]
    (test,) = report["tests"]
    assert test["works"] and test["ranks"] == 2 and 0 < test["latency_us"] < 1e6
    # Not zero: rounding differs between two ranks and one process, so the numbers come from a real comparison.
    assert all(0 < test["errors"][name] <= bound for name, bound in trial.TOLERANCE.items())
    assert test["way"] == "sockets to 1 of 1 peers"
    assert lines["settings"].startswith("SYNCBN_CHECKS=on, SYNCBN_KERNELS=native, SYNCBN_SOCKETS=on")
    own = report["devices"]["cpu"]
    assert own["kernels"] == kernels.name_of(kernels.choose(torch.zeros(1, 1), None, direct=False))
    assert f"{own['kernels']} on CPUs ({own['instructions'] or own['why']})" in report["kernels"] == lines["kernels"]
    assert not left_behind(alone) and not list(alone.glob("syncbn-doctor-*"))


def test_doctor_says_what_is_switched_off(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"SYNCBN_SOCKETS": "off", "SYNCBN_KERNELS": "aten", "SYNCBN_CHECKS": ""}.items():
        monkeypatch.setenv(name, text)
    assert main(["doctor", "--no-mpi", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"] | {"environment": None} == {
        "checks": "on", "kernels": "aten", "sockets": "off", "gather": "0", "pin": "", "environment": None
    }  # fmt: skip
    assert report["settings"]["environment"]["SYNCBN_SOCKETS"] == "off"
    assert report["kernels"].startswith("ATen on CPUs (SYNCBN_KERNELS=aten)")
    assert report["tests"][0]["way"] == "gloo to 1 of 1 peers"


def test_values_that_there_are_not_are_lines_and_the_rest_is_looked_at(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHECKS", "KERNELS", "SOCKETS", "GATHER", "PIN"):
        monkeypatch.setenv(f"SYNCBN_{name}", "nonsense")
    assert main(["doctor", "--no-mpi", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [line.partition(", got 'nonsense'")[0] for line in report["problems"]] == [
        "settings: the environment variable SYNCBN_CHECKS must be on, off or sync",
        "settings: the environment variable SYNCBN_KERNELS must be native or aten",
        "settings: the environment variable SYNCBN_SOCKETS must be on or off",
        "settings: the environment variable SYNCBN_GATHER must be a number of ranks, 0 or more",
        "settings: SYNCBN_PIN must be a number of cores per rank (0: do not pin)",
    ]
    assert [test["works"] for test in report["tests"]] == [True]


@pytest.mark.mpi
def test_doctor_tries_mpi(alone: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: the extra [mpi]")
    if not Path(sys.executable).with_name("mpiexec").exists() and shutil.which("mpiexec") is None:
        pytest.skip("no mpiexec in PATH or beside this Python: the extra [mpi]")
    said: list[tuple[str, str]] = []
    doctor = examination.Doctor(60.0, True, lambda part, line: said.append((part, line)))
    found = doctor._look_for_mpi(alone)
    assert Path(found["mpiexec"]).name.startswith("mpiexec") and found["library"]
    doctor._try("mpi4py", 2, alone)
    assert doctor.report["problems"] == []
    assert said[-1][0] == "test mpi4py" and said[-1][1].startswith("ok: 2 ranks")


def test_a_wrong_interface_is_one_line(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    line = problem(capsys)
    assert line.startswith("test gloo: rank ") and "nonsense" in line
    assert not left_behind(alone)


def break_rank_1(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Run a line of Python in rank 1 of a trial, as it starts."""
    (folder / "sitecustomize.py").write_text(
        f"import os, sys\nif os.environ.get('RANK') == '1' and '_worker' in str(sys.orig_argv): {how}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setattr(processes, "GRACE", 0.2)


def test_a_killed_rank_is_one_line(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rank_1(alone, monkeypatch, "os.kill(os.getpid(), 9)")
    assert problem(capsys) == "test gloo: killed by SIGKILL: it said nothing"
    assert not left_behind(alone)


def test_verbose_has_the_details(
    alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rank_1(alone, monkeypatch, "print('a hint', file=sys.stderr, flush=True); os._exit(3)")
    assert main(["doctor", "--no-mpi", "--verbose"]) == 1
    output = capsys.readouterr()
    assert "test gloo    FAILED: a hint\n" in output.out and output.out.endswith("result       1 problem\n")
    assert output.err.splitlines() == ["---- test gloo", "a hint"]


def test_a_hung_mpiexec_is_a_problem_and_an_absent_one_is_not(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(launcher: str, mpi: bool | None, timeout: float = 60.0) -> dict[str, Any]:
        doctor = examination.Doctor(timeout, mpi, lambda part, line: None)
        monkeypatch.setattr(examination, "_ASK_MPI", "print('A library\\nof MPI')")
        monkeypatch.setattr(examination, "_launcher", lambda engine, ranks: [sys.executable, "-c", launcher])
        return doctor._look_for_mpi(Path(tempfile.mkdtemp()))

    monkeypatch.setattr(examination.importlib.util, "find_spec", lambda name: object())
    refuses = "import sys; print('syncbn-launch: error: no mpiexec', file=sys.stderr); sys.exit(2)"
    assert look(refuses, None) == {"library": "A library", "note": "not tried: no mpiexec"}
    with pytest.raises(processes.Failure, match="no mpiexec"):
        look(refuses, True)
    assert look("print('A=1 /b/mpiexec -n 2')", None)["mpiexec"] == "/b/mpiexec"
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with pytest.raises(processes.Failure, match=r"not done within the 0\.5 s"):
        look("import time; time.sleep(60)", None, timeout=0.5)
    assert not left_behind(alone)


@pytest.mark.nccl
@pytest.mark.skipif(not torch.cuda.is_available() or not dist.is_nccl_available(), reason="no CUDA device with NCCL")
def test_doctor_tries_nccl(tmp_path: Path) -> None:
    doctor = examination.Doctor(90.0, False, lambda part, line: None)
    (device, *_) = doctor._accelerators(tmp_path)["accelerators"]
    assert device["name"] == torch.cuda.get_device_name(0)
    doctor._try("nccl", 1, tmp_path)
    assert doctor.report["problems"] == [], doctor.details


def test_the_deadline_is_kept(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert problem(capsys, "--timeout", "0.3") == "test gloo: not done within the 0.3 s of --timeout"
    assert time.monotonic() - started < 10
    assert not left_behind(alone)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_its_ranks(
    alone: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: signal.Signals, code: int
) -> None:
    wait = processes.Processes.run

    def wait_and_be_ended(own: processes.Processes, job: list[Any], folder: Path) -> None:
        assert [process.poll() for process in job] == [None, None]
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        wait(own, job, folder)

    monkeypatch.setattr(processes.Processes, "run", wait_and_be_ended)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # (ignored in a shell's background)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--no-mpi"])
        assert ended.value.code == code
    else:
        assert main(["doctor", "--no-mpi"]) == code
    assert not left_behind(alone) and not list(alone.glob("syncbn-doctor-*"))


def test_ranks_that_are_off_are_a_failure() -> None:
    good = {"errors": {"float64": 1e-15, "float32": 1e-7}, "statistics": [1.0], "latency_us": 5.0, "way": "a"}
    assert trial.judge([good, good]) == {"errors": good["errors"], "latency_us": 5.0, "way": "a"}
    assert trial.judge([good, good | {"way": "b"}])["way"] == "a from rank 0; b from rank 1"
    with pytest.raises(processes.Failure, match=r"in float32 is off by 1.0e-02"):
        trial.judge([good, good | {"errors": {"float64": 1e-15, "float32": 1e-2}}])
    with pytest.raises(processes.Failure, match="running statistics of the ranks are not equal"):
        trial.judge([good, good | {"statistics": [1.0 + 1e-16, 2.0]}])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nonsense"], "invalid choice"),
        (["doctor", "nonsense"], "unrecognized arguments: nonsense"),
        (["doctor", "--timeout", "0"], "positive number of seconds, got 0"),
        (["doctor", "--timeout", "soon"], "positive number of seconds, got soon"),
        (["version", "--json"], "unrecognized arguments"),
        (["launch"], "no script"),
    ],
)
def test_wrong_arguments_exit_with_2(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_launch_is_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "-n", "2", "--max-restarts", "1", str(Path(__file__)), "--json"]
    said = []
    for call in (lambda: main(["launch", *words]), lambda: launch.main(words)):
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1] and launch.AGENT in said[0].out


def test_the_matrix_says_what_was_tested() -> None:
    entry = matrix.ENTRIES[1]
    said = matrix.about(f"{entry.torch}.0+cpu", f"{entry.python}.7")
    assert said == f"torch {entry.torch} with Python {entry.python}: {entry.passed} passed on {entry.date}"
    assert matrix.about("2.13.1", "3.99.0") == (
        "torch 2.13 with Python 3.99 was not tested; that torch was tested with Python 3.11"
    )
    assert matrix.about("9.9", "3.11.0").startswith(
        "torch 9.9 with Python 3.11 was not tested; tested: torch 2.11, 2.12, 2.13"
    )


def test_the_readme_has_the_matrix() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (2\.\d+)\.\d+ \| (3\.\d+) \| (.+?) \| (\d{4}-\d\d-\d\d) \|$", readme, flags=re.MULTILINE)
    assert [matrix.Entry(*row) for row in rows] == list(matrix.ENTRIES)


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"], ["launch", "--help"]])
def test_help_names_the_environment_variables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every one that the code reads: the layers' and the launcher's, each where it belongs."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    found = set(re.findall(r"\bSYNCBN_[A-Z_]+", capsys.readouterr().out))
    launcher = {"SYNCBN_PIN", "SYNCBN_CHECK_TIMEOUT"}
    assert found == (launcher if words[0] == "launch" else set(looking.CHOICES))
    sources = [path.read_text() for path in (ROOT / "syncbn").rglob("*.py")]
    inside = {"SYNCBN_THREADS"}  # from the launcher to its workers
    assert {name for text in sources for name in re.findall(r"\bSYNCBN_[A-Z_]+\b", text)} - inside == (
        launcher | set(looking.CHOICES)
    )


def test_recipes_are_shown_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'launch'}\n"
    assert main(["recipes", str(tmp_path / "own")]) == 0
    names = {path.name for path in (ROOT / "launch").iterdir()}
    assert {path.name for path in (tmp_path / "own").iterdir()} == names
    assert os.access(tmp_path / "own" / "torchrun.sh", os.X_OK)
    assert main(["recipes", str(tmp_path / "own")]) == 2  # there already
    monkeypatch.setattr(_recipes, "CHECKOUT", tmp_path / "no")
    monkeypatch.setattr(_recipes, "INSTALLED", tmp_path / "own")
    capsys.readouterr()
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'own'}\n"
    shutil.rmtree(tmp_path / "own")
    assert main(["recipes"]) == 2
    assert re.fullmatch(r"syncbn recipes: error: no recipes in .*\n", capsys.readouterr().err)


def test_help_and_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(sys.executable, "-m", "syncbn", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert all(command in done.stdout for command in ("doctor", "launch", "recipes", "version"))
    assert done.stdout.startswith("usage: syncbn ")
    assert main(["version"]) == 0
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == shown and shown.startswith("syncbn ")
