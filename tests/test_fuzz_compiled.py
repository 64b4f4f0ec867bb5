"""Random compiled programs with branches, checkpoints and uneven batches, against the whole batch.

Long runs: ``make fuzz``. A failure prints its seed, which ``draw`` makes the same program of.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import run_processes
from test_compile_order import CHECKPOINTS, WAYS, check, ranks_train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def draw(seed: int) -> tuple[int, list[tuple[int, ...]], dict[str, Any]]:
    """Number of ranks, their batches in each step (0 to 5 samples, not one value in all), and how they are compiled."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 2, 3])
    sizes = [tuple(rng.choice([0, 1, 2, 4, 5]) for _ in range(ranks)) for _ in range(rng.randint(2, 4))]
    sizes = [at if sum(at) > 1 else (*at[:-1], 3) for at in sizes]
    checkpoints = rng.choice(list(CHECKPOINTS))
    options: dict[str, Any] = {
        "checkpoints": checkpoints,
        "backend": "aot_eager",
        "dynamic": rng.choice([None, True, False]),
        "way": rng.choice(WAYS),
    }
    if checkpoints == "no checkpoint" and options["way"] != "device" and rng.random() < 0.5:
        options["eager"] = (rng.randrange(ranks),)
    return ranks, sizes, options


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_fuzz_compiled_programs_train_like_the_whole_batch(tmp_path: Path, seed: int) -> None:
    ranks, sizes, options = draw(seed)
    print(f"seed {seed}: {ranks} ranks, batches {sizes}, {options}")
    results = run_processes(ranks, ranks_train, tmp_path, sizes, options, deadline=900.0, timeout=850.0)
    check(results, sizes, options["checkpoints"])
