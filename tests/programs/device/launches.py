"""Launches of compiled kernels, on a driver that only takes notes: nothing is run.

Started by test_triton.py, in a process of its own without Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.commands import ROOT, load
from syncbn.kernels import triton
from syncbn.kernels.operands import Operands
from syncbn.memory import Running
from syncbn.messages import Message, Report, Shared
from syncbn.wire import HEAD, SLOTS

host = load(ROOT / "benchmarks" / "host.py")
C = 16


class Driver:
    """What was launched: the grid, the stream, the code, and the arguments, addresses as numbers."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.by_address = False

    def __call__(self, *args: Any) -> None:
        x, y, z, stream, code, _, _, _, metadata, enter, _, *_, given = args
        if enter is not None and metadata is not None:  # as the launcher in C does
            enter(metadata)
        self.by_address = not any(isinstance(value, Tensor) for value in given)
        # (what is None is a constant of the code, and what stands in its place is not looked at)
        values = tuple(value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in given)
        self.launches.append((x, y, z, stream, code, values))


driver = Driver()
host.stand_in_for_the_driver(driver)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton, "_direct", {"cpu"})
    triton._known.clear()
    yield
    triton._known.clear()


def vectors(dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.ones(C, dtype=dtype)


def step(
    x: Tensor, relu: bool, parameters: torch.dtype | None, momentum: float | None, headed: bool, gathered: bool
) -> None:
    """All launches of a training step."""
    grad, residual = torch.ones_like(x), torch.ones_like(x) if relu else None
    weight, bias = vectors(parameters), vectors(parameters)
    whole = torch.zeros(SLOTS + 2 * C + 1, dtype=torch.float64)
    given = (not gathered, 70000, 3 if headed else 0, torch.zeros(HEAD, dtype=torch.float64) if gathered else None)
    message = Message(whole, whole[SLOTS:], *given)
    report = Report(torch.zeros(8, dtype=torch.float64), 4097, 8) if headed else None
    triton.pack_moments(x, None, message)
    running = Running(torch.zeros(C), torch.ones(C), momentum, torch.tensor(0))
    shared = Shared(message.payload[None], not gathered, report)
    _, stats, _ = triton.normalize_shared(x, None, shared, weight, bias, residual, relu, 1e-5, running)
    operands = Operands(grad, x, None, stats, weight, bias, residual, relu)
    backward = Message(whole[:-1], whole[SLOTS:-1], *given)
    triton.pack_gradient_sums(operands, backward, (parameters, parameters))
    triton.shared_input_gradient(operands, Shared(backward.payload[None], not gathered, report), relu)
    if relu:
        triton.passed_gradient(operands)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("relu", "parameters", "momentum", "headed", "offset"),
    [(False, torch.float32, 0.1, True, 0), (True, torch.bfloat16, None, False, 0), (True, None, 0.1, True, 1)],
    ids=str,
)
def test_they_are_those_that_triton_makes(
    columns: bool, relu: bool, parameters: Any, momentum: Any, headed: bool, offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The code, the grid and all arguments."""
    launch, names = triton._launch, list[str]()
    monkeypatch.setattr(triton, "SIZES", triton.Sizes(programs=8, whole=0, fold=1 << 14 if relu else 0))

    def three_times(layout: Any, like: Tensor, kernel: Any, *args: Any, **options: Any) -> None:
        driver.launches.clear()
        triton._direct.clear()
        launch(layout, like, kernel, *args, **options)
        assert not driver.by_address
        triton._direct.add("cpu")
        launch(layout, like, kernel, *args, **options)
        launch(layout, like, kernel, *args, **options)
        assert driver.by_address, "the second launch searched for the kernel again"
        assert len(driver.launches) == 3 and len(set(driver.launches)) == 1
        names.append(kernel.__name__)

    monkeypatch.setattr(triton, "_launch", three_times)
    x = torch.zeros(4 * C * 15 + offset, dtype=torch.bfloat16)[offset:]
    x = x.view(4, 15, C).movedim(-1, 1) if columns else x.view(4, C, 15)
    step(x, relu, parameters, momentum, headed, gathered=columns)
    assert names == (
        ["measure", "normalize", "sum_gradients", "input_gradient", "input_gradient"]
        if relu
        else ["measure", "finish_moments", "normalize", "sum_gradients", "finish_gradients", "input_gradient"]
    )


def test_what_code_depends_on_is_told_apart() -> None:
    """Addresses that are no multiples of 16, dtypes and missing tensors take other code than the first ones."""
    memory = torch.zeros(4 * C * 16 + 8, dtype=torch.bfloat16)
    codes = []
    for start, weight in ((0, torch.float32), (1, torch.float32), (0, torch.float16), (0, None), (8, torch.float32)):
        x = memory[start : start + 4 * C * 16].view(4, C, 16)
        for _ in range(2):
            driver.launches.clear()
            triton.normalize(x, torch.zeros(C).double(), torch.ones(C).double(), vectors(weight), None)
            ((*_, code, values),) = driver.launches
        assert driver.by_address and values[0] == x.data_ptr()
        codes.append(code)
    assert len(set(codes[:4])) == 4 and codes[4] == codes[0]


def test_wide_offsets_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SIZES", triton.Sizes(wide=0))
    for _ in range(2):
        triton.normalize(torch.zeros(2, C), torch.zeros(C).double(), torch.ones(C).double(), None, None)
        assert not driver.by_address


def test_who_listens_to_launches_hears_them() -> None:
    from triton import knobs

    heard: list[str] = []
    for _ in range(2):
        triton.normalize(torch.zeros(2, C), torch.zeros(C).double(), torch.ones(C).double(), None, None)
    hook = knobs.runtime.launch_enter_hook
    driver.launches.clear()
    hook.add(listener := lambda metadata: heard.append(metadata.get()["name"]))
    try:
        triton.normalize(torch.zeros(2, C), torch.zeros(C).double(), torch.ones(C).double(), None, None)
    finally:
        hook.remove(listener)
    assert heard == ["normalize"] and driver.by_address


@pytest.mark.parametrize("when", ["found", "started", "called"])
def test_a_triton_that_starts_kernels_in_another_way(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is made once, the way that is documented, and nothing else is tried again."""
    from triton.compiler import CompiledKernel

    def other(*args: Any, **kwargs: Any) -> None:
        raise TypeError("unexpected keyword argument")

    if when == "found":
        monkeypatch.setattr(CompiledKernel, "__getitem__", other)
    elif when == "started":
        monkeypatch.setattr(triton, "_starter", lambda *args: other)
    else:  # what is documented works all the same
        monkeypatch.setattr(triton, "_CALL", (*triton._CALL, "more"))
    driver.launches.clear()
    for count in (1, 2, 3):
        triton.normalize(torch.zeros(2, C), torch.zeros(C).double(), torch.ones(C).double(), None, None)
        assert len(driver.launches) == count and driver.by_address == (when == "called" and count > 1)
    assert triton._direct == ({"cpu"} if when == "called" else set())
