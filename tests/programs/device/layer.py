"""The layer on its path for devices, with a sum over ranks that are threads (over gloo, which takes CUDA tensors too).

Started by test_triton.py for CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), and by test_gpu.py for a GPU
(SYNCBN_TEST_DEVICE=cuda).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from helpers.oracle import TOLERANCE, assert_matches, close, step, whole_batch
from helpers.ranks import run_ranks
from syncbn import comm, kernels
from syncbn.comm.all_gather import AllGatherOnDevice
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.kernels import triton
from syncbn.memory import Running
from syncbn.modules import memory_of
from syncbn.wire import FRONT, HEAD, SLOTS
from test_no_sync import WAITING

# numpy, in which the interpreter computes, warns of what is not finite, and of what older interpreters do with it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning",
    "ignore:Conversion of an array:DeprecationWarning",
)

DEVICE = torch.device(os.environ.get("SYNCBN_TEST_DEVICE", "cpu"))
launches: dict[int, list[str]] = {}  # per thread
lock = threading.Lock()


class OnDevice(AllReduceOnDevice):
    """The link of a device, for CPU tensors; notes what it sums, and looks at slots that no kernel looked at."""

    def _reduce(self, message: Tensor, call: Any, width: int) -> None:
        values = message.cpu().numpy()  # (which no mode sees)
        assert np.isfinite(values[SLOTS:]).all() or values[4] == 1, "unwritten memory in a message"
        launches[threading.get_ident()].append("sum")
        super()._reduce(message, call, width)

    def _check_later(self, slots: Tensor, call: Any, width: int, number: int) -> None:
        self._check(tuple(slots.cpu().numpy().tolist()), call, width, number)


class Gathering(AllGatherOnDevice):
    """The other link of a device, likewise."""

    def _gather(self, own: Tensor, call: Any, width: int) -> Tensor:
        values = own.cpu().numpy()
        assert np.isfinite(values[FRONT:]).all() or values[HEAD + 4] == 1, "unwritten memory in a message"
        launches[threading.get_ident()].append("gather")
        return super()._gather(own, call, width)

    def _check_later(self, front: Tensor, call: Any, width: int, number: int) -> None:
        self._examine(front.cpu(), call, width, number)


class NoWaiting(TorchDispatchMode):
    """Fails on an operator that would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    launch = triton._launch

    def counted(layout: Any, like: Tensor, kernel: Any, *args: Any, **options: Any) -> None:
        with lock:  # the interpreter is for one thread at a time
            launches.setdefault(threading.get_ident(), []).append(kernel.__name__)
            launch(layout, like, kernel, *args, **options)

    monkeypatch.setattr(triton, "_launch", counted)
    monkeypatch.setattr(triton, "SIZES", triton.Sizes(tile=2048, programs=4, whole=0, fold=0))
    monkeypatch.setattr(kernels, "_interpreted", True)
    # The interpreter cuts bfloat16 off where devices round: a unit in the last place, not half of one.
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, (2 * TOLERANCE[torch.bfloat16][0], TOLERANCE[torch.bfloat16][1]))
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    assert kernels.choose(torch.zeros(1, 1), None, True) is triton
    with comm.forced(), torch.autograd.set_multithreading_enabled(False):
        yield
    torch.set_default_device(before)


def connect(group: Any, make: Any = OnDevice) -> Any:
    torch.set_default_device(DEVICE)  # (of this thread)
    # A backward on a GPU runs in one thread for all ranks of this process, in which they would wait for each other.
    torch.autograd.set_multithreading_enabled(False)
    device = torch.zeros(1).device  # with its index
    comm._links[group] = {device: make(group, device)}
    return comm._links[group][device]


