"""Synchronized batch normalization as functions: argument checks and the choice of the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn import _torch, arguments, autograd, dtensor, kernels, unsynchronized, wire
from syncbn.arguments import ACTIVATIONS, Vectors
from syncbn.autograd import GlobalCovarianceFunction, GlobalMomentsFunction, Plan
from syncbn.channels import compute_dtype
from syncbn.comm import Link, link_of, must_synchronize, synchronizes
from syncbn.few_samples import FEW, notice_few
from syncbn.groups import group_device, notice_alone, resolve_group
from syncbn.memory import Memory, Running
from syncbn.moments import scatter_width
from syncbn.together import tell
from syncbn.wire import Call


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization with the statistics of the global batch: ``torch.nn.functional.batch_norm`` over all ranks.

    Per channel, with n, mean and var (biased) over the inputs of all ranks::

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
        running_mean <- (1 - momentum) * running_mean + momentum * mean
        running_var  <- (1 - momentum) * running_var  + momentum * var * n / (n - 1)

    Args:
        input: shape ``(N, C, *)``, any float dtype and layout. N and ``*`` may differ between ranks; N may be 0.
            Computed in float32 at least, statistics in float64.
        running_mean, running_var: shape ``(C,)``, updated in place when training, used when not. None: batch
            statistics always.
        weight, bias: shape ``(C,)`` or None.
        training: normalize with batch statistics. Without it (and with running statistics) nothing communicates.
        momentum: weight of the new observation, as in PyTorch.
        eps: added to the variance.
        process_group: None, a ProcessGroup, a DeviceMesh, (DeviceMesh, dim) or an mpi4py communicator.
        residual: added before the activation; the shape of ``input``.
        activation: None or "relu".
        mask: boolean, shape ``(N, 1, *)`` or 1 in place of any of these; True at the positions that n, mean and var are
            taken over. None: all. Every position is normalized. Ranks with and without a mask go together, and a rank
            may have no valid position; on a GPU the host waits for the global count. Not used without ``training``
            where there are running statistics.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: wrong shape, dtype or activation (peers raise RankMismatchError, none waits); or a global batch
            with one value per channel (on every rank).
        RankMismatchError: the ranks made different calls.
        PeerLostError: a rank did not take part.

    Collectives:
        When training, one exchange of 2C+1 float64 forward and one of 2C backward; none otherwise.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> sync_batch_norm(x, None, None, training=True, eps=1e-12)
    tensor([[-1.],
            [ 1.]])
    """
    return batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training=training,
        eps=eps,
        group=resolve_group(process_group),
        activation=activation,
        memory=Running(running_mean, running_var, momentum),
        check=_refuse_cumulative_average if momentum is None else None,
        mask=mask,
    )


