"""Compile the GPU kernels ahead of time, without a GPU: what the compiler makes of each variant.

    python benchmarks/cubins.py                      # compute capability 9.0, 8.9 and 8.0
    python benchmarks/cubins.py --sass --csv cubins.csv

The kernels are called as the layer calls them, for a set of shapes, layouts and dtypes; what would be launched is
compiled to machine code by the assembler that Triton brings along. Printed: registers per thread, bytes of stack and of
local memory (to which registers are spilled), shared memory, and with --sass how many accesses to global memory of 16
bytes and of less the code has, its instructions in float64, and how often a program counts itself to find the last
one. Fails if a variant uses local memory, or if memory is not in order where programs count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.kernels import triton as kernels
from syncbn.memory import Running
from syncbn.messages import Message, Report, Shared
from syncbn.wire import HEAD, SLOTS

CALL = 16  # bytes of stack that a call of the float64 division may take
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LARGE = (64, 256, 56, 56)
SHAPES = [LARGE, (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7), (2, 64, 112, 112), (4096, 256), (64, 3, 5)]


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], int]]]:
    """Within it nothing is launched; what would have been is in the list."""
    launches: list[tuple[Any, tuple[Any, ...], int]] = []

    def record(
        layout: Any, like: torch.Tensor, kernel: Any, number: int, tensors: Any, numbers: Any, constants: Any,
        warps: int = 4,
    ) -> None:  # fmt: skip
        launches.append((kernel, (*tensors, *numbers, *constants), warps))

    original, kernels._launch = kernels._launch, record
    try:
        yield launches
    finally:
        kernels._launch = original


def step(
    shape: tuple[int, ...], dtype: torch.dtype, columns: bool, relu: bool, half: bool = False, gathered: bool = False
) -> None:
    """All launches of a training step of one layer, and those of the functions by themselves.

    ``gathered``: as where each rank's message is gathered, and not summed.
    """
    x, g, r = (torch.empty(shape, dtype=dtype, device="cpu") for _ in range(3))
    if columns:
        x, g, r = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g, r))
    channels = shape[1]
    residual = r if relu else None
    parameters = torch.float16 if half else torch.float32
    weight, bias = (None, None) if half and not relu else (torch.empty(channels, dtype=parameters) for _ in range(2))
    whole = torch.empty(SLOTS + 2 * channels + 1, dtype=torch.float64)
    given = (not gathered, 77, 3, torch.empty(HEAD, dtype=torch.float64) if gathered else None)
    message, backward = Message(whole, whole[SLOTS:], *given), Message(whole[:-1], whole[SLOTS:-1], *given)
    batches = torch.zeros((), dtype=torch.int64)
    running = Running(torch.empty(channels), torch.empty(channels), None if half else 0.1, batches)
    kernels.pack_moments(x, None, message)
    report = Report(torch.empty(8, dtype=torch.float64), 1, 2)
    shared = Shared(message.payload[None], not gathered, report)
    _, stats, _ = kernels.normalize_shared(x, None, shared, weight, bias, residual, relu, 1e-5, running)
    args = kernels.operands(g, x, None, stats, weight, bias, residual, relu)
    dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    kernels.pack_gradient_sums(args, backward, dtypes)
    kernels.shared_input_gradient(args, Shared(backward.payload[None], not gathered, report), relu)
    if gathered:
        return
    mean, invstd, count = stats[:channels], stats[channels:-1], stats[-1]
    kernels.moments(x)
    kernels.normalize(x, mean, invstd, weight, bias, residual, relu)
    kernels.gradient_sums(g, x, mean, invstd)
    kernels.input_gradient(g, x, mean, invstd, weight, backward.payload, count)
    if relu:
        kernels.relu_gradient(g, x, mean, invstd, weight, bias, residual)


class NoDevice:
    """Stands for the driver of a GPU of some architecture, for Triton to compile for what it would find."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def variants(quick: bool) -> Iterator[tuple[str, int, Any]]:
    """Every different kernel that the shapes lead to, compiled, with a description and its number of warps."""
    seen: set[str] = set()
    # (No memory is touched: these tensors are only looked at.)
    cases = [(shape, dtype, columns, relu, False, False)
             for shape in SHAPES for dtype in (torch.bfloat16, torch.float32)
             for columns in (False, True) for relu in (False, True) if len(shape) > 2 or not columns]  # fmt: skip
    cases += [((64, 48, 3, 5), torch.float16, columns, relu, True, gathered) for gathered in (False, True)
              for columns in (False, True) for relu in (False, True)]  # fmt: skip
    if quick:
        cases = [((64, 48, 3, 5), torch.float16, True, True, True, gathered) for gathered in (False, True)]
    shipped = kernels.SIZES
    for wide in (False,) if quick else (False, True):
        for shape, dtype, columns, relu, half, gathered in cases[:: 9 if wide else 1]:
            kernels.SIZES = shipped._replace(wide=0) if wide else shipped
            if quick and gathered:  # those that merge parts as well
                kernels.SIZES = shipped._replace(fold=0)
            with recorded() as launches:
                step(shape, dtype, columns, relu, half, gathered)
            kernels.SIZES = shipped
            for kernel, args, warps in launches:
                compiled = kernel.warmup(*args, grid=(1,), num_warps=warps, **kernels.OPTIONS)
                what = f"{kernel.__name__} {'x'.join(map(str, shape))} {'columns' if columns else 'rows'} {dtype}"
                what = what.replace("torch.", "") + "".join(
                    f" {name}" for name, is_so in (("relu", relu), ("wide", wide), ("gathered", gathered)) if is_so
                )
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    yield what, warps, compiled


