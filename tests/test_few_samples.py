"""A word where statistics are noise: once, by rank 0; never at healthy sizes, or with nothing to choose."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from helpers.processes import run_processes
from syncbn import few_samples


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("syncbn").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train(model: nn.Module, samples: int, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(samples, 3, 4, 4)).sum().backward()


def local(samples: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    syncbn.check_ranks_agree(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model.eval(), samples)
    train(model.train(), samples)
    assert not model[1]._forward_pre_hooks
    train(copies[0], samples)
    train(copies[1], samples)


def synchronized(samples: int, group: Any = None) -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), group)
    syncbn.check_ranks_agree(model)
    train(model, samples)


def body(rank: int, size: int) -> dict[str, list[str]]:
    pairs, _ = dist.new_subgroups(2)
    alone, _ = dist.new_subgroups(1)
    runs = {
        "local, few": lambda: local(2),
        "local, many": lambda: local(8),
        "all ranks": lambda: synchronized(1),
        "pairs, few": lambda: synchronized(3, pairs),
        "pairs, enough": lambda: synchronized(4, pairs),
        "pairs, no samples": lambda: (synchronized(0, pairs), None)[1],
        "each alone": lambda: synchronized(2, alone),
    }
    texts = {}
    for name, run in runs.items():
        few_samples._said = False
        said = Said()
        run()
        logging.getLogger("syncbn").removeHandler(said)
        texts[name] = said.texts
    return texts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return run_processes(4, body, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local, few", ("layer '1'", "over 2 sample(s): 2 on each of 1 rank(s), of the 4")),
        ("pairs, few", ("layer '1'", "over 6 sample(s): 3 on each of 2 rank(s), of the 4")),
        ("each alone", ("over 2 sample(s): 2 on each of 1 rank(s)",)),
    ],
)
def test_rank_0_says_it_once(ranks: list[dict[str, list[str]]], name: str, words: tuple[str, ...]) -> None:
    (text,) = ranks[0][name]
    assert all(word in text for word in (*words, "syncbn.diagnostics.measure_noise", "Said once")), text
    assert not any(texts[name] for texts in ranks[1:])


@pytest.mark.parametrize("name", ["local, many", "all ranks", "pairs, enough", "pairs, no samples"])
def test_nothing_is_said_where_nothing_is_wrong(ranks: list[dict[str, list[str]]], name: str) -> None:
    assert not any(texts[name] for texts in ranks)


def test_nothing_is_said_without_a_job(caplog: pytest.LogCaptureFixture) -> None:
    local_model = nn.Sequential(nn.BatchNorm2d(3))
    syncbn.check_ranks_agree(local_model)
    assert not local_model[0]._forward_pre_hooks
    train(syncbn.convert_sync_batchnorm(local_model), 2)
    assert not caplog.records
