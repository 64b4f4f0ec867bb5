"""Population statistics against float64 moments of the concatenated data set."""

from __future__ import annotations

import builtins
import copy
import random
import warnings
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from helpers.oracle import close, rows
from helpers.processes import run_processes
from helpers.ranks import outcomes, run_ranks
from syncbn import RankMismatchError, update_population_stats, wire
from syncbn.diagnostics import measure_noise
from syncbn.kernels import values

# Batch sizes per rank.
SHARES: dict[str, list[tuple[int, ...]]] = {
    "one rank": [(4, 3, 1, 5)],
    "even": [(3, 3), (3, 3)],
    "uneven": [(4, 2, 6), (2,)],
    "one has nothing": [(), (3, 4)],
    "three": [(2, 5), (), (3, 1, 4)],
}


def shares_of(
    sizes: Sequence[Sequence[int]], *shape: int, offset: float = 3.0, scale: float = 2.0
) -> list[list[Tensor]]:
    """Batches for each rank, float32, of channels with different means."""
    generator = torch.Generator().manual_seed(1)

    def batch(size: int) -> Tensor:
        x = torch.randn(size, *shape, generator=generator) * scale
        return x + offset * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))

    return [[batch(size) for size in own] for own in sizes]


def together(shares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [batch for own in shares for batch in own]


def moments(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all batches as one, in float64."""
    whole = torch.cat([rows(batch) for batch in batches])
    return whole.mean(0), whole.var(0)


def update(net: nn.Module, shares: list[Any], convert: bool = True, **options: Any) -> list[nn.Module]:
    """The net on each rank after the update over these shares of batches."""

    def body(rank: int, group: Any) -> nn.Module:
        own = copy.deepcopy(net)
        if convert:
            syncbn.convert_sync_batchnorm(own, group)
        update_population_stats(own, shares[rank], process_group=group, **options)
        return own

    if len(shares) == 1:
        own = syncbn.convert_sync_batchnorm(copy.deepcopy(net)) if convert else copy.deepcopy(net)
        update_population_stats(own, shares[0], **options)
        return [own]
    return run_ranks(len(shares), body)


def norms(net: nn.Module) -> list[Any]:
    return [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def same_bits(nets: Sequence[nn.Module]) -> None:
    for net in nets[1:]:
        for name, value in net.state_dict().items():
            assert torch.equal(value, nets[0].state_dict()[name]), name


def check(layer: Any, batches: Sequence[Tensor], rtol: float = 1e-12) -> None:
    mean, var = moments(batches)
    close(layer.running_mean, mean.to(layer.running_mean), rtol, 0.0, "running_mean")
    close(layer.running_var, var.to(layer.running_var), rtol, 0.0, "running_var")


# ---- the first layer: exact


@pytest.mark.parametrize("convert", [True, False], ids=["sync", "local"])
@pytest.mark.parametrize("sizes", SHARES)
@pytest.mark.usefixtures("way")
def test_first_layer_has_the_moments_of_the_data_set(sizes: str, convert: bool) -> None:
    """To float64, whatever the batches; and equal bits on all ranks."""
    sizes_of = SHARES[sizes]
    if not convert:  # nn.BatchNorm refuses batches of one
        sizes_of = [tuple(size + 1 for size in own) for own in sizes_of]
    shares = [[batch.double() for batch in own] for own in shares_of(sizes_of, 4)]
    net = nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), nn.ReLU())
    if convert and sizes == "one rank":
        shares[0] = [batch for batch in shares[0] if len(batch) > 1]
    nets = update(net, shares, convert)
    same_bits(nets)
    check(nets[0][0], together(shares))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images(layout: torch.memory_format) -> None:
    """Maps of different sizes, in slices (the piece is made small)."""
    shares = [[x.contiguous(memory_format=layout) for x in own] for own in shares_of([(2, 5), (3,)], 3, 6, 5)]
    shares[1].append(torch.randn(4, 3, 9, 2).contiguous(memory_format=layout))
    nets = update(nn.Sequential(nn.BatchNorm2d(3)).double(), [[x.double() for x in own] for own in shares])
    check(nets[0][0], together(shares))


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PIECE", 100)
    shares = [[x.double() for x in own] for own in shares_of([(7, 5), (3,)], 3, 6, 5)]
    check(update(nn.Sequential(nn.BatchNorm2d(3)).double(), shares)[0][0], together(shares))


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.usefixtures("way")
def test_far_from_zero(offset: float) -> None:
    """float32 data whose mean is large against its deviations: measured and merged in float64, rounded once."""
    shares = shares_of([(40, 30), (50,), (3, 4)], 4, offset=offset, scale=1.0)
    nets = update(nn.Sequential(nn.BatchNorm1d(4)), shares)
    same_bits(nets)
    check(nets[0][0], together(shares), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules(dtype: torch.dtype) -> None:
    shares = [[x.to(dtype) for x in own] for own in shares_of([(40, 3), (5,)], 4)]
    nets = update(nn.Sequential(nn.BatchNorm1d(4)).to(dtype), shares)
    same_bits(nets)
    assert nets[0][0].running_var.dtype == dtype
    check(nets[0][0], together(shares), rtol=0.0)


def test_many_channels() -> None:
    """Statistics wider than the first message."""
    channels = wire.FRAME + 3
    shares = [[torch.randn(2, channels), torch.randn(3, channels)], [torch.randn(2, channels)]]
    check(update(nn.Sequential(nn.BatchNorm1d(channels)), shares)[1][0], together(shares), rtol=1e-6)


# ---- deeper layers


class Deep(nn.Module):
    """A net with dropout, a layer used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.fc2, self.bn2 = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn1(self.fc1(x))))
        return self.bn2(self.bn2(self.fc2(x)) * 3 + 1)


