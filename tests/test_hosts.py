"""Two hosts on one machine: network namespaces joined by a pair of virtual Ethernet devices, a torchrun in each.

Whatever passes between the ranks of different hosts goes through that pair, and nothing else does: no loopback, no
shared name resolution. Pulling the cable is setting one end down: packets vanish, and nobody is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.commands import LAUNCHER, ROOT, environment, mpi_version, needs_mpi4py, needs_mpiexec, running

DEADLINE = 60.0
TIMEOUT = 5.0  # of the group whose cable is cut


def why_not() -> str:
    """The reason for which namespaces cannot be had here; empty if they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and ip (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"sbn-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        entered = subprocess.run(["ip", "netns", "exec", name, "true"], capture_output=True, text=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        return f"cannot enter network namespaces: {entered.stderr.strip()}" if entered.returncode else ""
    return f"cannot make network namespaces: {made.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the cable."""

    name: str
    address: str
    device: str

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, timeout=10)

    def running(self, *command: str | Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Python there, and nothing of it after the block."""
        entered = "ip", "netns", "exec", self.name, sys.executable
        return running(*entered, *command, env=environment(GLOO_SOCKET_IFNAME=self.device))


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    pair = [Host(f"sbn-{os.getpid()}-{i}", f"10.77.0.{i + 1}", f"sbn{i}") for i in range(2)]
    try:
        for host in pair:
            subprocess.run(["ip", "netns", "add", host.name], check=True, timeout=10)
        pair[0].ip("link", "add", pair[0].device, "type", "veth", "peer", pair[1].device, "netns", pair[1].name)
        for host in pair:
            host.ip("address", "add", f"{host.address}/24", "dev", host.device)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", host.device, "up")
        yield pair
    finally:
        for host in pair:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False, timeout=10)


@contextlib.contextmanager
def torchruns(hosts: list[Host], ranks: int, *command: str | Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The launcher on each host, as its recipe starts it. None of its processes outlives the block."""
    with contextlib.ExitStack() as stack:
        agents = []
        for host in hosts:
            # The address of neither host is that of its name, by which torchrun would know where the store is.
            meeting = f"is_host={int(host is hosts[0])}"
            options = ["-n", str(ranks), "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "hosts"]
            options += ["--rdzv-endpoint", f"{hosts[0].address}:29400", "--local-addr", host.address]
            options += ["--rdzv-conf", meeting]
            agents.append(stack.enter_context(host.running(*LAUNCHER[1:], *options, *command)))
        yield agents  # whose ranks die with them


@pytest.mark.netns
@pytest.mark.integration
def test_two_hosts_train_like_one_process(hosts: list[Host]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: examples)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: examples)")
    pytest.importorskip("tqdm", reason="tqdm is not installed (extra: examples)")
    with torchruns(hosts, 2, ROOT / "examples" / "equivalence.py", "--steps", "20") as agents:
        ends = [agent.communicate(timeout=DEADLINE) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    out = "".join(out for out, _ in ends)
    assert "4 ranks against one process" in out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| float")]
    assert len(rows) == 6 and all(row[-1].strip() == "yes" for row in rows), out
    assert sum(row[1].strip() == "SyncBN" for row in rows) == 4


EXCHANGING = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
import syncbn
from syncbn import comm

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
for limit in (32, 2):
    comm.ONE_HOP_LIMIT = limit
    group = dist.new_group()
    for channels in (5, 9000):
        seeds = [torch.Generator().manual_seed(r) for r in range(world)]
        xs = [torch.randn(3, channels, dtype=torch.float64, generator=seed) for seed in seeds]
        layer = syncbn.SyncBatchNorm(channels, process_group=group).double()
        alone = torch.nn.BatchNorm1d(channels).double()
        for _ in range(10):
            torch.testing.assert_close(layer(xs[rank]), alone(torch.cat(xs))[3 * rank :][:3], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, alone.running_var, rtol=1e-12, atol=1e-12)
    link = comm.link_of(group, torch.device("cpu"))
    seen = f"{os.environ['GROUP_RANK']} {link._carrier.by_socket}"
    (Path(sys.argv[1]) / f"seen-{limit}-{rank}").write_text(seen)
dist.barrier()
"""


@pytest.mark.netns
@pytest.mark.integration
def test_ranks_of_a_host_meet_by_socket_and_hosts_over_gloo(hosts: list[Host], tmp_path: Path) -> None:
    """In one exchange; above the limit, by way of each host's lowest rank."""
    script = tmp_path / "exchanging.py"
    script.write_text(EXCHANGING)
    with torchruns(hosts, 3, script, tmp_path) as agents:
        ends = [agent.communicate(timeout=DEADLINE) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    for limit in (32, 2):
        seen = [path.read_text().split(maxsplit=1) for path in sorted(tmp_path.glob(f"seen-{limit}-*"))]
        ranks = [[rank for rank, (host, _) in enumerate(seen) if host == str(number)] for number in range(2)]
        assert [len(of_host) for of_host in ranks] == [3, 3]
        for of_host in ranks:
            for rank in of_host:
                peers = [peer for peer in of_host if peer != rank]
                led = limit == 2 and rank != of_host[0]
                assert seen[rank][1] == str((of_host[0],) if led else tuple(peers))


TRAINING = """
import datetime, json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import syncbn

folder, timeout = Path(sys.argv[1]), float(sys.argv[2])
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
torch.manual_seed(0)
layers = [torch.nn.Linear(8, 16), syncbn.SyncBatchNorm(16, process_group=group), torch.nn.ReLU()]
layers += [torch.nn.Linear(16, 16), syncbn.SyncBatchNorm(16, process_group=group)]
net = torch.nn.Sequential(*layers)
for step in range(1_000_000):
    try:
        net(torch.randn(4, 8)).square().mean().backward()
    except syncbn.PeerLostError as error:
        record = {"at": time.monotonic(), "steps": step, "message": str(error), "host": os.environ["GROUP_RANK"]}
        (folder / f"lost-{rank}.tmp").write_text(json.dumps(record))
        (folder / f"lost-{rank}.tmp").rename(folder / f"lost-{rank}")
        time.sleep(3)  # the agent ends the other rank of its host as soon as one has failed
        os._exit(7)
    if step == 20:
        (folder / f"training-{rank}").touch()
"""


def await_files(folder: Path, pattern: str, count: int, seconds: float, agents: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"{sorted(path.name for path in folder.iterdir())} after {seconds} s"
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents]
        time.sleep(0.02)


@pytest.mark.netns
@pytest.mark.integration
@pytest.mark.parametrize("end", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cut_cable_is_a_lost_peer_on_every_rank(hosts: list[Host], tmp_path: Path, end: int) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    with torchruns(hosts, 2, script, tmp_path, str(TIMEOUT)) as agents:
        await_files(tmp_path, "training-?", 4, DEADLINE, agents)
        assert not list(tmp_path.glob("lost-*"))
        hosts[end].ip("link", "set", hosts[end].device, "down")
        cut = time.monotonic()
        await_files(tmp_path, "lost-?", 4, TIMEOUT + 5, agents)
        hosts[end].ip("link", "set", hosts[end].device, "up")  # the agents have a store to say goodbye to
        errors = [agent.communicate(timeout=DEADLINE)[1] for agent in agents]
    lost = [json.loads((tmp_path / f"lost-{rank}").read_text()) for rank in range(4)]
    assert sorted(record["host"] for record in lost) == ["0", "0", "1", "1"]
    for record in lost:
        assert TIMEOUT - 1 < record["at"] - cut < TIMEOUT + 1, lost
        assert "lost a peer after" in record["message"], lost
    assert [agent.returncode for agent in agents] == [1, 1], errors
    for text in errors:
        assert "ended with code 7" in text and "SIGABRT" not in text, text


# What MPICH's mpiexec calls instead of ssh: [-x] host command. A name of its own makes it a host of its own for MPI,
# and a name that is an address needs no resolver.
ENTER = """#!/bin/sh
[ "$1" = -x ] && shift
host=$1; shift
case $host in {cases} esac
exec ip netns exec $name unshare --uts sh -c "hostname $host; exec $*"
"""

OVER_MPI = """
import os, socket, sys
from pathlib import Path
import torch, torch.distributed as dist
import syncbn, syncbn.mpi

dist.init_process_group("mpi4py")
rank, world = dist.get_rank(), dist.get_world_size()
xs = [torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(world)]
layer, alone = syncbn.SyncBatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
for _ in range(20):
    torch.testing.assert_close(layer(xs[rank]), alone(torch.cat(xs))[3 * rank :][:3], rtol=1e-12, atol=1e-12)
torch.testing.assert_close(layer.running_var, alone.running_var, rtol=1e-12, atol=1e-12)
devices = ",".join(name for _, name in socket.if_nameindex())
seen = f"rank {rank} of {world} local {os.environ['LOCAL_RANK']} devices {devices}"
(Path(sys.argv[1]) / f"seen-{rank}").write_text(seen)  # lines of several ranks may mix on the way to stdout
"""


@pytest.mark.netns
@pytest.mark.mpi
@needs_mpi4py
@needs_mpiexec
@pytest.mark.integration
def test_two_hosts_over_mpi(hosts: list[Host], tmp_path: Path) -> None:
    if shutil.which("unshare") is None or shutil.which("hostname") is None:
        pytest.skip("needs unshare and hostname")
    if "HYDRA" not in mpi_version():
        pytest.skip("needs MPICH's mpiexec, whose way to another host can be replaced by a script")
    script, enter = tmp_path / "over_mpi.py", tmp_path / "enter"
    script.write_text(OVER_MPI)
    enter.write_text(ENTER.format(cases=" ".join(f"{host.address}) name={host.name};;" for host in hosts)))
    enter.chmod(0o755)
    options = ["--engine", "mpi", "-n", "4", "-hosts", ",".join(host.address for host in hosts), "-ppn", "2"]
    options += ["-launcher", "ssh", "-launcher-exec", str(enter), "-localhost", hosts[0].address]
    with hosts[0].running(*LAUNCHER[1:], *options, script, tmp_path) as job:
        out, err = job.communicate(timeout=DEADLINE)
    assert job.returncode == 0, err
    seen = [path.read_text() for path in sorted(tmp_path.glob("seen-*"))]
    assert seen == [f"rank {r} of 4 local {r % 2} devices lo,{hosts[r // 2].device}" for r in range(4)], out + err
