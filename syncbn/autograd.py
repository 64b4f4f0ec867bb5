"""The gradient formulas of batch normalization over all ranks.

Convention: the loss is the sum of the ranks' losses. So the adjoint of "every rank gets the sum" is again "every rank
gets the sum", and with g = dL/dy, xhat = (x - mean) * invstd, n the global count and sums over all ranks,

    dx      = weight * invstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)
    dweight = local sum(g * xhat)        dbias = local sum(g)

(Ioffe and Szegedy, 2015, section 3; the parameters' gradients stay local, for DDP to average as any other.)
With the ReLU, g is first set to zero where the output, computed again from the saved input, is not positive.

Double backward: when a graph of the backward is asked for (``create_graph=True``), the backward runs as a composition
of differentiable steps, in which the statistics are functions of the input once more; one more exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn import header, kernels, moments
from syncbn.comm import Link
from syncbn.header import Call
from syncbn.kernels import HEAD
from syncbn.moments import Moments, Running
from syncbn.recompute import unseen


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a forward knows besides tensors.

    Attributes:
        link: to the other ranks; None for none.
        eps: added to the variance.
        relu: whether the output goes through a ReLU.
        remember: called with the global moments once they are known, to update running statistics.
        layer: qualified name for headers and errors, "" when there is none.
        flags: header flags of the gradients that are wanted.
        kind: of the forward exchange.
    """

    link: Link | None
    eps: float
    relu: bool = False
    remember: Callable[[Moments], None] | None = None
    layer: str = ""
    flags: int = 0
    kind: int = header.FORWARD

    def share(self, x: Tensor) -> Moments:
        """Measure ``x`` and merge with all ranks' moments.

        Raises:
            ValueError: the global batch has one value per channel; on every rank.
        """
        total = self.merge(kernels.moments(x, raw=self.wants_raw))
        # A global count of one is one on every rank, and then no rank has a local count above it: others never wait.
        if x.numel() < 2 * x.shape[1]:
            self.refuse_one(total, x)
        return total

    @property
    def wants_raw(self) -> bool:
        """Whether ``merge`` takes raw sums."""
        return self.link is not None and not self.link.sees_each_rank

    def refuse_one(self, total: Moments, x: Tensor) -> None:
        """Raise ValueError if the global batch that is to be normalized has one value per channel. Reads the count."""
        if self.kind == header.FORWARD and not _capturing(x) and total.n.item() == 1:
            raise ValueError(
                "batch normalization needs more than 1 value per channel when training, and the global batch over "
                f"{self.link.size if self.link else 1} rank(s) has 1; this rank's input has shape {tuple(x.shape)}"
            )

    def merge(self, packed: Tensor) -> Moments:
        """The moments of all ranks, of which ``packed`` are this rank's."""
        if self.link is None:
            return moments.look(moments.unpack(packed))
        parts = self.link.exchange(packed, Call(self.kind, self.layer, self.flags))
        if self.link.sees_each_rank:
            total = moments.look(moments.merge([moments.unpack(part) for part in parts]))
        else:
            total = moments.look(moments.unpack_raw(parts[0]))
        if total.finite is False:
            self.link.warn_broken(parts, self.layer)
        return total

    def fused(self, x: Tensor) -> Any:
        """The kernels with the fused forms, if there are some for x, and the link takes a message from them."""
        return kernels.fused(x) if self.link is None or self.link.in_place else None

    def exchange_in_place(self, write: Callable[[Tensor, int, int], None], kind: int, width: int, x: Tensor) -> Tensor:
        """The sum over all ranks of the payload of a message that ``write`` writes; see ``Link.exchange_in_place``."""
        if self.link is not None:
            return self.link.exchange_in_place(write, width, Call(kind, self.layer, self.flags))
        message = torch.empty(HEAD + width, dtype=torch.float64, device=x.device)
        write(message, 0, 0)
        return message[HEAD:]

    def sum(self, payload: Tensor, kind: int) -> Tensor:
        """The sum of a float64 vector over all ranks."""
        return payload if self.link is None else self.link.sum(payload, Call(kind, self.layer, self.flags))


