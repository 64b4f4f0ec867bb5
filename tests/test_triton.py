"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled to machine code that nobody runs here.

Triton decides when it is imported whether its functions are interpreted, so these tests have processes of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from helpers.commands import ROOT, environment, load, must, run

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(300)  # interpreters are slow, and the machine may be busy


def python(*arguments: str, interpret: bool) -> str:
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return must(run(sys.executable, *arguments, deadline=280.0, env=variables))


def version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4), reason="this interpreter needs a numpy below 2.4"
)
@pytest.mark.parametrize("what", ["kernels", "layer"])
def test_in_the_interpreter(what: str) -> None:
    """All tests of programs/device: each function against the reference, and the layer against the oracle."""
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/programs/device/{what}.py", interpret=True)
    assert " passed" in said and "skipped" not in said


def test_launches_without_the_search_for_kernels() -> None:
    """All tests of programs/device/launches.py: compiled, and launched on a driver that only takes notes."""
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/programs/device/launches.py", interpret=False)
    assert " passed" in said and "skipped" not in said


def test_the_benchmark_of_host_time() -> None:
    said = python("benchmarks/host.py", "--rounds", "1", "--calls", "3", interpret=False)
    assert "layer               everything" in said and "now both us" in said


def test_the_benchmark_without_a_gpu() -> None:
    """Results checked and launches counted, end to end, on tiny shapes; nothing is timed."""
    options = "--interpret", "--layouts", "NHWC", "--dtypes", "float32"
    said = python("benchmarks/gpu.py", *options, interpret=False)
    assert "layer 4x20x9x7 NHWC float32 both" in said and "syncbn kernels 6" in said and "nothing was timed" in said
    for part in (
        "host 4x",
        "spin 4x",
        "exchange 256",
        "exchange 4x",
        "step 2x3x16x16",
        "kernel 4x",
        "chain 4x",
        "compiled 4x",
    ):
        assert part in said
    assert " us" not in said


def test_rows_are_written_as_they_come_errors_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And nothing new is begun when the time is over: a run that is cut off leaves what it has measured."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = load(ROOT / "benchmarks" / "gpu.py")
    monkeypatch.setattr(sys.modules["timing"], "OUT", tmp_path)
    table, written = gpu.Table("gpu.csv", "a GPU"), tmp_path / "gpu.csv"

    def second() -> Any:
        assert "layer,1x2,,,,,a GPU," in written.read_text() and "syncbn eager us,1.5" in written.read_text()
        raise RuntimeError("out\nof memory")

    todo = [
        ("first", lambda: [{"part": "layer", "shape": "1x2", "syncbn eager us": 1.5}]),
        ("second", second),
        ("third", lambda: [{"part": "spin", "count": 3}]),
        ("fourth", lambda: 1 / 0),
    ]
    turns = iter([False, False, False, True])
    assert gpu.work_off(iter(todo), table, lambda: next(turns), True) == ["fourth"]
    assert (table.count, table.failed) == (3, 1)
    assert "RuntimeError: out of memory" in written.read_text() and "count,3" in written.read_text()
    table.close()
    with pytest.raises(RuntimeError, match="memory"):
        gpu.work_off(iter(todo[1:2]), table, lambda: False, False)


def test_what_matters_most_is_measured_first() -> None:
    said = python(
        "-c",
        "import sys, argparse; sys.path.insert(0, 'benchmarks'); import gpu\n"
        "args = argparse.Namespace(batches=[32, 8], dtypes=['bfloat16', 'float32'], layouts=['NHWC', 'NCHW'], rounds=1,"
        " parts=gpu.PARTS)\n"
        "print(*(what for what, _ in gpu.tasks(args, gpu.STAGES, 'cuda')), sep='\\n')",
        interpret=False,
    )
    order = said.splitlines()
    assert order[0] == "layer (32, 64, 112, 112) NHWC bfloat16"
    first_setting = order[: order.index("layer (32, 64, 112, 112) NCHW bfloat16")]
    for part in ("host", "spin", "exchange", "step", "kernel", "chain", "compiled"):
        assert any(line.startswith(part) for line in first_setting), part
    assert not any(line.startswith(("host", "spin", "step")) for line in order[len(first_setting) :])


def test_every_kernel_compiles() -> None:
    """To machine code, which finds errors of types that the interpreter does not; nothing spills.

    Float64 is computed once for each channel, and not by all threads for all their channels, which took up to 339
    instructions: most devices are slow at it. Programs that merge the parts of others see what these wrote.
    """
    said = python("benchmarks/cubins.py", "--quick", "--arch", "89", "--sass", interpret=False)
    counts: dict[str, int] = {}
    for line in said.splitlines():
        if "  float64 " in line:
            name, count = line.split()[0], int(line.split("  float64 ")[1].split()[0])
            counts[name] = max(counts.get(name, 0), 0 if "gathered" in line else count)
    assert counts.keys() == {
        "measure", "finish_moments", "normalize", "sum_gradients", "finish_gradients", "input_gradient",
    }  # fmt: skip
    assert counts["normalize"] <= 70 and counts["input_gradient"] <= 24
    assert said.count("gathered") >= 5 and "0 with local memory" in said
    assert "counted 2" in said and said.count("counted 1") >= 1  # `measure` and `sum_gradients`
