"""Process groups that are written in Python and change between steps: torchft's, and a stand-in of the same form."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from helpers.oracle import close
from helpers.ranks import make_group
from syncbn import comm

C = 3
STEPS = [(0, 1, 2), (0, 2), (0, 2, 3)]  # who takes part: one leaves, another joins
TIMEOUT = 10.0


class Changing(dist.ProcessGroup):
    """As torchft has them: a group that holds another one, a new one by each ``configure``. Its rank says nothing."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]
        self.parent: Any = None

    def configure(self, store: dist.Store, step: int, rank: int, size: int) -> None:
        self.parent = make_group(dist.PrefixStore(str(step), store), rank, size, TIMEOUT)

    def size(self) -> int:
        return int(self.parent.size())

    def getBackendName(self) -> str:
        return "changing-gloo"


class Torchft:
    """The real one, by the same call."""

    def __new__(cls) -> Any:
        module = pytest.importorskip("torchft.process_group", reason="torchft is not installed")

        class Group(module.ProcessGroupGloo):  # type: ignore[name-defined, misc]
            def configure(self, store: Any, step: int, rank: int, size: int) -> None:
                super().configure(f"127.0.0.1:{store.port}/{step}", f"replica {rank}", rank, size)

        return Group(timeout=datetime.timedelta(seconds=TIMEOUT))


def data(step: int, member: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + member)
    return torch.randn(2 + member, C, generator=generator).double() + member


def run(make: Callable[[], Any], store: dist.Store) -> list[list[tuple[Tensor, Tensor]]]:
    """Output and gradient of each member in each step; members are threads that wait for each other between steps."""
    groups = [make() for _ in range(4)]
    layers = [syncbn.SyncBatchNorm(C, process_group=group, dtype=torch.float64) for group in groups]
    results: list[list[Any]] = []
    for step, members in enumerate(STEPS):
        found: list[Any] = [None] * len(members)

        def take(rank: int, step: int = step, members: Any = members, found: Any = found) -> None:
            try:
                member = members[rank]
                groups[member].configure(store, step, rank, len(members))
                for _ in range(2):  # two exchanges, so that members of long standing have made more than new ones
                    x = data(step, member).requires_grad_()
                    y = layers[member](x)
                    y.pow(3).sum().backward()
                found[rank] = y.detach(), x.grad
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=take, args=(rank,), name=f"rank {rank}") for rank in range(len(members))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for one in found:
            assert isinstance(one, tuple), one
        results.append(found)
    return results


@pytest.mark.parametrize("make", [Changing, Torchft])
def test_each_step_is_that_of_its_members(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if make is Torchft:
        pytest.importorskip("torchft", reason="torchft is not installed")
    # (Threads cannot wait on one connection to a TCPStore; torchft makes a connection for each.)
    tcp = {"host_name": "127.0.0.1", "port": 0, "is_master": True, "wait_for_workers": False}
    store = dist.TCPStore(**tcp) if make is Torchft else dist.HashStore()
    for step, (members, found) in enumerate(zip(STEPS, run(make, store), strict=True)):
        parts = [data(step, member).requires_grad_() for member in members]
        whole = nn.BatchNorm1d(C, dtype=torch.float64)(torch.cat(parts))
        whole.pow(3).sum().backward()
        expected = whole.detach().split([len(part) for part in parts])
        for (y, dx), truth, part in zip(found, expected, parts, strict=True):
            assert part.grad is not None
            close(y, truth, 1e-12, 1e-12, f"y of step {step}")
            close(dx, part.grad, 1e-11, 1e-11, f"dx of step {step}")


class Renamed(dist.ProcessGroup):
    """A backend of its own that calls itself gloo, and has no tags."""

    def getBackendName(self) -> str:
        return "glooo"

    def name(self) -> str:
        return "gloo"


def test_a_way_is_chosen_by_the_class_of_the_backend() -> None:
    store = dist.HashStore()
    renamed = Renamed(0, 2)  # type: ignore[call-arg]
    assert isinstance(comm.link_of(renamed, torch.device("cpu")), comm.AllReduce)
    links: list[Any] = [None, None]

    def look(rank: int) -> None:
        links[rank] = comm.link_of(make_group(store, rank, 2), torch.device("cpu"))

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(isinstance(link, comm.OneHop) for link in links)
