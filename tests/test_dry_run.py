"""A model that is run without being trained: compiled ones run eagerly, and afterwards all is as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import outcomes
from syncbn import RankMismatchError, update_population_stats
from syncbn.diagnostics import measure_noise
from syncbn.dry_run import dry_run, run_on_batch

DEADLINE = 30.0


def stance() -> str:
    from torch._dynamo import eval_frame

    return str(eval_frame._stance.stance)


def test_threads_share_the_stance_of_the_compiler() -> None:
    """Two measurements that overlap: neither the first to end takes eager mode away, nor the last leaves it."""
    models = [torch.compile(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), backend="eager") for _ in range(2)]
    assert stance() == "default"
    both_begun, first_done = threading.Barrier(2, timeout=DEADLINE), threading.Event()
    within: list[str] = []
    errors: list[BaseException] = []

    def batches(number: int) -> Iterator[Tensor]:
        if number == 1:
            second_may_begin.wait(DEADLINE)
        else:
            second_may_begin.set()
        both_begun.wait()
        if number == 1:
            assert first_done.wait(DEADLINE)
        within.append(stance())
        yield from torch.ones(8, 4, 6)

    second_may_begin = threading.Event()

    def measure(number: int) -> None:
        try:
            measure_noise(models[number], batches(number), [1])
            if number == 0:
                first_done.set()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=measure, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not errors and within == ["force_eager"] * 2
    assert stance() == "default"


class Restless(nn.Module):
    """Moves, replaces and adds buffers in every forward, and changes a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.lazy = nn.LazyBatchNorm1d()
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("none", None)
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, self.norm.training, torch.is_grad_enabled()))
        self.cache = torch.ones(len(x))
        y = self.norm(x)
        self.norm.eval()
        return self.lazy(y) + torch.rand(())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
def test_all_is_as_it_was(fails: bool, evaluates: bool) -> None:
    model = Restless()
    before, cache = copy.deepcopy(model.norm.state_dict()), model.cache
    state = torch.get_rng_state()
    try:
        with dry_run(model, trains=(lambda module: module is model.norm) if evaluates else None):
            model(torch.randn(4, 3))
            if fails:
                raise KeyError("cannot")
    except KeyError:
        assert fails
    assert model.seen == [(not evaluates, True, False)] and torch.is_grad_enabled()
    assert model.training and model.norm.training and model.cache is cache and torch.equal(cache, torch.zeros(2))
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lazy.running_mean.shape == (3,)  # (what it learnt of its input it keeps)


@pytest.mark.parametrize(
    ("batch", "message"),
    [((), r"an empty sequence, \(\)"), ([], r"an empty sequence, \[\]"), ({0: 1.0}, r"the keys \[0\]")],
)
def test_batches_without_an_input(batch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_on_batch(nn.Identity(), batch)


@pytest.mark.parametrize("measure", [measure_noise, update_population_stats])
def test_the_model_must_be_one(measure: Callable[..., object]) -> None:
    """On a rank where it is none its peers are told."""

    def body(rank: int, group: Any) -> None:
        norm = nn.BatchNorm1d(3)
        measure([norm] if rank == 1 else norm, [torch.ones(2, 3)] * 4, process_group=group)

    peer, error = outcomes(2, body, timeout=5.0)
    assert isinstance(peer, RankMismatchError) and peer.refused_by == (1,)
    assert isinstance(error, TypeError)
    assert "model must be a torch.nn.Module, got a list: [BatchNorm1d" in str(error)
