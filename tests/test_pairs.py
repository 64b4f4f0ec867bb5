"""Pairs of float32 in place of float64: what they keep, and why they must be gathered (docs/decisions.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncbn.comm.pairs import join, split
from syncbn.moments import Moments, merge, unpack, unpack_raw

C = 5
SIZES = (9, 1, 0, 30)


def triples(offset: float) -> tuple[list[Tensor], Tensor]:
    x = torch.randn(sum(SIZES), C).double() + offset
    packed = []
    for part in x.split(SIZES):
        mean = part.mean(0) if len(part) else torch.zeros(C).double()
        packed.append(torch.cat([torch.tensor([float(len(part))]), mean, (part - mean).square().sum(0)]))
    return packed, x


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e37])
def test_a_pair_keeps_48_bits(scale: float) -> None:
    values = torch.randn(10_000).double() * scale
    assert ((join(split(values)) - values) / values).abs().max() <= 2.0**-48
    counts = torch.tensor([0.0, 1.0, 2.0**24 + 1, 2.0**47 + 1]).double()
    assert torch.equal(join(split(counts)), counts)
    beyond = torch.tensor([torch.inf, -1e39, torch.nan]).double()
    assert join(split(beyond)).tolist()[:2] == [torch.inf, -torch.inf] and join(split(beyond))[2].isnan()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_gathered_pairs_lose_nothing_that_counts(offset: float) -> None:
    """Each rank merges the pairs of all in rank order: equal bits, as they are the same numbers."""
    packed, x = triples(offset)
    total = merge([unpack(join(split(p))) for p in packed])
    again = merge([unpack(join(split(p))) for p in packed])
    assert torch.equal(total.mean, again.mean) and torch.equal(total.m2, again.m2)
    assert total.n == len(x)
    torch.testing.assert_close(total.mean, x.mean(0), rtol=2.0**-46, atol=2.0**-46)
    # a mean of one rank that is off by its 49th bit moves the variance by the square of that, and by twice its product
    # with the distance between ranks
    torch.testing.assert_close(total.var, x.var(0, correction=0), rtol=2.0**-44 * (1 + offset), atol=0.0)


def test_summed_pairs_lose_what_float32_loses() -> None:
    """High parts are rounded as they are added up, and no low part knows."""
    packed, x = triples(4e3)
    raw = [torch.cat([p[:1], p[:1] * p[1 : C + 1], p[C + 1 :] + p[:1] * p[1 : C + 1] ** 2]) for p in packed]
    summed: Moments = unpack_raw(join(torch.stack([split(r) for r in raw]).sum(0)))
    exact = unpack_raw(torch.stack(raw).sum(0))
    truth = x.var(0, correction=0)
    assert ((exact.var - truth) / truth).abs().max() < 1e-7
    assert ((summed.var - truth) / truth).abs().max() > 0.1
