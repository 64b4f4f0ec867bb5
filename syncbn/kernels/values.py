"""The statistics of a batch as a value, in float64 throughout, whatever the dtype of the batch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from syncbn.kernels import aten
from syncbn.moments import Moments, merge, unpack

_PIECE = 1 << 22  # values that are converted to float64 at a time


def statistics(x: Tensor, mask: Tensor | None, covariance: bool) -> Moments:
    """Count, mean and squared deviations over the valid positions, float64, without gradients.

    Args:
        x: shape ``(N, C, *)``.
        mask: of its valid positions, or None.
        covariance: ``m2`` is the scatter matrix ``sum (x - mean) (x - mean)^T`` of shape ``(C, C)``, not its diagonal.
    """
    return merge([_of_piece(piece, covariance) for piece in _pieces(x.detach(), mask)])


def _pieces(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The values that count, in float64, in pieces along the batch."""
    rows = max(1, _PIECE * len(x) // max(x.numel(), 1))
    if mask is None:
        yield from (piece.double() for piece in x.split(rows))
        return
    for piece, valid in zip(x.split(rows), mask.expand_as(x[:, :1]).squeeze(1).split(rows), strict=True):
        yield piece.movedim(1, -1)[valid].double()


def _of_piece(x: Tensor, covariance: bool) -> Moments:
    moments = unpack(aten.moments(x))
    if not covariance:
        return moments
    deviations = x.movedim(1, 0).flatten(1) - moments.mean[:, None]
    return moments._replace(m2=deviations @ deviations.T)
