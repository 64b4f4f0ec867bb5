"""The noise report: known answers on synthetic data, the same on all ranks, and nothing of the model is touched."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from helpers.links import SEE_EACH_RANK
from helpers.ranks import outcomes, run_ranks
from syncbn import diagnostics
from syncbn.diagnostics import NoiseObserver, NoiseReport, NoiseRow, measure_noise


def draws(shape: tuple[int, ...], count: int, rank: int = 0, *, scale: float | Tensor = 1.0) -> list[Tensor]:
    """``count`` batches of independent Gaussian values."""
    generator = torch.Generator().manual_seed(1 + rank)
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def at(report: NoiseReport, k: int, layer: str | None = None) -> NoiseRow:
    return next(row for row in report.rows if row.group_size == k and layer in (None, row.layer))


# ---- known answers


@pytest.mark.parametrize(("n", "positions"), [(2, 1), (4, 9), (16, 1)])
def test_independent_values(n: int, positions: int) -> None:
    """1 / sqrt(n k) for the mean; for the std in closed form, as n var / s^2 is chi-squared with n - 1 degrees."""
    shape = (n, 32, positions) if positions > 1 else (n, 32)
    report = measure_noise(nn.BatchNorm1d(32, eps=1e-12), draws(shape, 320))
    assert [row.group_size for row in report.rows] == [1, 2, 4, 8, 16, 32, 64]
    for row in report.rows:
        values = n * positions * row.group_size
        assert row.values == n * positions and row.channels == 32 and row.groups == 320 // row.group_size
        assert row.mean_noise == pytest.approx(values**-0.5, abs=4 * row.mean_noise_error, rel=0.01)
        assert row.mean_noise_error < 0.1 * row.mean_noise
        half = torch.tensor((values - 1) / 2)
        bias, spread = 0.5 * (half.digamma() - math.log(values / 2)), 0.5 * torch.special.polygamma(1, half).sqrt()
        expected = math.hypot(bias, spread)
        assert row.std_noise == pytest.approx(expected, abs=4 * row.std_noise_error, rel=0.01)
        assert values < 64 or expected == pytest.approx((2 * values) ** -0.5, rel=0.04)
        assert row.noise == pytest.approx(math.hypot(row.mean_noise, row.std_noise))


def test_the_group_is_part_of_the_reference() -> None:
    """With four groups only, the deviation from the mean of all would be 13 % too small without the correction."""
    noises = []
    for seed in range(150):
        batches = draws((8, 64), 4, seed)
        noises.append(at(measure_noise(nn.BatchNorm1d(64), batches, [1]), 1).mean_noise)
    assert sum(noises) / 150 == pytest.approx(8**-0.5, rel=0.02)


def test_standard_errors() -> None:
    """Over many repetitions the noise scatters by as much as its standard error says, also if channels are copies."""
    reports = []
    for seed in range(60):
        batches = [x.repeat(1, 4) for x in draws((4, 8), 64, seed)]
        reports.append(at(measure_noise(nn.BatchNorm1d(32), batches, [2]), 2))
    for name in ("mean_noise", "std_noise", "noise"):
        found = torch.tensor([getattr(row, name) for row in reports])
        stated = torch.tensor([getattr(row, name + "_error") for row in reports]).mean()
        assert 0.75 < found.std() / stated < 1.3, name


def test_correlated_positions() -> None:
    """Positions that repeat each other are no further values: 49 of them are as noisy as one."""
    batches = [x.unsqueeze(2).expand(4, 16, 49) for x in draws((4, 16), 256)]
    row = at(measure_noise(nn.BatchNorm1d(16), batches, [1, 4]), 4)
    assert row.values == 4 * 49
    assert row.mean_noise == pytest.approx((4 * 4) ** -0.5, rel=0.06)


def test_scale_and_offset_of_channels_do_not_matter() -> None:
    scale = torch.logspace(-2, 6, 16)
    plain = measure_noise(nn.BatchNorm1d(16, eps=1e-12), draws((4, 16), 64))
    scaled = measure_noise(nn.BatchNorm1d(16, eps=1e-12), [x * scale + 30 * scale for x in draws((4, 16), 64)])
    for one, other in zip(plain.rows, scaled.rows, strict=True):
        assert one.noise == pytest.approx(other.noise, rel=1e-4)


def test_dead_and_broken_channels() -> None:
    """A channel that is constant has no noise; one with a NaN has no answer."""
    batches = [torch.cat([x, torch.zeros(4, 8)], 1) for x in draws((4, 8), 64)]
    alive = measure_noise(nn.BatchNorm1d(8), draws((4, 8), 64), [4])
    half = measure_noise(nn.BatchNorm1d(16), batches, [4])
    assert at(half, 4).noise == pytest.approx(at(alive, 4).noise / math.sqrt(2))
    batches[3][0, 0] = math.nan
    broken = measure_noise(nn.BatchNorm1d(16), batches, [1, 4])
    assert math.isnan(at(broken, 1).noise) and broken.group_size is None
    assert "statistics are not finite" in str(broken.recommendations[0]) and "not finite" in str(broken)


def test_ranks_that_see_other_data() -> None:
    """Ranks shifted by -1, 1, -1, 1: alone they are off by that, in pairs not at all."""

    def body(rank: int, group: Any) -> NoiseReport:
        batches = [x + (-1) ** rank for x in draws((64, 8), 32, rank)]
        return measure_noise(nn.BatchNorm1d(8), batches, [1, 2, 4], process_group=group)

    reports = run_ranks(4, body)
    assert at(reports[0], 1).mean_noise == pytest.approx(math.sqrt((1 + 1 / 64) / 2), rel=0.02)  # variance 1 + 1
    assert at(reports[0], 2).mean_noise == pytest.approx(math.sqrt(1 / 128 / 2), rel=0.08)
    # What a rank finds for itself knows nothing of the others.
    alone = at(measure_noise(nn.BatchNorm1d(8), [x - 1 for x in draws((64, 8), 32)], [1]), 1)
    assert alone.mean_noise == pytest.approx(1 / 8, rel=0.08)


def test_groups_are_neighbouring_ranks() -> None:
    """Against ``nn.BatchNorm1d`` in float64 on the data of each group, as dist.new_subgroups forms them."""
    data = [[x.double() for x in draws((2 + rank, 5), 6, rank)] for rank in range(4)]

    def body(rank: int, group: Any) -> NoiseReport:
        return measure_noise(nn.BatchNorm1d(5, dtype=torch.float64), data[rank], [2, 4], process_group=group)

    whole = torch.cat([x for own in data for x in own])
    scale, total = whole.var(0, unbiased=False) + 1e-5, len(whole)
    squares = []
    for step in range(6):
        for ranks in ((0, 1), (2, 3)):
            x = torch.cat([data[rank][step] for rank in ranks])
            norm = nn.BatchNorm1d(5, momentum=1.0, dtype=torch.float64)
            norm(x)
            assert norm.running_mean is not None
            deviation = ((norm.running_mean - whole.mean(0)) ** 2 / scale).mean()
            squares.append(deviation * total / (total - len(x)))
    row = at(run_ranks(4, body)[0], 2)
    assert row.groups == 12
    assert row.mean_noise == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-10)


def test_one_process_foretells_many_ranks() -> None:
    """Groups of k batches of one process are as noisy as groups of k ranks."""

    def body(rank: int, group: Any) -> NoiseReport:
        return measure_noise(nn.BatchNorm1d(16), draws((2, 16), 64, rank), [4], process_group=group)

    real, alone = at(run_ranks(4, body)[0], 4), at(measure_noise(nn.BatchNorm1d(16), draws((2, 16), 256, 9), [4]), 4)
    assert alone.groups == real.groups == 64
    assert alone.noise == pytest.approx(real.noise, rel=0.1)


# ---- the ranks


class Net(nn.Module):
    """Two layers of batch norm; ``fail`` says where it raises. (Threads share torch's random numbers.)"""

    def __init__(
        self, group: Any = None, fail: str = "", norm: Callable[..., nn.Module] | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        make = norm or (lambda width: syncbn.SyncBatchNorm(width, process_group=group))
        self.fc1, self.bn1 = nn.Linear(6, 8), make(8)
        self.fc2, self.bn2 = nn.Linear(8, 4), make(4)
        generator = torch.Generator().manual_seed(0)
        for parameter in (*self.fc1.parameters(), *self.fc2.parameters()):
            parameter.data.normal_(generator=generator)
        self.drop = nn.Dropout(drop)
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn1(self.fc1(x)).relu())
        if self.fail == "between":
            raise OSError("disk on fire")
        x = self.bn2(self.fc2(x)) if self.fail != "wrong shape" else self.bn2(x)
        if self.fail == "after":
            raise OSError("disk on fire")
        return x


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_get_the_same_report(way: str, size: int) -> None:
    def body(rank: int, group: Any) -> NoiseReport:
        torch.manual_seed(rank)
        sizes = [5, 3, 4, 2][:4] if rank < 2 else [2, 0, 3, 2]
        model = syncbn.convert_sync_batchnorm(Net(group), process_group=group)
        return measure_noise(model, [torch.randn(n, 6) for n in sizes * 4], process_group=group)

    reports = run_ranks(size, body)
    assert all(report == reports[0] for report in reports)
    report = reports[0]
    assert report.world_size == size and report.batches == 16
    assert [row.layer for row in report.rows[:: len(report.rows) // 2]] == ["bn1", "bn2"]
    assert all(math.isfinite(row.noise) and row.noise > 0 for row in report.rows)
    seconds = {row.sync_seconds for row in report.rows}
    assert seconds == {None} if size == 1 else all(0 < s < 1 for s in seconds if s is not None) and None not in seconds


def test_ranks_with_other_numbers_of_batches(way: str) -> None:
    def body(rank: int, group: Any) -> int:
        return measure_noise(Net(group), draws((3, 6), 8 + rank, rank), process_group=group).batches

    assert run_ranks(2, body) == [8, 8]


@pytest.mark.parametrize("fail", ["between", "after", "wrong shape", "batches", "layers"])
def test_a_rank_that_fails(way: str, fail: str) -> None:
    """It raises its own error, the others name it, nobody waits, and the group can be used again."""

    def batches(rank: int) -> Iterator[Tensor]:
        yield from draws((3, 6), 2, rank)
        if rank == 1 and fail == "batches":
            raise OSError("disk on fire")
        yield from draws((3, 6), 6, rank)

    def body(rank: int, group: Any) -> tuple[BaseException | None, bool]:
        # (an all-reduce of another length aborts the process unless padded, so layers share a width here)
        model = Net(group, fail if rank == 1 else "", norm=nn.BatchNorm1d if fail == "layers" else None)
        if fail == "layers" and rank == 1:
            model.bn2.eval()
        before = copy.deepcopy(model.state_dict())
        try:
            measure_noise(model, batches(rank), process_group=group)
        except Exception as error:
            kept = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            layer = syncbn.SyncBatchNorm(1, process_group=group)
            layer(torch.tensor([[float(rank)]]))
            return error, kept and layer.running_mean.item() == pytest.approx(0.1 * 1.0)
        return None, False

    started = time.monotonic()
    results = run_ranks(3, body)
    assert time.monotonic() - started < 5.0
    errors = [error for error, _ in results]
    assert all(fine for _, fine in results), results
    kinds = {"wrong shape": ValueError, "layers": syncbn.RankMismatchError}
    assert isinstance(errors[1], kinds.get(fail, OSError))
    for error in (errors[0], errors[2]):
        assert isinstance(error, syncbn.RankMismatchError)
        assert error.refused_by == ((1,) if fail != "layers" else ())
    if fail == "batches" and way in SEE_EACH_RANK:
        assert "its batches raised OSError: disk on fire" in str(errors[0])


WRONG: dict[str, Callable[[Any], NoiseReport]] = {
    "eval mode": lambda group: measure_noise(Net(group).eval(), draws((3, 6), 8), process_group=group),
    "no layers": lambda group: measure_noise(nn.Linear(6, 2), draws((3, 6), 8), process_group=group),
    "no module": lambda group: measure_noise([Net(group)], draws((3, 6), 8), process_group=group),  # type: ignore
    "lazy": lambda group: measure_noise(nn.LazyBatchNorm1d(), draws((3, 6), 8), process_group=group),
    "sizes": lambda group: measure_noise(Net(group), draws((3, 6), 8), [0], process_group=group),
    "too large a size": lambda group: measure_noise(Net(group), draws((3, 6), 8), [99], process_group=group),
    "no iterable": lambda group: measure_noise(Net(group), None, process_group=group),  # type: ignore
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rank_with_wrong_arguments(way: str, wrong: str) -> None:
    """Its peers hear of it, and do not wait until their timeout."""

    def body(rank: int, group: Any) -> list[Any]:
        call = (
            WRONG[wrong]
            if rank == 1
            else lambda group: measure_noise(Net(group), draws((3, 6), 8), [1, 2], process_group=group)
        )
        with pytest.raises((ValueError, TypeError, syncbn.RankMismatchError)) as caught:
            call(group)
        assert syncbn.steps.vote(True, process_group=group)
        return [caught.value]

    started = time.monotonic()
    (first,), (error,), (last,) = run_ranks(3, body)
    assert time.monotonic() - started < 5.0
    assert isinstance(error, TypeError if wrong.startswith("no ") and wrong != "no layers" else ValueError)
    for peer in (first, last):
        assert isinstance(peer, syncbn.RankMismatchError) and peer.refused_by == (1,)


def test_a_group_of_one_value(way: str) -> None:
    """The layers' own error, raised on every rank, is not followed by an exchange for which nobody is left."""

    def body(rank: int, group: Any) -> None:
        measure_noise(Net(group), [torch.ones(1 - min(rank, 1), 6)] * 8, process_group=group)

    started = time.monotonic()
    assert all(isinstance(error, ValueError) for error in outcomes(3, body))
    assert time.monotonic() - started < 5.0


# ---- the model


def train(model: Net, rank: int, group: Any, look: bool) -> list[Tensor]:
    """Four steps, with a measurement in the middle or not; what the model ends with."""
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_hook(lambda module, *_: module.seen.add_(1) and None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(draws((4, 6), 4, rank)):
        if look and step == 2:
            buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
            inputs = (torch.rand(4, 6) if group is None else x for x in draws((4, 6), 8, 10 + rank))
            measure_noise(model, inputs, process_group=group)
            assert buffers == {name: id(buffer) for name, buffer in model.named_buffers()}
            assert not any(m._forward_pre_hooks for m in model.modules()) and not model.bn1._forward_hooks
            assert len(model._forward_hooks) == 1 and model.training
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [t.detach().clone() for t in model.state_dict().values()]


def test_nothing_changes(way: str) -> None:
    """Buffers, their identity, modes, hooks, gradients: training goes on as if nothing had been."""
    plain, looked = (
        run_ranks(2, lambda rank, group, look: train(Net(group), rank, group, look), look) for look in (False, True)
    )
    for one, other in zip(plain, looked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_random_numbers_do_not_change() -> None:
    """Dropout, and batches that are drawn on the way, have no effect on what follows."""
    states = []
    for look in (False, True):
        torch.manual_seed(0)
        model = Net(drop=0.3)
        states.append([*train(model, 0, None, look), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_which_layers_count() -> None:
    """Those in training mode that run; a layer that runs twice gets a line for each call."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen, self.unused = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.norm(5 * self.norm(input=x)))

    model = Twice()
    model.frozen.eval()
    report = measure_noise(nn.Sequential(model), draws((4, 3), 8), [1])
    assert [row.layer for row in report.rows] == ["0.norm", "0.norm[1]"]
    assert at(report, 1, "0.norm[1]").mean_noise < 1e-6 < at(report, 1, "0.norm").mean_noise


@pytest.mark.parametrize(
    ("make", "batch"),
    [(tuple, (torch.ones(4, 3), "label")), (list, [torch.ones(4, 3)]), (dict, {"input": torch.ones(4, 3)})],
)
def test_kinds_of_batches(make: type, batch: Any) -> None:
    assert isinstance(batch, make)
    assert measure_noise(nn.BatchNorm1d(3), [batch] * 4, [1]).batches == 4


def test_own_forward_and_a_limit() -> None:
    endless = iter(lambda: "x", "")
    report = measure_noise(
        nn.BatchNorm1d(3),
        endless,
        [1],
        num_batches=5,
        forward=lambda model, batch: model(torch.ones(4, 3) * len(batch)),
    )
    assert report.batches == 5


def test_compiled_models() -> None:
    """They run eagerly, and are neither compiled nor compiled again."""
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    report = measure_noise(compiled, draws((4, 6), 8), [2])
    assert report == measure_noise(model, draws((4, 6), 8), [2])
    assert at(report, 2).layer == "1"
    with pytest.raises(ValueError, match="watches eager models"):
        NoiseObserver(compiled)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: measure_noise(nn.Linear(2, 2), []),
            "the model has 0 batch norm layers, none of them in training mode",
        ),
        (lambda: measure_noise(nn.BatchNorm1d(2).eval(), []), "the model has 1 batch norm layers"),
        (lambda: measure_noise(nn.BatchNorm1d(2), []), "0 batches on 1 rank.*give more"),
        (lambda: measure_noise(nn.BatchNorm1d(2), draws((2, 2), 7), [2]), "a group size of 2 takes 8 measurements"),
        (lambda: measure_noise(nn.BatchNorm1d(2), [], [0, 1]), r"group_sizes must be .* got \[0, 1\]"),
        (lambda: measure_noise(nn.BatchNorm1d(2), [], []), r"group_sizes must be .* got \[\]"),
        (lambda: measure_noise(nn.LazyBatchNorm1d(), []), "does not know its number of channels yet"),
        (lambda: NoiseObserver(nn.Linear(2, 2)), "Linear has no batch norm layer to observe"),
        (lambda: NoiseObserver(nn.BatchNorm1d(2), 4, window=8), "window=8, every=4"),
        (lambda: NoiseObserver(nn.BatchNorm1d(2), window=3), "window=3 on 1 rank.*a window of 4 or more"),
    ],
)
def test_wrong_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the report


def row(layer: str, k: int, noise: float, seconds: float | None = None) -> NoiseRow:
    return NoiseRow(layer, 8, 2.0, k, 10, noise, 0.1 * noise, 0.0, 0.0, noise, 0.1 * noise, seconds)


def test_recommendations() -> None:
    rows = [row("quiet", 1, 0.2), row("loud", 1, 0.9), row("loud", 2, 0.6), row("loud", 4, 0.4), row("wild", 1, 4.0)]
    report = NoiseReport((*rows, row("wild", 4, 1.5)), 0.5, 4, 10)
    assert [str(each) for each in report.recommendations] == [
        "quiet: per-device noise 0.2, no need to synchronize",
        "loud: per-device noise 0.9, synchronize over at least 4",
        "wild: per-device noise 4, synchronize over about 64 (extrapolated)",  # 4 * (1.5 / 0.5)^2 = 36
    ]
    assert report.group_size == 64 and "over 64 ranks or more, as wild asks for; this job has 4 ranks" in str(report)
    assert "No layer needs" in str(NoiseReport((row("quiet", 1, 0.2),), 0.5, 1, 10))
    assert str(NoiseReport((row("loud", 2, 0.9),), 0.5, 1, 10).recommendations[0]).startswith("loud: noise over 2 0.9")


def test_files(tmp_path: Path) -> None:
    report = measure_noise(nn.BatchNorm1d(3), draws((4, 3), 32), [1, 2, 99])
    assert report.skipped == (99,) and "Not measured: group size 99" in str(report)
    report.to_csv(tmp_path / "noise.csv")
    report.to_json(str(tmp_path / "noise.json"))
    with (tmp_path / "noise.csv").open() as file:
        lines = list(csv.DictReader(file))
    content = json.loads((tmp_path / "noise.json").read_text())
    for line, stored, own in zip(lines, content["rows"], report.rows, strict=True):
        assert float(line["noise"]) == stored["noise"] == own.noise
        assert int(line["group_size"]) == stored["group_size"] == own.group_size
        assert line["sync_seconds"] == "" and stored["sync_seconds"] is None
    assert content["group_size"] == report.group_size and content["threshold"] == diagnostics.THRESHOLD
    assert content["recommendations"][0]["text"] == str(report.recommendations[0])


@pytest.mark.parametrize("layers", [1, 50])
def test_picture(tmp_path: Path, layers: int) -> None:
    """All names lie within the picture, none over another."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: examples)")
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        kept.append(figure)
        save(figure, *args, **kwargs)

    names = [f"layer{1 + i // 13}.{i % 13}.bn{i % 3}" for i in range(layers)]
    rows = tuple(row(name, k, (1 + i / 10) / math.sqrt(k)) for i, name in enumerate(names) for k in (1, 2, 4, 8))
    report = NoiseReport(rows, 0.5, 4, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        report.plot(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    figure.draw_without_rendering()
    (legend,) = figure.legends
    texts = legend.get_texts()
    assert [text.get_text() for text in texts] == [*names, "threshold 0.5"]
    boxes = [text.get_window_extent() for text in texts]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i] if abs(a.x0 - b.x0) > 1)
    assert all(abs(a.y0 - b.y0) > 4 for i, a in enumerate(boxes) for b in boxes[:i] if abs(a.x0 - b.x0) <= 1)


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install matplotlib, or the extra \[examples\]"):
        NoiseReport((row("a", 1, 1.0),), 0.5, 1, 1).plot(tmp_path / "x.png")


# ---- the observer


class Writer:
    """What TensorBoard's SummaryWriter looks like from here."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def training(rank: int, group: Any, observe: bool, steps: int = 12) -> dict[str, Any]:
    """Steps with an evaluation between; watched or not."""
    model = Net(group)
    writer = Writer()
    observer = NoiseObserver(model, 6, window=4, writer=writer if rank == 0 else None, process_group=group)
    if observe:
        observer.attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(draws((4, 6), steps, rank)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if step == 3 and rank == 0:  # ranks may evaluate as they like
            model.eval()
            model(x)
            model.train()
    report, forwards = observer.report, observer.forwards
    observer.detach()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = [t.detach().clone() for t in model.state_dict().values()]
    return {"state": state, "report": report, "forwards": forwards, "scalars": writer.scalars, "hooks": sum(hooks)}


def test_training_is_the_same_when_observed(way: str) -> None:
    plain, watched = run_ranks(2, training, False), run_ranks(2, training, True)
    for one, other in zip(plain, watched, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["state"], other["state"], strict=True))
        assert other["forwards"] == 12 and other["hooks"] == 0
    assert watched[0]["report"] == watched[1]["report"]
    scalars = watched[0]["scalars"]
    assert watched[1]["scalars"] == []
    assert [(tag, step) for tag, _, step in scalars] == [
        (f"syncbn_noise/{layer}/group_{k}", step) for step in (6, 12) for layer in ("bn1", "bn2") for k in (1, 2)
    ]
    latest = watched[0]["report"]
    assert latest.batches == 4 and [value for _, value, step in scalars if step == 12] == [r.noise for r in latest.rows]


def test_the_observer_finds_what_measuring_finds() -> None:
    """Weights that do not move: the same numbers as measure_noise on the same batches."""
    model, batches = nn.Sequential(nn.BatchNorm1d(6)), draws((4, 6), 32)
    with NoiseObserver(model, 40, window=32) as observer:
        for x in [*draws((4, 6), 8, 1), *batches]:
            model(x)
    measured = measure_noise(model, batches)
    assert observer.report == measured


def test_a_failed_forward_while_observed(way: str) -> None:
    """Ranks that vote leave the step together, in any step of a window, and the observer goes on."""

    def body(rank: int, group: Any, failing: int) -> tuple[int, int | None]:
        model = Net(group)
        skipped = 0
        with NoiseObserver(model, 8, window=4, process_group=group) as observer:
            for step, x in enumerate(draws((4, 6), 16, rank), 1):
                model.fail = "between" if rank == 1 and step == failing else ""
                try:
                    model(x)
                    good = syncbn.steps.vote(True, process_group=group)
                except OSError as error:
                    good = syncbn.steps.vote(False, str(error), process_group=group)
                except syncbn.RankMismatchError as error:
                    assert error.refused_by == (1,)
                    good = False
                skipped += not good
        return skipped, observer.report.batches if observer.report is not None else None

    for failing in (1, 6, 8):
        assert run_ranks(2, body, failing) == [(1, 4), (1, 4)]


def test_ranks_in_other_steps(way: str) -> None:
    """A rank that has made another number of forwards: an error that names both calls, or the backend's; no hang."""

    def body(rank: int, group: Any) -> None:
        model = nn.Sequential(nn.BatchNorm1d(6))
        with NoiseObserver(model, 4, process_group=group):
            for x in draws((4, 6), 4 - rank):
                model(x)
            syncbn.steps.vote(True, process_group=group)

    for error in outcomes(2, body, timeout=5.0):
        assert isinstance(error, syncbn.RankMismatchError)
        assert "noise report" in str(error) or "vote" in str(error)


def test_layers_that_differ_are_no_reason_to_stop() -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", lambda text, *args, **kwargs: said.append(text))

        def quiet(rank: int, group: Any) -> Any:
            model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6).train(rank == 0))
            with NoiseObserver(model, 4, process_group=group) as observer:
                for x in draws((4, 6), 8):
                    model(x)
            return observer.report

        assert run_ranks(2, quiet) == [None, None]
    assert len(said) == 2 and all("different batch norm layers" in text for text in said)


def test_copies_of_an_observed_model() -> None:
    """An average of the weights carries the hooks along; its forwards do not count. A pickle watches nothing."""
    model = nn.Sequential(nn.BatchNorm1d(6))
    stream = io.BytesIO()
    with NoiseObserver(model, 4) as observer:
        twin = copy.deepcopy(model)
        torch.save(model, stream)
        for x in draws((4, 6), 6):
            twin(x)
        loaded = pickle.loads(pickle.dumps(model))
        loaded(torch.ones(4, 6))
        assert observer.forwards == 0
        for x in draws((4, 6), 4):
            model(x)
        assert observer.report is not None and observer.forwards == 4


def test_the_model_itself_is_a_layer() -> None:
    layer = nn.BatchNorm1d(6)
    with NoiseObserver(layer, 4) as observer:
        for x in draws((4, 6), 4):
            layer(x)
    assert observer.report == measure_noise(layer, draws((4, 6), 4))


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = nn.Sequential(nn.BatchNorm1d(6))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer, NoiseObserver(model, 4, writer=writer) as observer:
        for x in draws((4, 6), 8):
            model(x)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert observer.report is not None
    assert [e.step for e in events.Scalars("syncbn_noise/0/group_1")] == [4, 8]
    assert events.Scalars("syncbn_noise/0/group_1")[1].value == pytest.approx(observer.report.rows[0].noise)