def emulate(net: Deep, steps: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of the inputs of each layer, with batch statistics and without dropout, written out."""

    def normalize(x: Tensor, bn: Any) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + bn.eps).sqrt() * bn.weight + bn.bias

    seen: dict[str, list[Tensor]] = {"bn1": [], "bn2": []}
    with torch.no_grad():
        for x in steps:
            seen["bn1"].append(net.fc1(x))
            seen["bn2"].append(net.fc2(F.relu(normalize(seen["bn1"][-1], net.bn1))))
            seen["bn2"].append(normalize(seen["bn2"][-1], net.bn2) * 3 + 1)
    return {name: moments(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("sizes", [[(4, 3, 5)], [(4, 1, 5), (2, 3)], [(), (4, 3), (2,)]])
def test_deep_net_against_one_process(sizes: list[tuple[int, ...]]) -> None:
    """Synchronized layers normalize each step's batches of all ranks as one; dropout is off; all uses count."""
    net = Deep().double()
    nn.init.normal_(net.bn1.weight)
    shares = [[x.double() for x in own] for own in shares_of(sizes, 5)]
    nets = update(net, shares)
    same_bits(nets)
    longest = max(map(len, shares))
    expected = emulate(net, [torch.cat([own[i] for own in shares if i < len(own)]) for i in range(longest)])
    for name, (mean, var) in expected.items():
        layer = getattr(nets[0], name)
        close(layer.running_mean, mean, 1e-11, 1e-12, f"{name}.running_mean")
        close(layer.running_var, var, 1e-11, 1e-12, f"{name}.running_var")


def test_local_layers_merge_all_ranks() -> None:
    """nn.BatchNorm normalizes with its own rank's batch, and its statistics are those of all ranks."""
    net = Deep().double()
    shares = [[x.double() for x in own] for own in shares_of([(4, 3), (5,)], 5)]
    nets = update(net, shares, convert=False)
    same_bits(nets)
    for name, (mean, var) in emulate(net, together(shares)).items():
        close(getattr(nets[1], name).running_mean, mean, 1e-11, 1e-12, name)
        close(getattr(nets[1], name).running_var, var, 1e-11, 1e-12, name)


def test_convolutions_with_empty_ranks() -> None:
    """A rank without data goes through convolutions, pooling, a view and a linear layer with nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.fc, self.bn2 = nn.Linear(16, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.adaptive_avg_pool2d(self.bn1(self.conv(x)).relu(), 2)
            return self.bn2(self.fc(x.view(len(x), -1)))

    net = Net().double()
    shares = [[], [x.double() for x in shares_of([(2, 4)], 3, 7, 7)[0]]]
    for convert in (True, False):
        nets = update(net, shares, convert)
        same_bits(nets)
        alone = update(net, shares[1:], convert)[0]
        for name, value in alone.state_dict().items():
            close(nets[0].state_dict()[name], value, 1e-12, 1e-12, name)


# ---- which layers


def test_frozen_layers_keep_their_statistics() -> None:
    """A layer in eval mode normalizes with what it has; the next one sees that."""
    shares = shares_of([(4, 3)], 4)
    net: Any = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4))
    net[0].eval()
    net = update(net, shares)[0]
    assert torch.equal(net[0].running_mean, torch.zeros(4)) and torch.equal(net[0].running_var, torch.ones(4))
    assert net[1].running_mean is None and not net[0].training and net[1].training
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    net[0].eval()
    check(update(net, shares)[0][1], [x / (1 + 1e-5) ** 0.5 for x in shares[0]], rtol=1e-6)


def test_other_normalizations_and_buffers_are_left_alone() -> None:
    """Everything but batch norm runs in eval mode: instance norms and spectral norms keep their state, too."""
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.Unflatten(1, (4, 1)),
        nn.InstanceNorm1d(4, track_running_stats=True),
    )
    before = copy.deepcopy(net.state_dict())
    after = update(net, [[torch.randn(6, 4), torch.randn(3, 4)]])[0].state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize("convert", [True, False], ids=["sync", "local"])
@pytest.mark.parametrize("own", ["super", "F.batch_norm"])
def test_subclasses(own: str, convert: bool) -> None:
    """What is measured is what is normalized, not what the layer is given."""

    class Scaled(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            x = x.movedim(2, 1) * 2
            if own == "super":
                return super().forward(x)
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)
            return y.clone()

    for sizes in ([(4, 3)], [(4, 3), (2, 5)]):
        shares = shares_of(sizes, 6, 3)
        nets = update(nn.Sequential(Scaled(3)), shares, convert)
        same_bits(nets)
        check(nets[0][0], [x.movedim(2, 1) * 2 for x in together(shares)], rtol=1e-6)


def test_shared_layer_counts_once_per_use() -> None:
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    net = nn.ModuleDict({"a": layer, "b": layer})
    data = [[x.double() for x in own] for own in shares_of([(4, 3), (2, 5)], 3)]
    nets = update(net, data, forward=lambda net, x: (net["a"](x), net["b"](x + 10)))
    check(nets[0]["a"], [y for x in together(data) for y in (x, x + 10)])


def test_unreached_layers_are_named() -> None:
    net: Any = nn.ModuleDict({"used": nn.BatchNorm1d(3), "idle": nn.BatchNorm1d(3)})
    net["idle"].running_mean.fill_(7.0)
    with pytest.warns(UserWarning, match=r"reached 1 of 2 batch norm layers, which keep their statistics: idle$"):
        net = update(net, shares_of([(4, 3)], 3), forward=lambda net, x: net["used"](x))[0]
    assert torch.equal(net["idle"].running_mean, torch.full((3,), 7.0))
    assert not torch.equal(net["used"].running_mean, torch.zeros(3))


def test_a_layer_that_only_some_ranks_use() -> None:
    """Local layers may be used on some ranks alone."""
    net = nn.ModuleDict({"all": nn.BatchNorm1d(3), "odd": nn.BatchNorm1d(3)})
    shares = [[(0, x) for x in shares_of([(4, 3)], 3)[0]], [(1, torch.randn(5, 3))]]

    def forward(net: Any, batch: Any) -> None:
        net["all"](batch[1])
        if batch[0] == 1 and len(batch[1]):
            net["odd"](batch[1])

    nets = update(net, shares, convert=False, forward=forward)
    same_bits(nets)
    check(nets[0]["odd"], [shares[1][0][1]], rtol=1e-6)


# ---- what is as before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("convert", [True, False], ids=["sync", "local"])
def test_all_else_is_as_before(fails: bool, momentum: float | None, convert: bool) -> None:
    net = Deep()
    net.bn1.momentum = net.bn2.momentum = momentum
    if convert:
        syncbn.convert_sync_batchnorm(net)
    for _ in range(3):
        net(torch.randn(4, 5)).sum().backward()
    net.fc1.eval()
    before = copy.deepcopy(net.state_dict())
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    modes = {name: module.training for name, module in net.named_modules()}
    calls: list[bool] = []
    handle = net.bn1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def batches() -> Iterator[Tensor]:
        yield torch.randn(4, 5)
        yield torch.randn(3, 5)
        if fails:
            raise KeyError("a bad sample")

    torch.manual_seed(5)
    random_state = torch.random.get_rng_state()
    if fails:
        with pytest.raises(KeyError, match="a bad sample"):
            update_population_stats(net, batches())
    else:
        update_population_stats(net, batches())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert calls == [False, False]
    handle.remove()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == (set() if fails else {f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")})
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert (net.bn1.momentum, net.bn2.momentum) == (momentum, momentum)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for layer in norms(net):
        assert "_memory" not in layer.__dict__ and not layer._forward_hooks
        assert layer.num_batches_tracked == (3 if layer is net.bn1 else 6)


def test_training_goes_on() -> None:
    """The statistics are the same buffers still, and the next batch moves them as ever."""
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    buffer = net[0].running_mean
    update_population_stats(net, [torch.randn(8, 3)])
    mean = buffer.clone()
    x = torch.randn(4, 3)
    net(x)
    assert net[0].running_mean is buffer
    torch.testing.assert_close(buffer, mean * 0.9 + x.mean(0) * 0.1)


def test_modes_of_the_model_meanwhile() -> None:
    """Batch norm trains, all else does not; train() is not called, which some classes override."""

    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("train() is not to be called")

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return F.dropout(x, 0.9, self.training)

    net = nn.Sequential(Stubborn(), nn.BatchNorm1d(3), nn.Dropout(0.9), nn.BatchNorm1d(3))
    x = torch.randn(8, 3)
    modes: list[list[bool]] = []
    update_population_stats(
        net, [x], forward=lambda net, x: (net(x), modes.append([m.training for m in net.modules()]))
    )
    assert modes == [[False, False, True, False, True]] and net.training
    assert (net[3].running_var - len(x) / (len(x) - 1)).abs().max() < 1e-3, "with dropout it would be ten times that"


# ---- batches


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, ["name"] * len(x)],
        lambda x: Pair(x, 3),
        lambda x: {"input": x},
    ],
    ids=["tensor", "tuple", "list", "named tuple", "dict"],
)
def test_structures_of_batches(wrap: Any) -> None:
    """Also for a rank that never had one."""
    for sizes in ([(4, 3)], [(), (4, 3)]):
        shares = shares_of(sizes, 3)
        nets = update(nn.Sequential(nn.BatchNorm1d(3)), [[wrap(x) for x in own] for own in shares])
        check(nets[0][0], together(shares), rtol=1e-6)


def test_data_loader_and_num_batches() -> None:
    """Of each rank so many batches at most; from an iterator no more than these are taken."""
    data = torch.randn(20, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    net = nn.Sequential(nn.BatchNorm1d(3))
    check(update(net, [loader])[0][0], [data], rtol=1e-6)
    check(update(net, [loader], num_batches=3)[0][0], [data[:12]], rtol=1e-6)
    check(update(net, [loader, loader], num_batches=3)[0][0], [data[:12], data[:12]], rtol=1e-6)
    iterator = iter(loader)
    update(net, [iterator], num_batches=2)
    assert torch.equal(next(iterator)[0], data[8:12])


def test_progress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """On rank 0 alone; without tqdm in a plain line."""
    pytest.importorskip("tqdm", reason="tqdm is not installed (extra: examples)")
    shares = shares_of([(2, 2, 2), (2,)], 3)
    net = nn.Sequential(nn.BatchNorm1d(3))
    update(net, shares, progress=True)
    shown = capfd.readouterr().err
    assert "population statistics" in shown and "3/3" in shown and shown.count("100%") == 1
    find = builtins.__import__

    def without_tqdm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    update(net, shares, progress=True)
    assert capfd.readouterr().err.endswith("\rpopulation statistics: batch 3\n")
    update(net, shares)
    assert capfd.readouterr().err == ""


# ---- errors: on all ranks, and nobody waits


def fail_together(shares: list[Any], net: nn.Module | None = None, convert: bool = True, **options: Any) -> list[Any]:
    """What each rank raises; its statistics are as before, and the group can be used again."""

    def body(rank: int, group: Any) -> Any:
        torch.manual_seed(0)
        own = copy.deepcopy(net) if net is not None else nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        if convert:
            syncbn.convert_sync_batchnorm(own, group)
        before = copy.deepcopy(own.state_dict())
        mine = {key: value[rank] if isinstance(value, list) else value for key, value in options.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # (the layer says, too, that its statistics are not finite)
            with pytest.raises((ValueError, RuntimeError, KeyError)) as caught:
                update_population_stats(own, shares[rank], process_group=group, **mine)
        for name, value in own.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert syncbn.steps.vote(True, process_group=group)
        return [caught.value]  # (an exception as such would be a failure of the rank)

    return [error for (error,) in run_ranks(len(shares), body, timeout=5.0)]


def failing(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise KeyError("a bad sample")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_loader_that_fails(good: int) -> None:
    x = torch.randn(4, 3)
    errors = fail_together([[x, x], failing([x] * good), [x]])
    assert [type(error) for error in errors] == [RankMismatchError, KeyError, RankMismatchError]
    assert errors[0].refused_by == (1,)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("convert", [True, False], ids=["sync", "local"])
def test_a_forward_that_fails(where: str, convert: bool) -> None:
    """The others hear of it in the layer, where they are, or in the next step; or after their last one."""

    def forward(net: Any, x: Tensor) -> None:
        if where == "before" and x.isnan().any():
            raise KeyError("cannot")
        net(x.nan_to_num())
        if x.isnan().any():
            raise KeyError("cannot")

    x, bad = torch.randn(4, 3), torch.full((4, 3), torch.nan)
    for shares in ([[x, x], [x, bad]], [[x, x, x], [bad]]):
        errors = fail_together(shares, convert=convert, forward=forward)
        assert [type(error) for error in errors] == [RankMismatchError, KeyError]
        assert errors[0].refused_by == (1,)


@pytest.mark.usefixtures("way")
def test_an_input_that_a_layer_refuses() -> None:
    """It has told the others itself: nobody is told twice."""
    errors = fail_together([[torch.randn(4, 5)], [torch.randn(4, 4)]], nn.Sequential(nn.BatchNorm1d(4)))
    assert isinstance(errors[0], ValueError) and isinstance(errors[1], RankMismatchError)
    one = fail_together([[torch.randn(1, 4)], []], nn.Sequential(nn.BatchNorm1d(4)))
    assert all(isinstance(error, ValueError) and "more than 1 value" in str(error) for error in one)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("empty", [[[], []], [[torch.empty(0, 3)], []]], ids=["no batch", "empty batches"])
def test_no_data(empty: list[Any]) -> None:
    errors = fail_together(empty)
    assert all(type(error) is ValueError and "any of the 2 rank(s)" in str(error) for error in errors)
    with pytest.raises(ValueError, match="no batch on any of the 1 rank"):
        update_population_stats(nn.Sequential(nn.BatchNorm1d(3)), [])


@pytest.mark.usefixtures("way")
def test_arguments() -> None:
    x = torch.randn(4, 3)
    errors = fail_together([[x], [x]], num_batches=[None, 0])
    assert isinstance(errors[0], RankMismatchError)
    assert str(errors[1]) == "num_batches must be at least 1, or None for all batches, got 0"
    with pytest.raises(ValueError, match=r"of 1 batch norm layer.*0 in training mode.*call model\.train\(\) first"):
        update_population_stats(nn.Sequential(nn.BatchNorm1d(3)).eval(), [x])
    with pytest.raises(ValueError, match=r"of 0 batch norm layer"):
        update_population_stats(nn.Linear(3, 3), [x])
    with pytest.raises(ValueError, match=r"layer '0' is a LazyBatchNorm1d that has seen no input"):
        update_population_stats(nn.Sequential(nn.LazyBatchNorm1d()), [x])
    with pytest.raises(ValueError, match="empty sequence"):
        update_population_stats(nn.Sequential(nn.BatchNorm1d(3)), [()])


@pytest.mark.usefixtures("way")
def test_an_error_is_told_after_a_failed_vote() -> None:
    """That an exchange before was refused does not mean that the others know of this error."""

    def body(rank: int, group: Any) -> None:
        net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), group)
        assert not syncbn.steps.vote(rank == 0, process_group=group)
        update_population_stats(net, [torch.randn(4, 3)], 0 if rank else None, process_group=group)

    errors = outcomes(2, body, timeout=5.0)
    assert [type(error) for error in errors] == [RankMismatchError, ValueError]


@pytest.mark.usefixtures("way")
def test_different_models() -> None:
    def body(rank: int, group: Any) -> None:
        net = nn.Sequential(nn.BatchNorm1d(3), *[nn.BatchNorm1d(3)] * rank)
        update_population_stats(net, [torch.randn(4, 3)], process_group=group)

    errors = outcomes(2, body)
    assert all(isinstance(error, RankMismatchError) for error in errors)
    assert "population statistics of 1 layers, '0' to '0'" in str(errors[0])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e5])
def test_statistics_that_are_not_finite(bad: float) -> None:
    """On every rank, though one has them; nothing is written to any layer."""
    net = nn.Sequential(nn.BatchNorm1d(3).half() if bad == 3e5 else nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    y = x.clone()
    y[0, 1] = bad
    errors = fail_together([[x], [y]], net, convert=True)
    dtype = "torch.float16" if bad == 3e5 else "torch.float32"
    assert all(f"of 1 of 3 channels of layer '0' are not finite in {dtype}" in str(error) for error in errors)


# ---- wrappers


@pytest.mark.filterwarnings("ignore:torch.compile with fullgraph=True found no compiled frames")  # torch 2.12
def wrapped(rank: int, size: int) -> list[Any]:
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    ddp = DistributedDataParallel(net)
    net[1].eval().running_mean.fill_(rank)
    mine = shares_of([(4, 3), (2,)], 3)[rank]
    update_population_stats(ddp, mine)
    result = [mean.clone() for mean in (net[0].running_mean, net[1].running_mean)]

    def forward(model: Any, x: Tensor) -> None:
        if rank == 1:
            raise KeyError("cannot")
        model(x)

    with pytest.raises(KeyError if rank == 1 else RankMismatchError, match="cannot"):
        update_population_stats(ddp, mine, forward=forward)
    with pytest.raises(KeyError if rank == 1 else RankMismatchError, match="cannot"):
        measure_noise(ddp, mine, forward=forward)
    assert ddp.require_forward_param_sync
    return [*result, net[0].running_mean]


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """No broadcast of buffers meanwhile: frozen ones are as before, and no rank waits there for one that failed."""
    mean, _ = moments(together(shares_of([(4, 3), (2,)], 3)))
    for rank, (first, frozen, after) in enumerate(run_processes(2, wrapped, tmp_path)):
        close(first, mean.float(), 1e-6, 0.0, "running_mean")
        assert torch.equal(frozen, torch.full((3,), float(rank))) and torch.equal(after, first)


def test_compiled_models() -> None:
    """Graphs compiled before and compiled submodules: seen all the same, and compiled still afterwards."""
    torch._dynamo.reset()
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    for convert in (True, False):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        if convert:
            syncbn.convert_sync_batchnorm(net)
        compiled: Any = torch.compile(net, backend=backend, fullgraph=True)
        x = torch.randn(6, 3)
        compiled(x)
        graphs = count
        update_population_stats(compiled, [x, x + 1])
        assert count == graphs
        with torch.no_grad():
            check(net[1], [net[0](x), net[0](x + 1)], rtol=1e-5)
        compiled(torch.randn(6, 3))
        assert count == graphs > 0, "the graph was compiled anew"
    torch._dynamo.reset()


def test_torch_sync_batch_norm() -> None:
    """Without peers it is a local layer."""
    x = torch.randn(6, 3)
    net = nn.Sequential(nn.SyncBatchNorm(3))
    update_population_stats(net, [x, x + 1])
    check(net[0], [x, x + 1], rtol=1e-6)


def test_masked_positions_do_not_count() -> None:
    x = torch.randn(4, 3, 5)
    mask = torch.rand(4, 1, 5) > 0.4
    for layer in (syncbn.SyncBatchNorm(3), syncbn.revert_sync_batchnorm(syncbn.SyncBatchNorm(3))):
        update_population_stats(layer, [{"input": x, "mask": mask}, {"input": x}])
        check(layer, [x.movedim(1, 2)[mask[:, 0]], x], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_any_partition_gives_the_same(seed: int) -> None:
    """Random shares of one data set, on 1 to 4 ranks."""
    rng = random.Random(seed)
    data = shares_of([(60,)], 3)[0][0].double()
    world = rng.randint(1, 4)
    shares: list[list[Tensor]] = [[] for _ in range(world)]
    rest = data
    while len(rest) > 1:
        size = min(rng.randint(2, 12), len(rest))
        batch, rest = rest[:size], rest[size:]
        shares[rng.randrange(world)].append(batch)
    nets = update(nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64)), shares, convert=rng.random() < 0.5)
    same_bits(nets)
    check(nets[0][0], together(shares))
