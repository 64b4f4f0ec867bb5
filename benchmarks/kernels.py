"""Candidates for the per-rank arithmetic on CPU: time and error of each, on the shapes of a ResNet-50.

    python benchmarks/kernels.py [--threads 1] [--rounds 20] [--mean-over-std 1000]

For each shape and layout the candidates run in turn (A B C A B C ...) in one process. A row gives the median and
the minimum of the time, the ratio of the median to one `clone` of the input, and the error against float64: relative
for statistics, absolute for output and input gradient. Errors are measured on an input with the given mean / std,
before anything is timed.
"""

import argparse
import platform
import statistics
from collections.abc import Callable

import torch
from timing import keep_freed_memory, seconds_in_turn
from torch import Tensor

from syncbn.kernels import aten, reference

SHAPES = [(8, 64, 56, 56), (2, 64, 112, 112), (8, 256, 14, 14), (8, 512, 7, 7)]
EPS = 1e-5
DIMS = (0, 2, 3)
_backward = torch.ops.aten.native_batch_norm_backward.default


class Case:
    """One input with its gradient and exact statistics, and the candidates for each function on it."""

    def __init__(self, shape: tuple[int, ...], layout: torch.memory_format, mean: float) -> None:
        torch.manual_seed(0)
        self.x = (torch.randn(shape) + mean).contiguous(memory_format=layout)
        self.grad = torch.randn(shape).contiguous(memory_format=layout)
        channels = shape[1]
        self.weight, self.bias = torch.rand(channels) + 0.5, torch.randn(channels)
        moments = reference.moments(self.x)
        self.count, self.mean = moments[0], moments[1 : channels + 1]
        self.var = moments[channels + 1 :] / self.count
        self.invstd = (self.var + EPS).rsqrt()
        self.sums = reference.gradient_sums(self.grad, self.x, self.mean, self.invstd)
        self.zero, self.one = torch.zeros(channels), torch.ones(channels)
        self.spread = (1, -1, 1, 1)

    def variance(self) -> dict[str, Callable[[], Tensor]]:
        """Candidates for the local statistics, each returning the biased variance."""
        x, n = self.x, self.count

        def ours() -> Tensor:
            return aten.moments(x)[len(self.zero) + 1 :] / n

        def own() -> Tensor:
            return torch.batch_norm_update_stats(x, None, None, 0.1)[1]

        def var_mean() -> Tensor:
            return torch.var_mean(x, DIMS, correction=0)[0]

        def double() -> Tensor:
            wide = x.double()
            return wide.square().mean(DIMS) - wide.mean(DIMS).square()

        def one_read() -> Tensor:
            pivot = x.mean(DIMS)
            _, dot, total = _backward(x, x, None, pivot, self.one, None, None, False, 0.0, [False, True, True])
            return (dot.double() - pivot * (total - n * pivot)) / n

        def centred() -> Tensor:
            pivot = x.mean(DIMS)
            d = x - pivot.view(self.spread)
            return d.square().mean(DIMS) - d.mean(DIMS).square()

        return {
            "syncbn": ours,
            "PyTorch's own": own,
            "var_mean": var_mean,
            "whole, float64": double,
            "whole, centred": centred,
            "one read about pivot": one_read,
        }

    def output(self) -> dict[str, Callable[[], Tensor]]:
        """Candidates for the normalized output."""
        x, scale = self.x, self.invstd * self.weight
        mean, var = self.mean.float(), self.var.float()

        def ours() -> Tensor:
            return aten.normalize(x, self.mean, self.invstd, self.weight, self.bias)

        def evaluation() -> Tensor:
            return torch.batch_norm(x, self.weight, self.bias, mean, var, False, 0.0, EPS, False)

        def uncentred() -> Tensor:
            shift = torch.addcmul(self.bias, self.mean, scale, value=-1).float().view(self.spread)
            return torch.addcmul(shift, x, scale.float().view(self.spread))

        return {"syncbn": ours, "evaluation mode": evaluation, "addcmul, uncentred": uncentred}

    def gradient_sums(self) -> dict[str, Callable[[], Tensor]]:
        """Candidates for the two sums of the backward pass."""

        def ours() -> Tensor:
            return aten.gradient_sums(self.grad, self.x, self.mean, self.invstd)

        def formula() -> Tensor:
            xhat = (self.x - self.mean.float().view(self.spread)) * self.invstd.float().view(self.spread)
            return torch.cat([self.grad.sum(DIMS), (self.grad * xhat).sum(DIMS)])

        return {"syncbn": ours, "whole formula": formula}

    def input_gradient(self) -> dict[str, Callable[[], Tensor]]:
        """Candidates for the gradient of the input."""
        spread = self.spread

        def ours() -> Tensor:
            return aten.input_gradient(self.grad, self.x, self.mean, self.invstd, self.weight, self.sums, self.count)

        def formula() -> Tensor:
            mean_g, mean_gx = (self.sums / self.count).float().chunk(2)
            xhat = (self.x - self.mean.float().view(spread)) * self.invstd.float().view(spread)
            dx = self.grad - mean_g.view(spread) - xhat * mean_gx.view(spread)
            return dx * (self.invstd * self.weight).float().view(spread)

        def own() -> Tensor:
            stats = (None, None, self.mean.float(), self.invstd.float())
            return _backward(self.grad, self.x, self.weight, *stats, True, EPS, [True, False, False])[0]

        return {"syncbn": ours, "whole formula": formula, "PyTorch's own (with sums)": own}

    def exact(self) -> dict[str, tuple[Tensor, bool]]:
        """For each group of candidates the result in float64, and whether the error is relative."""
        x, grad = self.x.double(), self.grad.double()
        stats = (self.mean, self.invstd, self.weight)
        return {
            "variance": (self.var, True),
            "output": (reference.normalize(x, *stats, self.bias), False),
            "gradient_sums": (self.sums, False),
            "input_gradient": (reference.input_gradient(grad, x, *stats, self.sums, self.count), False),
        }

    def layer(self) -> dict[str, Callable[[], object]]:
        """Forward and backward: all four functions, and `nn.BatchNorm2d`."""
        bn = torch.nn.BatchNorm2d(len(self.zero))
        leaf = self.x.clone(memory_format=torch.preserve_format).requires_grad_()
        stats = (self.mean, self.invstd)

        def ours() -> Tensor:
            aten.moments(self.x, raw=True)
            aten.normalize(self.x, *stats, self.weight, self.bias)
            sums = aten.gradient_sums(self.grad, self.x, *stats)
            return aten.input_gradient(self.grad, self.x, *stats, self.weight, sums, self.count)

        def torch_layer() -> tuple[Tensor, ...]:
            return torch.autograd.grad(bn(leaf), (leaf, bn.weight, bn.bias), self.grad)

        return {"syncbn": ours, "nn.BatchNorm2d": torch_layer}