def global_moments(
    input: Tensor, *, process_group: Any = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance per channel over all ranks, with gradients.

    The service beneath the layer, for other normalizations to build on (batch renormalization, whitening, feature
    scaling). With the loss being the sum of the ranks' losses::

        dx = (sum_r dmean_r + 2 * (x - mean) * sum_r dvar_r) / n

    Args:
        input: shape ``(N, C, *)``, any float dtype; N and ``*`` may differ between ranks, N may be 0.
        process_group: as in ``sync_batch_norm``.
        mask: boolean, of the positions to take, as in ``sync_batch_norm``; elsewhere dx is zero.

    Returns:
        ``(count, mean, var)``: count a 0-dim float64 tensor; mean and var of shape ``(C,)``, float64 for float64 input
        and float32 for all others. Zeros when the global batch is empty.

    Raises:
        ValueError: wrong shape or dtype (peers raise RankMismatchError).
        RankMismatchError, PeerLostError: as in ``sync_batch_norm``.

    Collectives:
        One exchange of 2C+1 float64 forward, one of 2C backward, in any mode: this function knows none.

    >>> count, mean, var = global_moments(torch.tensor([[1.0], [3.0]]))
    >>> count.item(), mean.item(), var.item()
    (2.0, 2.0, 1.0)
    """
    plan = _plan_of_statistics(input, mask, process_group, wire.MOMENTS, lambda channels: 2 * channels + 1)
    mean, var, count = GlobalMomentsFunction.apply(input, mask, plan)
    dtype = compute_dtype(input)
    return count, mean.to(dtype), var.to(dtype)


def global_covariance(
    input: Tensor, *, process_group: Any = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased covariance matrix of the channels over all ranks, with gradients.

    For normalizations that take channels together, such as whitening::

        covariance = sum_r sum (x - mean) (x - mean)^T / n

    With the loss being the sum of the ranks' losses, and G the sum of their gradients of the covariance::

        dx = (sum_r dmean_r + (G + G^T) (x - mean)) / n

    Args:
        input: shape ``(N, C, *)``, any float dtype; N and ``*`` may differ between ranks, N may be 0.
        process_group: as in ``sync_batch_norm``.
        mask: boolean, of the positions to take, as in ``sync_batch_norm``; elsewhere dx is zero.

    Returns:
        ``(count, mean, covariance)``: count a 0-dim float64 tensor; mean of shape ``(C,)`` and covariance of shape
        ``(C, C)``, symmetric, float64 for float64 input and float32 for all others (computed in float64). Zeros when
        the global batch is empty. Differentiable any number of times.

    Raises:
        ValueError: wrong shape or dtype (peers raise RankMismatchError).
        RankMismatchError, PeerLostError: as in ``sync_batch_norm``.

    Collectives:
        One exchange of 1 + C + C(C+1)/2 float64 forward, one of C + C(C+1)/2 backward, in any mode.

    >>> count, mean, covariance = global_covariance(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    >>> count.item(), mean, covariance
    (2.0, tensor([2., 4.]), tensor([[1., 2.],
            [2., 4.]]))
    """
    plan = _plan_of_statistics(input, mask, process_group, wire.COVARIANCE, scatter_width)
    mean, covariance, count = GlobalCovarianceFunction.apply(input, mask, plan)
    dtype = compute_dtype(input)
    return count, mean.to(dtype), covariance.to(dtype)


def _plan_of_statistics(
    input: Tensor, mask: Tensor | None, process_group: Any, kind: int, width: Callable[[int], int]
) -> Plan:
    """What statistics of an input that has passed the checks are taken with.

    Args:
        kind: of the exchange.
        width: of its payload, for a number of channels.
    """
    group = resolve_group(process_group)
    plan = Plan(link_of(group, _device_of(input, group)), flags=_gradient_flags(input, None, None))
    try:
        error = _dtensor_error(input) or arguments.statistics_error(input, mask)
    except Exception as unforeseen:  # to be told to the peers as well
        error = unforeseen
    if error is not None:
        _raise_together(error, plan.link, plan.call(kind), width(_channels_of(input, None)))
    return plan


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    training: bool,
    eps: float,
    group: Any,
    activation: str | None,
    memory: Memory | None,
    channels: int | None = None,
    layer: str = "",
    check: Callable[[Tensor], None] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What function and module share: checks, then one of four ways.

    Args:
        memory: takes note of the batch in a training forward; None for nobody.
        channels: that the input must have; None to take it from the other tensors.
        layer: name for headers and errors.
        check: a further check of the input, which raises ValueError.
        Others as in ``sync_batch_norm``.
    """
    vectors = Vectors(running_mean, running_var, weight, bias)
    if type(input) is not Tensor and dtensor.is_dtensor(input):
        return _in_parts(
            input, vectors, residual, mask, activation, eps, channels, check, training, group, memory, layer
        )
    compiling = torch.compiler.is_compiling()
    if compiling and (training or running_mean is None or running_var is None):
        over, remembers = (group, memory) if training else (None, None)
        if mask is not None or synchronizes(over):
            if training and not synchronizes(over):
                notice_alone(over)
            call = Call(wire.FORWARD, layer, _gradient_flags(input, weight, bias))
            return _compiled(
                input, mask, weight, bias, residual, eps, activation, over, remembers, call, channels, check
            )
    link = link_of(group if training and not compiling else None, _device_of(input, group))
    call = Call(wire.FORWARD, layer, _gradient_flags(input, weight, bias))
    if channels is None:
        channels = next((t.numel() for t in vectors if isinstance(t, Tensor)), None)
    plain = not compiling and _torch.plainly_eager()
    error = _error(input, vectors, residual, mask, activation, eps, channels, check, plain)
    if error is None and training and (link.size > 1 or mask is not None):
        error = arguments.float64_error(input)
    if error is not None:
        _raise_together(error, link, call, 2 * _channels_of(input, channels) + 1)

    relu = activation == "relu"
    if not training and running_mean is not None and running_var is not None:
        return unsynchronized.after(unsynchronized.evaluate(input, vectors, eps), residual, relu)
    if not training:
        group = memory = None
    elif link.size == 1 and not synchronizes(group):
        notice_alone(group)
    if training and not compiling and 0 < input.shape[0] * link.size < FEW:
        notice_few(input.shape[0], link.size, layer)
    if not compiling:
        needed = must_synchronize(link) or mask is not None
        if (needed or _collects(memory)) and _torch.is_shadow(input):
            return unsynchronized.after(unsynchronized.without_values(input, vectors, eps), residual, relu)
        # On a CPU our kernels are quicker than torch's, and more exact, without peers as well. Not where somebody looks
        # on, who knows torch's batch norm and not ours.
        if needed or (plain and kernels.is_native(input)) or input.numel() == 0:
            plan = Plan(link, eps, relu, memory, layer, call.flags)
            return _synchronized(input, mask, weight, bias, residual, plan, plain)
    return unsynchronized.after(unsynchronized.local(input, vectors, eps, memory), residual, relu)


def _in_parts(
    input: Tensor,
    vectors: Vectors,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    eps: float,
    channels: int | None,
    check: Callable[[Tensor], None] | None,
    training: bool,
    group: Any,
    memory: Memory | None,
    layer: str,
) -> Tensor:
    """``batch_norm`` of a DTensor. What is wrong with it, all its ranks see by themselves."""
    if channels is None:
        channels = next((t.numel() for t in vectors if isinstance(t, Tensor)), None)
    error = _error(input, vectors, residual, mask, activation, eps, channels, check)
    if error is not None:
        raise error
    parts = dtensor.parts_of(input, vectors, residual, mask, memory, group, training)
    y = batch_norm(
        parts.input,
        *parts.vectors,
        parts.residual,
        training=training,
        eps=eps,
        group=parts.group,
        activation=activation,
        memory=parts.memory,
        layer=layer,
        mask=parts.mask,
    )
    if training:
        parts.finish()
    return parts.whole(y)


def _collects(memory: Memory | None) -> bool:
    return memory is not None and memory.running is None


def _synchronized(
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    plain: bool,
) -> Tensor:
    """Our kernels, with the statistics of all ranks; what goes wrong before the exchange is told to the others.

    Args:
        plain: whether operators just run, and nobody looks on: ``_torch.plainly_eager``.
    """
    link = plan.link
    link.broke_off = False  # by an exchange before
    before = link.exchanges
    try:
        if not plain:
            autograd.refuse_tracing(plan, input)
        return autograd.sync_batch_norm(input, mask, weight, bias, residual, plan)
    except Exception as error:
        if link.exchanges == before:
            tell(error, link, plan.call(wire.FORWARD), 2 * input.shape[1] + 1)
        raise


def _compiled(
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    group: Any,
    memory: Memory | None,
    call: Call,
    channels: int | None,
    check: Callable[[Tensor], None] | None,
) -> Tensor:
    """The synchronized path as an operator that a compiler traces, and which checks the rest."""
    from syncbn import compiled  # here, for it imports the compiler

    if check is not None:
        check(input)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return compiled.batch_norm(
        input,
        mask,
        weight,
        bias,
        residual,
        eps,
        activation == "relu",
        group if synchronizes(group) else None,
        memory,
        call,
        channels,
    )


def _gradient_flags(input: Any, weight: Tensor | None, bias: Tensor | None) -> int:
    """Which gradients this forward is to give: ranks that differ here would wait for each other in the backward."""
    if not torch.is_grad_enabled():
        return 0
    flags = wire.INPUT_GRAD if isinstance(input, Tensor) and input.requires_grad else 0
    if getattr(weight, "requires_grad", False):
        flags |= wire.WEIGHT_GRAD
    if getattr(bias, "requires_grad", False):
        flags |= wire.BIAS_GRAD
    return flags


def _device_of(input: Any, group: Any) -> torch.device:
    """Where the exchange is; also for an input that is none."""
    return input.device if isinstance(input, Tensor) else group_device(group)


def _channels_of(input: Any, channels: int | None) -> int:
    """How wide the peers' messages are, as far as this rank can tell."""
    if channels is not None:
        return channels
    return input.shape[1] if isinstance(input, Tensor) and arguments.is_dense(input) and input.dim() > 1 else 0


def _error(
    input: Any,
    vectors: Vectors,
    residual: Any,
    mask: Any,
    activation: Any,
    eps: Any,
    channels: int | None,
    check: Callable[[Tensor], None] | None,
    plain: bool = False,
) -> Exception | None:
    """What is wrong with the arguments of a layer; None if nothing is.

    Args:
        plain: whether it is known that nobody looks on: ``_torch.plainly_eager``.
    """
    if not plain and _torch.in_script_trace():  # comparing sizes would warn, and torch's own batch norm compares them
        return None
    if not plain and torch.compiler.is_compiling():
        return arguments.error(input, vectors, residual, mask, eps, activation, channels, check)
    try:
        return arguments.error(input, vectors, residual, mask, eps, activation, channels, check)
    except Exception as unforeseen:  # to be told to the peers as well
        return unforeseen


def _dtensor_error(input: Any) -> Exception | None:
    if not dtensor.is_dtensor(input):
        return None
    return TypeError(
        "expected a plain tensor, got a DTensor: give input.to_local(), and as process_group the dimension of its mesh "
        "that shards batch or space"
    )


def _refuse_cumulative_average(_: Tensor) -> NoReturn:
    raise ValueError("momentum must be a number here, got None; the cumulative average is a matter of the module")


def tell_peers(error: Exception, input: Tensor, group: Any, layer: str, channels: int) -> None:
    """Take part, in place of a forward that failed before it shared anything, so that no peer waits for this rank."""
    call = Call(wire.FORWARD, layer, _gradient_flags(input, None, None))
    tell(error, link_of(group, input.device), call, 2 * channels + 1)


def _raise_together(error: Exception, link: Link, call: Call, width: int) -> NoReturn:
    """Raise this rank's own error, after telling the peers that would wait for it in an exchange of this width."""
    link.broke_off = False  # by an exchange before
    tell(error, link, call, width)
    raise error
