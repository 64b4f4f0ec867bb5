"""What several ranks make real: a message to all of them, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from on_gpu.cases import LAYOUTS, Case, Rows, TorchSync, head, layers
from on_gpu.clocks import eager_time, graph_time, host_time
from on_gpu.one_layer import number
from syncbn import comm
from syncbn.comm import Link
from syncbn.comm.all_gather import AllGatherOnDevice
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.wire import HEAD, summed_length


def measure_exchanges(rounds: int, device: str) -> Rows:
    """One message to all ranks: as a sum of float64, and as all ranks' float64, whose result grows with the ranks."""
    rows: Rows = []
    ranks = dist.get_world_size()
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    options = dist.AllreduceOptions()
    options.asyncOp = device == "cpu"
    for channels in (64, 256, 2048):
        width = 2 * channels + 1
        summed = torch.ones(summed_length(width), dtype=torch.float64, device=device)
        own = torch.ones(HEAD + len(summed), dtype=torch.float64, device=device)
        gathered = torch.zeros(ranks * len(own), dtype=torch.float64, device=device)

        def reduce(i: int, message: Tensor = summed) -> None:
            work = dist.group.WORLD.allreduce([message], options)
            if work is not None:
                work.wait()

        def gather(i: int, own: Tensor = own, gathered: Tensor = gathered) -> None:
            all_gather(gathered, own)

        for what, run in (("all-reduce", reduce), ("all-gather", gather)):
            row: dict[str, object] = {"part": "exchange", "shape": f"{channels} channels", "what": what, "ranks": ranks}
            run(0)
            if device != "cpu":
                row["syncbn eager us"] = eager_time(run, 1, rounds) * 1e6
                row["syncbn graph us"] = graph_time(run, 1, rounds) * 1e6
                row["syncbn host us"] = host_time(run, 1, rounds) * 1e6
            rows.append(row)
        assert bool((gathered == 1).all())
    return rows + [_over(link, rounds, device) for link in (AllReduceOnDevice, AllGatherOnDevice)]


def _over(link: Callable[..., Link], rounds: int, device: str) -> dict[str, object]:
    """Forward and backward of a layer over a link."""
    small = device == "cpu"
    shape, dtype = ((4, 20, 3, 3), torch.float32) if small else ((8, 256, 28, 28), torch.bfloat16)
    case = Case(shape, dtype, torch.channels_last, device)
    kept, by = comm._links.get(dist.group.WORLD), case.xs[0].device
    comm._links[dist.group.WORLD] = {by: link(dist.group.WORLD, by)}
    try:
        side = layers(shape[1], device, False, False)["syncbn"]
        if dist.get_world_size() == 1:
            case.check(side)
        run = case.runs(side)["both"]
        run(0)
        row = head("exchange", case, "NHWC", f"layer over {link.__name__}") | {"ranks": dist.get_world_size()}
        if not small:
            row["syncbn eager us"] = eager_time(run, case.copies, rounds) * 1e6
            row["syncbn graph us"] = graph_time(run, case.copies, rounds) * 1e6
            row["syncbn host us"] = host_time(run, case.copies, rounds) * 1e6
        comm._links[dist.group.WORLD][by].settle()
    finally:
        if kept is None:
            del comm._links[dist.group.WORLD]
        else:
            comm._links[dist.group.WORLD] = kept
    return row


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with a batch norm, and what goes around them."""

    def __init__(self, inputs: int, width: int, stride: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), make(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), make(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), make(outputs),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), make(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet(make: Callable[[int], nn.Module], width: int, blocks: Sequence[int], classes: int = 1000) -> nn.Module:
    """The residual network of bottlenecks (He et al., 2016); 64 and (3, 4, 6, 3) make a ResNet-50, of 53 norms."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), make(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1, make))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def measure_step(batch: int, dtype: torch.dtype, layout: str, rounds: int, device: str) -> Rows:
    """Forward and backward of a ResNet-50 under autocast, in DistributedDataParallel, with each sort of layers."""
    small = device == "cpu"
    shape = (2, 3, 16, 16) if small else (batch, 3, 224, 224)
    given = (4, (1, 1)) if small else (64, (3, 4, 6, 3))
    own = dist.new_group(list(range(dist.get_world_size())), **_in_a_hurry(device))
    makes: dict[str, Callable[[int], nn.Module]] = {
        "BatchNorm2d": nn.BatchNorm2d,
        "syncbn": syncbn.SyncBatchNorm,
        "syncbn own group": partial(syncbn.SyncBatchNorm, process_group=own),
    }
    if small:  # with the link of a device
        comm._links[own] = {torch.device("cpu"): AllReduceOnDevice(own, torch.device("cpu"))}
    else:
        makes["SyncBatchNorm"] = TorchSync
    x = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])
    row: dict[str, object] = {
        "part": "step", "shape": "x".join(map(str, shape)), "layout": layout,
        "dtype": str(dtype).removeprefix("torch."), "what": "both", "ranks": dist.get_world_size(),
    }  # fmt: skip
    for name, make in makes.items():
        torch.manual_seed(0)
        model = resnet(make, *given, classes=10 if small else 1000).to(device, memory_format=LAYOUTS[layout])
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

        def step(i: int, model: nn.Module = model) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=dtype is not torch.float32):
                loss = model(x).float().square().mean()
            loss.backward()

        step(0)
        if not small:
            row[f"{name} eager us"] = eager_time(step, 1, rounds) * 1e6
            row[f"{name} host us"] = host_time(step, 1, 5) * 1e6
        del model
    if not small:
        for name in makes:
            row[f"{name} over BatchNorm2d"] = number(row, f"{name} eager us") / number(row, "BatchNorm2d eager us")
    return [row]


def _in_a_hurry(device: str) -> dict[str, Any]:
    """Options of a group whose kernels run before others' that wait."""
    return {} if device == "cpu" else {"pg_options": dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)}
