"""The per-rank arithmetic: the reference against PyTorch in float64, the fast kernels against the reference."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import batch_norm
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.fused import Plain
from syncbn import kernels as choice
from syncbn.kernels import aten, native, reference
from syncbn.kernels.composed import Composed
from syncbn.memory import Running
from syncbn.messages import Message, Shared

EPS = 1e-5
SHAPES = [
    (6, 5),
    (4, 3, 7),
    (5, 6, 3, 3),
    (3, 2, 9, 7),
    (2, 3, 4, 5, 6),
    (2, 3, 2, 2, 2, 3),
    (4, 3, 1, 1),
    (3, 1, 4, 4),
]
LAYOUTS = ["contiguous", "channels_last", "strided", "transposed"]
# Half types: one unit in the last place, so the arithmetic itself is not done in them.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True, params=["whole", "sliced", "native"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plain forms that a test runs: ATen's with slices as shipped, ATen's with slices so short that small tensors
    need many, and those of the compiled loops.
    """
    if request.param == "native":
        if not native.available():
            pytest.skip(native.reason())
        return Plain(native)
    if request.param == "sliced":
        monkeypatch.setattr(aten, "_SLICE_BYTES", 64)
        monkeypatch.setattr(aten, "_MAX_RUN", 4)
        monkeypatch.setattr(aten, "_WIDTH", 16)
        monkeypatch.setattr(aten, "_SMALL", 0)
    return aten


@pytest.fixture(params=["reference", "fast"])
def kernels(request: pytest.FixtureRequest, fast: Any) -> Any:
    """The ground truth as well."""
    return reference if request.param == "reference" else fast


@pytest.fixture
def shipped_only(request: pytest.FixtureRequest, fast: Any) -> None:
    """For tests of inputs large enough to be sliced as shipped."""
    if request.node.callspec.params["fast"] == "sliced":
        pytest.skip("large input: sliced as shipped")


@pytest.fixture
def aten_only(fast: Any) -> None:
    """For tests of what operators ATen's forms are made of."""
    if fast is not aten:
        pytest.skip("of the compositions of ATen operators alone")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x with other strides."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def example(shape: tuple[int, ...], dtype: torch.dtype, layout: str, mean: float = 2.0) -> dict[str, Tensor]:
    """A layer call: input, gradient, residual, parameters and the exact statistics of the input."""
    torch.manual_seed(0)
    x = laid_out((torch.randn(shape, dtype=torch.float64) + mean).to(dtype), layout)
    channels = shape[1]
    moments = reference.moments(x)
    count, local_mean, m2 = moments[0], moments[1 : channels + 1], moments[channels + 1 :]
    return {
        "x": x,
        "grad": laid_out(torch.randn(shape).to(dtype), layout),
        "residual": laid_out(torch.randn(shape).to(dtype), layout),
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
        "count": count,
        "mean": local_mean,
        "invstd": (m2 / count + EPS).rsqrt(),
    }


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=min(4 * tolerance, 2e-5))


