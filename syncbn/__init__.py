"""Synchronized batch normalization: every rank normalizes with the statistics of the global mini-batch."""

from syncbn import accumulation, functional, masked, steps, uneven
from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.header import PeerLostError, RankMismatchError
from syncbn.manifest import check_ranks_agree
from syncbn.modules import SyncBatchNorm
from syncbn.population import update_population_stats

__all__ = [
    "PeerLostError",
    "RankMismatchError",
    "SyncBatchNorm",
    "accumulation",
    "check_ranks_agree",
    "convert_sync_batchnorm",
    "functional",
    "masked",
    "revert_sync_batchnorm",
    "steps",
    "uneven",
    "update_population_stats",
]
