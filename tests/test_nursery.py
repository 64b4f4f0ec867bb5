"""The ranks that tests fork find what the launcher's find, and a job ends as the launcher's does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.commands import launch

SHOW = """
import os, sys, warnings
import torch.distributed as dist
dist.init_process_group("gloo")
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"
found = [os.environ.get(name) for name in names]
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, found)
if dist.get_rank() == 0:
    print(everyone, sys.argv, os.getcwd(), __name__, sys.path[0], flush=True)
    warnings.warn("it is shown", DeprecationWarning)
dist.destroy_process_group()
"""


def test_ranks_find_what_the_launchers_find(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    forked, started = (launch(2, script, "a", "b", cwd=tmp_path, really=really) for really in (False, True))
    assert forked.returncode == started.returncode == 0, forked.stderr + started.stderr
    assert forked.stdout == started.stdout and f"{script}" in forked.stdout
    assert "it is shown" in forked.stderr and "it is shown" in started.stderr


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    """The others would sleep for longer than a job may take."""
    script = tmp_path / "fails.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1':\n    raise KeyError('here')\ntime.sleep(300)\n")
    done = launch(3, script)
    assert done.returncode == 1 and re.search(r"KeyError: 'here'\n$", done.stderr)
    assert done.stderr.count("Traceback") == 1


def test_a_job_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text("import sys, time\nprint('begun', flush=True)\ntime.sleep(float(sys.argv[1]))\n")
    with pytest.raises(pytest.fail.Exception, match=r"not done after 1.0 s:\nbegun"):
        launch(1, script, "60", deadline=1.0)
    assert launch(1, script, "0").stdout == "begun\n"
