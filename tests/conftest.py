"""One thread per test process: ranks are threads or processes here, and share few cores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers.links import ALONE, WAYS, travel

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with few tests first, which are those that take long: workers take whole files, and are to end together."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How messages travel on gloo."""
    with travel(request.param):
        yield request.param


@pytest.fixture(params=[*WAYS, ALONE])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    """Three ranks, by each way that messages travel on gloo, or one."""
    with travel(request.param):
        yield 1 if request.param == ALONE else 3