def largest_error(actual: Tensor, exact: Tensor, relative: bool) -> float:
    """Largest absolute or relative difference."""
    error = (actual.double() - exact).abs()
    return ((error / exact.abs()) if relative else error).max().item()


def report(shape: tuple[int, ...], layout: torch.memory_format, rounds: int, mean: float) -> None:
    """Print the table of one shape and layout."""
    case = Case(shape, layout, mean)
    exact = case.exact()
    print(f"\n{'x'.join(map(str, shape))} {str(layout).removeprefix('torch.')}")
    print(f"  {'function':15} {'candidate':26} {'median us':>10} {'min us':>8} {'/ clone':>8} {'error':>9}")
    for group in ("variance", "output", "gradient_sums", "input_gradient", "layer"):
        candidates = getattr(case, group)()
        errors = {}
        if group in exact:
            errors = {name: largest_error(call(), *exact[group]) for name, call in candidates.items()}
        times = seconds_in_turn({**candidates, "clone": case.x.clone}, rounds)
        clone = statistics.median(times.pop("clone"))
        for name, values in times.items():
            median, least = statistics.median(values), min(values)
            error = f"{errors[name]:9.1e}" if name in errors else ""
            print(f"  {group:15} {name:26} {median * 1e6:10.0f} {least * 1e6:8.0f} {median / clone:8.1f} {error}")
        if group == "layer":
            ours, theirs = (times[name] for name in ("syncbn", "nn.BatchNorm2d"))
            ratio = statistics.median(ours) / statistics.median(theirs)
            print(f"  layer, syncbn / nn.BatchNorm2d: {ratio:.2f} of medians, {min(ours) / min(theirs):.2f} of minima")


def main() -> None:
    """Print one table for each shape and layout."""
    parser = argparse.ArgumentParser(description="time and error of candidates for the CPU kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mean-over-std", type=float, default=1000.0, help="of the input")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s), mean / std {args.mean_over_std:g}"
    )
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            report(shape, layout, args.rounds, args.mean_over_std)


if __name__ == "__main__":
    keep_freed_memory()
    main()
