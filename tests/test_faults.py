"""Faults on one rank: which error on which ranks, that its text names the layer, and that nobody waits or aborts."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from helpers.commands import mpiexec, needs_mpi4py, needs_mpiexec
from helpers.faults import run_faulty
from helpers.links import SEE_EACH_RANK, Arrival, Late, connect, link_of
from helpers.oracle import close
from helpers.processes import run_processes
from helpers.ranks import outcomes, run_ranks
from programs import faults
from programs.faults import DIFFERENT_CALLS, Different, Fault, all_different, batch, train
from syncbn.comm.base import checks
from syncbn.steps import vote

TIMEOUT = 1.0
WORLDS = (2, 3)


def check_lost(reports: list[dict[str, Any]], fault: Fault, direction: str, layer: str, timeout: float) -> None:
    """Every rank but the faulty one lost its peer in this layer, in time, and says which peer."""
    for rank, report in enumerate(reports):
        if rank == fault.rank:
            continue
        assert report["error"] == "PeerLostError", report
        assert report["step"] == fault.step
        assert f"{direction} of layer {layer!r} (8 channels" in report["text"]
        assert f"Not arrived: rank {fault.rank}." in report["text"]
        assert f"This is rank {rank} of a group of {len(reports)}" in report["text"]
        assert "What is known: " in report["text"]
        assert report["seconds"] < timeout + 1.0


# ---- ranks that make different calls


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", DIFFERENT_CALLS, ids=Different.name)
def test_different_calls(way: str, world: int, case: Different) -> None:
    reports = outcomes(world, train, case.fault(world), timeout=TIMEOUT)
    case.check(reports, way in SEE_EACH_RANK)
    assert all(report["seconds"] < 1.0 for report in reports)


@pytest.mark.mpi
@needs_mpi4py
@needs_mpiexec
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_different_calls_over_mpi(world: int) -> None:
    done = mpiexec(world, "faults.py")
    assert done.returncode == 0 and done.stdout.count(f"{len(DIFFERENT_CALLS)} checked") == world, done.stdout


@pytest.mark.integration
def test_different_calls_of_compiled_models(tmp_path: Path) -> None:
    for case, *reports in zip(DIFFERENT_CALLS, *run_processes(2, all_different, tmp_path), strict=True):
        case.check(reports, sees_each_rank=True)


@pytest.mark.parametrize("world", WORLDS)
def test_wrong_input_on_one_rank(way: str, world: int) -> None:
    fault = Fault("channels", rank=0)
    reports = outcomes(world, train, fault, timeout=TIMEOUT)
    assert reports[0]["error"] == "ValueError"
    assert "expected 8 channels" in reports[0]["text"] and "got 7" in reports[0]["text"]
    for report in reports[1:]:
        assert report["error"] == "RankMismatchError"
        assert "forward of layer 'bn2'" in report["text"]
        assert "rank 0 could not make the call" in report["text"]
        if way in SEE_EACH_RANK:
            assert "expected 8 channels" in report["text"]


def test_the_group_stays_usable_after_a_mismatch(way: str) -> None:
    def body(rank: int, group: Any) -> torch.Tensor:
        layers = [syncbn.SyncBatchNorm(4, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        with pytest.raises(syncbn.RankMismatchError, match="forward of layer"):
            layers[rank](torch.ones(2, 4))
        layers[0](torch.tensor([[float(rank)] * 4]))
        assert layers[0].running_mean is not None
        return layers[0].running_mean

    for mean in run_ranks(2, body, timeout=TIMEOUT):
        close(mean, torch.full((4,), 0.05), 1e-6, 0, "running mean")


def test_statistics_are_untouched_by_a_mismatch(way: str) -> None:
    def body(rank: int, group: Any) -> list[torch.Tensor]:
        layer = syncbn.SyncBatchNorm(4, process_group=group)
        layer.layer_name = str(rank)
        with pytest.raises(syncbn.RankMismatchError):
            layer(torch.randn(3, 4))
        return [layer.get_buffer(name) for name in ("running_mean", "running_var", "num_batches_tracked")]

    for mean, var, count in run_ranks(2, body, timeout=TIMEOUT):
        assert mean.eq(0).all() and var.eq(1).all() and count == 0


# ---- values that differ, and are right


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["none", "empty", "dtype"])
def test_no_fault(way: str, world: int, kind: str) -> None:
    """An empty batch or another dtype on one rank: right numbers on all, equal statistics."""
    fault = Fault(kind, rank=world - 1)
    reports = run_ranks(world, train, fault, timeout=TIMEOUT)
    assert [report["error"] for report in reports] == [None] * world
    for report in reports[1:]:
        for name, value in report["state"].items():
            if "running" in name or "num_batches" in name:
                assert torch.equal(value, reports[0]["state"][name]), name
    # (Without an optimizer the steps see equal weights.)
    torch.manual_seed(0)
    net = faults.Net().double()
    for step in range(faults.STEPS):
        parts = [batch(rank, step, fault).double() for rank in range(world)]
        whole = net(torch.cat(parts)).split([len(part) for part in parts])
        bound = 0.1 if kind == "dtype" and step == fault.step else 2e-5
        for rank, report in enumerate(reports):
            close(report["outputs"][step], whole[rank].detach(), bound, bound, f"rank {rank}, step {step}")
    bound = 0.02 if kind == "dtype" else 1e-5
    for name, value in net.state_dict().items():
        if "running" in name:
            close(reports[0]["state"][name], value, bound, bound, name)


@pytest.mark.parametrize("world", WORLDS)
def test_not_finite_on_one_rank(way: str, world: int) -> None:
    """NaN goes on to the outputs; running statistics stay finite; one warning for each layer names it and the rank."""
    fault = Fault("nan", rank=world - 1)
    with pytest.warns(RuntimeWarning) as warned:
        reports = run_ranks(world, train, fault, timeout=TIMEOUT)
    for report in reports:
        assert report["error"] is None
        assert report["outputs"][fault.step].isnan().any()
        assert not report["outputs"][fault.step + 1].isnan().any()
        assert all(value.isfinite().all() for name, value in report["state"].items() if "running" in name)
        assert all(torch.equal(value, reports[0]["state"][name]) for name, value in report["state"].items())
    texts = [str(warning.message) for warning in warned]
    # bn2 meets the NaN of one rank. Its output is not finite on any rank, and so all of them bring some to bn3.
    everyone = "rank " + ", ".join(map(str, range(world))) if way in SEE_EACH_RANK else f"{world} ranks of {world}"
    for layer, who in (("bn2", f"rank {fault.rank}"), ("bn3", everyone)):
        said = [text for text in texts if f"layer {layer!r}" in text]
        assert len(said) == world, said  # each rank says it once
        assert all(f"they came from {who}. " in text and "not finite" in text for text in said)
    assert len(texts) == 2 * world


def test_gradscaler_overflow_leaves_finite_statistics(way: str) -> None:
    """A loss scaler skips the step that overflowed and goes on with half the scale; statistics stay finite."""

    def body(rank: int, group: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        with faults.BUILDING:
            torch.manual_seed(0)
            net = faults.Net()
        syncbn.convert_sync_batchnorm(net, group)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        scales = []
        for step in range(4):
            x = batch(rank, step)
            if step == 1 and rank == 0:
                x = x * 1e38 * 1e2  # overflows in the first linear layer
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            for parameter in net.parameters():  # as DistributedDataParallel would
                group.allreduce([parameter.grad], dist.AllreduceOptions()).wait()
                parameter.grad.div_(2)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, {name: value.clone() for name, value in net.state_dict().items()}

    with pytest.warns(RuntimeWarning, match="not finite") as warned:
        results = run_ranks(2, body, timeout=TIMEOUT)
    for scales, state in results:
        assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
        assert all(value.isfinite().all() for value in state.values())
        assert all(torch.equal(value, results[0][1][name]) for name, value in state.items())
    assert sum("'bn1'" in str(w.message) and "rank 0." in str(w.message) for w in warned) == 2
    assert len(warned) == 6  # three layers on two ranks


# ---- ranks that do not come


# layer in which the others wait, by phase (the fault is in bn2)
WAITING = {"forward": ("forward", "bn2"), "between": ("backward", "bn3"), "backward": ("backward", "bn2")}


@pytest.mark.parametrize("phase", WAITING)
@pytest.mark.parametrize("world", WORLDS)
def test_exception_on_one_rank(way: str, world: int, phase: str) -> None:
    """The exception stays what it is on its rank; the others lose a peer (here the group outlives its rank)."""
    fault = Fault("exception", phase, rank=world - 1)
    reports = outcomes(world, train, fault, timeout=TIMEOUT)
    assert reports[fault.rank]["error"] == "Planned"
    check_lost(reports, fault, *WAITING[phase], TIMEOUT)


@pytest.mark.parametrize("phase", WAITING)
@pytest.mark.parametrize("world", WORLDS)
def test_a_peer_in_another_collective(world: int, phase: str) -> None:
    """A peer that averages gradients meanwhile (one hop: its message and ours never mix)."""
    fault = Fault("collective", phase, rank=world - 1)
    reports = outcomes(world, train, fault, timeout=TIMEOUT)
    assert reports[fault.rank]["error"] == "RuntimeError"  # its collective lost its peers
    assert reports[fault.rank]["seconds"] < TIMEOUT + 1.0
    check_lost(reports, fault, *WAITING[phase], TIMEOUT)


def test_a_model_in_eval_mode_on_one_rank(way: str) -> None:
    def body(rank: int, group: Any) -> str:
        model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), group)
        model.train(rank == 0)
        if rank == 0:
            with pytest.raises(syncbn.PeerLostError) as caught:
                model(torch.ones(2, 4))
            return str(caught.value)
        model(torch.ones(2, 4))
        time.sleep(TIMEOUT + 0.5)  # keeps the connection open
        return ""

    text = run_ranks(2, body, timeout=TIMEOUT)[0]
    assert "forward of layer '0'" in text and "Not arrived: rank 1." in text


def test_a_dead_group_stays_dead(way: str) -> None:
    def body(rank: int, group: Any) -> list[str]:
        layer = syncbn.SyncBatchNorm(4, process_group=group)
        if rank == 1:
            return []
        texts = []
        for name in ("first", "second"):
            layer.layer_name = name
            with pytest.raises(syncbn.PeerLostError) as caught:
                layer(torch.ones(2, 4))
            texts.append(str(caught.value))
        return texts

    first, second = run_ranks(2, body, timeout=TIMEOUT)[0]
    assert "forward of layer 'first'" in first
    assert "forward of layer 'second'" in second and "cannot be used any more" in second
    assert "lost a peer in forward of layer 'first'" in second


@pytest.mark.slow  # in its process a thread of gloo works on connections that are gone, and takes a core, until it ends
def test_a_rank_that_hung_up_first_is_not_blamed(way: str) -> None:
    """Rank 2 is gone; rank 1 finds out, and hangs up before rank 0 comes: rank 0 names rank 2 alone."""
    hung_up = threading.Event()

    def body(rank: int, group: Any) -> str:
        if rank == 2:
            return ""
        if rank == 0:
            hung_up.wait(10.0)
        try:
            syncbn.SyncBatchNorm(4, process_group=group)(torch.ones(2, 4))
        except syncbn.PeerLostError as error:
            return str(error)
        raise AssertionError

    def run(rank: int, group: Any) -> str:
        text = body(rank, group)
        del group
        if rank == 1:
            time.sleep(0.2)  # for the connections to be closed
            hung_up.set()
        return text

    texts = run_ranks(3, run, timeout=TIMEOUT)
    assert "Not arrived: rank 2." in texts[0], texts[0]


# ---- processes


@pytest.mark.integration
@pytest.mark.parametrize("phase", WAITING)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "code"), [("exit", 3), ("kill", -signal.SIGKILL), ("exception", 1)])
def test_a_process_ends(tmp_path: Path, kind: str, code: int, world: int, phase: str) -> None:
    """The others hear of it at once, through the closed connection, and end with an exception."""
    fault = Fault(kind, phase, rank=world - 1)
    ranks = run_faulty(world, fault, tmp_path, timeout=10.0)
    assert [rank.code for rank in ranks] == [1] * (world - 1) + [code]
    check_lost([rank.report for rank in ranks], fault, *WAITING[phase], timeout=1.0)


@pytest.mark.integration
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["exit", "kill"])
def test_a_process_ends_under_all_reduce(tmp_path: Path, kind: str, world: int) -> None:
    fault = Fault(kind, "backward", rank=world - 1)
    ranks = run_faulty(world, fault, tmp_path, timeout=10.0, way="all-reduce")
    assert [rank.code for rank in ranks] == [1] * (world - 1) + [3 if kind == "exit" else -signal.SIGKILL]
    check_lost([rank.report for rank in ranks], fault, "backward", "bn2", timeout=1.0)


@pytest.mark.integration
@pytest.mark.parametrize("phase", WAITING)
@pytest.mark.parametrize("world", WORLDS)
def test_a_process_stops(tmp_path: Path, world: int, phase: str) -> None:
    """The others wait for the timeout. Woken up after that, the stopped rank finds itself alone, and ends as well."""
    fault = Fault("stop", phase, rank=world - 1)
    ranks = run_faulty(world, fault, tmp_path, timeout=TIMEOUT)
    assert [rank.code for rank in ranks] == [1] * world
    check_lost([rank.report for rank in ranks], fault, *WAITING[phase], TIMEOUT)
    assert ranks[fault.rank].report["error"] == "PeerLostError"
    assert " of layer 'bn" in ranks[fault.rank].report["text"]


@pytest.mark.integration
@pytest.mark.parametrize("phase", WAITING)
def test_a_process_stops_for_a_moment(tmp_path: Path, phase: str) -> None:
    """Less than the timeout: nothing happens."""
    ranks = run_faulty(3, Fault("stop", phase), tmp_path, timeout=20.0, wake=0.3)
    assert [rank.code for rank in ranks] == [0, 0, 0]
    assert [rank.report["error"] for rank in ranks] == [None] * 3


# ---- a device: its checks come late


def _two_layers(group: Any) -> list[syncbn.SyncBatchNorm]:
    connect(group, Late(group, torch.device("cpu")))
    layers = [syncbn.SyncBatchNorm(4, process_group=group) for _ in range(2)]
    for name, layer in zip("ab", layers, strict=True):
        layer.layer_name = name
    return layers


@pytest.mark.parametrize("how", ["later exchange", "settle"])
def test_a_device_finds_out_later(how: str) -> None:
    """The first exchange after the slots arrived raises, and names the exchange in which the ranks differed."""
    Arrival.arrived = False

    def body(rank: int, group: Any) -> str:
        layers = _two_layers(group)
        layers[0](torch.ones(2, 4) * torch.arange(2.0)[:, None])
        layers[rank](torch.ones(2, 4) * torch.arange(2.0)[:, None])  # differ: nobody has looked yet
        layers[0](torch.ones(2, 4) * torch.arange(2.0)[:, None])
        group.barrier().wait()
        Arrival.arrived = True
        with pytest.raises(syncbn.RankMismatchError) as caught:
            if how == "settle":
                link_of(group).settle()
            else:
                layers[0](torch.ones(2, 4))
        return str(caught.value)

    for rank, text in enumerate(run_ranks(2, body, timeout=TIMEOUT)):
        assert f"This is rank {rank}: forward of layer {'ab'[rank]!r}" in text and "call 1)" in text


def test_a_device_may_be_told_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_CHECKS", "sync")

    def body(rank: int, group: Any) -> None:
        layers = _two_layers(group)
        with pytest.raises(syncbn.RankMismatchError, match="forward of layer"):
            layers[rank](torch.ones(2, 4) * torch.arange(2.0)[:, None])

    run_ranks(2, body, timeout=TIMEOUT)


# ---- the switch


def test_checks_off_compares_nothing_and_hears_refusals(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other implementations do: layers of equal width mix. A rank that gave up is heard all the same."""
    monkeypatch.setenv("SYNCBN_CHECKS", "off")

    def body(rank: int, group: Any) -> torch.Tensor:
        layers = [syncbn.SyncBatchNorm(4, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        layers[rank](torch.full((1, 4), float(rank)))
        error = ValueError if rank == 0 else syncbn.RankMismatchError
        with pytest.raises(error):
            layers[0](torch.ones(2, 3 if rank == 0 else 4))
        mean = layers[rank].running_mean
        assert mean is not None
        return mean

    for mean in run_ranks(2, body, timeout=TIMEOUT):
        close(mean, torch.full((4,), 0.05), 1e-6, 0, "mixed mean")


def test_checks_off_never_aborts_on_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first message come the rests of wide ones: of different lengths they would abort the process."""
    monkeypatch.setenv("SYNCBN_CHECKS", "off")

    def body(rank: int, group: Any) -> None:
        with pytest.raises(syncbn.RankMismatchError, match=r"12000 channels.*9000 channels"):
            syncbn.SyncBatchNorm((12000, 9000)[rank], process_group=group)(torch.randn(2, (12000, 9000)[rank]))

    run_ranks(2, body, timeout=TIMEOUT)


def test_values_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, means in [("ON", "on"), ("sync", "sync"), ("", "on"), ("off", "off")]:
        monkeypatch.setenv("SYNCBN_CHECKS", value)
        assert checks() == means
    monkeypatch.setenv("SYNCBN_CHECKS", "of")
    with pytest.raises(ValueError, match="SYNCBN_CHECKS must be on, off or sync, got 'of'"):
        checks()


NONSENSE = {
    "SYNCBN_CHECKS": "SYNCBN_CHECKS must be on, off or sync, got 'of'",
    "SYNCBN_SOCKETS": "SYNCBN_SOCKETS must be on or off, got 'of'",
    "SYNCBN_GATHER": "SYNCBN_GATHER must be a number of ranks, 0 or more, got 'of'",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_value_that_the_switch_does_not_have(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised on every rank in its first exchange."""
    monkeypatch.setenv(name, "of")

    def body(rank: int, group: Any) -> None:
        with pytest.raises(ValueError, match=NONSENSE[name]):
            syncbn.SyncBatchNorm(4, process_group=group)(torch.ones(2, 4))

    run_ranks(2, body, timeout=TIMEOUT)


@pytest.mark.parametrize("name", NONSENSE)
def test_a_value_that_one_rank_alone_does_not_have(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peers do not wait for it: they hear of it in each exchange, whoever makes it."""
    made = threading.Barrier(2)

    def body(rank: int, group: Any) -> None:
        if rank == 0:
            monkeypatch.setenv(name, "of")
            link_of(group)
            monkeypatch.delenv(name)
        made.wait()
        layer = syncbn.SyncBatchNorm(4, process_group=group)
        own = NONSENSE[name]
        theirs = own if way in SEE_EACH_RANK else "rank 0 could not make the call"
        for _ in range(2):
            with pytest.raises(
                ValueError if rank == 0 else syncbn.RankMismatchError, match=own if rank == 0 else theirs
            ):
                layer(torch.ones(2, 4))
        with pytest.raises(ValueError, match=own) if rank == 0 else contextlib.nullcontext():
            assert not vote(True, process_group=group)

    run_ranks(2, body, timeout=TIMEOUT)


def test_a_link_keeps_the_switch_that_it_was_made_with(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switched = threading.Barrier(2)

    def body(rank: int, group: Any) -> None:
        layers = [syncbn.SyncBatchNorm(4, process_group=group) for _ in range(2)]
        for name, layer in zip("ab", layers, strict=True):
            layer.layer_name = name
        layers[0](torch.ones(2, 4))
        if switched.wait() == 0:
            monkeypatch.setenv("SYNCBN_CHECKS", "off")
        switched.wait()
        with pytest.raises(syncbn.RankMismatchError):
            layers[rank](torch.ones(2, 4))

    run_ranks(2, body, timeout=TIMEOUT)


# ---- before training: whether the ranks' layers agree


def _net(rank: int, difference: str) -> nn.Module:
    odd = rank == 1
    layers = {"first": nn.BatchNorm1d(8), "second": nn.BatchNorm1d(16 if odd and difference == "width" else 8)}
    if odd and difference == "order":
        layers = dict(reversed(layers.items()))
    if odd and difference == "missing":
        del layers["second"]
    if odd and difference == "name":
        layers = {"first": layers["first"], "other": layers["second"]}
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.ModuleDict(layers)))
    layer: Any
    for layer in list(net.modules())[-1:]:
        if odd and difference == "eps":
            layer.eps = 1e-3
        if odd and difference == "momentum":
            layer.momentum = None
        if odd and difference == "mode":
            layer.eval()
        if odd and difference == "activation":
            layer.activation = "relu"
    return net


DIFFERENCES = {
    "name": (1, '"name": "0.second"', '"name": "0.other"'),
    "width": (1, '"num_features": 8', '"num_features": 16'),
    "order": (0, '"name": "0.first"', '"name": "0.second"'),
    "missing": (1, '"name": "0.second"', "no further layer"),
    "eps": (1, '"eps": 1e-05', '"eps": 0.001'),
    "momentum": (1, '"momentum": 0.1', '"momentum": null'),
    "mode": (1, '"training": true', '"training": false'),
    "activation": (1, '"activation": null', '"activation": "relu"'),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_check_ranks_agree_names_the_first_difference(difference: str) -> None:
    position, theirs, odd = DIFFERENCES[difference]

    def body(rank: int, group: Any) -> str:
        with pytest.raises(syncbn.RankMismatchError) as caught:
            syncbn.check_ranks_agree(_net(rank, difference), group)
        return str(caught.value)

    texts = run_ranks(3, body, timeout=TIMEOUT)
    for text in texts:
        assert f"first at position {position}: rank 0, 2: " in text
        both = text.partition("; rank 1: ")
        assert theirs in both[0] and odd in both[2]


def test_check_ranks_agree_passes_and_names_layers() -> None:
    def body(rank: int, group: Any) -> list[str]:
        net = nn.Sequential(nn.Linear(4, 8), syncbn.SyncBatchNorm(8, process_group=group))
        syncbn.check_ranks_agree(net, group)
        syncbn.check_ranks_agree(nn.Linear(2, 2), group)  # no layers at all
        layer: Any = net[1]
        return [layer.layer_name]

    assert run_ranks(3, body, timeout=TIMEOUT) == [["1"]] * 3
