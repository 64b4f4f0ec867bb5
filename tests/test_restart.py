"""A rank is killed, ``syncbn-launch --max-restarts`` starts all again, and training ends with the same weights."""

import socket
from pathlib import Path

import pytest
import torch

from helpers.commands import LAUNCHER, Done, environment, run, running

STEPS = 12

# Plain torch on purpose: what is tested is the launcher. One step per loop, a checkpoint after each.
SCRIPT = '''
import gc, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS = 12
kills, checkpoint, final = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

def die(where):
    """Another rank and another moment in each attempt."""
    moments = ["in a step", "in the backward", "before joining", "after joining"]
    if attempt < kills and rank == attempt % 2 and where == moments[attempt % 4]:
        os.kill(os.getpid(), signal.SIGKILL)

die("before joining")
# The ranks of a new attempt do not come at the same time: the first finds in the store what is there by then.
time.sleep(0.5 if attempt > 0 and rank == attempt % 2 else 0)
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
die("after joining")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
start = 0
if checkpoint.exists():
    state = torch.load(checkpoint)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    start = state["step"]
model = DistributedDataParallel(net)
for step in range(start, STEPS):
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    if step == min(start + 1, STEPS - 1):
        die("in a step")
        loss.register_hook(lambda g: die("in the backward"))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0 and step < STEPS - 1:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
if rank == 0:
    torch.save(net.state_dict(), final)
    print(f"done in attempt {attempt}", flush=True)
del model, loss
gc.collect()  # DistributedDataParallel that outlives its group aborts or hangs now and then
dist.destroy_process_group()
'''


def train(directory: Path, kills: int, max_restarts: int, deadline: float) -> Done:
    script = directory / "train.py"
    script.write_text(SCRIPT)
    command = [*LAUNCHER, "-n", "2", "--max-restarts", str(max_restarts), str(script)]
    command += [str(kills), str(directory / f"checkpoint{kills}"), str(directory / f"final{kills}")]
    return run(*command, deadline=deadline)


def uninterrupted(steps: int) -> dict[str, torch.Tensor]:
    """The weights after as many steps, both ranks in this process. Halves and sums of two are exact in any order."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(2):
            x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
            ((net(x) - x.sum(1, keepdim=True)).square().mean() / 2).backward()
        optimizer.step()
    return net.state_dict()


def assert_recovers(directory: Path, kills: int, deadline: float) -> None:
    """As many restarts as kills: an attempt that fails for another reason would be one too many."""
    result = train(directory, kills, kills, deadline)
    assert result.returncode == 0, result.stderr
    assert f"done in attempt {kills}" in result.stdout
    expected, found = uninterrupted(STEPS), torch.load(directory / f"final{kills}")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.integration
def test_recovers_from_kills(tmp_path: Path) -> None:
    assert_recovers(tmp_path, 2, 100)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak_recovers_from_twenty_kills_of_twenty(tmp_path: Path) -> None:
    assert_recovers(tmp_path, 20, 800)


# Two hosts acted by one, a rank on each. The agents count restarts differently: only one of them had a failure.
HOSTS_SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist

rank, killed = int(os.environ["RANK"]), Path(sys.argv[1])
again = killed.exists()
time.sleep(0.5 * rank)
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
message = torch.ones(4)
dist.all_reduce(message)
if rank == 1 and not again:
    killed.touch()
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(message)
print("sum", message[0].item(), "restarts", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
dist.destroy_process_group()
"""


@pytest.mark.integration
def test_recovers_on_two_hosts(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(HOSTS_SCRIPT)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [*LAUNCHER, "-n", "1", "--nnodes", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += [str(script), str(tmp_path / "killed")]
    variables = environment(GLOO_SOCKET_IFNAME="lo")
    with running(*command, env=variables) as first, running(*command, env=variables) as second:
        agents = [first, second]
        ends = [agent.communicate(timeout=90) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert sum(out.count("sum 4.0") for out, _ in ends) == 2


@pytest.mark.integration
def test_gives_up_after_the_last_restart(tmp_path: Path) -> None:
    result = train(tmp_path, 1, 0, 60)
    assert result.returncode != 0
    assert "done" not in result.stdout
