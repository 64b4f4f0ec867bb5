"""The gradient formulas of batch normalization over all ranks.

Convention: the loss is the sum of the ranks' losses. So the adjoint of "every rank gets the sum" is again "every rank
gets the sum", and with g = dL/dy, xhat = (x - mean) * invstd, n the global count and sums over all ranks,

    dx      = weight * invstd * (g - m * (sum(g) / n + xhat * sum(g * xhat) / n))
    dweight = local sum(g * xhat)        dbias = local sum(g)

(Ioffe and Szegedy, 2015, section 3; the parameters' gradients stay local, for DDP to average as any other.) m is 1, or
the mask of the valid positions that the statistics were taken over; the sums of the backward run over all positions,
for every output depends on the statistics. With a ReLU, g is first set to zero where the output, computed again from
the saved input, is not positive.

Double backward: when a graph of the backward is asked for (``create_graph=True``), the backward runs as a composition
of differentiable steps, in which the statistics are functions of the input once more; one more exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn import _torch, kernels, wire
from syncbn.channels import centred, per_channel, reduced_dims
from syncbn.checkpointing import unseen
from syncbn.comm import Link
from syncbn.memory import Memory, Running
from syncbn.messages import Message, Shared, fill
from syncbn.moments import look, pack_scatter, scatter_width, symmetric, unpack_scatter, upper_triangle
from syncbn.wire import Call


@dataclass(slots=True)  # and not frozen, which would take longer to make than all of it to use
class Plan:
    """All that a forward knows besides tensors.

    Attributes:
        link: to the other ranks.
        eps: added to the variance.
        relu: whether the output goes through a ReLU.
        memory: remembers the batch; None for nobody.
        layer: qualified name for headers and errors, "" when there is none.
        flags: header flags of the gradients that are wanted.
    """

    link: Link
    eps: float = 0.0
    relu: bool = False
    memory: Memory | None = None
    layer: str = ""
    flags: int = 0

    def call(self, kind: int) -> Call:
        """What an exchange of this layer is for."""
        return Call(kind, self.layer, self.flags)


def sync_batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> Tensor:
    """Apply ``SyncBatchNormFunction``; its output alone."""
    return _torch.apply(SyncBatchNormFunction, x, mask, weight, bias, residual, plan)[0]


_Saved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]


class _Function(torch.autograd.Function):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuses: one call of a vmapped function would be many exchanges, or one of the wrong batch."""
        plan = next((arg for arg in args if isinstance(arg, Plan)), None)
        raise _unsupported("torch.vmap (nor in what maps: jacrev, per-sample gradients)", plan, _NO_VMAP)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Refuses: forward-mode derivatives would take an exchange of their own."""
        raise _unsupported(_FORWARD_MODE, getattr(ctx, "plan", None), _NO_FORWARD_MODE)


_FORWARD_MODE = "forward-mode differentiation (torch.func.jvp, jacfwd, hessian, forward_ad)"
_NO_VMAP = "Put vmap's dimension into the batch"
_NO_FORWARD_MODE = "Differentiate in reverse (torch.func.vjp, torch.autograd.grad)"


def _unsupported(what: str, plan: Plan | None, instead: str) -> NotImplementedError:
    layer = f"layer {plan.layer!r}" if plan is not None and plan.layer else "a layer"
    return NotImplementedError(
        f"{layer}: synchronized (or masked) batch statistics do not work in {what}: they are shared over ranks once a "
        f"call. {instead}, use eval mode, or syncbn.revert_sync_batchnorm(model) for statistics of this rank alone."
    )


def _refuse_batched(plan: Plan, x: Tensor) -> NoReturn:
    error = _unsupported("a backward with batched gradients", plan, "Compute one gradient at a time")
    with _torch.outside_modes():
        plan.link.refuse(plan.call(wire.BACKWARD), str(error), 2 * x.shape[1])
    raise error


def refuse_tracing(plan: Plan, x: Tensor) -> None:
    """Raise NotImplementedError where somebody watches a layer who cannot follow it to the other ranks."""
    tracer = _torch.tracer()
    if tracer:
        raise _unsupported(tracer, plan, "Use torch.compile, which knows them")
    if _torch.has_tangent(x):
        raise _unsupported(_FORWARD_MODE, plan, _NO_FORWARD_MODE)


class SyncBatchNormFunction(_Function):
    """``y = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, statistics over all ranks.

    Apply to ``(x, mask, weight, bias, residual, plan)``; returns ``(y, stats)``, of which only ``y`` has a gradient.
    Saves x, the mask and per-channel vectors (and the residual under a ReLU).

    Collectives: one exchange of 2C+1 float64 forward; one of 2C backward if x needs a gradient, none otherwise.
    """

    @staticmethod
    def forward(
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        call = plan.call(wire.FORWARD)
        kernel = kernels.choose(x, mask, plan.link.direct)
        with unseen():
            local = measure(kernel, x, mask, plan.link, call)
            shared = plan.link.share(local, call)
            running = remember(shared, x, mask, plan)
            return normalize(kernel, x, mask, shared, weight, bias, residual, plan, running)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, weight, bias, residual, plan = inputs
        stats = output[1]
        if not plan.relu:
            bias = residual = None  # needed to compute the output again, for the ReLU's mask
        ctx.save_for_backward(x, mask, weight, bias, residual, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.bias_dtype = None if inputs[3] is None else inputs[3].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        saved: _Saved = ctx.saved_tensors
        x, weight = saved[0], saved[2]
        needs_x, _, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        dtypes = weight.dtype if weight is not None and needs_weight else None, ctx.bias_dtype if needs_bias else None
        if grad is None:
            grad = torch.zeros_like(x)  # this rank uses no output, but its peers wait for its sums
        gradients: tuple[Tensor | None, ...]
        batched = _torch.is_batched(grad)  # by autograd itself: is_grads_batched=True, jacobian(vectorize=True)
        if batched and ctx.plan.link.size > 1:
            _refuse_batched(ctx.plan, x)
        if batched or torch.is_grad_enabled():
            gradients = _differentiable_backward(ctx.plan, grad, *saved, dtypes)
        else:
            gradients = _backward(ctx.plan, grad, *saved, dtypes, needs_x, needs_residual)
        dx, dweight, dbias, g = gradients
        return dx, None, dweight, dbias, g if needs_residual else None, None


def _backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    dtypes: tuple[torch.dtype | None, ...],
    needs_x: bool,
    needs_g: bool,
) -> tuple[Tensor | None, ...]:
    """``(dx, dweight, dbias, g)``, g being the gradient behind the ReLU: two calls of the kernels and an exchange."""
    kernel = kernels.choose(x, mask, plan.link.direct)
    rest = x, mask, stats, weight, bias, residual
    relu = plan.relu
    operands = kernel.operands(grad, *rest, relu)
    if relu and not kernel.fuses_relu:
        grad, relu = kernel.passed_gradient(operands), False
        operands = kernel.operands(grad, *rest, relu)
    dx, dweight, dbias, g = None, None, None, None if relu else grad
    call = plan.call(wire.BACKWARD)
    message = plan.link.message(2 * x.shape[1], call) if needs_x else None
    if needs_x or dtypes != (None, None):
        dweight, dbias = kernel.pack_gradient_sums(operands, message, dtypes)
    if message is not None:
        dx, passed = kernel.shared_input_gradient(operands, plan.link.share(message, call), relu and needs_g)
        g = passed if relu else grad
    elif relu and needs_g:
        g = kernel.passed_gradient(operands)
    return dx, dweight, dbias, g


def measure(kernel: Any, x: Tensor, mask: Tensor | None, link: Link, call: Call) -> Message:
    """The moments of this rank's valid positions, in a message for the others."""
    message = link.message(2 * x.shape[1] + 1, call)
    kernel.pack_moments(x, mask, message)
    return message


