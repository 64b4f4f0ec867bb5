"""The layer and its kernels on one GPU, against PyTorch's layers and against a copy of the same bytes.

    python benchmarks/gpu.py                     # what matters most first, for 400 seconds
    python benchmarks/gpu.py --budget 1500 --batches 32 --dtypes bfloat16 --parts layer step
    torchrun --nproc-per-node 8 benchmarks/gpu.py --parts exchange step        # the two that several ranks make real
    python benchmarks/gpu.py --interpret         # no GPU: tiny shapes in Triton's interpreter, results and launches

A group over NCCL, of one rank unless torchrun starts more. Compared are

* ``nn.BatchNorm2d`` (cuDNN or PyTorch's own kernels), which synchronizes nothing;
* the autograd function of ``nn.SyncBatchNorm``, applied directly, so that its synchronized path runs on one rank;
* ``syncbn.SyncBatchNorm`` within ``comm.forced()``, which runs ours: it is asserted that our kernels and one
  collective each way ran, by what was launched.

The parts: ``layer``, and ``chain`` with a residual and a rectifier; ``host``, the time until a call has returned, which
no device is waited for in; ``spin``, the layer with a kernel that keeps the device busy for 10, 20 and 30 us in place
of each sum, which is what the latency of a sum over many GPUs costs; ``exchange``, an all-reduce of float64 sums beside
an all-gather of the same, and the layer over each; ``step``, a ResNet-50's forward and backward in
DistributedDataParallel, with the layers on its group or on one of their own; ``kernel``, each function; ``compiled``,
the layer under torch.compile.

Everything is compared with float64 first. Times are medians of CUDA events, eager and as a CUDA graph, all on one
stream, on which autograd's nodes then run as well. The inputs rotate through more memory than the L2 cache holds.
Launches and host synchronizations are counted by the profiler. Rows are written as they come; one that fails says why,
and the next one follows. ``on_gpu`` has the parts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

if "--interpret" in sys.argv:  # Triton looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from on_gpu import one_layer, ranks
from on_gpu.cases import DTYPES, LAYOUTS, Case, Rows
from on_gpu.table import Table, work_off

from syncbn import comm, kernels
from syncbn.comm.all_reduce import AllReduceOnDevice

STAGES = [(64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
PARTS = ("layer", "host", "spin", "exchange", "step", "kernel", "chain", "compiled")
ONCE = ("host", "spin", "exchange", "step", "compiled")  # in the first setting alone


def tasks(args: argparse.Namespace, stages: Sequence[tuple[int, ...]], device: str) -> Iterator[tuple[str, Any]]:
    """What is measured, in the order of its worth: a name and a function that makes rows."""
    settings = list(itertools.product(args.batches, args.dtypes, args.layouts))
    settings.sort(
        key=lambda s: args.batches.index(s[0]) + 2 * args.dtypes.index(s[1]) + args.layouts.index(s[2])
    )  # stable
    for place, (batch, dtype_name, layout) in enumerate(settings):
        dtype = DTYPES[dtype_name]
        for part in PARTS:
            if part not in args.parts or (place and part in ONCE):
                continue
            if part == "exchange":
                yield "exchange", partial(ranks.measure_exchanges, args.rounds, device)
            elif part == "step":
                yield "step", partial(ranks.measure_step, batch, dtype, layout, args.rounds, device)
            else:
                for stage in stages[1:3] if part in ONCE and len(stages) > 2 else stages:
                    yield (
                        f"{part} {(batch, *stage)} {layout} {dtype_name}",
                        partial(_of_case, part, (batch, *stage), dtype, layout, args.rounds, device),
                    )


def _of_case(part: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, rounds: int, device: str) -> Rows:
    case = Case(shape, dtype, LAYOUTS[layout], device)
    if part in ("layer", "chain"):
        return one_layer.measure_layers(case, layout, part == "chain", rounds, device)
    measure = {
        "kernel": one_layer.measure_kernels,
        "host": one_layer.measure_host,
        "spin": one_layer.measure_spins,
        "compiled": one_layer.measure_compiled,
    }[part]
    return measure(case, layout, rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description="syncbn.SyncBatchNorm on a GPU")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU; no times")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing new is begun")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 2, 128], help="the most important first")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=["NHWC", "NCHW"])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--csv", default="gpu.csv", help="name of the file in $BENCHMARKS_OUT or out/benchmarks; empty for none"
    )
    args = parser.parse_args()
    ends = time.monotonic() + args.budget
    device = "cpu" if args.interpret else "cuda"
    if not args.interpret and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --interpret checks results and launches without one")
    if "WORLD_SIZE" in os.environ and not args.interpret:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    else:
        dist.init_process_group("gloo" if args.interpret else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    stages = STAGES if not args.interpret else [(20, 9, 7)]
    if args.interpret:
        from syncbn.kernels import triton

        args.batches = [4]
        kernels._interpreted = True
        triton.SIZES = triton.SIZES._replace(whole=0, fold=0)
        torch.autograd.set_multithreading_enabled(False)
        cpu = torch.device("cpu")  # with the link of a device
        comm._links[dist.group.WORLD] = {cpu: AllReduceOnDevice(dist.group.WORLD, cpu)}
    else:
        torch.cuda.set_stream(torch.cuda.Stream())
    first = dist.get_rank() == 0
    name = args.csv if first and not args.interpret else ""
    table = Table(name, "cpu" if args.interpret else torch.cuda.get_device_name())

    def is_late() -> bool:
        # Ranks that measured different things would wait for each other: the first one's clock counts for all.
        late = torch.tensor([time.monotonic() > ends], dtype=torch.int32, device=device)
        dist.broadcast(late, 0)
        return bool(late)

    # (where several ranks are, the others may wait in the middle of what failed)
    keeps = not args.interpret and dist.get_world_size() == 1
    with comm.forced():
        left_out = work_off(tasks(args, stages, device), table if first else None, is_late, keeps)
    if left_out:
        print(f"no time was left for {len(left_out)} of the rest: {', '.join(left_out)}")
    if args.interpret:
        print(f"{table.count} rows: results agree with float64, and our kernels ran; nothing was timed")
    elif table.file is not None:
        print(f"written: {table.file.name}, {table.count} rows, {table.failed} failed")
    table.close()
    dist.destroy_process_group()
    if table.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