def oracle(e: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and input gradient of PyTorch's batch normalization in float64."""
    x = e["x"].double().clone().requires_grad_()
    y = batch_norm(x, None, None, e["weight"].double(), e["bias"].double(), True, 0.0, EPS)
    return y.detach(), torch.autograd.grad(y, x, e["grad"].double())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_with_torch(kernels: Any, layout: str, shape: tuple[int, ...]) -> None:
    e = example(shape, torch.float64, layout)
    channels = shape[1]
    count, mean, m2 = kernels.moments(e["x"]).split([1, channels, channels])
    invstd = (m2 / count + EPS).rsqrt()
    y, dx = oracle(e)
    torch.testing.assert_close(
        kernels.normalize(e["x"], mean, invstd, e["weight"], e["bias"]), y, rtol=1e-12, atol=1e-12
    )
    sums = kernels.gradient_sums(e["grad"], e["x"], mean, invstd)
    actual = kernels.input_gradient(e["grad"], e["x"], mean, invstd, e["weight"], sums, count[0])
    torch.testing.assert_close(actual, dx, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_reference(fast: Any, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    e = example(shape, dtype, layout)
    before = {name: tensor.clone() for name, tensor in e.items()}
    x, grad, mean, invstd, weight, bias = (e[k] for k in ("x", "grad", "mean", "invstd", "weight", "bias"))
    for raw in (False, True):
        assert_same(fast.moments(x, raw=raw), reference.moments(x, raw=raw), torch.float32)
    for w, b in ((weight, bias), (weight.half(), None), (None, bias.double()), (None, None)):
        for residual, relu in itertools.product((None, e["residual"]), (False, True)):
            args = (x, mean, invstd, w, b, residual, relu)
            assert_same(fast.normalize(*args), reference.normalize(*args), dtype)
    sums = reference.gradient_sums(grad, x, mean, invstd)
    assert_same(fast.gradient_sums(grad, x, mean, invstd), sums, torch.float32)
    for w in (weight, None):
        given = (grad, x, mean, invstd, w, sums, e["count"])
        assert_same(fast.input_gradient(*given), reference.input_gradient(*given), dtype)
    for name, tensor in e.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "strided", "expanded"])
def test_gradient_of_any_strides(fast: Any, dtype: torch.dtype, layout: str, other: str) -> None:
    e = example((5, 6, 3, 4), dtype, layout)
    x, mean, invstd = e["x"], e["mean"], e["invstd"]
    grad = torch.ones((), dtype=dtype).expand(x.shape) if other == "expanded" else laid_out(e["grad"], other)
    sums = reference.gradient_sums(grad, x, mean, invstd)
    torch.testing.assert_close(fast.gradient_sums(grad, x, mean, invstd), sums, rtol=1e-5, atol=1e-5)
    args = (grad, x, mean, invstd, e["weight"], sums, e["count"])
    assert_same(fast.input_gradient(*args), reference.input_gradient(*args), dtype)
    args = (grad, x, mean, invstd, e["weight"], e["bias"], grad)
    assert_same(fast.relu_gradient(*args), reference.relu_gradient(*args), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_relu_gradient_follows_the_very_sign_of_the_output(
    fast: Any, dtype: torch.dtype, layout: str, with_residual: bool
) -> None:
    e = example((5, 6, 9, 4), dtype, layout)
    # Weights near zero and no bias: many outputs are close to zero, or round to it.
    args = (e["x"], e["mean"], e["invstd"], e["weight"] * 1e-7, None, e["residual"] * 1e-7 if with_residual else None)
    y = fast.normalize(*args, relu=True)
    masked = fast.relu_gradient(torch.ones_like(y), *args)
    assert torch.equal(masked, (y > 0).to(dtype))
    assert masked.stride() == torch.empty_like(e["x"]).stride()


def test_relu_gradient_of_nan_is_that_of_torch(kernels: Any) -> None:
    e = example((4, 3, 5), torch.float32, "contiguous")
    residual = torch.zeros(4, 3, 5)
    residual[0, 0, 0], residual[1, 1, 1], residual[2, 2, 2] = torch.nan, torch.inf, -torch.inf
    args = (e["x"], e["mean"], e["invstd"], e["weight"], e["bias"], residual)
    y = kernels.normalize(*args).requires_grad_()
    expected = torch.autograd.grad(y.relu(), y, e["grad"])[0]
    assert torch.equal(kernels.relu_gradient(e["grad"], *args), expected)
    assert kernels.normalize(*args, relu=True)[0, 0, 0].isnan()


def test_expanded_input(fast: Any) -> None:
    row = torch.randn(1, 5, 1, 3)
    x = row.expand(4, 5, 6, 3)
    mean, invstd = torch.randn(5).double(), torch.rand(5).double()
    torch.testing.assert_close(fast.moments(x), reference.moments(x), rtol=1e-5, atol=1e-5)
    assert_same(
        fast.normalize(x, mean, invstd, None, None, relu=True),
        reference.normalize(x, mean, invstd, None, None, relu=True),
        torch.float32,
    )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_empty_input_gives_zeros(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    for raw in (False, True):
        assert torch.equal(kernels.moments(x, raw=raw), torch.zeros(7, dtype=torch.float64))
    assert kernels.normalize(x, zero, one, None, None, x, True).shape == shape
    sums = kernels.gradient_sums(x, x, zero, one)
    assert torch.equal(sums, torch.zeros(6, dtype=torch.float64))
    assert kernels.input_gradient(x, x, zero, one, None, sums, torch.zeros(()).double()).dtype is dtype
    assert kernels.relu_gradient(x, x, zero, one, None, None).shape == shape


def test_zero_count_is_one(kernels: Any) -> None:
    e = example((4, 3, 5), torch.float32, "contiguous")
    args = (e["grad"], e["x"], e["mean"], e["invstd"], None, torch.ones(6).double())
    dx = kernels.input_gradient(*args, torch.zeros((), dtype=torch.float64))
    assert dx.isfinite().all()
    assert torch.equal(dx, kernels.input_gradient(*args, torch.ones((), dtype=torch.float64)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_non_finite_input_stays_in_its_channel(fast: Any, layout: str, bad: float, position: int) -> None:
    x = torch.randn(6, 4, 5, 5)
    x[position, 1, position, position] = bad
    x = laid_out(x, layout)
    for raw in (False, True):
        _, first, second = fast.moments(x, raw=raw).split([1, 4, 4])
        finite = torch.tensor([True, False, True, True])
        assert torch.equal(second.isfinite(), finite)
        assert torch.equal(first.isfinite(), finite)
    invstd = (fast.moments(x)[5:] / 150 + EPS).rsqrt()
    y = fast.normalize(x, fast.moments(x)[1:5], invstd, None, None)
    assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channel_has_no_variance(fast: Any, layout: str) -> None:
    values = torch.randn(64) * 10.0 ** torch.randint(-3, 8, (64,))
    x = laid_out(values.view(1, -1, 1, 1).expand(6, 64, 9, 5).contiguous(), layout)
    _, mean, m2 = fast.moments(x).split([1, 64, 64])
    torch.testing.assert_close(mean, values.double(), rtol=1e-12, atol=0)
    assert (m2 >= 0).all() and (m2 <= 1e-9 * values.double().square()).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_far_from_zero_nothing_is_lost(fast: Any, layout: str, with_bias: bool, ratio: float) -> None:
    e = example((6, 5, 8, 6), torch.float32, layout, mean=ratio)
    x, mean, invstd = e["x"], e["mean"], e["invstd"]
    stats = (mean, invstd, e["weight"])
    y = reference.normalize(x.double(), *stats, e["bias"] if with_bias else None)
    actual = fast.normalize(x, *stats, e["bias"] if with_bias else None)
    torch.testing.assert_close(actual.double(), y, rtol=0, atol=2e-6)
    # A gradient with a mean, and one that follows the input: both sums are large.
    grad = (1 + (x.double() - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)).float()
    sums = reference.gradient_sums(grad, x, mean, invstd)
    torch.testing.assert_close(fast.gradient_sums(grad, x, mean, invstd), sums, rtol=1e-6, atol=0)
    dx = reference.input_gradient(grad.double(), x.double(), *stats, sums, e["count"])
    actual = fast.input_gradient(grad, x, *stats, sums, e["count"])
    torch.testing.assert_close(actual.double(), dx, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_counts_and_sums_beyond_65504(fast: Any, layout: str, dtype: torch.dtype, shipped_only: None) -> None:
    x = laid_out((torch.randn(3, 4, 160, 160) + 3).to(dtype), layout)
    assert fast.moments(x)[0] == 76800
    torch.testing.assert_close(fast.moments(x), reference.moments(x), rtol=1e-5, atol=0)
    mean, invstd = torch.full((4,), 3.0).double(), torch.ones(4).double()
    expected = reference.gradient_sums(x, x, mean, invstd)
    assert expected[0] > 65504
    torch.testing.assert_close(fast.gradient_sums(x, x, mean, invstd), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 16, 28, 28), (2, 8, 150, 150), (1, 3, 300, 200)])
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e3, 1e4, 1e5])
def test_float32_never_less_accurate_than_torch(
    fast: Any, layout: str, shape: tuple[int, ...], ratio: float, shipped_only: None
) -> None:
    e = example(shape, torch.float32, layout, mean=ratio)
    x, grad, channels = e["x"], e["grad"], shape[1]
    y, dx = oracle(e)

    count, mean, m2 = fast.moments(x).split([1, channels, channels])
    exact = x.double().var((0, *range(2, x.dim())), correction=0)
    assert ((m2 / count - exact).abs() / exact).max() < 1e-4
    raw_count, total, square = fast.moments(x, raw=True).split([1, channels, channels])
    raw_var = square / raw_count - (total / raw_count).square()
    assert ((raw_var - exact).abs() / exact).max() < 1e-4

    invstd = (m2 / count + EPS).rsqrt()
    ours = fast.normalize(x, mean, invstd, e["weight"], e["bias"])
    sums = fast.gradient_sums(grad, x, mean, invstd)
    our_dx = fast.input_gradient(grad, x, mean, invstd, e["weight"], sums, count[0])

    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    theirs = batch_norm(leaf, None, None, e["weight"], e["bias"], True, 0.0, EPS)
    their_dx = torch.autograd.grad(theirs, leaf, grad)[0]
    # Near zero mean both are as good as float32 can be: two ulps of the largest value.
    floor = 2 * torch.finfo(torch.float32).eps
    assert (ours - y).abs().max() <= max((theirs - y).abs().max(), floor * y.abs().max())
    assert (our_dx - dx).abs().max() <= max((their_dx - dx).abs().max(), floor * dx.abs().max())


@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e5])
@pytest.mark.parametrize("shape", [(1_000_003, 2), (1, 2, 1_000_003)])
def test_long_runs_keep_their_digits(fast: Any, shape: tuple[int, ...], ratio: float, shipped_only: None) -> None:
    x = torch.randn(shape) + ratio
    _, mean, m2 = fast.moments(x).split([1, 2, 2])
    _, exact_mean, exact_m2 = reference.moments(x).split([1, 2, 2])
    torch.testing.assert_close(m2, exact_m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=2e-8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outlier", ["first sample far off", "first row far off", "first pixel far off"])
def test_statistics_do_not_depend_on_a_lucky_pivot(fast: Any, layout: str, outlier: str, shipped_only: None) -> None:
    x = torch.randn(2000, 4, 6, 6)
    far = {"first sample far off": x[:1], "first row far off": x[..., :1, :], "first pixel far off": x[..., :1, :1]}
    far[outlier].add_(1e4)
    x = laid_out(x, layout)
    _, mean, m2 = fast.moments(x).split([1, 4, 4])
    _, exact_mean, exact_m2 = reference.moments(x).split([1, 4, 4])
    torch.testing.assert_close(m2, exact_m2, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_deterministic(fast: Any, layout: str) -> None:
    e = example((8, 6, 20, 20), torch.float32, layout)
    first, second = fast.moments(e["x"]), fast.moments(e["x"].clone(memory_format=torch.preserve_format))
    assert torch.equal(first, second)
    args = (e["x"], e["mean"], e["invstd"])
    assert torch.equal(fast.gradient_sums(e["grad"], *args), fast.gradient_sums(e["grad"], *args))


class Allocations(TorchDispatchMode):
    """Counts ATen calls and records the bytes of each storage they create."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.storages: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                # Keeps the tensor, so that no address is used twice.
                self.storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return result

    def sizes(self, known: Iterator[Tensor]) -> list[int]:
        """Bytes of the new storages, largest first."""
        old = {t.untyped_storage().data_ptr() for t in known}
        return sorted(
            (t.untyped_storage().nbytes() for address, t in self.storages.items() if address not in old), reverse=True
        )


def calls(e: dict[str, Tensor]) -> dict[str, object]:
    """Each kernel, applied to an example."""
    x, grad, mean, invstd, weight, bias = (e[k] for k in ("x", "grad", "mean", "invstd", "weight", "bias"))
    sums = reference.gradient_sums(grad, x, mean, invstd)
    return {
        "moments": lambda: aten.moments(x, raw=True),
        "normalize": lambda: aten.normalize(x, mean, invstd, weight, bias),
        "normalize, relu": lambda: aten.normalize(x, mean, invstd, weight, bias, e["residual"], True),
        "gradient_sums": lambda: aten.gradient_sums(grad, x, mean, invstd),
        "input_gradient": lambda: aten.input_gradient(grad, x, mean, invstd, weight, sums, e["count"]),
        "relu_gradient": lambda: aten.relu_gradient(grad, x, mean, invstd, weight, bias),
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_larger_than_a_slice(layout: str, dtype: torch.dtype, shipped_only: None, aten_only: None) -> None:
    e = example((4, 32, 96, 96), dtype, layout)
    full = e["x"].untyped_storage().nbytes()
    assert e["x"].numel() * 4 > 2 * aten._SLICE_BYTES
    for name, call in calls(e).items():
        with Allocations() as log:
            call()
        sizes = log.sizes(iter(e.values()))
        if "sums" not in name and name != "moments":
            assert sizes.pop(0) == full
        assert sizes[0] <= aten._SLICE_BYTES * torch.get_num_threads(), name


def test_few_calls_for_a_small_layer(shipped_only: None, aten_only: None) -> None:
    e = example((64, 256), torch.float32, "contiguous", mean=0.5)
    counts = {}
    for name, call in calls(e).items():
        with Allocations() as log:
            call()
        counts[name] = log.calls
    limits = {"moments": 7, "normalize": 10, "gradient_sums": 8, "input_gradient": 20}
    assert all(counts[name] <= limit for name, limit in limits.items()), counts


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nothing_is_read_back_to_the_host(layout: str, dtype: torch.dtype, aten_only: None) -> None:
    # A fake tensor has no values: asking for one raises.
    e = example((2, 3, 4, 5), dtype, layout)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in e.items()}
        for name, call in calls(fake).items():
            assert isinstance(call(), torch._subclasses.FakeTensor), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "columns"])
@pytest.mark.parametrize("far", [0, 1, 2, 5, 12])
def test_channels_far_from_zero_beside_channels_near_it(fast: Any, layout: torch.memory_format, far: int) -> None:
    """Statistics in one read for the near ones, about a pivot for the others: up to a quarter of them, else for all."""
    x = torch.randn(4, 12, 41, 43)
    offsets = torch.tensor([1e5, -1e3, 3.0, 20.0, 7.0, 1e4, -50.0, 2.0, 1.5, -300.0, 11.0, 1e2])
    x[:, :far] += offsets[:far].view(-1, 1, 1)
    x[:, 11] = 4.25
    x = x.contiguous(memory_format=layout)
    exact = reference.moments(x)
    ours = fast.moments(x)
    var, expected = ours[13:] / ours[0], exact[13:] / exact[0]
    torch.testing.assert_close(var[:11], expected[:11], rtol=2e-5, atol=0)
    assert var[11] <= 1e-12
    torch.testing.assert_close(ours[1:13], exact[1:13], rtol=1e-6, atol=1e-6)
    invstd = (expected + 1e-5).rsqrt()
    y = fast.normalize(x, exact[1:13], invstd, None, None)
    wanted = reference.normalize(x.double(), exact[1:13], invstd, None, None)
    assert (y - wanted).abs().max() <= 2e-6
    broken = x.clone(memory_format=torch.preserve_format)
    broken[2, 7, 3, 3] = float("nan")
    values = fast.moments(broken)
    assert values[13 + 7].isnan()
    assert not values[13 : 13 + 7].isnan().any()


# ---- fused forms

MASKED_SHAPES = [(6, 5), (4, 3, 7), (5, 6, 3, 3), (2, 3, 4, 5, 6), (0, 3, 4)]


def random_mask(shape: tuple[int, ...], kind: str) -> Tensor | None:
    """None, or a mask of the positions, or one that is the same for all samples or for all positions of a row."""
    if kind == "none":
        return None
    size = [shape[0], 1, *shape[2:]]
    if kind == "samples":
        size[0] = 1
    elif kind == "rows":
        size[2:] = [1] * len(size[2:])
    return torch.zeros(size, dtype=torch.bool) if kind == "nothing" else torch.rand(size) < 0.6


def fused(fast: Any) -> Any:
    return Composed(aten) if fast is aten else native


def filled(width: int, raw: bool) -> Message:
    """A message of the host, full of NaN."""
    whole = torch.full((width + 3,), torch.nan, dtype=torch.float64)
    return Message(whole, whole[3:], raw)


@pytest.mark.parametrize("kind", ["none", "positions", "samples", "rows", "nothing"])
@pytest.mark.parametrize("shape", MASKED_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "relu", "raw", "layout"),
    [
        (torch.float32, False, False, "contiguous"),
        (torch.float32, True, True, "channels_last"),
        (torch.bfloat16, True, False, "channels_last"),
        (torch.float64, False, True, "strided"),
    ],
)
def test_fused_forms_are_those_of_the_reference(
    fast: Any, shape: tuple[int, ...], kind: str, dtype: torch.dtype, relu: bool, raw: bool, layout: str
) -> None:
    """One rank's calls of a layer over two ranks, of which the other has the same moments, with garbage as padding."""
    e = (
        example(shape, dtype, layout)
        if shape[0]
        else dict.fromkeys(("x", "grad", "residual"), torch.zeros(shape, dtype=dtype))
    )
    x, grad, channels = e["x"].clone(memory_format=torch.preserve_format), e["grad"], shape[1]
    weight, bias, residual = torch.rand(channels) + 0.5, torch.randn(channels), e["residual"] if relu else None
    mask = random_mask(shape, kind)
    if mask is not None and len(x):
        x[~mask.expand_as(x) & (torch.rand(shape) < 0.2)] = torch.nan
    modules = fused(fast), reference

    sent = [filled(2 * channels + 1, raw) for _ in modules]
    for module, message in zip(modules, sent, strict=True):
        module.pack_moments(x, mask, message)
        assert message.whole[:3].isnan().all()
    assert_same(sent[0].payload, sent[1].payload, torch.float32)
    payload = sent[1].payload
    shared = Shared((2 * payload)[None] if raw else torch.stack([payload, payload]), raw)

    running = [
        Running(torch.full((channels,), 0.5), torch.full((channels,), 0.25), 0.1, torch.tensor(3)) for _ in modules
    ]
    forward = [
        module.normalize_shared(x, mask, shared, weight, bias, residual, relu, EPS, each)
        for module, each in zip(modules, running, strict=True)
    ]
    assert_same(forward[0][0], forward[1][0], dtype)
    assert_same(forward[0][1], forward[1][1], torch.float32)
    assert forward[0][2] is forward[1][2] is True
    assert_same(running[0].mean, running[1].mean, torch.float32)
    assert_same(running[0].var, running[1].var, torch.float32)
    assert running[0].batches == running[1].batches == (4 if payload[0] > 0 else 3)

    given = [m.operands(grad, x, mask, forward[1][1], weight, bias, residual, relu) for m in modules]
    sent = [filled(2 * channels, raw) for _ in modules]
    kinds = torch.float32, torch.float64
    gradients = [
        module.pack_gradient_sums(args, message, kinds)
        for module, args, message in zip(modules, given, sent, strict=True)
    ]
    assert_same(sent[0].payload, sent[1].payload, torch.float32)
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs, torch.float32)
    assert modules[0].pack_gradient_sums(given[0], None, (None, None)) == (None, None)
    if relu:
        assert_same(modules[0].passed_gradient(given[0]), modules[1].passed_gradient(given[1]), dtype)

    shared = Shared(torch.stack([sent[1].payload, 0.5 * sent[1].payload]), raw)
    backward = [module.shared_input_gradient(args, shared, True) for module, args in zip(modules, given, strict=True)]
    assert_same(backward[0][0], backward[1][0], dtype)
    assert torch.equal(backward[0][1].double(), backward[1][1].double())
    assert modules[0].shared_input_gradient(given[0], shared, False)[1] is None


def test_what_the_other_ranks_bring_is_merged(fast: Any) -> None:
    """The fused forms of the parts are the plain ones of the whole."""
    x, grad = torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind()
    whole = torch.cat([x, x + 2])
    for module in (fused(fast), reference):
        sent = [filled(7, False) for _ in range(2)]
        for part, message in zip((x, x + 2), sent, strict=True):
            module.pack_moments(part, None, message)
        shared = Shared(torch.stack([message.payload for message in sent]), False)
        y, stats, _ = module.normalize_shared(x, None, shared, None, None, None, False, EPS, None)
        expected = reference.moments(whole)
        invstd = (expected[4:] / expected[0] + EPS).rsqrt()
        torch.testing.assert_close(stats, torch.cat([expected[1:4], invstd, expected[:1]]))
        torch.testing.assert_close(y, reference.normalize(whole, expected[1:4], invstd, None, None)[:5])
        sums = torch.randn(2, 6, dtype=torch.float64)
        args = module.operands(grad, x, None, stats, None, None, None, False)
        dx, _ = module.shared_input_gradient(args, Shared(sums, False), False)
        exact = reference.input_gradient(grad, x, expected[1:4], invstd, None, sums.sum(0), expected[0])
        torch.testing.assert_close(dx, exact)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SYNCBN_KERNELS", "aten")
    choice._native_works.cache_clear()
    yield
    choice._native_works.cache_clear()


def test_the_choice_for_a_cpu(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = torch.randn(4, 3), torch.ones(4, 1, dtype=torch.bool)
    for raw, valid in itertools.product((False, True), (None, mask)):
        assert choice.choose(x, valid, raw) is choice._ATEN and choice.name_of(choice._ATEN) == "ATen"
    assert choice.plain(x) is aten
    assert torch.equal(choice.moments(x), aten.moments(x))
    monkeypatch.setenv("SYNCBN_KERNELS", "cuda")
    choice._native_works.cache_clear()
    with pytest.raises(ValueError, match="SYNCBN_KERNELS must be native or aten, got 'cuda'"):
        choice.choose(x, None, False)