def remember(shared: Shared, x: Tensor, mask: Tensor | None, plan: Plan) -> Running | None:
    """Let the memory take note of the batch; the running statistics, if a kernel is to move them.

    Raises:
        ValueError: the global batch has one value per channel; on every rank, and nothing is remembered.
    """
    # If the global count is one, no rank has a larger local count. So only ranks with a local count below two read the
    # global one, and wait for their device. Under a mask only reading tells how many positions are valid.
    if (mask is not None or x.numel() < 2 * x.shape[1]) and not _torch.is_capturing(x.device):
        _refuse_one(shared, x, plan)
    if plan.memory is None or plan.memory.running is not None:
        return None if plan.memory is None else plan.memory.running
    plan.memory.collect(shared.on(x.device).moments(), x, mask)
    return None


def normalize(
    kernel: Any,
    x: Tensor,
    mask: Tensor | None,
    shared: Shared,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """The output, and ``(mean[C], invstd[C], n)`` of the global batch."""
    y, stats, finite = kernel.normalize_shared(x, mask, shared, weight, bias, residual, plan.relu, plan.eps, running)
    if finite is False:
        plan.link.warn_broken(shared, plan.layer)
    return y, stats


class _GlobalFunction(_Function):
    """Of ``(x, mask, plan)``, with ``(mean, spread, count)`` as output."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, ctx.plan = inputs
        mean, _, count = output
        ctx.save_for_backward(x, mask, mean, count)  # an output that is saved comes back with its own gradient
        ctx.mark_non_differentiable(count)


class GlobalMomentsFunction(_GlobalFunction):
    """Mean and biased variance over all ranks, as functions of this rank's ``x``.

    Apply to ``(x, mask, plan)``; returns float64 ``(mean, var, count)``. With the loss being the sum of the ranks'
    losses,

        dx = m * (sum_r dmean_r + 2 * (x - mean) * sum_r dvar_r) / n

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward. Differentiable any number of times.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        call = plan.call(wire.MOMENTS)
        with unseen():
            kernel = kernels.choose(x, mask, plan.link.direct)
            shared = plan.link.share(measure(kernel, x, mask, plan.link, call), call)
            total = look(shared.on(x.device).moments())
        if total.finite is False:
            plan.link.warn_broken(shared, plan.layer)
        return total.mean.clone(), total.var, total.n.clone()

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: None) -> tuple[Tensor, None, None]:
        x, mask, mean, count = ctx.saved_tensors
        total = SumFunction.apply(torch.cat([grad_mean, grad_var]), ctx.plan, wire.MOMENTS_BACKWARD)
        level, slope = (total / count.clamp(min=1.0)).chunk(2)
        if mask is not None:
            x = torch.where(mask, x, 0)  # here already: zero times NaN is NaN in a second derivative as well
        if torch.is_grad_enabled() or mask is not None:
            dx = centred(x, mean) * per_channel(2.0 * slope, x) + per_channel(level, x)
            return _valid(dx, mask).to(x.dtype), None, None
        return kernels.plain(x).normalize(x, mean, 2.0 * slope, None, level), None, None


