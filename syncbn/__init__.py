"""Synchronized batch normalization: every rank normalizes with the statistics of the global mini-batch."""

from typing import Any

from syncbn import accumulation, functional, masked, steps, uneven
from syncbn.agreement import check_ranks_agree
from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.errors import PeerLostError, RankMismatchError
from syncbn.modules import SyncBatchNorm
from syncbn.population import update_population_stats
from syncbn.statistics import Statistics, merge_running_statistics

__all__ = [
    "PeerLostError",
    "RankMismatchError",
    "Statistics",
    "SyncBatchNorm",
    "accumulation",
    "check_ranks_agree",
    "convert_sync_batchnorm",
    "diagnostics",
    "functional",
    "masked",
    "merge_running_statistics",
    "revert_sync_batchnorm",
    "steps",
    "uneven",
    "update_population_stats",
]


def __getattr__(name: str) -> Any:
    """``__version__`` and ``diagnostics``, which are found at their first use."""
    import importlib

    if name == "__version__":
        return importlib.import_module("syncbn._version").version()
    if name == "diagnostics":
        return importlib.import_module("syncbn.diagnostics")
    raise AttributeError(f"module 'syncbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
