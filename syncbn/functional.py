"""Synchronized batch normalization as functions: argument checks and the choice of the path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import autograd, comm, header, masked
from syncbn.autograd import GlobalMomentsFunction, Plan
from syncbn.comm import Link
from syncbn.groups import resolve_group
from syncbn.header import Call, PeerLostError
from syncbn.moments import Moments, Running
from syncbn.recompute import unseen

ACTIVATIONS = (None, "relu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        remember=Running(running_mean, running_var, momentum),
        local_momentum=momentum,
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
    group = resolve_group(process_group)
    link = comm.link(group, input.device)
    flags = header.INPUT_GRAD if torch.is_grad_enabled() and input.requires_grad else 0
    error = _input_error(input, None) or (None if mask is None else masked.mask_error(input, mask))
    if error is not None:
        _raise_together(error, link, Call(header.MOMENTS, "", flags), input, None)
    plan = Plan(link, 0.0, flags=flags, kind=header.MOMENTS)
    if mask is None:
        mean, var, count = GlobalMomentsFunction.apply(input, plan)
    else:
        mean, var, count = masked.MaskedMomentsFunction.apply(input, mask, plan)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return count, mean.to(dtype), var.to(dtype)


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
    remember: Callable[[Moments | None], None] | None,
    local_momentum: float | None,
    channels: int | None = None,
    layer: str = "",
    check: Callable[[Tensor], None] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What function and module share: checks, then the synchronized path or torch's own.

    Args:
        remember: called once in a training forward, before the output is computed, with the global moments; or with
            None where torch's own path has updated the running statistics. None: update nothing.
        local_momentum: for torch's own path; None to give the batch's moments to ``remember`` there too.
        channels: that the input must have; None to take it from the other tensors.
        layer: name for headers and errors.
        check: a further check of the input, which raises ValueError.
        Others as in ``sync_batch_norm``.
    """
    per_channel = (running_mean, running_var, weight, bias)
    if channels is None:
        channels = next((t.numel() for t in per_channel if t is not None), None)
    compiling = torch.compiler.is_compiling()
    link = comm.link(group, input.device) if training and not compiling else None
    flags = _gradient_flags(input, weight, bias)
    error = _input_error(input, channels, check) or _argument_error(input, per_channel, residual, activation)
    if mask is not None:
        error = error or masked.mask_error(input, mask)
    if error is not None:
        _raise_together(error, link, Call(header.FORWARD, layer, flags), input, channels)
    measures = mask is not None and (training or running_mean is None or running_var is None)
    synchronizes = training and compiling and comm.must_synchronize_compiled(group)
    if compiling and (synchronizes or measures):
        from syncbn import traced  # here, for it imports the compiler

        return traced.batch_norm(
            input, weight, bias, residual, eps=eps, relu=activation == "relu", group=group if synchronizes else None,
            remember=remember, layer=layer, flags=flags, mask=mask,
        )  # fmt: skip
    if mask is not None and measures:
        plan = Plan(link, eps, activation == "relu", remember, layer, flags)
        return masked.sync_batch_norm(input, mask, weight, bias, residual, plan)
    if training and not compiling and (comm.must_synchronize(link) or input.numel() == 0):
        plan = Plan(link, eps, activation == "relu", remember, layer, flags)
        return autograd.sync_batch_norm(input, weight, bias, residual, plan)
    dtype, wide = input.dtype, _common_dtype(input, per_channel)
    if wide is not None:
        input, weight, bias = input.to(wide), _cast(weight, wide), _cast(bias, wide)
    if training:
        y = _local_training(input, running_mean, running_var, weight, bias, eps, remember, local_momentum, wide)
    else:
        batch_stats = running_mean is None or running_var is None
        running_mean, running_var = _cast(running_mean, wide), _cast(running_var, wide)
        y = F.batch_norm(input, running_mean, running_var, weight, bias, batch_stats, 0.0, eps)
    y = y.to(dtype)
    if residual is not None:
        y = (y + residual).to(y.dtype)
    return F.relu(y) if activation == "relu" else y


