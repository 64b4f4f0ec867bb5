"""The oracle of the tests: ``nn.BatchNorm1d`` in float64 on the concatenation of all ranks' data, sliced again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Relative and absolute tolerance of outputs and input gradients. Half and bfloat16 are computed in float32 and rounded
# once, on writing: half a unit in the last place (2^-11, 2^-8), and the float32 error on top.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2**-11 * 1.05, 2e-5),
    torch.bfloat16: (2**-8 * 1.05, 2e-5),
}


@dataclass
class Outcome:
    """What the global batch norm makes of each rank's input; gradients of ``sum_r (y_r * g_r).sum()``."""

    y: list[Tensor] = field(default_factory=list)
    dx: list[Tensor] = field(default_factory=list)
    dweight: list[Tensor] = field(default_factory=list)
    dbias: list[Tensor] = field(default_factory=list)
    dresidual: list[Tensor] = field(default_factory=list)
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def rows(x: Tensor) -> Tensor:
    """``(N, C, *)`` as a float64 matrix of one row per element of a channel."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.shape[1])


def unrows(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``rows``."""
    moved = like.movedim(1, -1).shape
    return matrix.reshape(moved).movedim(-1, 1)


def whole_batch(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    residuals: Sequence[Tensor] | None = None,
    relu: bool = False,
) -> Outcome:
    """One process with the whole batch. Each rank has its own copies of the parameters: their gradients stay local."""
    channels = xs[0].shape[1]
    norm = nn.BatchNorm1d(channels, eps, momentum, affine=False, dtype=torch.float64)
    leaves = [rows(x).requires_grad_() for x in xs]
    parts = norm(torch.cat(leaves)).split([len(leaf) for leaf in leaves])
    weights = [(torch.ones(channels) if weight is None else weight.detach()).double().requires_grad_() for _ in xs]
    biases = [(torch.zeros(channels) if bias is None else bias.detach()).double().requires_grad_() for _ in xs]
    outcome = Outcome(running_mean=norm.running_mean, running_var=norm.running_var)
    adds = None if residuals is None else [rows(r).requires_grad_() for r in residuals]
    loss = torch.zeros((), dtype=torch.float64)
    for rank, (part, w, b, g) in enumerate(zip(parts, weights, biases, gs, strict=True)):
        y = part * w + b
        if adds is not None:
            y = y + adds[rank]
        if relu:
            y = y.relu()
        loss = loss + (y * rows(g)).sum()
        outcome.y.append(unrows(y.detach(), xs[rank]))
    loss.backward()
    for rank, x in enumerate(xs):
        outcome.dx.append(unrows(_gradient(leaves[rank]), x))
        outcome.dweight.append(_gradient(weights[rank]))
        outcome.dbias.append(_gradient(biases[rank]))
        if adds is not None:
            outcome.dresidual.append(unrows(_gradient(adds[rank]), x))
    return outcome


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def step(layer: Any, x: Tensor, g: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
    """One training step of a layer on a rank: output, gradients and buffers."""
    x = x.detach().requires_grad_()
    args = [x]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        args.append(residual)
    y = layer(*args)
    y.backward(g)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": None if layer.weight is None else layer.weight.grad,
        "dbias": None if layer.bias is None else layer.bias.grad,
        "dresidual": None if residual is None else residual.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
        "grad_fn": y.grad_fn,
    }


def assert_matches(results: Sequence[dict[str, Any]], expected: Outcome, dtype: torch.dtype) -> None:
    """Every rank's values against the oracle, and the ranks' running statistics against each other, bit for bit."""
    rtol, atol = TOLERANCE[dtype]
    for rank, result in enumerate(results):
        for name in ("y", "dx", "dresidual"):
            if result[name] is not None:
                close(result[name], getattr(expected, name)[rank], rtol, atol, f"{name} of rank {rank}")
        for name in ("dweight", "dbias"):
            if result[name] is not None:
                parameter = TOLERANCE[result[name].dtype]
                scale = 1.0 + float(expected.dweight[rank].abs().max())
                close(result[name], getattr(expected, name)[rank], parameter[0], parameter[1] * scale, f"{name} {rank}")
        for name in ("running_mean", "running_var"):
            if result[name] is not None:
                buffer = TOLERANCE[result[name].dtype]
                close(result[name], getattr(expected, name), *buffer, f"{name} of rank {rank}")
                assert torch.equal(result[name], results[0][name]), f"{name} of rank {rank} is not rank 0's"


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )
