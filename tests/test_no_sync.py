"""On a device, nothing waits for it and no shape depends on data: what a CUDA graph needs, shown on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from helpers.links import NoPeers, forced
from syncbn import functional, wire
from syncbn.autograd import Plan, SyncBatchNormFunction
from syncbn.comm.all_reduce import AllReduceOnDevice
from syncbn.wire import Call

ATEN = torch.ops.aten
# Operators that read a value back to the host, or whose output's shape depends on values.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.is_nonzero, ATEN.equal, ATEN._unique2}


class NoWaiting(TorchDispatchMode):
    """Fails on an operator that would wait for the device; counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        if func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_):
            assert not any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]), f"{func} by a mask"
        if func.overloadpacket is ATEN._to_copy:
            assert (kwargs or {}).get("device") in (None, torch.device("meta")), f"{func} copies to the host"
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _forced() -> Iterator[None]:
    with forced():
        yield


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5), (0, 3, 5)], ids=str)
def test_a_training_step_never_waits(
    _forced: None, monkeypatch: pytest.MonkeyPatch, momentum: float | None, options: Any, shape: Any
) -> None:
    # Meta tensors stand for those of a device here, and are not taken for tensors without values.
    monkeypatch.setattr("syncbn._torch.is_shadow", lambda tensor: False)
    # A rank with fewer than two values reads the global count, except while a graph is captured.
    monkeypatch.setattr("syncbn._torch.is_capturing", lambda device: shape[0] == 0)
    layer = syncbn.SyncBatchNorm(3, momentum=momentum, device="meta", **options)
    x = torch.randn(shape, device="meta", requires_grad=True)
    residual = torch.randn(shape, device="meta", requires_grad=True)
    with NoWaiting() as mode:
        y = layer(x, residual)
        y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.shape == x.shape
    assert any("rsqrt" in name for name in mode.seen), "not on our path"


def test_the_exchange_on_a_device_never_waits() -> None:
    link = NoPeers()
    x = torch.randn(4, 3, 5, device="meta", requires_grad=True)
    with NoWaiting():
        y, *_ = SyncBatchNormFunction.apply(x, None, None, None, None, Plan(link, 1e-5, flags=2))
        y.sum().backward()
    assert link.messages == 2


def test_global_moments_never_wait(_forced: None) -> None:
    x = torch.randn(4, 3, 5, device="meta", requires_grad=True)
    with NoWaiting():
        _, mean, var = functional.global_moments(x)
        (mean + var).sum().backward()


def test_the_mode_catches_what_it_is_for() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1, device="meta").item()


class _InOrder:
    """A group of two whose sums are in order on the stream: there is nothing to wait for."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        self.asked.append(options.asyncOp)


def test_a_device_sums_on_the_current_stream() -> None:
    """And not on another one, with events between; such a sum may have no work to wait for."""
    group = _InOrder()
    link = AllReduceOnDevice(group, torch.device("meta"))
    call = Call(wire.FORWARD, "layer", 0)
    for count in (1, 2):
        shared = link.share(link.message(7, call), call)
        assert shared.parts.shape == (1, 7) and link.exchanges == count
    assert group.asked == [False, False]