def _local_training(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    remember: Callable[[Moments | None], None] | None,
    momentum: float | None,
    wide: torch.dtype | None,
) -> Tensor:
    """torch's own batch norm for one rank: its values to the bit, except that running statistics stay finite.

    ``wide``: the dtype for copies of the running statistics; None for their own.
    """
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    if remember is None:  # copies, for torch saves them, and a checkpoint wants its second pass to save as much
        with unseen():
            copies = running_mean.to(wide, copy=True), running_var.to(wide, copy=True)
        return F.batch_norm(input, *copies, weight, bias, True, 0.0, eps)
    if momentum is None:
        # Momentum 1 yields the batch's own mean and unbiased variance, for the policy to work with.
        with unseen():
            mean, var = torch.zeros_like(running_mean, dtype=wide), torch.zeros_like(running_var, dtype=wide)
        y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
        with unseen():
            count = torch.full((), input.numel() / input.shape[1], dtype=torch.float64, device=input.device)
            remember(Moments(count, mean.double(), var.double() * (count - 1.0)))
        return y
    # On copies: torch saves the statistics for its backward, and they must not change after that.
    with unseen():
        moved = running_mean.to(wide, copy=True), running_var.to(wide, copy=True)
    y = F.batch_norm(input, *moved, weight, bias, True, momentum, eps)
    with unseen():
        may_read = input.device.type == "cpu" and not torch.compiler.is_compiling()
        all_finite = may_read and math.isfinite(torch.add(*moved).sum().item())
        finite = None if all_finite else torch.isfinite(moved[0]) & torch.isfinite(moved[1])
        for running, new in zip((running_mean, running_var), moved, strict=True):
            running.copy_(new if finite is None else torch.where(finite, new, running))
        remember(None)
    return y


def _common_dtype(input: Tensor, per_channel: tuple[Tensor | None, ...]) -> torch.dtype | None:
    """The dtype to compute in where torch's batch norm refuses this mixture, and the synchronized path does not.

    FSDP's mixed precision, for one, leaves running statistics in float32 beside bfloat16 parameters.
    """
    dtypes = [tensor.dtype for tensor in per_channel if tensor is not None]
    least = torch.promote_types(input.dtype, torch.float32)
    if all(dtype == input.dtype for dtype in dtypes) or all(dtype == torch.float32 == least for dtype in dtypes):
        return None
    for dtype in dtypes:
        least = torch.promote_types(least, dtype)
    return least


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def _gradient_flags(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """Which gradients this forward is to give: ranks that differ here would wait for each other in the backward."""
    if not torch.is_grad_enabled():
        return 0
    flags = header.INPUT_GRAD if input.requires_grad else 0
    if weight is not None and weight.requires_grad:
        flags |= header.WEIGHT_GRAD
    if bias is not None and bias.requires_grad:
        flags |= header.BIAS_GRAD
    return flags


def _input_error(
    input: Tensor, channels: int | None, check: Callable[[Tensor], None] | None = None
) -> ValueError | None:
    shape = tuple(input.shape)
    if input.dtype not in DTYPES:
        return ValueError(
            f"expected a float16, bfloat16, float32 or float64 input, got {input.dtype} of shape {shape}; "
            "convert it first"
        )
    if input.dim() < 2:
        return ValueError(f"expected an input of at least 2 dimensions (N, C, *), got {input.dim()}-D, shape {shape}")
    if channels is not None and input.shape[1] != channels:
        return ValueError(
            f"expected {channels} channels (num_features) in dimension 1 of the input, got {input.shape[1]}: "
            f"shape {shape}"
        )
    if check is not None:
        try:
            check(input)
        except ValueError as error:
            return error
    return None


def _refuse_cumulative_average(_: Tensor) -> NoReturn:
    raise ValueError("momentum must be a number here, got None; the cumulative average is a matter of the module")


def _argument_error(
    input: Tensor, per_channel: tuple[Tensor | None, ...], residual: Tensor | None, activation: str | None
) -> ValueError | None:
    if activation not in ACTIVATIONS:
        return ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    channels = input.shape[1]
    names = ("running_mean", "running_var", "weight", "bias")
    for name, tensor in zip(names, per_channel, strict=True):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            return ValueError(f"{name} must have shape ({channels},) for this input, got {tuple(tensor.shape)}")
    if residual is not None and (residual.shape != input.shape or not residual.is_floating_point()):
        return ValueError(
            f"residual must be a floating point tensor of the input's shape {tuple(input.shape)}, "
            f"got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    return None


def tell_peers(error: Exception, input: Tensor, group: Any, layer: str, channels: int) -> None:
    """Take part, in place of a forward that failed before it shared anything, so that no peer waits for this rank."""
    link = comm.link(group, input.device)
    if link is not None:
        flags = _gradient_flags(input, None, None)
        link.refuse(Call(header.FORWARD, layer, flags), f"{type(error).__name__}: {error}", 2 * channels + 1)


def _raise_together(error: ValueError, link: Link | None, call: Call, input: Tensor, channels: int | None) -> NoReturn:
    """Raise this rank's own error, after telling the peers that would wait for it."""
    if link is not None:
        if channels is None:
            channels = input.shape[1] if input.dim() > 1 else 0
        try:
            link.refuse(call, str(error), 2 * channels + 1)
        except PeerLostError as lost:  # this rank's own error is what there is to mend
            raise error from lost
    raise error
