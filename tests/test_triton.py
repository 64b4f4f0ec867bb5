"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled to machine code that nobody runs here.

Triton decides when it is imported whether its functions are interpreted, so these tests have processes of their own.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import pytest

from helpers.commands import environment, must, run

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
    assert "layer 4x20x9x9 NHWC float32 both" in said and "syncbn kernels 6" in said and "nothing was timed" in said
    for part in ("host 4x", "spin 4x", "exchange 256", "step 2x3x32x32", "kernel 4x", "chain 4x", "compiled 4x"):
        assert part in said
    assert " us" not in said


def test_every_kernel_compiles() -> None:
    """To machine code of Hopper, which finds errors of types that the interpreter does not; nothing spills."""
    said = python("benchmarks/cubins.py", "--quick", "--arch", "90", interpret=False)
    for name in (
        "measure", "finish_moments", "normalize", "sum_gradients", "finish_gradients", "input_gradient",
    ):  # fmt: skip
        assert f"{name} " in said
    assert "0 with local memory" in said


def test_float64_is_computed_once_for_each_channel() -> None:
    """And not by all threads for all their channels, which took up to 339 instructions: most devices are slow at it."""
    said = python("benchmarks/cubins.py", "--quick", "--arch", "89", "--sass", interpret=False)
    counts: dict[str, int] = {}
    for line in said.splitlines():
        if "  float64 " in line:
            counts[line.split()[0]] = max(counts.get(line.split()[0], 0), int(line.split("  float64 ")[1]))
    assert counts["measure"] <= 80 and counts["normalize"] <= 110 and counts["input_gradient"] <= 40
