"""What the package takes from PyTorch that is private, or not the same in all versions from 2.11 on: all of it.

Each entry says what it is for, and what happens where a version of PyTorch does not have it. ``tests/test_torch.py``
notices when one goes, or when it no longer does what it is here for. So a new release of PyTorch is this page to read.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.autograd.forward_ad
import torch.autograd.graph
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _LazyNormBase as LazyNormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

__all__ = ["BatchNormBase", "LazyNormBase", "is_lazy"]

# BatchNormBase: what nn.BatchNorm1d, 2d, 3d and nn.SyncBatchNorm derive from.
# LazyNormBase: what nn.LazyBatchNorm1d, 2d and 3d derive from. No fallback for both: a layer is one of them, and their
# private names have been the same since PyTorch 1.8.
# is_lazy: whether a parameter or buffer has no shape yet. Not documented; no fallback: there is no other way to ask.


# ---- process groups


def backend_of(group: Any, device: torch.device) -> Any:
    """The backend below a ProcessGroup: calling it directly saves the dispatcher's 10 us a call.

    Fallback: the group itself, which has the same collectives. So it is for groups that are a backend themselves
    (written in Python), and for devices that the group has no backend for.
    """
    try:
        return group._get_backend(device)
    except (AttributeError, RuntimeError):
        return group


def within(group: Any) -> Any:
    """The group that one written in Python is made of at the moment, if it says so by ``parent``; else itself.

    Groups that change between steps (torchft's) hold another one after each change. It alone has the rank, and what is
    kept per group must not outlive it. Not from PyTorch, where such groups have no common form.
    """
    while type(group) is not dist.ProcessGroup and isinstance(
        inner := getattr(group, "parent", None), dist.ProcessGroup
    ):
        group = inner
    return group


_GLOO = getattr(dist, "ProcessGroupGloo", ())


def is_gloo(backend: Any) -> bool:
    """Whether a backend is gloo's own, which has tags; by its class, for others call themselves gloo as well.

    Fallback: no, where PyTorch was built without it.
    """
    return isinstance(getattr(backend, "wrapped_pg", backend), _GLOO)  # wrapped by TORCH_DISTRIBUTED_DEBUG=DETAIL


_GatherOptions = getattr(getattr(torch._C, "_distributed_c10d", None), "AllgatherOptions", None)


def gather_options(in_order: bool) -> Any:
    """Options of ``all_gather``; ``in_order``: on the current stream. Fallback: None, for those that a group has."""
    options: Any = None if _GatherOptions is None else _GatherOptions()
    if in_order and hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def all_gather(group: Any, output: Tensor, own: Tensor, options: Any) -> Any:
    """Begin to collect a tensor of each rank into one, in rank order; the work, or None where it is done in order.

    ``dist.all_gather_into_tensor`` takes registered groups alone, and warns in some versions. Fallback (also for groups
    that are written in Python): into a tensor for each rank, which some backends copy once more.
    """
    more = () if options is None else (options,)
    if hasattr(group, "_allgather_base"):
        return group._allgather_base(output, own, *more)
    return group.allgather([list(output.view(-1, own.numel()).unbind())], [own], *more)


def has_backend(group: Any, device: torch.device) -> bool:
    """Whether the group can work on tensors of a device. Fallback: it is taken to be for CPUs alone."""
    try:
        group._get_backend(device)
    except (AttributeError, RuntimeError):
        return False
    return True


def is_fake(group: Any) -> bool:
    """Whether the collectives of a group do nothing: torch's ``fake`` backend, on which steps are estimated.

    Fallback: it counts as any other, whose ranks then seem to disagree.
    """
    return type(backend_of(group, torch.device("cpu"))).__name__ == "FakeProcessGroup"


_c10d_world = getattr(getattr(dist, "distributed_c10d", None), "_world", None)


def default_group() -> Any:
    """The default process group, None where torch.distributed is not initialized.

    ``dist.group.WORLD``, without the five calls in Python that lead there. Fallback: by these.
    """
    try:
        return _c10d_world.default_pg  # type: ignore[union-attr]
    except AttributeError:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def timeout_of(group: Any, device: torch.device) -> datetime.timedelta:
    """The timeout of a group's backend. Fallback: that of a group for which nobody chose one."""
    try:
        return backend_of(group, device).options._timeout
    except (AttributeError, RuntimeError):
        return dist.constants.default_pg_timeout


def registered_groups() -> list[Any]:
    """All groups that this process has made with torch.distributed, oldest first. Fallback: the default group alone."""
    try:
        return list(dist.distributed_c10d._world.pg_map)
    except AttributeError:
        return [dist.group.WORLD]


def root_of(mesh: Any) -> Any:
    """The DeviceMesh that a mesh is a slice of, or the mesh itself. Fallback: itself, as if it were no slice."""
    try:
        return mesh._get_root_mesh()
    except AttributeError:
        return mesh


def part_of(tensor: Any) -> Any:
    """This rank's part of a DTensor, the very memory, outside of autograd. No fallback: ``to_local`` may be a copy."""
    return tensor._local_tensor


def group_named(name: str) -> Any:
    """The process group of a name: compiled graphs keep names. No fallback: functional collectives do the same."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined, unused-ignore]


# ---- autograd

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)


def transforms_active() -> bool:
    """Whether a transform of torch.func is active. Fallback: assume so."""
    return _transforms_active is None or _transforms_active()


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` of an ``autograd.Function``, without the 40 us of Python that only torch.func needs.

    ``Function.apply`` binds its arguments by ``inspect`` first, for the transforms of torch.func; the method of its
    base class does not. Fallback: ``Function.apply``.
    """
    if _transforms_active is None or _transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is on. Fallback: assume not."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)

ENGINE_FILE = torch.autograd.graph.__file__
"""Where every backward enters the engine: a frame of this file on the stack is a backward."""

CHECKPOINT_FILE = torch.utils.checkpoint.__file__
CHECKPOINT_RERUNS = ("recompute_fn", "unpack_hook")
"""The functions of that file that run a forward again, in the mode without reentry. Both in ``checkpointing``.
Fallback: the stack holds none of them, and a batch that is computed again would count twice."""


def in_backward() -> bool:
    """Whether a backward is running on this thread. Fallback: it may be, so that the stack is looked at."""
    return _graph_task_id is None or _graph_task_id() != -1


_SELECTIVE = tuple(
    mode
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if (mode := getattr(torch.utils.checkpoint, name, None)) is not None
)
_modes_on = getattr(torch._C, "_len_torch_dispatch_stack", None)


def outside_selective_checkpointing() -> contextlib.AbstractContextManager[None]:
    """Within it, a mode of selective checkpointing sees no operation, if one is on.

    Fallback: the modes see all operations, and such a checkpoint complains that its second pass runs others.
    """
    if _modes_on is None or torch.compiler.is_compiling() or _modes_on() == 0:
        return contextlib.nullcontext()
    from torch.utils import _python_dispatch

    stack = _python_dispatch._get_current_dispatch_mode_stack()
    if any(isinstance(mode, _SELECTIVE) for mode in stack):
        return _python_dispatch._disable_current_modes()
    return contextlib.nullcontext()


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Within it, tensors are made as if no mode were on: for those that are kept and used again in other modes.

    Outside of inference mode (an inference tensor cannot be written to later), of modes that see operators (fake
    tensors, tracing), of modes that see functions (a default device), and of transforms of torch.func. Fallback: within
    those of the last three for which there is no way out.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch._C.DisableTorchFunction())
        if _modes_on is not None and _modes_on() > 0:
            from torch.utils import _python_dispatch

            stack.enter_context(_python_dispatch._disable_current_modes())
        if transforms_active():
            clear = _interpreters_cleared()
            if clear is not None:
                stack.enter_context(clear())
        yield