def accesses(sass: str) -> tuple[int, int]:
    """Accesses to global memory in the machine code: those of 16 bytes, and narrower ones."""
    found = re.findall(r"\b(?:LDG|STG)(\.[\w.]+)", sass)
    wide = sum(".128" in name for name in found)
    return wide, len(found) - wide


def counts_in_order(sass: str) -> str:
    """How often a program counts itself, to find the last one, and whether memory is in order around it: "", "2", or
    what is wrong.

    All of its threads have stored (a barrier), what they stored is out (a fence), it counts, what lies in its cache is
    void, and all threads know (a barrier).
    """
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass)
    order = [name for name in names if name.startswith(("ATOM", "BAR.SYNC", "MEMBAR", "CCTL.IVALL", "LDG", "STG"))]
    places = [i for i, name in enumerate(order) if name.startswith("ATOM")]
    for i in places:
        around = [name.partition(".")[0] for name in order[i - 2 : i + 3]]
        if around != ["BAR", "MEMBAR", order[i].partition(".")[0], "CCTL", "BAR"] or ".GPU" not in order[i - 1]:
            return f"not in order: {' '.join(order[i - 2 : i + 3])}"
    return str(len(places)) if places else ""


def in_float64(sass: str) -> int:
    """Instructions in the machine code that compute in float64 or convert from and to it, of a thread, each counted
    once: what runs in few programs alone (the running statistics) is among them.
    """
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass)
    return sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w+64|.*F64", name)) for name in names)


def resources(text: str) -> dict[str, int]:
    """Registers per thread, and bytes of stack, local and shared memory, as the assembler recorded them."""
    usage = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)
    return {name: int(value) for name, value in usage}


def dump(cubin: bytes, *what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}  # (it starts the disassembler beside it)
        command = [BIN / "cuobjdump", *what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | path).stdout


def rows_of(arch: int, quick: bool, with_sass: bool) -> Iterator[dict[str, object]]:
    """What the compiler makes of each variant for one architecture, as it is made."""
    driver.set_active(NoDevice(arch))
    for what, warps, compiled in variants(quick):
        text = dump(compiled.asm["cubin"], "--dump-resource-usage", *(["--dump-sass"] if with_sass else []))
        usage = resources(text)
        row: dict[str, object] = {
            "kernel": what, "arch": arch, "warps": warps, "registers": usage["REG"], "stack": usage["STACK"],
            "local": usage.get("LOCAL", 0), "shared": compiled.metadata.shared,
        }  # fmt: skip
        if with_sass:
            row["16-byte accesses"], row["narrower"] = accesses(text)
            row["float64"] = in_float64(text)
            row["counted"] = counts_in_order(text)
        yield row


def compile_apart(arch: int, options: list[str]) -> list[dict[str, object]]:
    """``rows_of`` in a process of its own, which shows them; it ends without taking the compiler down, which may fail
    after some hundred kernels (a segmentation fault, seen with Triton 3.9).
    """
    with tempfile.NamedTemporaryFile("r") as file:
        command = [sys.executable, __file__, "--arch", str(arch), "--rows", file.name, *options]
        subprocess.run(command, check=True)
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the GPU kernels without a GPU")
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 89, 80])
    parser.add_argument("--sass", action="store_true", help="count accesses in the machine code")
    parser.add_argument("--quick", action="store_true", help="one small layer only")
    parser.add_argument("--csv", default="", help="name of a file to write, in $BENCHMARKS_OUT or out/benchmarks")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        with open(args.rows, "w") as file:
            for row in rows_of(args.arch[0], args.quick, args.sass):
                file.write(json.dumps(row) + "\n")
                text = (f"{key} {value}" if key != "kernel" else f"{value:<70}" for key, value in row.items())
                print("  ".join(text), flush=True)
        os._exit(0)
    options = [name for name, chosen in (("--sass", args.sass), ("--quick", args.quick)) if chosen]
    rows = [row for arch in args.arch for row in compile_apart(arch, options)]
    spilled = [row for row in rows if int(str(row["stack"])) > CALL or row["local"]]
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(spilled)} with local memory")
    if args.csv:
        print(f"written: {timing.write_csv(args.csv, [row | {'triton': triton.__version__} for row in rows])}")
    if spilled:
        raise SystemExit(f"local memory is used: {spilled}")
    racing = [row for row in rows if str(row.get("counted", "")).startswith("not")]
    if racing:
        raise SystemExit(f"programs may not see what others wrote: {racing}")


if __name__ == "__main__":
    main()
