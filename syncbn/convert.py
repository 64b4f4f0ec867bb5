"""To synchronized batch norm and back, in place: a layer stays the same object and only changes its class.

So everything that a layer is to the rest of a program survives: its parameters and buffers, hooks, training flag,
custom attributes, all the parents and lists that hold it, and the optimizer's references. The class it had is
remembered and given back by ``revert_sync_batchnorm``.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from syncbn import functional, tracing
from syncbn._torch import BatchNormBase, LazyNormBase
from syncbn.checkpointing import counts
from syncbn.comm import link_of, must_synchronize, synchronizes
from syncbn.dry_run import check_is_module
from syncbn.groups import GroupHandle
from syncbn.local import LocalBatchNorm
from syncbn.memory import Memory, Running
from syncbn.modules import SyncBatchNorm
from syncbn.overlooked import overlooked

M = TypeVar("M", bound=nn.Module)

_LAZY = {nn.BatchNorm1d: nn.LazyBatchNorm1d, nn.BatchNorm2d: nn.LazyBatchNorm2d, nn.BatchNorm3d: nn.LazyBatchNorm3d}
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_OURS = ("_group", "_layer_name", "_activation", "_origin", "_passes", "_passes_warned")


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

    Warns:
        UserWarning: there is no batch norm in it; or some that cannot be reached: in what ``torch.jit`` compiled, in a
            graph of ``torch.fx`` or ``torch.export``, or in a layer that looks like one (by its running statistics, or
            its name) and derives from no batch norm of ``torch.nn``. They are named.

    Raises:
        ValueError, TypeError: for a process group as in ``SyncBatchNorm``; and for what is no module.
        TypeError: a subclass of ``nn.SyncBatchNorm`` or of a lazy batch norm, or a layer with a forward of its own as
            an attribute of the object.

    Collectives:
        None. ``check_ranks_agree`` compares the layers of all ranks.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> type(convert_sync_batchnorm(model)[1]).__name__
    'SyncBatchNorm'
    >>> type(revert_sync_batchnorm(model)[1]).__name__
    'BatchNorm1d'
    """
    check_is_module(module)
    handle = GroupHandle(process_group)
    found: list[tuple[str, Any]] = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, BatchNormBase | LazyNormBase)
    ]
    # All or nothing: a half-converted model is of no use.
    for name, layer in found:
        if "forward" in layer.__dict__ and not isinstance(layer, SyncBatchNorm):
            raise TypeError(
                f"layer {name!r}: the forward of this {type(layer).__name__} was replaced on the object by "
                f"{layer.__dict__['forward']!r}, which would stay local. Convert the model before wrapping its layers."
            )
    classes = {_class(layer): _synchronized_class(_class(layer), name) for name, layer in found}
    for name, layer in found:
        if isinstance(layer, SyncBatchNorm):
            layer._layer_name = layer._layer_name or layer_name(name)
            continue
        target = classes[_class(layer)]
        if target is None:
            continue
        layer_handle = handle
        if isinstance(layer, nn.SyncBatchNorm):  # torch's own
            own = layer.__dict__.pop("process_group", None)
            layer_handle = handle if process_group is not None else GroupHandle(own)
        layer._group = layer_handle
        layer._layer_name = layer_name(name)
        layer._origin = _origin(_class(layer))
        _become(layer, target)
    _warn_of_the_rest(module, any(isinstance(layer, BatchNormBase) for _, layer in found))
    return module


SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)


def _warn_of_the_rest(module: nn.Module, found: bool) -> None:
    rest = overlooked(module)
    if rest:
        warnings.warn(
            f"convert_sync_batchnorm cannot reach these, which go on with the statistics of each rank alone: "
            f"{', '.join(rest)}. Convert before scripting, tracing or exporting; derive a layer of another library "
            "from nn.BatchNorm*d, or replace it.",
            stacklevel=3,
        )
    elif not found:
        warnings.warn(
            f"convert_sync_batchnorm found no batch normalization in this {type(module).__name__}: nothing is "
            "synchronized. (A call of F.batch_norm in a forward cannot be seen.)",
            stacklevel=3,
        )


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
    check_is_module(module)
    layers: list[Any] = list(module.modules())
    for layer in layers:
        if isinstance(layer, SyncBatchNorm):
            origin: Any = layer._origin or LocalBatchNorm
            if isinstance(layer, LazyNormBase):
                origin = _LAZY[origin]
            if layer._activation is not None:
                origin = LocalBatchNorm
            kept = ("_activation",) if origin is LocalBatchNorm else ()
            for name in _OURS:
                if name not in kept:
                    layer.__dict__.pop(name, None)
            _become(layer, origin)
        elif isinstance(layer, nn.SyncBatchNorm):
            layer.__dict__.pop("process_group", None)
            _become(layer, LocalBatchNorm)
    return module


def layer_name(name: str) -> str:
    """A module's qualified name without the parts that wrappers (DDP, torch.compile, ...) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _class(layer: nn.Module) -> Any:
    """The layer's class, below those that torch puts on top of it: for parametrizations, by ``fully_shard``."""
    cls: Any = type(layer)
    while _is_on_top(cls):
        cls = cls.__bases__[-1]
    return cls


def _is_on_top(cls: Any) -> bool:
    """Whether torch made this class while the program ran, to add something to one layer or to one kind of layer."""
    first, *others = cls.__bases__
    if others:  # fully_shard and replicate: (FSDPModule, the class)
        return first.__module__.startswith("torch.distributed.")
    return cls.__module__ == parametrize.__name__


def _become(layer: nn.Module, cls: Any) -> None:
    """Give the layer class ``cls``, below those that torch has put on top of its own."""
    layer.__class__ = _with_top(type(layer), cls)


