"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled to machine code that nobody runs here.

Triton decides when it is imported whether its functions are interpreted, so these tests have processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(300)  # interpreters are slow, and the machine may be busy


def run(*command: str, interpret: bool, timeout: float = 280) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_INTERPRET": "1"} if interpret else {}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{variables.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4), reason="this interpreter needs a numpy below 2.4"
)
@pytest.mark.parametrize("what", ["kernels", "layer"])
def test_in_the_interpreter(what: str) -> None:
    """All tests of programs/device: each function against the reference, and the layer against the oracle."""
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/programs/device/{what}.py", interpret=True)
    assert " passed" in said and "skipped" not in said


def test_the_benchmark_without_a_gpu() -> None:
    """Results checked and launches counted, end to end, on tiny shapes; nothing is timed."""
    options = "--interpret", "--layouts", "NHWC", "--dtypes", "float32"
    said = run("benchmarks/gpu.py", *options, interpret=False)
    assert "layer 4x20x9x9 NHWC float32 both" in said and "syncbn kernels 6" in said and "nothing was timed" in said
    assert " us" not in said


def test_every_kernel_compiles() -> None:
    """To machine code of Hopper, which finds errors of types that the interpreter does not; nothing spills."""
    said = run("benchmarks/cubins.py", "--quick", "--arch", "90", interpret=False)
    for name in (
        "measure", "finish_moments", "normalize", "sum_gradients", "finish_gradients", "input_gradient",
    ):  # fmt: skip
        assert f"{name} " in said
    assert "0 with local memory" in said
