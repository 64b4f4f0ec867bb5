"""Models as other people put them together: wrappers of sparse tensors, registries of names, two models of one make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers.oracle import close
from helpers.ranks import run_ranks
from syncbn import RankMismatchError, SyncBatchNorm, convert_sync_batchnorm

C = 3


class Sparse(NamedTuple):
    features: Tensor
    coordinates: Tensor


class SparseBatchNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, dtype=torch.float64)

    def forward(self, sparse: Sparse) -> Sparse:
        return Sparse(self.bn(sparse.features), sparse.coordinates)


def points(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((5, 0, 2)[rank], C, dtype=torch.float64, generator=generator)


def sparse_rank(rank: int, group: Any) -> Tensor:
    model = convert_sync_batchnorm(nn.Sequential(SparseBatchNorm(C)), group)
    x = points(rank)
    out: Tensor = model(Sparse(x, torch.zeros(len(x), 3))).features
    return out.detach()


def test_a_wrapper_of_sparse_tensors() -> None:
    found = run_ranks(3, sparse_rank)
    whole = nn.BatchNorm1d(C, dtype=torch.float64)(torch.cat([points(rank) for rank in range(3)]))
    close(torch.cat(found), whole.detach(), 1e-12, 1e-12, "features")


def test_spconv() -> None:
    """The real thing: features of points behind a convolution of theirs, whose backward asks for CUDA."""
    spconv = pytest.importorskip("spconv.pytorch", reason="spconv is not installed", exc_type=ImportError)

    def network() -> nn.Module:
        torch.manual_seed(0)
        conv = spconv.SubMConv3d(C, C, 3, bias=False, algo=spconv.ConvAlgo.Native).requires_grad_(False)
        net: nn.Module = spconv.SparseSequential(conv, nn.BatchNorm1d(C), nn.ReLU())
        return net

    def tensor(rank: int) -> Any:
        places = torch.tensor([[0, i, i, (i + rank) % 8] for i in range(5 - 3 * rank)], dtype=torch.int32)
        features = torch.randn(len(places), C, generator=torch.Generator().manual_seed(rank))
        return spconv.SparseConvTensor(features, places, [8, 8, 8], 1)

    def body(rank: int, group: Any) -> tuple[Tensor, Tensor]:
        net: Any = convert_sync_batchnorm(network(), group)
        out = net(tensor(rank)).features
        out.sum().backward()
        return out.detach(), net[1].weight.grad

    with torch.no_grad():
        before: Any = network()[0]  # type: ignore[index]
        features = [before(tensor(rank)).features for rank in range(2)]
    norm = nn.BatchNorm1d(C)
    whole = norm(torch.cat(features)).relu()
    whole.sum().backward()
    found = run_ranks(2, body)
    close(torch.cat([out for out, _ in found]), whole.detach(), 1e-5, 1e-5, "features")
    close(found[0][1] + found[1][1], norm.weight.grad, 1e-4, 1e-4, "dweight")  # type: ignore[arg-type]


def test_a_registry_of_names() -> None:
    norms: dict[str, Callable[[int], nn.Module]] = {"": nn.Identity, "BN": nn.BatchNorm2d, "SyncBN": SyncBatchNorm}  # type: ignore[dict-item]
    layer = norms["SyncBN"](C)
    assert isinstance(layer, SyncBatchNorm) and layer(torch.randn(2, C, 2, 2)).shape == (2, C, 2, 2)


def confused(rank: int, group: Any, together: bool) -> str:
    """Rank 1 runs the two models in the other order."""
    pair = nn.ModuleDict({name: nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)) for name in ("first", "second")})
    if together:
        convert_sync_batchnorm(pair, group)
    else:
        for model in pair.values():
            convert_sync_batchnorm(model, group)
    order = ["first", "second"] if rank == 0 else ["second", "first"]
    try:
        for name in order:
            pair[name](torch.randn(4, C))
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("together", [True, False])
def test_two_models_of_one_make(together: bool) -> None:
    for text in run_ranks(2, confused, together):
        assert ("'first.1'" in text and "'second.1'" in text) if together else text == ""


def test_alternating_models_of_equal_names_are_right() -> None:
    """Same order on all ranks: names need not differ."""

    def body(rank: int, group: Any) -> Tensor:
        torch_nets = [nn.Sequential(nn.BatchNorm1d(C, dtype=torch.float64)) for _ in range(2)]
        nets = [convert_sync_batchnorm(net, group) for net in torch_nets]
        x = torch.randn(4, C, dtype=torch.float64, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        y: Tensor = nets[1](nets[0](x) * 2.0)
        y.pow(3).sum().backward()
        assert x.grad is not None
        return torch.stack([y.detach(), x.grad])

    found = run_ranks(2, body)
    x = torch.cat(
        [torch.randn(4, C, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    ).requires_grad_()
    nets = [nn.BatchNorm1d(C, dtype=torch.float64) for _ in range(2)]
    y = nets[1](nets[0](x) * 2.0)
    y.pow(3).sum().backward()
    assert x.grad is not None
    close(torch.cat(found, 1), torch.stack([y.detach(), x.grad]), 1e-10, 1e-10, "y and dx")
