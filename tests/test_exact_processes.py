"""A slice of ``test_exact`` through real processes, one after another over the same ranks: what threads cannot show.

Ranks that are threads share an allocator, kernels' scratch memory and the counters of torch; processes have their own.
"""

from __future__ import annotations

import os
import traceback
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.oracle import assert_matches, step, whole_batch
from helpers.processes import run_processes
from syncbn import comm
from syncbn.comm.handshake import SWITCH
from test_exact import CHANNELS, affine, build, data, strided

WORLD = 3


class Case(NamedTuple):
    """One step: samples and positions of each rank, and what is special about it."""

    sizes: tuple[int, ...] = (4, 0, 3)
    positions: tuple[int, ...] = (3, 5)
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    relu: bool = False
    offset: float = 0.0


CASES = {
    "float64": Case(),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "one value": Case(sizes=(1, 0, 1), positions=()),
    "channels_last, relu and residual": Case(dtype=torch.float32, layout="channels_last", relu=True),
    "large": Case(sizes=(5, 1, 2), positions=(131, 97), dtype=torch.float32),
    "far off centre": Case(sizes=(9, 4, 1), dtype=torch.float64, offset=1e4),
}
WAYS = ("sockets", "one hop", "all-reduce")


def batches(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    torch.manual_seed(7)
    xs, gs = data([(n, CHANNELS, *case.positions) for n in case.sizes], case.dtype)
    xs = [strided(x + case.offset, case.layout) for x in xs]
    return xs, gs, [torch.randn_like(x) for x in xs] if case.relu else None


def parameters(case: Case) -> tuple[Tensor, Tensor]:
    return affine(CHANNELS, torch.float64 if case.dtype == torch.float64 else torch.float32)


def run_all(rank: int, size: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for way in WAYS:
        os.environ[SWITCH] = "off" if way == "one hop" else "on"
        comm.LEVELS_LIMIT = 0 if way == "all-reduce" else 4096
        group = dist.new_group()
        for name, case in CASES.items():
            xs, gs, adds = batches(case)
            try:
                layer = build(group, *parameters(case), activation="relu" if case.relu else None)
                result = step(layer, xs[rank], gs[rank], None if adds is None else adds[rank])
                results[way, name] = {key: value for key, value in result.items() if key != "grad_fn"}
            except Exception:
                return {(way, name): traceback.format_exc()}
        results[way] = comm.link_of(group, torch.device("cpu")).way()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    results = run_processes(WORLD, run_all, tmp_path_factory.mktemp("ranks"))
    failed = [
        text for result in results for key, text in result.items() if isinstance(key, tuple) and type(text) is str
    ]
    assert not failed, failed[0]
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_processes_equal_the_whole_batch(ranks: list[dict[Any, Any]], way: str, name: str) -> None:
    case = CASES[name]
    xs, gs, adds = batches(case)
    expected = whole_batch(xs, gs, *parameters(case), residuals=adds, relu=case.relu)
    results = [result[way, name] for result in ranks]
    if case.offset:  # float64 resolves 1e4 to 2e-12, and sums lose (mean / std)^2 more: judged as float32
        results = [{key: single(value) for key, value in result.items()} for result in results]
    assert_matches(results, expected, torch.float32 if case.offset else case.dtype)


def single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_each_way_was_taken(ranks: list[dict[Any, Any]]) -> None:
    for result in ranks:
        assert result["sockets"] == "sockets to 2 of 2 peers" and result["one hop"] == "gloo to 2 of 2 peers"
        assert result["all-reduce"] == "one all-reduce"


@pytest.mark.parametrize("name", CASES)
def test_ways_over_which_triples_travel_agree_in_every_bit(ranks: list[dict[Any, Any]], name: str) -> None:
    for result in ranks:
        for key, value in result["sockets", name].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, result["one hop", name][key]), key