# Private, so tested for: whether a transform of torch.func is active.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan
) -> Tensor:
    """Apply ``SyncBatchNormFunction``; its output alone."""
    if _transforms_active is None or _transforms_active():
        return SyncBatchNormFunction.apply(x, weight, bias, residual, plan)[0]
    # Function.apply binds its arguments by inspect first, for these transforms: 40 us that only they need.
    return super(torch.autograd.Function, SyncBatchNormFunction).apply(x, weight, bias, residual, plan)[0]


class SyncBatchNormFunction(torch.autograd.Function):
    """``y = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, statistics over all ranks.

    Apply to ``(x, weight, bias, residual, plan)``; returns ``(y, mean, invstd, count)``, of which only ``y`` has a
    gradient. Saves x and per-channel vectors (and the residual under a ReLU).

    Collectives: one exchange of 2C+1 float64 forward; one of 2C backward if x needs a gradient, none otherwise.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with unseen():
            fused = plan.fused(x)
            if fused is not None and _is_movable(plan.remember):
                return _fused_forward(fused, x, weight, bias, residual, plan)
            total = plan.share(x)  # measure, share
            if plan.remember is not None:
                plan.remember(total)
            invstd = total.invstd(plan.eps)
            y = kernels.normalize(x, total.mean, invstd, weight, bias, residual, plan.relu)
        return y, total.mean, invstd, total.n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, plan = inputs
        _, mean, invstd, count = output
        if not plan.relu:
            bias = residual = None  # needed to compute the output again, for the ReLU's mask
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, count)
        ctx.mark_non_differentiable(mean, invstd, count)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
        dx: Tensor | None = None
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        if grad is None:
            grad = torch.zeros_like(x)  # this rank uses no output, but its peers wait for its sums
        needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight, dbias, g = _differentiable_backward(
                ctx.plan, grad, x, weight, (mean, invstd), (bias, residual)
            )
        elif (fused := ctx.plan.fused(x)) is not None and (needs_x or needs_weight or needs_bias):
            dx, dweight, dbias, g = _fused_backward(fused, ctx, grad)
        else:
            g = grad
            if ctx.plan.relu:
                g = kernels.relu_gradient(grad, x, mean, invstd, weight, bias, residual)
            if needs_x or needs_weight or needs_bias:
                sums = kernels.gradient_sums(g, x, mean, invstd)
                dbias, dweight = sums[: mean.numel()], sums[mean.numel() :]
            if needs_x:
                total = ctx.plan.sum(sums, header.BACKWARD)
                dx = kernels.input_gradient(g, x, mean, invstd, weight, total, count)
        return (
            dx,
            dweight.to(weight.dtype) if needs_weight and dweight is not None else None,
            dbias.to(ctx.bias_dtype) if needs_bias and dbias is not None else None,
            g if needs_residual else None,
            None,
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refuses: see ``refuse_vmap``."""
        refuse_vmap()


class GlobalMomentsFunction(torch.autograd.Function):
    """Mean and biased variance over all ranks, as functions of this rank's ``x``.

    Apply to ``(x, plan)``; returns float64 ``(mean, var, count)``. With the loss being the sum of the ranks' losses,

        dx = (sum_r dmean_r + 2 * (x - mean) * sum_r dvar_r) / n

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward. Differentiable any number of times.
    """

    @staticmethod
    def forward(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        with unseen():
            total = plan.share(x)
            return total.mean, total.var, total.n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.plan = inputs
        mean, _, count = output
        ctx.save_for_backward(x, mean, count)  # an output that is saved comes back with its own gradient
        ctx.mark_non_differentiable(count)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: None) -> tuple[Tensor, None]:
        x, mean, count = ctx.saved_tensors
        channels = mean.numel()
        total = SumFunction.apply(torch.cat([grad_mean, grad_var]), replace(ctx.plan, kind=header.MOMENTS_BACKWARD))
        total = total / count.clamp(min=1.0)
        slope, level = 2.0 * total[channels:], total[:channels]
        if torch.is_grad_enabled():
            return (centred(x, mean) * per_channel(slope, x) + per_channel(level, x)).to(x.dtype), None
        return kernels.normalize(x, mean, slope, None, level), None

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refuses: see ``refuse_vmap``."""
        refuse_vmap()


class SumFunction(torch.autograd.Function):
    """The sum of a float64 vector over all ranks; its own adjoint. Apply to ``(payload, plan)``.

    Collectives: one exchange forward, one backward.
    """

    @staticmethod
    def forward(payload: Tensor, plan: Plan) -> Tensor:
        # (a clone, for a Function must not return its input)
        return payload.clone() if plan.link is None else plan.sum(payload, plan.kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.plan = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumFunction.apply(grad, replace(ctx.plan, kind=header.SUM)), None

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refuses: see ``refuse_vmap``."""
        refuse_vmap()


