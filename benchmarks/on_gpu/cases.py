"""The layers that are compared, their inputs, and the check against float64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions as torchs_functions

import syncbn

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHATS = ("forward", "backward", "both")
EPS = 1e-5
Rows = list[dict[str, object]]


class TorchSync(nn.BatchNorm2d):
    """The synchronized path of nn.SyncBatchNorm, which that layer takes with peers only."""

    def forward(self, input: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return torchs_functions.SyncBatchNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
            dist.group.WORLD, 1,
        )  # fmt: skip


class Chain(nn.Module):
    """A layer, then the residual and the rectifier as operators of their own, if asked for."""

    def __init__(self, norm: nn.Module, fused: bool, follows: bool) -> None:
        super().__init__()
        self.norm, self.fused, self.follows = norm, fused, follows

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if self.fused:
            return self.norm(input, residual)
        y = self.norm(input)
        return torch.relu(y + residual) if self.follows else y


class Case:
    """Inputs of one shape, in as many copies as exceed the L2 cache, and what is done with a layer on each in turn."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
        torch.manual_seed(0)
        one = 3 * dtype.itemsize * int(torch.tensor(shape).prod())
        self.copies = 1 if device == "cpu" else max(2, min(32, -(-3 * l2_bytes() // one)))

        def tensors() -> list[Tensor]:
            made = (torch.randn(shape, device=device) for _ in range(self.copies))
            return [t.to(dtype).contiguous(memory_format=layout) for t in made]

        self.xs, self.grads, self.residuals = tensors(), tensors(), tensors()
        self.xs = [x.mul_(2).add_(1) for x in self.xs]
        self.shape, self.dtype, self.bytes = shape, dtype, one // 3

    def runs(self, layer: Chain) -> dict[str, Callable[[int], object]]:
        """Forward, backward on a kept graph, and both, for the i-th input."""
        xs = [x.detach().requires_grad_() for x in self.xs]
        residuals = [r.detach().requires_grad_(layer.fused or layer.follows) for r in self.residuals]
        parameters = list(layer.parameters())

        def wanted(i: int) -> list[Tensor]:
            return [xs[i], *([residuals[i]] if residuals[i].requires_grad else []), *parameters]

        outputs: dict[int, Tensor] = {}

        def forward(i: int) -> Tensor:
            return layer(xs[i], residuals[i])

        def backward(i: int) -> object:
            if i not in outputs:
                outputs[i] = forward(i)
            return torch.autograd.grad(outputs[i], wanted(i), self.grads[i], retain_graph=True)

        def both(i: int) -> object:
            return torch.autograd.grad(forward(i), wanted(i), self.grads[i])

        return {"forward": forward, "backward": backward, "both": both}

    def check(self, layer: Chain) -> None:
        """Output, gradients and running statistics of the layer against float64; raises if they differ."""
        x, r = self.xs[0].detach().requires_grad_(), self.residuals[0].detach().requires_grad_()
        exact_x, exact_r = x.detach().double().requires_grad_(), r.detach().double().requires_grad_()
        norm = layer.norm
        mean, var = norm.running_mean.double(), norm.running_var.double()
        weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
        exact = nn.functional.batch_norm(exact_x, mean, var, weight, bias, True, 0.1, EPS)
        y = layer(x, r)
        if layer.fused or layer.follows:
            exact = exact + exact_r
            # Where the output rounds to zero either side of the rectifier is right: the exact one follows ours.
            exact = exact * (y.detach() > 0)
        leaves = [x, norm.weight, norm.bias]
        ours = torch.autograd.grad(y, leaves, self.grads[0])
        theirs = torch.autograd.grad(exact, [exact_x, weight, bias], self.grads[0].double())
        scale = 4e-3 if self.dtype is torch.bfloat16 else 5e-4 if self.dtype is torch.float16 else 2e-6
        pairs = zip((y, *ours), (exact, *theirs), strict=True)
        for name, (our, their) in zip(("y", "dx", "dweight", "dbias"), pairs, strict=True):
            error = float((our.detach().double() - their.detach()).norm() / their.detach().norm())
            if layer.follows and not layer.fused:  # it rounds twice
                error /= 2
            if name in ("dweight", "dbias"):  # sums of values that mostly cancel
                error /= 25
            assert error <= 2 * scale, f"{name} of {type(norm).__name__} is off by {error:.2g} for {self.shape}"
        for name, exact_value in (("running_mean", mean), ("running_var", var)):
            torch.testing.assert_close(getattr(norm, name).double(), exact_value, rtol=2e-4, atol=2e-4)


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def layers(channels: int, device: str, with_torch: bool, fused: bool) -> dict[str, Chain]:
    """The sides of the comparison, with the same parameters."""
    sides: dict[str, nn.Module] = {"syncbn": syncbn.SyncBatchNorm(channels, activation="relu" if fused else None)}
    if fused:
        sides["syncbn apart"] = syncbn.SyncBatchNorm(channels)
    sides["BatchNorm2d"] = nn.BatchNorm2d(channels)
    if with_torch:
        sides["SyncBatchNorm"] = TorchSync(channels)
    with torch.no_grad():
        for layer in sides.values():
            torch.manual_seed(1)
            layer.weight.normal_(1, 0.2)
            layer.bias.normal_(0, 0.2)
    return {name: Chain(norm, fused and name == "syncbn", fused).to(device) for name, norm in sides.items()}


def head(part: str, case: Case, layout: str, what: str) -> dict[str, object]:
    return {
        "part": part, "shape": "x".join(map(str, case.shape)), "layout": layout,
        "dtype": str(case.dtype).removeprefix("torch."), "what": what,
    }  # fmt: skip