def _interpreters_cleared() -> Any:
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        return None
    return temporarily_clear_interpreter_stack


def is_shadow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values: on the meta device, or a fake one. Fallback: meta tensors alone."""
    if tensor.is_meta:
        return True
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def plainly_eager() -> bool:
    """Whether operators just run: nothing differentiates forward, maps, traces, or otherwise looks at them.

    Only then may values be read, and may kernels work that PyTorch knows nothing of. (Selective checkpointing looks
    on, and is kept from seeing layers: it does not count.) Fallback: as of its parts; modes: assume none.
    """
    if transforms_active() or forward_mode_active() or in_script_trace():
        return False
    return _modes_on is None or _modes_on() == 0 or _only_selective_checkpointing()


def _only_selective_checkpointing() -> bool:
    from torch.utils import _python_dispatch

    return all(isinstance(mode, _SELECTIVE) for mode in _python_dispatch._get_current_dispatch_mode_stack())


def tracer() -> str:
    """What records the operators that run, to run them again without us: its name, empty if nothing does.

    Fallback: as if nothing did.
    """
    if in_script_trace():
        return "torch.jit.trace"
    if _modes_on is None or _modes_on() == 0:
        return ""
    try:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode
    except ImportError:
        return ""
    return "" if get_proxy_mode() is None else "make_fx"


_functorch = getattr(torch._C, "_functorch", None)
_batched = tuple(
    test for name in ("is_batchedtensor", "is_legacy_batchedtensor") if (test := getattr(_functorch, name, None))
)


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch that vmap maps over. Fallback: no."""
    return any(test(tensor) for test in _batched)


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is on, and goes through a tensor. Fallback: it does not."""
    return forward_mode_active() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def in_script_trace() -> bool:
    """Whether torch.jit.trace is on: sizes are tensors then, and what is read becomes a constant. Fallback: no."""
    return _script_trace is not None and _script_trace() is not None


_script_trace = getattr(torch._C, "_get_tracing_state", None)


def once_per_graph(function: Any) -> Any:
    """A function without a result that a compiler calls while it traces, and leaves out of the graph.

    ``torch.compiler.assume_constant_result`` without importing the compiler. Fallback: a compiler looks into it.
    """
    function._dynamo_marked_constant = True
    return function


# ---- modules


@contextlib.contextmanager
def without_broadcasts(model: nn.Module) -> Iterator[None]:
    """Within it, DistributedDataParallel broadcasts no buffers in its forwards.

    For whoever measures a model: the broadcast would overwrite statistics that differ between ranks, and a rank that
    fails before it leaves the others waiting in it, where nobody hears of the failure. Fallback: they are broadcast.
    """
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    before = [getattr(wrapper, "require_forward_param_sync", None) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            if value is not None:
                wrapper.require_forward_param_sync = value


def ddp_looks_for_sync_batchnorm() -> bool:
    """Whether the caller's caller lists modules for DistributedDataParallel to look for torch's SyncBatchNorm among.

    It refuses models on CPUs that have one. That is ``for layer in module.modules()`` in a function of its file that
    names the class. No fallback: where the class is looked for in another way, DDP refuses our layers on CPUs.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "named_modules":
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "modules" or frame.f_back is None:
        return False
    code = frame.f_back.f_code
    return code.co_filename == _DDP_FILE and "SyncBatchNorm" in code.co_names


