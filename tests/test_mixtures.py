"""Input, parameters and running statistics of different dtypes, as mixed precision leaves them: right in every mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from helpers.oracle import TOLERANCE, close
from helpers.ranks import run_ranks
from syncbn import SyncBatchNorm

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARAMETERS = (torch.bfloat16, torch.float32, torch.float64)
C = 3


def coarser(*dtypes: torch.dtype) -> tuple[float, float]:
    """The tolerance of values that were rounded to each of these."""
    tolerance = 2 * max(TOLERANCE[dtype][0] for dtype in dtypes)
    return tolerance, tolerance


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_mixture_of_dtypes(dtype: torch.dtype, ranks: int, momentum: float | None) -> None:
    x = torch.randn(6, C, 2).to(dtype)
    for parameters, statistics in itertools.product(PARAMETERS, PARAMETERS):
        plain = nn.BatchNorm1d(C, momentum=momentum).double()
        plain.weight.data = torch.tensor([0.5, -1.0, 1.5])
        plain.double()
        leaf = x.double().clone().requires_grad_()
        expected = plain(leaf)
        expected.pow(2).sum().backward()
        evaluated = plain.eval()(x.double())

        def body(rank: int, group: Any, parameters: Any = parameters, statistics: Any = statistics) -> Any:
            layer = SyncBatchNorm(C, momentum=momentum, process_group=group)
            layer.weight.data = torch.tensor([0.5, -1.0, 1.5], dtype=parameters)
            layer.bias.data = layer.bias.data.to(parameters)
            layer.running_mean, layer.running_var = layer.running_mean.to(statistics), layer.running_var.to(statistics)
            part = x[rank * (6 // ranks) : (rank + 1) * (6 // ranks)].clone().requires_grad_()
            y = layer(part)
            y.pow(2).sum().backward()
            return layer, y.detach(), part.grad, layer.eval()(x)

        for rank, (layer, y, dx, after) in enumerate(run_ranks(ranks, body)):
            what = f"of rank {rank}, parameters {parameters}, statistics {statistics}"
            rows = slice(rank * (6 // ranks), (rank + 1) * (6 // ranks))
            assert y.dtype == after.dtype == dx.dtype == dtype, what
            assert layer.running_mean.dtype == layer.running_var.dtype == statistics, what
            assert layer.weight.grad.dtype == parameters, what
            close(y, expected[rows], *coarser(dtype), f"y {what}")
            close(dx, leaf.grad[rows], 16 * coarser(dtype)[0], 16 * coarser(dtype)[1], f"dx {what}")
            close(layer.running_mean, plain.running_mean, *coarser(statistics, torch.float32), f"mean {what}")
            close(layer.running_var, plain.running_var, *coarser(statistics, torch.float32), f"var {what}")
            close(after, evaluated, *[2 * t for t in coarser(dtype, statistics)], what=f"y in eval {what}")
