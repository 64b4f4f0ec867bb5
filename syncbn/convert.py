"""To synchronized batch norm and back, in place: a layer stays the same object and only changes its class.

So everything that a layer is to the rest of a program survives: its parameters and buffers, hooks, training flag,
custom attributes, all the parents and lists that hold it, and the optimizer's references. The class it had is
remembered and given back by ``revert_sync_batchnorm``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.overrides import TorchFunctionMode

from syncbn import functional
from syncbn.comm import GroupHandle, link, must_synchronize
from syncbn.modules import SyncBatchNorm
from syncbn.moments import Moments, update_running_stats
from syncbn.recompute import recomputing

M = TypeVar("M", bound=nn.Module)

_LAZY = {nn.BatchNorm1d: nn.LazyBatchNorm1d, nn.BatchNorm2d: nn.LazyBatchNorm2d, nn.BatchNorm3d: nn.LazyBatchNorm3d}
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_OURS = ("_group", "layer_name", "activation", "_origin")


def convert_sync_batchnorm(module: M, process_group: Any = None) -> M:
    """Make every batch norm layer in ``module`` synchronize its statistics over ranks.

    The layers are changed in place: each stays the same object, with the same parameters, buffers, hooks, mode and
    attributes, and gets another class. ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` become ``SyncBatchNorm``; lazy
    ones become it when they materialize; subclasses keep their behaviour (what they do before and after the
    normalization) and are ``SyncBatchNorm`` besides. Layers that are synchronized already are left as they are, group
    included. Other normalizations are not touched.

    A subclass's own forward may call ``super().forward`` or ``F.batch_norm`` with its own running statistics or weight.
    One that does neither raises RuntimeError, naming class and layer, in its first synchronized forward.

    Each layer is given its qualified name, by which ranks find out that they are in different layers.

    Args:
        module: a model, or a batch norm layer.
        process_group: to synchronize over; as in ``SyncBatchNorm``. For a ``nn.SyncBatchNorm`` None means its own.

    Returns:
        ``module`` itself.

    Raises:
        ValueError, TypeError: for a process group as in ``SyncBatchNorm``.
        TypeError: a subclass of ``nn.SyncBatchNorm`` or of a lazy batch norm.

    Collectives:
        None. (To compare the layers of all ranks, call ``check_ranks_agree``.)

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> type(convert_sync_batchnorm(model)[1]).__name__
    'SyncBatchNorm'
    >>> type(revert_sync_batchnorm(model)[1]).__name__
    'BatchNorm1d'
    """
    handle = GroupHandle(process_group)
    found: list[tuple[str, Any]] = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm | _LazyNormBase)
    ]
    # All or nothing: a model that is converted by half is no use to anybody.
    classes = {type(layer): _synchronized_class(type(layer), name) for name, layer in found}
    for name, layer in found:
        if isinstance(layer, SyncBatchNorm):
            layer.layer_name = layer.layer_name or layer_name(name)
            continue
        target = classes[type(layer)]
        if target is None:
            continue
        layer_handle = handle
        if isinstance(layer, nn.SyncBatchNorm):
            own = layer.__dict__.pop("process_group", None)
            layer_handle = handle if process_group is not None else GroupHandle(own)
        layer._group = layer_handle
        layer.layer_name = layer_name(name)
        layer._origin = _origin(type(layer))
        layer.__class__ = target
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Make every synchronized batch norm layer in ``module`` local again, in place: the inverse of the conversion.

    Each layer gets back the class that it had. One that never had another (a ``SyncBatchNorm`` or ``nn.SyncBatchNorm``
    built as such) becomes a ``LocalBatchNorm``, with the same activation.

    Args:
        module: a model, or a batch norm layer.

    Returns:
        ``module`` itself.

    Collectives:
        None.
    """
    layers: list[Any] = list(module.modules())
    for layer in layers:
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__dict__.pop("process_group", None)
            layer.__class__ = LocalBatchNorm  # type: ignore[assignment]
        elif isinstance(layer, SyncBatchNorm):
            origin: Any = layer._origin or LocalBatchNorm
            if isinstance(layer, LazySyncBatchNorm):
                origin = _LAZY[origin]
            activation = layer.__dict__.get("activation")
            if activation is not None and type(layer) is SyncBatchNorm:
                origin = LocalBatchNorm
            kept = ("activation",) if origin is LocalBatchNorm else ()
            for name in _OURS:
                if name not in kept:
                    layer.__dict__.pop(name, None)
            layer.__class__ = origin
    return module


def layer_name(name: str) -> str:
    """A module's qualified name without the parts that wrappers (DDP, torch.compile, ...) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class LocalBatchNorm(_BatchNorm):
    """``activation(batch_norm(input) + residual)`` with this rank's own statistics, for ``(N, C, *)`` of any dimension.

    What ``revert_sync_batchnorm`` makes of a layer that was built as a ``SyncBatchNorm``.
    """

    activation: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize, add, activate; shapes as in ``SyncBatchNorm.forward``. Collectives: none."""
        y = super().forward(input)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.activation == "relu" else y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions (N, C, *), got {input.dim()}-D")


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A converted ``nn.LazyBatchNorm*d`` that has not seen its first input; then it becomes a ``SyncBatchNorm``."""

    cls_to_become = SyncBatchNorm

    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        """Take ``num_features`` from the input."""
        super().initialize_parameters(input)


def _origin(cls: Any) -> type[_BatchNorm] | None:
    if cls in (nn.SyncBatchNorm, LocalBatchNorm):
        return None
    return getattr(cls, "cls_to_become", cls)


def _synchronized_class(cls: Any, name: str) -> type[SyncBatchNorm] | None:
    """The class that a layer of class ``cls`` gets; None if it stays as it is.

    Raises:
        TypeError: it cannot be converted without losing what the class does.
    """
    if issubclass(cls, SyncBatchNorm):
        return None
    if cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, LocalBatchNorm):
        return SyncBatchNorm
    if cls in _LAZY.values():
        return LazySyncBatchNorm
    if issubclass(cls, nn.SyncBatchNorm | _LazyNormBase):
        if not issubclass(cls, nn.SyncBatchNorm) and not issubclass(cls, _BatchNorm):
            return None  # a lazy instance norm
        raise TypeError(
            f"layer {name!r}: {cls.__name__} derives from {cls.__mro__[1].__name__}, and there is no synchronized "
            "class that keeps what it adds. Derive it from nn.BatchNorm2d (or 1d, 3d), or from syncbn.SyncBatchNorm."
        )
    return _subclass_of(cls)


@functools.cache
def _subclass_of(cls: Any) -> type[SyncBatchNorm]:
    """``cls`` with SyncBatchNorm behind it: in its method order ``super().forward`` reaches ours."""
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce}
    target: Any = type(f"Sync{cls.__name__}", (cls, SyncBatchNorm), body)
    if not _reaches_ours(cls):

        def forward(self: SyncBatchNorm, *args: Any, **kwargs: Any) -> Any:
            return _watched_forward(self, super(target, self).forward, args, kwargs)

        target.forward = forward
        target._normalize = _reached_normalize
    return target


def _reaches_ours(cls: type[_BatchNorm]) -> bool:
    """Whether a forward of ``cls`` certainly ends in ours, so that it needs no watching."""
    for base in cls.__mro__:
        if base is _BatchNorm:
            return True
        forward = base.__dict__.get("forward")
        if forward is not None:
            code = getattr(forward, "__code__", None)
            names = code.co_names if code is not None else ()
            # Only the plain form: what else a forward calls may hide an F.batch_norm.
            if not ("super" in names and "forward" in names) or "batch_norm" in names:
                return False
    return False


def _new_converted(cls: Any) -> SyncBatchNorm:
    target = _subclass_of(cls)
    return target.__new__(target)


def _reduce(self: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
    # The class was made here, so a pickle names the one it was made from.
    return _new_converted, (self._origin,), self.__getstate__()


class _Redirect(TorchFunctionMode):
    """Sends a layer's own call of ``F.batch_norm`` in training through the synchronized function."""

    def __init__(self, layer: SyncBatchNorm) -> None:
        super().__init__()
        self.layer = layer
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        layer = self.layer
        ours = (layer.running_mean, layer.weight)
        theirs = (running_mean, weight)
        same = any(a is b for a, b in zip(ours, theirs, strict=True) if b is not None) or theirs == (None, None)
        if not training or not same:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self.reached = True

        def remember(moments: Moments | None) -> None:
            if moments is not None and not recomputing():
                update_running_stats(running_mean, running_var, moments, momentum)

        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, None,
            training=True, eps=eps, group=layer._group.resolve(), activation=None, remember=remember,
            local_momentum=momentum, channels=layer.num_features, layer=layer.layer_name,
        )  # fmt: skip


def _watched_forward(self: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The subclass's own forward, watched: its batch statistics are the global ones, or it raises."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    here = torch.device("cpu") if not tensors else tensors[0].device
    if not self.training or not must_synchronize(link(self._group.resolve(), here)):
        return forward(*args, **kwargs)
    redirect = self.__dict__["_redirect"] = _Redirect(self)
    try:
        with redirect:
            output = forward(*args, **kwargs)
    except Exception as error:
        if not redirect.reached and tensors:
            functional.tell_peers(error, tensors[0], self._group.resolve(), self.layer_name, self.num_features)
        raise
    finally:
        del self.__dict__["_redirect"]
    if not redirect.reached and not any(output is arg for arg in args):
        origin = self._origin
        raise RuntimeError(
            f"layer {self.layer_name!r}: {origin.__module__}.{origin.__qualname__}.forward computed its output without "
            "super().forward and without F.batch_norm on its own running statistics or weight, so its statistics "
            "would be those of this rank alone. Let it call one of them, or convert the model without this layer."
        )
    return output


def _reached_normalize(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    redirect = self.__dict__.get("_redirect")
    if redirect is not None:
        redirect.reached = True
    return SyncBatchNorm._normalize(self, *args, **kwargs)
