"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled to machine code that nobody runs here.

Triton decides when it is imported whether its functions are interpreted, so these tests have processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

pytest.importorskip("triton")


def run(*command: str, interpret: bool, timeout: float = 110) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_INTERPRET": "1"} if interpret else {}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{variables.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("what", ["kernels", "layer"])
def test_in_the_interpreter(what: str) -> None:
    """All tests of tests/interpreted: each function against the reference, and the layer against the oracle."""
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted/{what}.py", interpret=True)
    assert " passed" in said and "skipped" not in said


def test_every_kernel_compiles() -> None:
    """To machine code of Hopper, which finds errors of types that the interpreter does not; nothing spills."""
    said = run("benchmarks/cubins.py", "--quick", "--arch", "90", interpret=False)
    for name in (
        "measure", "finish_moments", "normalize", "sum_gradients", "finish_gradients", "input_gradient",
    ):  # fmt: skip
        assert f"{name} " in said
    assert "0 with local memory" in said