def _fused_forward(
    fused: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of ``SyncBatchNormFunction`` in three launches and one sum over the ranks."""

    def write(message: Tensor, tag: int, number: int) -> None:
        fused.pack_moments(x, message, tag, number)

    sums = plan.exchange_in_place(write, plan.kind, 2 * x.shape[1] + 1, x)
    if x.numel() < 2 * x.shape[1]:
        plan.refuse_one(moments.unpack_raw(sums), x)
    to_move = plan.remember
    running = (to_move.mean, to_move.var, to_move.momentum, to_move.batches) if isinstance(to_move, Running) else None
    return fused.normalize_shared(x, sums, weight, bias, residual, plan.relu, plan.eps, running)


def _fused_backward(fused: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """``(dx, dweight, dbias, g)`` in three launches and one sum, g being the gradient behind the ReLU."""
    x, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
    plan = ctx.plan
    needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
    args = grad, x, mean, invstd, weight, bias, residual, plan.relu
    dtypes = weight.dtype if needs_weight else None, ctx.bias_dtype if needs_bias else None
    if not needs_x:
        g = kernels.relu_gradient(*args[:-1]) if plan.relu and needs_residual else grad
        return None, *fused.pack_gradient_sums(*args, None, 0, 0, dtypes), g
    parameters: list[Tensor | None] = []

    def write(message: Tensor, tag: int, number: int) -> None:
        parameters.extend(fused.pack_gradient_sums(*args, message, tag, number, dtypes))

    sums = plan.exchange_in_place(write, header.BACKWARD, 2 * x.shape[1], x)
    dx, masked = fused.shared_input_gradient(*args, sums, count, plan.relu and needs_residual)
    return dx, *parameters, grad if masked is None else masked


def _is_movable(remember: Any) -> bool:
    """Whether a kernel can carry out what is to be remembered: running statistics as plain vectors, or nothing."""
    if remember is None:
        return True
    if not isinstance(remember, Running):
        return False
    return all(type(t) is Tensor and t.is_contiguous() for t in (remember.mean, remember.var) if t is not None)


def _differentiable_backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: tuple[Tensor, Tensor],
    mask: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward out of differentiable steps: ``(dx, dweight, dbias, g)``, g being the gradient behind the ReLU."""
    g = grad
    if plan.relu:
        ones = torch.ones_like(x)
        g = grad * kernels.relu_gradient(ones, x.detach(), *stats, _detached(weight), *map(_detached, mask))
    mean, var, count = GlobalMomentsFunction.apply(x, replace(plan, kind=header.MOMENTS))
    dims = [dim for dim in range(x.dim()) if dim != 1]
    invstd = (var + plan.eps).rsqrt()
    xhat = centred(x, mean) * per_channel(invstd, x)
    sums = torch.cat([g.sum(dims, dtype=torch.float64), (g * xhat).sum(dims, dtype=torch.float64)])
    total = SumFunction.apply(sums, replace(plan, kind=header.SUM)) / count.clamp(min=1.0)
    channels = mean.numel()
    dx = g - per_channel(total[:channels], x) - xhat * per_channel(total[channels:], x)
    scale = invstd if weight is None else invstd * weight
    return (dx * per_channel(scale, x)).to(x.dtype), sums[channels:], sums[:channels], g


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def centred(x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean`` in x's compute dtype, without the rounding error of a float32 mean; differentiable in both."""
    dtype = compute_dtype(x)
    coarse = mean.detach().to(dtype)
    return x.to(dtype) - per_channel(coarse, x) - per_channel(mean - coarse, x)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape ``(C,)`` in x's compute dtype, shaped to broadcast against x."""
    return values.to(compute_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def refuse_vmap() -> NoReturn:
    """Raise NotImplementedError: one call of a vmapped function would be many exchanges, or one of the wrong batch."""
    raise NotImplementedError(
        "synchronized batch statistics do not work under torch.vmap: they are shared over ranks once a call. "
        "Put vmap's dimension into the batch, use eval mode, or syncbn.revert_sync_batchnorm(model)."
    )
