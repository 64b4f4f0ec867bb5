"""Groups in all their forms, and the exchange over them."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from helpers.links import SEE_EACH_RANK, exchange, link_of
from helpers.oracle import close, step, whole_batch
from helpers.ranks import make_group, outcomes, run_ranks
from syncbn import RankMismatchError, SyncBatchNorm, comm, groups, wire
from syncbn.wire import Call

C = 3


@pytest.fixture
def world_of_four() -> Iterator[None]:
    """This process as rank 0 of four, with a backend that does nothing: for what needs registered groups."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


# ---- which group


def test_no_group_when_not_initialized() -> None:
    assert groups.resolve_group(None) is None
    assert SyncBatchNorm(C).process_group is None


@pytest.mark.usefixtures("world_of_four")
def test_default_group() -> None:
    assert groups.resolve_group(None) is dist.group.WORLD
    assert groups.resolve_group(dist.group.WORLD) is dist.group.WORLD


def test_the_default_group_is_that_of_the_forward(request: pytest.FixtureRequest) -> None:
    handle = SyncBatchNorm(C)._group
    assert handle.resolve() is None
    request.getfixturevalue("world_of_four")
    assert handle.resolve() is dist.group.WORLD


@pytest.mark.usefixtures("world_of_four")
def test_groups_that_this_rank_is_in_or_not() -> None:
    group = dist.new_group([0, 2])
    assert groups.resolve_group(group) is group
    assert groups.group_ranks(group) == [0, 2]
    other = dist.new_group([1, 2])
    with pytest.raises(ValueError, match=r"not a member.*new_subgroups"):
        groups.resolve_group(other)
    with pytest.raises(ValueError, match="not a member"):
        SyncBatchNorm(C, process_group=other)
    with pytest.raises(ValueError, match="not a member"):
        syncbn.convert_sync_batchnorm(torch.nn.BatchNorm1d(C), other)


@pytest.mark.usefixtures("world_of_four")
def test_device_meshes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    line = init_device_mesh("cpu", (4,))
    assert groups.resolve_group(line) is line.get_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert groups.group_ranks(groups.resolve_group((mesh, "shard"))) == [0, 1]
    assert groups.group_ranks(groups.resolve_group((mesh, "replicate"))) == [0, 2]
    assert groups.group_ranks(groups.resolve_group((mesh, 0))) == [0, 2]
    assert groups.group_ranks(groups.resolve_group((mesh, -1))) == [0, 1]
    assert groups.group_ranks(groups.resolve_group(mesh["shard"])) == [0, 1]
    with pytest.raises(ValueError, match=r"2 dimensions.*replicate.*shard.*\(mesh, dim\)"):
        groups.resolve_group(mesh)
    with pytest.raises(ValueError, match=r"no dimension 'tensor'.*replicate"):
        groups.resolve_group((mesh, "tensor"))
    for dim in (2, -3):
        with pytest.raises(ValueError, match=f"dimension {dim} is out of range"):
            groups.resolve_group((mesh, dim))


@pytest.mark.parametrize(
    "wrong", ["world", 3, [0, 1], (1, 2), object(), torch.device("cpu"), True], ids=lambda wrong: type(wrong).__name__
)
def test_things_that_are_no_group(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group must be None.*got") as caught:
        groups.resolve_group(wrong)
    assert type(wrong).__name__ in str(caught.value)


@pytest.mark.usefixtures("world_of_four")
def test_a_mesh_with_a_dimension_of_the_wrong_type() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    with pytest.raises((TypeError, ValueError), match="dim"):
        groups.resolve_group((init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), 1.5))


# ---- groups in pickles


@pytest.mark.usefixtures("world_of_four")
def test_a_pickle_finds_the_group_of_the_same_ranks() -> None:
    dist.new_group([0, 1])
    group = dist.new_group([0, 2])
    for target in (group, dist.group.WORLD, None):
        layer = SyncBatchNorm(C, process_group=target)
        assert pickle.loads(pickle.dumps(layer)).process_group is target
        assert copy.deepcopy(layer).process_group is target


def test_a_pickle_without_torch_distributed_is_plain_batch_norm(world_of_four: None) -> None:
    blob = pickle.dumps(SyncBatchNorm(C, process_group=dist.new_group([0, 3])))
    dist.destroy_process_group()
    layer = pickle.loads(blob)
    x = torch.randn(4, C)
    torch.testing.assert_close(layer(x), torch.nn.BatchNorm1d(C)(x))
    again = pickle.loads(pickle.dumps(layer))  # still remembers its ranks

    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    with pytest.raises(RuntimeError, match=r"\[0, 3\].*new_group"):
        again.process_group  # noqa: B018
    group = dist.new_group([0, 3])
    assert layer.process_group is group
    assert layer._group.resolve() is group