def finish() -> None:
    """Wait until kernels have written to the host."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


FORWARD = ["measure", "finish_moments", "sum", "normalize"]
EMPTY = ["measure", "sum", "normalize", "sum_gradients", "finish_gradients", "sum"]
BACKWARD = ["sum_gradients", "finish_gradients", "sum", "input_gradient"]
SIZES = [(3,), (2, 3), (2, 0, 3)]
CASES = [
    ((5,), "rows", torch.float32, {}),
    ((5, 4, 3), "rows", torch.bfloat16, {"activation": "relu"}),
    ((5, 4, 3), "columns", torch.float32, {"activation": "relu", "momentum": None}),
    ((18, 7), "rows", torch.float16, {"affine": False, "momentum": None}),
    ((18, 2, 2), "columns", torch.float16, {}),
]


@pytest.mark.parametrize(
    ("sizes", "case", "with_residual"),
    [(SIZES[i % 3], CASES[i], with_residual) for i, with_residual in enumerate([False, True, True, False, True])]
    + [(SIZES[1], CASES[1], False)],
    ids=str,
)
def test_the_layer_is_that_of_the_whole_batch(sizes: Any, case: Any, with_residual: bool) -> None:
    shape, layout, dtype, options = case
    xs, gs, rs = ([torch.randn(n, *shape).mul(2).add(1).to(dtype) for n in sizes] for _ in range(3))
    if layout == "columns":
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    residuals = rs if with_residual else [None] * len(xs)

    def body(rank: int, group: Any) -> Any:
        connect(group)
        layer = syncbn.SyncBatchNorm(shape[0], process_group=group, **options)
        made: list[Any] = []
        launches[threading.get_ident()] = made
        # A rank with fewer than two values looks at the global count.
        with NoWaiting() if len(xs[rank]) else contextlib.nullcontext():
            result = step(layer, xs[rank], gs[rank], residuals[rank])
        assert made == (FORWARD + BACKWARD if len(xs[rank]) else EMPTY)
        assert result["y"].stride() == torch.empty_like(xs[rank]).stride()
        return result

    expected = whole_batch(
        xs, gs, momentum=options.get("momentum", 0.1), residuals=rs if with_residual else None,
        relu="activation" in options,
    )  # fmt: skip
    results = run_ranks(len(xs), body)
    assert_matches(results, expected, dtype)
    for result in results:
        assert result["num_batches_tracked"] == 1


GATHERED = [
    ((5, 4, 3), "rows", torch.float32, {"activation": "relu", "momentum": None}, (2, 0, 3), 2.0),
    ((6, 2, 2), "columns", torch.float16, {}, (3, 2), 2.0),
    ((5,), "rows", torch.float32, {}, (9, 1, 30), 1e3),
]


@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_the_layer_over_an_all_gather(case: Any) -> None:
    """The launches are those over an all-reduce; triples travel, which lose nothing far from zero; bits are equal."""
    shape, layout, dtype, options, sizes, offset = case
    xs, gs = ([torch.randn(n, *shape).add(mean).to(dtype) for n in sizes] for mean in (offset, 0.0))
    if layout == "columns":
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    relu = "activation" in options

    def body(rank: int, group: Any) -> Any:
        connect(group, Gathering)
        layer = syncbn.SyncBatchNorm(shape[0], process_group=group, **options)
        made: list[Any] = []
        launches[threading.get_ident()] = made
        result = step(layer, xs[rank], gs[rank], xs[rank] if relu else None)
        names = FORWARD + BACKWARD if len(xs[rank]) else EMPTY
        assert made == ["gather" if name == "sum" else name for name in names]
        return result

    expected = whole_batch(
        xs, gs, momentum=options.get("momentum", 0.1), residuals=xs if relu else None, relu=relu
    )  # fmt: skip
    results = run_ranks(len(xs), body)
    assert_matches(results, expected, dtype)
    for result in results:
        assert torch.equal(result["running_var"], results[0]["running_var"])
        assert result["num_batches_tracked"] == 1


@pytest.mark.parametrize("fault", ["calls", "refusal", "nan"])
def test_kernels_report_all_ranks_over_an_all_gather(fault: str) -> None:
    """Each rank that differs is named, some exchanges later, with nothing copied to the host."""

    def body(rank: int, group: Any) -> str:
        link = connect(group, Gathering)
        launches[threading.get_ident()] = []
        link._check_later = None
        layers = [syncbn.SyncBatchNorm(3, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        x = torch.randn(4, 3)
        layers[0](x)
        if fault == "refusal" and rank == 1:
            with pytest.raises(ValueError):
                layers[0](torch.randn(4, 5))
            return ""
        layers[rank if fault == "calls" else 0](x if fault != "nan" or rank == 0 else x / 0)
        finish()
        if fault == "nan":
            link._warned.add("a")  # (threads cannot catch warnings one by one)
            layers[0](x)
            return link._broken_ranks(None)
        with pytest.raises(syncbn.RankMismatchError) as caught:
            link.settle()
        return str(caught.value)

    said = run_ranks(2, body)
    if fault == "calls":
        for rank, text in enumerate(said):
            assert "rank 0: forward of layer 'a' (3 channels, gradients for weight, bias, call 1)" in text
            assert "rank 1: forward of layer 'b' (3 channels, gradients for weight, bias, call 1)" in text
            assert f"This is rank {rank}" in text
    elif fault == "refusal":
        assert "rank 1 could not make the call that rank 0 made (forward of layer 'a'" in said[0]
        assert "rank 1: ValueError: " in said[0]
    else:
        assert said == ["rank 1"] * 2


def test_only_what_is_wanted_is_done() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        layer = syncbn.SyncBatchNorm(4, process_group=group, activation="relu")
        x, r, g = torch.randn(3, 4, 5), torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
        made: list[Any] = []
        launches[threading.get_ident()] = made
        layer(x, r).backward(g)
        assert made == [*FORWARD, "sum_gradients", "finish_gradients", "input_gradient"]
        weight, bias, residual = layer.weight.grad, layer.bias.grad, r.grad
        layer.zero_grad()
        r.grad = None
        layer(x.requires_grad_(), r).backward(g)
        for ours, theirs in ((layer.weight.grad, weight), (layer.bias.grad, bias), (r.grad, residual)):
            torch.testing.assert_close(ours, theirs)
        made.clear()
        with torch.no_grad():
            layer(x)
        assert made == FORWARD
        made.clear()
        layer.eval()(x)
        assert made == []

    run_ranks(1, body)


def test_a_small_input_takes_a_launch_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SIZES", triton.SIZES._replace(whole=1 << 14))

    def body(rank: int, group: Any) -> Any:
        connect(group)
        made: list[Any] = []
        launches[threading.get_ident()] = made
        result = step(syncbn.SyncBatchNorm(6, process_group=group), xs[rank], xs[rank])
        assert made == ["measure", "sum", "normalize", *BACKWARD]
        return result

    xs = [torch.randn(5, 6), torch.randn(4, 6)]
    assert_matches(run_ranks(2, body), whole_batch(xs, xs), torch.float32)


def test_the_last_program_takes_two_launches_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SIZES", triton.SIZES._replace(fold=1 << 14))

    def body(rank: int, group: Any) -> Any:
        connect(group)
        launches[threading.get_ident()] = made = list[str]()
        result = step(syncbn.SyncBatchNorm(6, process_group=group, activation="relu"), xs[rank], xs[rank])
        assert made == ["measure", "sum", "normalize", "sum_gradients", "sum", "input_gradient"]
        return result

    xs = [torch.randn(70, 6), torch.randn(90, 6)]
    assert_matches(run_ranks(2, body), whole_batch(xs, xs, relu=True), torch.float32)


def test_without_a_group_nothing_is_summed() -> None:
    made: list[Any] = []
    launches[threading.get_ident()] = made
    x, g = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    result = step(syncbn.SyncBatchNorm(3), x, g)
    assert made == [name for name in FORWARD + BACKWARD if name != "sum"]
    assert_matches([result], whole_batch([x], [g]), torch.float32)


def test_float64_takes_the_other_way() -> None:
    def body(rank: int, group: Any) -> Any:
        connect(group)
        made: list[Any] = []
        launches[threading.get_ident()] = made
        result = step(syncbn.SyncBatchNorm(3, process_group=group).double(), xs[rank], xs[rank])
        assert made == ["sum", "sum"]
        return result

    xs = [torch.randn(5, 3).double(), torch.randn(2, 3).double()]
    assert_matches(run_ranks(2, body), whole_batch(xs, xs), torch.float64)


def test_ranks_of_both_ways_understand_each_other() -> None:
    xs = [torch.randn(5, 3, 2), torch.randn(4, 3, 2).double()]

    def body(rank: int, group: Any) -> Any:
        connect(group)
        launches[threading.get_ident()] = []
        return step(syncbn.SyncBatchNorm(3, process_group=group), xs[rank], xs[rank])

    results = run_ranks(2, body)
    expected = whole_batch(xs, xs)
    for rank, result in enumerate(results):
        close(result["y"], expected.y[rank], *TOLERANCE[torch.float32], "y")
        close(result["dx"], expected.dx[rank], *TOLERANCE[torch.float32], "dx")


def test_second_derivatives_and_an_unused_output() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        x = torch.randn(4, 3, 5, requires_grad=True)
        plain = torch.nn.BatchNorm1d(3)
        grads = []
        for module in (layer, plain):
            (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            (ddx,) = torch.autograd.grad((dx * torch.arange(5.0)).square().sum(), x)
            grads.append((dx, ddx))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    run_ranks(1, body)


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1)])
def test_one_value_per_channel_is_refused_and_nothing_is_moved(sizes: tuple[int, ...]) -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.randn(sizes[rank], 3))
        assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all() and (layer.running_var == 1).all()

    run_ranks(2, body)


def test_all_ranks_empty_move_nothing() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        x = torch.randn(0, 3, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None and layer.weight.grad.eq(0).all()
        assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all() and (layer.running_var == 1).all()

    run_ranks(2, body)


@pytest.mark.parametrize("how", ["settle", "later exchange"])
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_ranks_that_differ_are_found_by_the_kernels(how: str, half: str) -> None:
    """They write to the host, which looks in a later exchange, and copies nothing."""

    def body(rank: int, group: Any) -> str:
        connect(group)
        link: Any = comm.link_of(group, torch.zeros(1).device)
        launches[threading.get_ident()] = []
        copied: list[Any] = []
        link._check_later = lambda *args: copied.append(args)
        layers = [syncbn.SyncBatchNorm(3, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        x = torch.randn(4, 3)
        outputs = [layers[0](x), *(layer(x.clone().requires_grad_()) for layer in layers)]
        if half == "forward":
            layers[rank](x)
        else:
            outputs[1 + rank].sum().backward()
        finish()
        with pytest.raises(syncbn.RankMismatchError, match="different calls") as caught:
            link.settle() if how == "settle" else layers[0](x)
        link.settle()  # said once
        layers[0](x)
        assert not copied
        return str(caught.value)

    for rank, text in enumerate(run_ranks(2, body)):
        assert f"This is rank {rank}: {half} of layer {'ab'[rank]!r}" in text and "call 3)" in text


def test_what_no_kernel_looked_at_is_copied() -> None:
    """Where other operators than ours read the sum: global moments, and an empty rank's backward."""

    def body(rank: int, group: Any) -> None:
        connect(group)
        link: Any = comm.link_of(group, torch.zeros(1).device)
        launches[threading.get_ident()] = []
        copied: list[int] = []
        link._check_later = lambda slots, call, width, number: copied.append(number)
        syncbn.functional.global_moments(torch.randn(4, 3), process_group=group)
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        x = torch.randn(0 if rank else 4, 3).requires_grad_()
        layer(x).sum().backward()
        link.settle()
        assert copied == ([0, 2] if rank else [0])

    run_ranks(2, body)