_DDP_FILE = DistributedDataParallel.__init__.__code__.co_filename


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of a model runs compiled. Fallback: only what ``torch.compile(model)`` returned is recognized."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def operator_arguments(target: Any) -> list[str]:
    """The names of an operator's arguments, for what a graph of torch.fx calls. Fallback: none, as for no operator."""
    return [argument.name for argument in getattr(getattr(target, "_schema", None), "arguments", ())]


def script_methods(module: Any) -> list[str]:
    """The names of the compiled methods of a ScriptModule. Fallback: its forward."""
    try:
        return list(module._c._method_names())
    except AttributeError:
        return ["forward"] if hasattr(module, "forward") else []


# ---- devices and compilers


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on a device, so that nothing may be read. Fallback: no, as on devices without.

    Asked of the module of any accelerator (``torch.cuda``, ``torch.xpu``): ``torch.accelerator`` does not know it yet.
    """
    if device.type == "cpu":
        return False
    asked = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    if asked is None:
        return False
    if not is_elsewhere(device):
        return bool(asked())
    with on_device(device):
        return bool(asked())


def is_elsewhere(device: torch.device) -> bool:
    """Whether a device is not the current one of its type, by which streams are asked for and kernels are launched.

    A model may live on another device than that of ``torch.cuda.set_device``. Fallback: it is the current one.
    """
    if device.type == "cpu" or device.index is None:
        return False
    current = getattr(getattr(torch, device.type, None), "current_device", None)
    return current is not None and current() != device.index


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it, a device is the current one of its type. Fallback: whichever is."""
    made = getattr(getattr(torch, device.type, None), "device", None)
    return contextlib.nullcontext() if made is None or device.index is None else made(device)


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def raw_stream(device: torch.device) -> int:
    """The handle of a CUDA device's current stream; 0, which is the default one, for others.

    Fallback: by way of an object for the stream, which takes a microsecond more.
    """
    if device.type != "cuda":
        return 0
    if _raw_stream is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(_raw_stream(device.index))


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it. Fallback: do not, as on a CPU."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None and device.type != "cpu":
        wait(device)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: MPS does not, nor do some XPUs, which say so. Fallback: it does."""
    if device.type in ("cpu", "cuda"):
        return True
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


def assert_async(condition: Tensor, message: str) -> None:
    """Raise RuntimeError where ``condition`` is false, without waiting for a device; compilers trace it.

    On CUDA it is the device that asserts: the error comes with a later call, and the process cannot use the device any
    more. So it is for errors after which a job ends anyway.
    """
    torch._assert_async(condition, message)


def traced_sum(message: Tensor, group: Any) -> Tensor:
    """An all-reduce that a compiler can trace (a functional collective), in forward and backward.

    ``dist.all_reduce`` within an ``autograd.Function`` compiles from PyTorch 2.13 on only.
    """
    total = torch.ops._c10d_functional.all_reduce(message, "sum", group.group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


_proxy_mode = getattr(torch._C, "_get_dispatch_mode", None)


def traced_graph() -> Any:
    """The graph that a compiler writes the operators of this thread into; None if there is none.

    Fallback: none, so that the order of exchanges in a graph is left to the compiler.
    """
    if _proxy_mode is None:
        return None
    mode = _proxy_mode(torch._C._TorchDispatchModeKey.PROXY)
    return None if mode is None else mode.tracer.graph


def not_fused_across(tensor: Tensor) -> Tensor:
    """The tensor, computed before it is used: a compiler moves no computation across it.

    ``wait_tensor`` does nothing to a tensor that no collective is working on.
    """
    return torch.ops._c10d_functional.wait_tensor(tensor)