def test_a_pickle_whose_ranks_do_not_exist(world_of_four: None) -> None:
    blob = pickle.dumps(SyncBatchNorm(C, process_group=dist.new_group([0, 3])))
    dist.destroy_process_group()

    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    with pytest.raises(RuntimeError, match=r"ranks \[0, 3\].*world size 4"):
        pickle.loads(blob)


def test_deepcopy_shares_an_unregistered_group() -> None:
    def body(rank: int, group: Any) -> None:
        layer = SyncBatchNorm(C, process_group=group)
        assert copy.deepcopy(layer).process_group is group
        assert copy.copy(layer).process_group is group

    run_ranks(2, body)


# ---- the exchange


def exchanged(rank: int, group: Any, width: int, kind: int = wire.SUM) -> list[Tensor]:
    link = link_of(group)
    payload = torch.arange(width, dtype=torch.float64) + 1000.0 * rank
    return exchange(link, payload, Call(kind, "x"))


WIDTHS = [1, 2, 7, wire.FRAME - 1, wire.FRAME, wire.FRAME + 1, 3 * wire.FRAME + 5]


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_gets_all_payloads(world: int) -> None:
    def body(rank: int, group: Any) -> None:
        for width in [*WIDTHS, *reversed(WIDTHS)]:
            parts = exchanged(rank, group, width)
            for peer, part in enumerate(parts):
                assert torch.equal(part, torch.arange(width, dtype=torch.float64) + 1000.0 * peer)

    run_ranks(world, body)


def test_sum(way: str) -> None:
    def body(rank: int, group: Any) -> list[Tensor]:
        link = link_of(group)
        assert link.raw != (way in SEE_EACH_RANK)
        generator = torch.Generator().manual_seed(rank)
        payloads = [torch.randn(width, generator=generator, dtype=torch.float64) for width in WIDTHS]
        sums = [link.sum(payload, Call(wire.SUM, "x")) for payload in payloads]
        assert not any(a.data_ptr() == b.data_ptr() for a in sums for b in payloads)
        return payloads + sums

    results = run_ranks(3, body)
    for i in range(len(WIDTHS)):
        expected = sum(result[i] for result in results)
        for result in results:
            torch.testing.assert_close(result[len(WIDTHS) + i], expected, rtol=1e-14, atol=1e-14)
            assert torch.equal(result[len(WIDTHS) + i], results[0][len(WIDTHS) + i])


@pytest.mark.parametrize("channels", [4, 9000])
@pytest.mark.usefixtures("way")
def test_all_ways_give_the_same(channels: int) -> None:
    xs = [torch.randn(n, channels, 2, dtype=torch.float64) + n for n in (2, 0, 3)]

    results = run_ranks(
        3, lambda rank, group: step(SyncBatchNorm(channels, process_group=group).double(), xs[rank], xs[rank])
    )
    expected = whole_batch(xs, xs)
    for rank in range(3):
        for name in ("y", "dx", "dweight", "dbias"):
            close(results[rank][name], getattr(expected, name)[rank], 1e-11, 1e-11, name)
        for name in ("running_mean", "running_var"):
            assert torch.equal(results[rank][name], results[0][name])


def test_gloo_takes_an_all_reduce_above_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(rank: int, group: Any) -> type:
        return type(link_of(group))

    assert run_ranks(3, kinds) == [comm.OneHop] * 3
    monkeypatch.setattr(comm, "LEVELS_LIMIT", 2)
    assert run_ranks(3, kinds) == [comm.AllReduceOnHost] * 3


@pytest.mark.parametrize("other", ["layer", "kind", "width", "frame", "flags"])
def test_mismatch_is_found_either_way_and_the_group_stays_usable(other: str, way: str) -> None:
    calls = {
        "layer": (Call(wire.FORWARD, "b"), 7),
        "kind": (Call(wire.BACKWARD, "a"), 7),
        "width": (Call(wire.FORWARD, "a"), 9),
        "frame": (Call(wire.FORWARD, "a"), wire.FRAME + 9),
        "flags": (Call(wire.FORWARD, "a", wire.INPUT_GRAD), 7),
    }

    def body(rank: int, group: Any) -> None:
        link = link_of(group)
        call, width = calls[other] if rank == 1 else (Call(wire.FORWARD, "a"), 7)
        if other == "frame" and way not in SEE_EACH_RANK:
            return  # messages of this difference abort the process in gloo's own all-reduce
        with pytest.raises(RankMismatchError, match="different calls"):
            exchange(link, torch.ones(width, dtype=torch.float64), call)
        assert float(link.sum(torch.ones(5, dtype=torch.float64), Call(wire.SUM))[0]) == 3.0

    run_ranks(3, body)