def test_a_graph_tells_the_call_that_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of a graph writes what it was captured with; the host finds the call, however much later."""
    capturing = threading.local()
    monkeypatch.setattr("syncbn._torch.is_capturing", lambda device: getattr(capturing, "now", False))

    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        x = torch.randn(4, 3)
        layer(x)
        layer.layer_name = f"captured on {rank}"
        capturing.now = True
        layer(x)
        capturing.now = False
        finish()
        layer.layer_name = "later"
        with pytest.raises(syncbn.RankMismatchError, match=rf"layer 'captured on {rank}'.*call 1\)"):
            layer(x)

    run_ranks(2, body)


def test_the_rank_that_is_not_finite_is_named() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        link: Any = comm.link_of(group, torch.zeros(1).device)
        launches[threading.get_ident()] = []
        x = torch.randn(4, 3, 5)
        if rank == 1:
            x[0, 1, 2] = torch.nan
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        layer.layer_name = "stem"
        y = layer(x)
        assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()
        finish()
        assert link._record[5:7].tolist() == [1, 2] and link._broken_ranks(None) == "no rank"
        assert layer.running_mean.isfinite().all() and layer.running_mean[1] == 0
        link._warned.add("stem")  # (threads cannot catch warnings one by one)
        link.settle()
        assert link._broken_ranks(None) == "rank 1"

    run_ranks(2, body)


def test_a_warning_names_the_rank_in_a_later_step() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        layer = syncbn.SyncBatchNorm(3, process_group=group)
        layer.layer_name = "stem"
        layer(torch.full((4, 3), torch.inf))
        finish()
        with pytest.warns(RuntimeWarning, match="layer 'stem' are not finite; they came from rank 0"):
            layer(torch.randn(4, 3))
        layer(torch.full((4, 3), torch.inf)), layer(torch.randn(4, 3))  # said once

    run_ranks(1, body)


def test_what_a_kernel_cannot_move_is_moved_by_others() -> None:
    def body(rank: int, group: Any) -> None:
        connect(group)
        launches[threading.get_ident()] = []
        x = torch.randn(4, 3)
        strided = torch.zeros(3, 2)[:, 0], torch.ones(3, 2)[:, 0]
        plain = torch.zeros(3), torch.ones(3)
        for mean, var in (strided, plain):
            syncbn.functional.sync_batch_norm(x, mean, var, training=True, process_group=group)
        torch.testing.assert_close(strided[0], plain[0])
        torch.testing.assert_close(strided[1], plain[1])
        assert isinstance(memory_of(syncbn.SyncBatchNorm(3)), Running)

    run_ranks(1, body)
