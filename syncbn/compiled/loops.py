"""The synchronized training forward as few operators, opaque to a compiler, around the compiled loops of a CPU.

A graph has five nodes a layer in place of some sixty: it is traced in a fraction of the time, and the loops are as
quick as those that inductor makes, as far as was measured. Values are those of the eager path.
Measuring and the gradient's sums hold the exchange that follows them; see ``exchange`` for their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn import wire
from syncbn.checkpointing import recomputing
from syncbn.compiled import exchange
from syncbn.compiled.exchange import library
from syncbn.kernels import native
from syncbn.memory import Running
from syncbn.messages import Message, Shared
from syncbn.moments import look, unpack
from syncbn.wire import Call

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_CALL = "Tensor? after, str group, str layer, int flags"
library.define(f"measure(Tensor x, Tensor? mask, {_CALL}) -> Tensor")
library.define(
    f"normalize(Tensor x, Tensor? mask, Tensor moments, {_AFFINE}, float eps, bool relu) -> (Tensor, Tensor)"
)
library.define(
    f"gradient_sums(Tensor grad, Tensor x, Tensor? mask, Tensor stats, {_AFFINE}, bool relu, bool shares, "
    f"ScalarType? of_weight, ScalarType? of_bias, {_CALL}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"input_gradient(Tensor grad, Tensor x, Tensor? mask, Tensor stats, {_AFFINE}, bool relu, Tensor sums, "
    "bool wants_g) -> (Tensor, Tensor)"
)
library.define(
    "moved(Tensor moments, Tensor mean, Tensor var, Tensor? batches, float? momentum) -> (Tensor, Tensor, Tensor)"
)
exchange.OPERATORS |= {torch.ops.syncbn.measure.default, torch.ops.syncbn.gradient_sums.default}


class Loops(torch.autograd.Function):
    """Apply to the arguments of ``forward``; returns ``(y, moments)``, of which only ``y`` has a gradient.

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward if x needs a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        relu: bool,
        group: str,
        layer: str,
        flags: int,
    ) -> tuple[Tensor, Tensor]:
        def measure(after: Tensor | None) -> tuple[Tensor, Tensor]:
            moments = torch.ops.syncbn.measure(x, mask, after, group, layer, flags)
            return moments, moments

        moments = exchange.in_order(measure)
        y, stats = torch.ops.syncbn.normalize(x, mask, moments, weight, bias, residual, eps, relu)
        ctx.save_for_backward(x, mask, stats, weight, bias if relu else None, residual if relu else None)
        ctx.mark_non_differentiable(moments)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.relu, ctx.call = relu, (group, layer, flags)
        return y, moments

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        stats, weight = saved[2:4]
        needs_x, needs_weight, needs_bias, needs_g = ctx.needs_input_grad[:4]
        dtypes = weight.dtype if weight is not None and needs_weight else None, ctx.bias_dtype if needs_bias else None

        def sums(after: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
            result = torch.ops.syncbn.gradient_sums(grad, *saved, ctx.relu, needs_x, *dtypes, after, *ctx.call)
            return result, result[0]

        total, dweight, dbias = exchange.in_order(sums) if needs_x else sums(None)[0]
        dx, g = None, grad
        if needs_x or (needs_g and ctx.relu):
            if not needs_x:
                total = stats.new_zeros(stats.shape[0] - 1)  # g does not depend on it
            dx, passed = torch.ops.syncbn.input_gradient(grad, *saved, ctx.relu, total, ctx.relu and needs_g)
            g = passed if ctx.relu else grad
        return (
            dx if needs_x else None,
            None if dtypes[0] is None else dweight,
            None if dtypes[1] is None else dbias,
            g if needs_g else None,
            *[None] * 6,
        )


def move(moments: Tensor, mean: Tensor, var: Tensor, batches: Tensor | None, momentum: float | None) -> None:
    """Move running statistics in place by the moments of a batch."""
    moved = torch.ops.syncbn.moved(moments, mean, var, batches, momentum)
    for kept, new in zip((mean, var, batches), moved, strict=True):
        if kept is not None:
            kept.copy_(new)


# ---- what runs in the graph


@torch.library.impl(library, "measure", "CPU")
def _measure(x: Tensor, mask: Tensor | None, after: Tensor | None, group: str, layer: str, flags: int) -> Tensor:
    call = Call(wire.FORWARD, layer, flags)
    width = 2 * x.shape[1] + 1
    link, shared = exchange.share(lambda m: native.pack_moments(x, mask, m), width, group, x.device, call)
    return exchange.total(link, shared, call)


@torch.library.impl(library, "normalize", "CPU")
def _normalize(
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    shared = Shared(moments.unsqueeze(0), False)
    return native.normalize_shared(x, mask, shared, weight, bias, residual, relu, eps, None)[:2]


@torch.library.impl(library, "gradient_sums", "CPU")
def _gradient_sums(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shares: bool,
    of_weight: torch.dtype | None,
    of_bias: torch.dtype | None,
    after: Tensor | None,
    group: str,
    layer: str,
    flags: int,
) -> tuple[Tensor, ...]:
    """``(sums[2C] over ranks, dweight, dbias)``, each without elements where it is not wanted."""
    gradients: tuple[Tensor | None, ...] = (None, None)

    def write(message: Message | None) -> None:
        nonlocal gradients
        dtypes = of_weight, of_bias
        given = native.operands(grad, x, mask, stats, weight, bias, residual, relu)
        gradients = native.pack_gradient_sums(given, message, dtypes)

    sums = None
    if shares:
        call = Call(wire.BACKWARD, layer, flags)
        sums = exchange.share(write, 2 * x.shape[1], group, x.device, call)[1].sum().clone()
    else:
        write(None)
    return tuple(stats.new_empty(0) if result is None else result for result in (sums, *gradients))


@torch.library.impl(library, "input_gradient", "CPU")
def _input_gradient(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    sums: Tensor,
    wants_g: bool,
) -> tuple[Tensor, Tensor]:
    """``(dx, g)``, g without elements where it is not wanted."""
    shared = Shared(sums.unsqueeze(0), False)
    given = native.operands(grad, x, mask, stats, weight, bias, residual, relu)
    dx, g = native.shared_input_gradient(given, shared, wants_g)
    return dx, stats.new_empty(0) if g is None else g


@torch.library.impl(library, "moved", "CPU")
def _moved(
    moments: Tensor, mean: Tensor, var: Tensor, batches: Tensor | None, momentum: float | None
) -> tuple[Tensor, ...]:
    """The running statistics after the batch; what nobody counts without elements.

    A graph within a checkpoint is run twice, and counts once.
    """
    mean, var = mean.clone(), var.clone()
    batches = None if batches is None else batches.clone()
    if not recomputing():
        Running(mean, var, momentum, batches).move(look(unpack(moments)))
    return mean, var, moments.new_empty(0) if batches is None else batches


# ---- and their shapes


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"syncbn::{name}", lib=library)  # type: ignore[no-any-return, unused-ignore]


@_fake("measure")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)


@_fake("normalize")
def _(x: Tensor, mask: Tensor | None, moments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(moments)


@_fake("gradient_sums")
def _(
    grad: Tensor, x: Tensor, mask: Any, stats: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, shares: bool,
    of_weight: torch.dtype | None, of_bias: torch.dtype | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    channels = x.shape[1]
    sums = stats.new_empty(2 * channels if shares else 0)
    return sums, *(
        stats.new_empty(0) if d is None else stats.new_empty(channels, dtype=d) for d in (of_weight, of_bias)
    )


@_fake("input_gradient")
def _(
    grad: Tensor, x: Tensor, mask: Any, stats: Tensor, weight: Any, bias: Any, residual: Any, relu: bool, sums: Tensor,
    wants_g: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(x, dtype=grad.dtype) if wants_g else stats.new_empty(0)


@_fake("moved")
def _(moments: Tensor, mean: Tensor, var: Tensor, batches: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    counted = moments.new_empty(0) if batches is None else torch.empty_like(batches)
    return torch.empty_like(mean), torch.empty_like(var), counted