@pytest.mark.parametrize("refusing", [(1,), (0, 2), (0, 1, 2)])
def test_refusal(refusing: tuple[int, ...], way: str) -> None:

    def body(rank: int, group: Any) -> str:
        link = link_of(group)
        call = Call(wire.FORWARD, "stem")
        said = ""
        if rank in refusing:
            link.refuse(call, "wrong shape \u00fc (3, 4)", 7)
        else:
            with pytest.raises(RankMismatchError, match="stays usable") as caught:
                exchange(link, torch.ones(7, dtype=torch.float64), call)
            said = str(caught.value)
            assert "'stem'" in said
        assert float(link.sum(torch.ones(5, dtype=torch.float64), Call(wire.SUM))[0]) == 3.0
        return said

    for said in run_ranks(3, body):
        if said and way in SEE_EACH_RANK:
            assert "wrong shape \u00fc (3, 4)" in said
            assert all(str(rank) in said for rank in refusing)


def test_very_long_names_and_reasons() -> None:
    def body(rank: int, group: Any) -> None:
        link = link_of(group)
        names = ["\u00e9" * 300 + "a", "b" + "\u00e9" * 300][rank], "x" * 200_000
        with pytest.raises(RankMismatchError):
            exchange(link, torch.ones(3, dtype=torch.float64), Call(wire.FORWARD, names[0]))
        # names that differ only in front of what is sent of them
        with pytest.raises(RankMismatchError):
            exchange(link, torch.ones(3, dtype=torch.float64), Call(wire.FORWARD, f"{rank}" + "m" * 96))
        if rank == 0:
            link.refuse(Call(wire.FORWARD), names[1], 3)
        else:
            with pytest.raises(RankMismatchError, match="xxx"):
                exchange(link, torch.ones(3, dtype=torch.float64), Call(wire.FORWARD))

    run_ranks(2, body)


def test_ranks_out_of_step_in_time() -> None:
    """A quick rank may be an exchange ahead: its next message must not be taken for this one."""

    def body(rank: int, group: Any) -> None:
        for i in range(30):
            if rank == i % 3:
                time.sleep(0.002)
            assert float(exchanged(rank, group, 3)[2][0]) == 2000.0

    run_ranks(3, body)


def test_several_groups_side_by_side() -> None:
    """Rank r of four is in a group of all and in one of two; neither sees the other's messages."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> None:
        half = make_group(dist.PrefixStore(f"half{rank // 2}", store), rank % 2, 2)
        for _ in range(3):
            whole, part = SyncBatchNorm(1, momentum=1.0, process_group=group), SyncBatchNorm(1, momentum=1.0)
            part.process_group = half
            x = torch.full((2, 1), float(rank))
            whole(x), part(x)
            assert whole.running_mean.item() == 1.5
            assert part.running_mean.item() == (0.5 if rank < 2 else 2.5)

    run_ranks(4, body)


def test_a_group_that_is_dropped_can_be_collected() -> None:
    def body(rank: int, group: Any) -> Any:
        SyncBatchNorm(C, process_group=group)(torch.randn(3, C))
        return weakref.ref(group)

    refs = run_ranks(2, body)
    for _ in range(50):
        gc.collect()
        if [ref() for ref in refs] == [None, None]:
            return
        time.sleep(0.1)  # until a thread of a rank has ended
    raise AssertionError(refs)


def test_forced_is_undone() -> None:
    assert not comm.synchronizes(None)
    with comm.forced():
        with comm.forced():
            pass
        assert comm.synchronizes(None)
    assert not comm.synchronizes(None)


def test_forced_is_undone_by_threads_in_any_order() -> None:
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(comm.forced())
        second.enter_context(comm.forced())
        first.close()
        assert comm.synchronizes(None)
    assert not comm.synchronizes(None)


def test_threads_of_the_harness_end() -> None:
    before = threading.active_count()
    assert outcomes(3, lambda rank, group: rank) == [0, 1, 2]
    assert threading.active_count() <= before + 1
