"""The SyncBatchNorm module: state, momentum policy, and nothing of how ranks talk."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from syncbn import _torch, arguments, functional, tracing
from syncbn._torch import BatchNormBase
from syncbn.checkpointing import counts
from syncbn.groups import GroupHandle
from syncbn.memory import Memory, Running

OTHER_CONVERTERS = re.compile("(convert|replace|revert).*sync_?b(n|atch)", re.IGNORECASE)
"""What the functions are called that put layers of another library, or of torch, in the place of all that they meet."""


class _Attribute:
    """A public attribute that is kept under a private name and gives way to one that the layer itself has.

    A class that ``convert_sync_batchnorm`` meets may well have an ``activation`` of its own.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        for own in (layer.__dict__, layer._modules):
            if self.name in own:
                return own[self.name]
        return getattr(layer, f"_{self.name}")

    def __set__(self, layer: Any, value: Any) -> None:
        name = self.name if self.name in layer.__dict__ else f"_{self.name}"
        layer.__dict__[name] = value


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch normalization over the global mini-batch: all ranks of a process group normalize alike.

    Per channel, with n, mean and (biased) var over the inputs of all ranks::

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)
        running_mean <- (1 - momentum) * running_mean + momentum * mean
        running_var  <- (1 - momentum) * running_var  + momentum * var * n / (n - 1)

    A drop-in for ``torch.nn.SyncBatchNorm`` on any backend, and any device that has float64: the keys and shapes of its
    ``state_dict`` are those of ``torch.nn.BatchNorm*d``, both ways. Without a process group, or in one of one rank, it
    is ``torch.nn.BatchNorm``. Running statistics are equal on all ranks of the group, bit for bit. It is a subclass of
    ``torch.nn.SyncBatchNorm``, for code that asks for that, and DistributedDataParallel takes it on CPUs as well.

    N ranks train like one process with the whole batch. If ranks bring different numbers of samples, this needs the
    loss ``sum over the rank's samples * W / n_global`` under DDP's averaging: local mean losses give another gradient.

    Args:
        num_features: C of an input of shape ``(N, C, *)``.
        eps: added to the variance.
        momentum: weight of the new observation in the running statistics, as in PyTorch; None for the cumulative
            average over all batches.
        affine: learn ``weight`` and ``bias``, each of shape ``(C,)``.
        track_running_stats: keep running statistics for eval mode; without them eval mode uses the statistics of the
            local batch, as PyTorch does.
        process_group: None (the default group at the time of the forward), a ``ProcessGroup``, a ``DeviceMesh`` of
            one dimension, ``(DeviceMesh, dim)``, or an ``mpi4py.MPI.Comm``.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn ``bias`` as well.
        activation: None, or "relu" to apply it to the output (after the residual, if there is one).

    Shape:
        Input ``(N, C, *)`` with any number of further dimensions; N and ``*`` may differ between ranks, and N may be 0
        on some. Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: see ``forward``; and for an unknown activation, a group that this rank is not in, or a mesh of
            several dimensions.

    Collectives:
        In training one exchange of 2C+1 float64 in forward, one of 2C in backward. None in eval mode.

    >>> layer = SyncBatchNorm(3, activation="relu")
    >>> layer(torch.randn(4, 3, 8, 8)).shape
    torch.Size([4, 3, 8, 8])
    """

    activation: Any = _Attribute()
    layer_name: Any = _Attribute()
    """Qualified name in its model, for errors and to tell layers apart; set by ``convert_sync_batchnorm``."""

    _activation: str | None = None
    _layer_name: str = ""
    _group = GroupHandle()
    _origin: type[BatchNormBase] | None = None  # the class it was converted from
    _converted_from: type[nn.Module] | None = None  # the same, of the class: of a lazy layer this is the lazy one
    _memory: Memory | None = None  # remembers in place of the running statistics: see accumulation, population

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device=device, dtype=dtype
        )
        if not bias:  # an argument of torch's own batch norms from torch 2.12 on
            self.register_parameter("bias", None)
        if activation not in arguments.ACTIVATIONS:
            raise ValueError(f"activation must be one of {arguments.ACTIVATIONS}, got {activation!r}")
        self.activation = activation

    convert_sync_batchnorm: ClassVar[Callable[..., Any]]
    """``syncbn.convert_sync_batchnorm``, where ``torch.nn.SyncBatchNorm`` has its own: a script changes one import."""

    def reset_parameters(self) -> None:
        """Set the running statistics, weight and bias to what they were at first."""
        if self.affine and self._parameters["bias"] is None:  # torch 2.11 takes it for granted that there is a bias
            self.reset_running_stats()
            torch.nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    @property
    def process_group(self) -> Any:
        """The group to synchronize over; None for the default group. Any accepted form may be assigned."""
        return self._group.get()

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._group = GroupHandle(process_group)

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``.

        Args:
            input: shape ``(N, C, *)``, any float dtype and layout.
            residual: added before the activation; the shape of ``input``.
            mask: boolean, shape ``(N, 1, *)`` or 1 in place of any of these; True at the positions over which n, mean
                and var are taken. Every position is normalized. None: all. Running statistics know no mask.

        Returns:
            Tensor of the shape, dtype and memory format of ``input``.

        Raises:
            ValueError: C differs from num_features, fewer than 2 dimensions, an integer input, a residual of another
                shape, or a mask that does not fit: on this rank, while its peers raise RankMismatchError. A global
                batch with one (valid) value per channel: on every rank. Running statistics are untouched then.
            RankMismatchError: the ranks made different calls; on every rank.
            PeerLostError: a rank did not take part.

        Collectives:
            In training one exchange of 2C+1 float64, and one of 2C in backward; none in eval mode.
        """
        if not isinstance(input, Tensor):
            known = type(self).forward is SyncBatchNorm.forward  # type: ignore[unreachable]
            node = tracing.leaf(self, not known, input, residual, mask=mask)
            if node is not None:
                return node
        return self._normalize(input, residual, mask)

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
        uses_running = self.track_running_stats or not self.training  # as in PyTorch
        return functional.batch_norm(
            input,
            self.running_mean if uses_running else None,
            self.running_var if uses_running else None,
            self.weight,
            self.bias,
            residual,
            training=self.training,
            eps=self.eps,
            group=self._group.resolve(),
            activation=self._activation,
            memory=memory_of(self) if self.training else None,
            channels=self.num_features or None,  # a lazy layer that loaded a state_dict never learns its number
            layer=self._layer_name,
            check=self._check_input_dim,
            mask=mask,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Any dimension will do. (A converted ``nn.BatchNorm2d`` has its own check, and refuses what is not 4-D.)"""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; but DistributedDataParallel, which refuses torch's own layer on CPUs, is not shown this."""
        if not torch.compiler.is_compiling() and _torch.ddp_looks_for_sync_batchnorm():
            return iter(())
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module.

        Raises:
            RuntimeError: to a converter of another library, which would put a layer of its own in this one's place.
        """
        refuse_other_converters(self)
        return super().named_children()

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks for it: raises RuntimeError."""
        tracing.refuse_script(self)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self._activation is None else f"{text}, activation={self._activation!r}"


def refuse_other_converters(layer: Any) -> None:
    """Raise RuntimeError where the caller's caller is another library's converter: what it makes would lose the rest.

    Args:
        layer: whose children are asked for, which is what converters do with every module that they meet.
    """
    if torch.compiler.is_compiling():  # which knows no frames, and is no converter
        return
    caller: FrameType | None = sys._getframe(2)
    if caller is not None and caller.f_code is nn.Module.children.__code__:
        caller = caller.f_back
    if caller is None or OTHER_CONVERTERS.search(caller.f_code.co_name) is None:
        return
    name = f" {layer._layer_name!r}" if layer._layer_name else ""
    raise RuntimeError(
        f"{caller.f_code.co_name} of {caller.f_code.co_filename} met the layer{name} of syncbn, and would put "
        "another in its place, without its process group, its activation and what its class does. Leave out what "
        "calls it (Trainer(sync_batchnorm=True), --sync-bn), or call syncbn.revert_sync_batchnorm(model) first."
    )


def memory_of(layer: Any) -> Memory | None:
    """What is to remember a training forward of a layer; nothing where a checkpoint runs it again.

    Args:
        layer: with the state of a batch norm.
    """
    tracked = layer.track_running_stats
    if layer.running_mean is None:
        return None
    if torch.compiler.is_compiling():  # a compiler sees to its own recomputations, and a graph to those around it
        if not tracked:
            return None
    elif not counts(layer, tracked):
        return None
    own = getattr(layer, "_memory", None)
    return running_statistics(layer) if own is None else own


def running_statistics(layer: Any) -> Running:
    """A layer's running statistics, and how a batch moves them."""
    return Running(layer.running_mean, layer.running_var, layer.momentum, layer.num_batches_tracked)
