"""Compiled training in the modes that people run: two ranks against one process with the whole batch, uncompiled.

Each mode compiles with inductor, in processes of its own, and takes a minute; so they are slow tests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import syncbn
from helpers.processes import run_processes

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 1)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(3, 8), nn.MaxPool2d(2), Block(8, 16))


class Mode(NamedTuple):
    """
    Attributes:
        compile: a network, to what is called in its place.
        sizes: of the ranks' batches, in each step.
        dtype: of parameters and data.
        layout: memory format of both.
        autocast: to bfloat16.
        tolerance: relative to the largest value of a tensor.
    """

    compile: Callable[[Any], Any]
    sizes: list[tuple[int, int]] = [(2, 2), (2, 2), (2, 2)]  # noqa: RUF012
    dtype: torch.dtype = torch.float64
    layout: torch.memory_format = torch.contiguous_format
    autocast: bool = False
    tolerance: float = 1e-9


def blocks_apart(net: Any, wrap: Callable[[Any], Any], **options: Any) -> Any:
    """Each block compiled by itself; ``wrap`` around it."""
    for name, module in list(net.named_children()):
        if isinstance(module, Block):
            setattr(net, name, wrap(torch.compile(module, **options)))
    return net


def with_compiled_autograd(net: Any) -> Any:
    torch._dynamo.config.compiled_autograd = True  # of this process, which is the mode's own
    return torch.compile(net, fullgraph=True)


whole = functools.partial(torch.compile, fullgraph=True)
MODES: dict[str, Mode] = {
    "default": Mode(whole),
    "reduce-overhead": Mode(functools.partial(whole, mode="reduce-overhead")),
    "max-autotune": Mode(functools.partial(whole, mode="max-autotune")),
    "channels_last": Mode(whole, dtype=torch.float32, layout=torch.channels_last, tolerance=2e-5),
    "autocast": Mode(whole, dtype=torch.float32, autocast=True, tolerance=5e-2),
    "autocast, channels_last": Mode(
        whole, dtype=torch.float32, layout=torch.channels_last, autocast=True, tolerance=5e-2
    ),
    "one sample a rank": Mode(whole, sizes=[(1, 1), (1, 1), (1, 1)]),
    "changing sizes": Mode(whole, sizes=[(2, 2), (3, 1), (1, 4), (5, 2)]),
    "dynamic": Mode(functools.partial(whole, dynamic=True), sizes=[(3, 2), (2, 5), (4, 4)]),
    "compiled autograd": Mode(with_compiled_autograd),
    "blocks": Mode(functools.partial(blocks_apart, wrap=lambda block: block)),
    "checkpoint_wrapper(compile(block))": Mode(functools.partial(blocks_apart, wrap=checkpoint_wrapper)),
}


def batches(mode: Mode, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator, dtype=mode.dtype) * 2 + 1).to(memory_format=mode.layout)
        for size in mode.sizes[step]
    ]


def step_of(run: Any, mode: Mode, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16) if mode.autocast else contextlib.nullcontext():
        y = run(x)
    y.to(mode.dtype).pow(3).mean((1, 2, 3)).sum().backward()


def ranks_train(rank: int, size: int, name: str) -> list[dict[str, Tensor]]:
    """After each step: gradients summed over ranks, and buffers."""
    mode = MODES[name]
    net = syncbn.convert_sync_batchnorm(network().to(mode.dtype).to(memory_format=mode.layout))
    named, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    run = mode.compile(net)
    seen = []
    for step in range(len(mode.sizes)):
        for parameter in named.values():
            parameter.grad = None
        step_of(run, mode, batches(mode, step)[rank])
        sums = {key: parameter.grad.clone() for key, parameter in named.items() if parameter.grad is not None}
        for gradient in sums.values():
            dist.all_reduce(gradient)
        seen.append(sums | {key: buffer.clone() for key, buffer in buffers.items()})
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
@pytest.mark.timeout(600)
def test_two_compiled_ranks_train_like_the_whole_batch(tmp_path: Path, name: str) -> None:
    mode = MODES[name]
    results = run_processes(2, ranks_train, tmp_path, name, deadline=500.0, timeout=400.0)
    net = network().to(mode.dtype).to(memory_format=mode.layout)
    for step in range(len(mode.sizes)):
        net.zero_grad()
        step_of(net, mode, torch.cat(batches(mode, step)).contiguous(memory_format=mode.layout))
        expected = {key: parameter.grad for key, parameter in net.named_parameters()} | dict(net.named_buffers())
        for result in results:
            assert result[step].keys() == expected.keys()
            for key, value in expected.items():
                # A bias before batch norm has no gradient but rounding errors, of sums as large as the weight's.
                of = expected[key.replace("conv2.bias", "conv2.weight")]
                scale = float(of.abs().max())
                error = float((result[step][key] - value).abs().max())
                assert error <= mode.tolerance * scale, f"{key} in step {step}: {error} of {scale}"