def _with_top(top: Any, cls: Any) -> Any:
    if not _is_on_top(top):
        return cls
    *others, below = top.__bases__
    body = {name: value for name, value in vars(top).items() if name not in ("__dict__", "__weakref__")}
    prefix = top.__name__.removesuffix(below.__name__)
    return type(f"{prefix}{cls.__name__}", (*others, _with_top(below, cls)), body)


def _origin(cls: Any) -> type[BatchNormBase] | None:
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
    if cls in (nn.SyncBatchNorm, LocalBatchNorm):
        return SyncBatchNorm
    if cls in _LAZY.values():
        return _subclass_of(cls)
    if issubclass(cls, nn.SyncBatchNorm | LazyNormBase):
        if not issubclass(cls, nn.SyncBatchNorm) and not issubclass(cls, BatchNormBase):
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
    body["_converted_from"] = cls
    name = f"Sync{cls.__name__}"
    if cls in _LAZY:
        name, body["__module__"], body["__doc__"] = (
            SyncBatchNorm.__name__,
            SyncBatchNorm.__module__,
            SyncBatchNorm.__doc__,
        )
    elif cls in _LAZY.values():
        body |= {"cls_to_become": _subclass_of(cls.cls_to_become), "initialize_parameters": _initialize_parameters}
    target: Any = type(name, (cls, SyncBatchNorm), body)
    forwards = [
        base.__dict__["forward"] for base in cls.__mro__[: cls.__mro__.index(BatchNormBase)] if "forward" in vars(base)
    ]
    if forwards:
        plain = all(_calls_super(forward) for forward in forwards)
        reason = "F.batch_norm called by a subclass is synchronized in eager mode only"
        # Made here and not at the top, since it imports the compiler and few need it.
        uncompiled: Any = None if plain else torch.compiler.disable(_forward_in_eager_mode, reason=reason)

        def forward(self: SyncBatchNorm, *args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], Tensor):
                node = tracing.leaf(self, type(self).forward is not forward, *args, **kwargs)
                if node is not None:
                    return node
            above = super(target, self).forward
            if not torch.compiler.is_compiling():
                return _watched_forward(self, above, args, kwargs, _Watch() if plain else _Redirect(self))
            if plain or not self.training or not synchronizes(self._group.resolve()):
                return above(*args, **kwargs)
            return uncompiled(self, above, args, kwargs)

        target.forward = forward
        target._normalize = _reached_normalize
    return target


def _calls_super(forward: Any) -> bool:
    """Whether a forward seems to end in ours: then the costly watching for ``F.batch_norm`` is left out."""
    code = getattr(forward, "__code__", None)
    names = code.co_names if code is not None else ()
    return "super" in names and "forward" in names and "batch_norm" not in names


def _new_converted(cls: Any) -> SyncBatchNorm:
    target = _subclass_of(cls)
    return target.__new__(target)


def _reduce(self: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
    # The class was made here, so a pickle names the one it was made from.
    return _new_converted, (type(self)._converted_from,), self.__getstate__()


def _initialize_parameters(self: Any, input: Tensor, residual: Tensor | None = None, *, mask: Any = None) -> None:
    """Take ``num_features`` from the input, of a call as layers of ours have it."""
    LazyNormBase.initialize_parameters(self, input)


class _Watch(contextlib.nullcontext[None]):
    """Notes whether a subclass's forward has reached the synchronized one."""

    reached = False


class _Redirect(TorchFunctionMode):
    """The same, and sends a layer's own call of ``F.batch_norm`` in training through the synchronized function."""

    reached = False

    def __init__(self, layer: SyncBatchNorm) -> None:
        super().__init__()
        self.layer = layer

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
        uses_batch = training or running_mean is None
        self.reached = self.reached or (same and (training or not uses_batch))
        if not training or not same:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

        running = Running(running_mean, running_var, momentum)
        memory: Memory | None = running if layer._memory is None else layer._memory.of_own_call(running)
        if not counts(layer, running_mean is not None):
            memory = None
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, None,
            training=True, eps=eps, group=layer._group.resolve(), activation=None,
            memory=memory, channels=layer.num_features or None, layer=layer._layer_name,
        )  # fmt: skip


def _watched_forward(
    self: Any,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: _Watch | _Redirect,
) -> Any:
    """The subclass's own forward, watched: its batch statistics are the global ones, or it raises."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    here = torch.device("cpu") if not tensors else tensors[0].device
    if not self.training or not must_synchronize(link_of(self._group.resolve(), here)):
        return forward(*args, **kwargs)
    self.__dict__["_watch"] = watch
    try:
        with watch:
            output = forward(*args, **kwargs)
    except Exception as error:
        if not watch.reached and tensors:
            functional.tell_peers(error, tensors[0], self._group.resolve(), self._layer_name, self.num_features)
        raise
    finally:
        del self.__dict__["_watch"]
    if not watch.reached and not any(output is arg for arg in args):
        cls = f"{self._origin.__module__}.{self._origin.__qualname__}"
        instead = " and without F.batch_norm on its own running statistics or weight"
        raise RuntimeError(
            f"layer {self._layer_name!r}: in training, {cls}.forward computed its output without super().forward"
            f"{instead if isinstance(watch, _Redirect) else ''}, so its statistics would be those of this rank alone. "
            "Let it call super().forward, or convert the model without this layer."
        )
    return output


def _forward_in_eager_mode(
    self: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return _watched_forward(self, forward, args, kwargs, _Redirect(self))


def _reached_normalize(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    watch = self.__dict__.get("_watch")
    if watch is not None:
        watch.reached = True
    return SyncBatchNorm._normalize(self, *args, **kwargs)