class GlobalCovarianceFunction(_GlobalFunction):
    """Mean and biased covariance over all ranks, as functions of this rank's ``x``.

    Apply to ``(x, mask, plan)``; returns float64 ``(mean[C], covariance[C, C], count)``. With the loss being the sum of
    the ranks' losses, and G the sum of their gradients of the covariance,

        dx = m * (sum_r dmean_r + (G + G^T) (x - mean)) / n

    Collectives: one exchange of 1 + C + C(C+1)/2 float64 forward, one of C + C(C+1)/2 backward. Differentiable any
    number of times.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        call = plan.call(wire.COVARIANCE)
        channels = x.shape[1]
        with unseen():
            message = plan.link.message(scatter_width(channels), call)
            fill(message, pack_scatter(kernels.statistics(x, mask, covariance=True), message.raw))
            shared = plan.link.share(message, call)
            total = look(shared.on(x.device).moments(partial(unpack_scatter, channels=channels)))
        if total.finite is False:
            plan.link.warn_broken(shared, plan.layer)
        return total.mean.clone(), total.var, total.n.clone()

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_covariance: Tensor, _: None) -> tuple[Tensor, None, None]:
        x, mask, mean, count = ctx.saved_tensors
        channels = len(mean)
        grads = torch.cat([grad_mean, upper_triangle(grad_covariance + grad_covariance.T)])
        total = SumFunction.apply(grads, ctx.plan, wire.COVARIANCE_BACKWARD) / count.clamp(min=1.0)
        level, slope = total[:channels], symmetric(total[channels:], channels)
        if mask is not None:
            x = torch.where(mask, x, 0)
        deviation = centred(x, mean)
        dx = torch.einsum("ij,nj...->ni...", slope.to(deviation.dtype), deviation) + per_channel(level, x)
        return _valid(dx, mask).to(x.dtype), None, None


class SumFunction(_Function):
    """The sum of a float64 vector over all ranks; its own adjoint. Apply to ``(payload, plan, kind)``.

    Collectives: one exchange forward, one backward.
    """

    @staticmethod
    def forward(payload: Tensor, plan: Plan, kind: int) -> Tensor:
        return plan.link.sum(payload, plan.call(kind))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.plan, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return SumFunction.apply(grad, ctx.plan, wire.SUM), None, None


class _PassesFunction(_Function):
    """One where the gradient passes the ReLU, else zero. A Function, so that kernels see plain tensors."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, stats: Tensor, *rest: Any) -> Tensor:
        *parameters, direct = rest
        kernel = kernels.choose(x, mask, direct)
        return kernel.passed_gradient(kernel.operands(torch.ones_like(x), x, mask, stats, *parameters, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)


def _differentiable_backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The backward out of differentiable steps: ``(dx, dweight, dbias, g)``, g being the gradient behind the ReLU."""
    g = grad
    if plan.relu:
        g = grad * _PassesFunction.apply(x, mask, stats, weight, bias, residual, plan.link.direct)
    given = x
    if mask is not None:
        x = kernels.clean_padding(x, mask)
    mean, var, count = GlobalMomentsFunction.apply(x, mask, plan)
    invstd = (var + plan.eps).rsqrt()
    xhat = centred(x, mean) * per_channel(invstd, x)
    dims = reduced_dims(x)
    sums = torch.cat([g.sum(dims, dtype=torch.float64), (g * xhat).sum(dims, dtype=torch.float64)])
    dbias, dweight = sums.chunk(2)
    if plan.link.size > 1:
        sums = SumFunction.apply(sums, plan, wire.SUM)
    level, slope = (sums / count.clamp(min=1.0)).chunk(2)
    dx = g - _valid(per_channel(level, x), mask) - _valid(xhat * per_channel(slope, x), mask)
    dx = dx * per_channel(invstd if weight is None else invstd * weight, x)
    if mask is not None and x is not given:
        dx = torch.where(mask | (x == given), dx, 0)
    return (
        dx.to(x.dtype),
        None if dtypes[0] is None else dweight.to(dtypes[0]),
        None if dtypes[1] is None else dbias.to(dtypes[1]),
        g,
    )


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0)


def _refuse_one(shared: Shared, x: Tensor, plan: Plan) -> None:
    if sum(shared.parts[:, 0].tolist()) == 1:
        raise ValueError(
            "batch normalization needs more than 1 value per channel when training, and the global batch over "
            f"{plan.link.size} rank(s) has 1; this rank's input has shape {tuple(x.shape)}"
        )
