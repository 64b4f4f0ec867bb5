"""The estimator: from measurements to the noise of groups of k. Pure numbers; nothing of layers or ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise_of_groups(line: Tensor, k: int, eps: float) -> tuple[int, list[float]]:
    """The noise of groups of k neighbours: formulas and estimator are in the docstring of the package.

    Args:
        line: shape ``(measurements, 2C+1)``: count, mean, M2 of each.

    Returns:
        How many groups there are, and the mean, std and total noise, each followed by its standard error.
    """
    channels = line.shape[1] // 2
    n, mean, m2 = line[:, :1], line[:, 1 : channels + 1], line[:, channels + 1 :]
    total = n.sum().clamp(min=1.0)
    centre = (n * mean).sum(0) / total
    off = mean - centre  # about the centre, so that a far mean costs no digits
    scale = (m2 + n * off * off).sum(0) / total + eps
    number = len(line) // k
    n, off, m2 = (t[: number * k].unflatten(0, (number, k)) for t in (n, off, m2))
    size = n.sum(1)
    shift = (n * off).sum(1) / size.clamp(min=1.0)
    var = (m2 + n * (off - shift.unsqueeze(1)) ** 2).sum(1) / size.clamp(min=1.0)
    weight = total / (total - size).clamp(min=1.0)
    of_mean = (weight * shift * shift / scale).mean(1)
    of_std = (weight * (0.5 * torch.log((var + eps) / scale)) ** 2).mean(1)
    there = size.squeeze(1) > 0  # nobody normalizes with the statistics of an empty group
    numbers: list[float] = []
    for squares in (of_mean[there], of_std[there], (of_mean + of_std)[there]):
        rms = math.sqrt(squares.mean().item()) if len(squares) else math.nan
        spread = squares.std().item() / math.sqrt(len(squares)) if len(squares) > 1 else math.nan
        numbers += [rms, spread / (2 * rms) if rms > 0 else spread]
    return int(there.sum()), numbers
