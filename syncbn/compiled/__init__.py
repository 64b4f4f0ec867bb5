"""The synchronized training forward as torch.compile sees it: one operator.

The compiler meets ``syncbn::batch_norm`` in the program and traces through it when it makes its graph. What the
operator is made of is decided there:

* on a CPU, for which there are compiled loops, of a few operators around them (``loops``), opaque to the compiler;
* else of plain formulas (``formulas``), which it fuses: both sums in one loop over x, and normalization, residual and
  ReLU in another.

Both exchange in the order of the program: ``exchange``. All that can be is done in the operator and not before it: what
comes before, the compiler interprets instruction by instruction, which takes a hundred times as long.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import arguments, kernels
from syncbn.arguments import Vectors
from syncbn.checkpointing import recomputing
from syncbn.compiled import exchange
from syncbn.compiled.formulas import Formulas
from syncbn.compiled.loops import Loops, move
from syncbn.memory import Memory, Running
from syncbn.moments import unpack
from syncbn.wire import Call

exchange.library.define(
    "batch_norm(Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? mean, "
    "Tensor(b!)? var, Tensor(c!)? batches, float? momentum, float eps, bool relu, str group, str layer, int flags, "
    "int? channels, int source) -> (Tensor, Tensor)"
)

exchange.library.define("to_count(Tensor moments) -> Tensor")

_HERE = Path(__file__).parent
_MADE_OF = [*sorted(_HERE.glob("*.py")), *(_HERE.with_name(f"{name}.py") for name in ("memory", "moments"))]


# torch keeps compiled graphs on disk by the names of their operators, and does not know what this one is made of.
_SOURCE = zlib.crc32(b"".join(path.read_bytes() for path in _MADE_OF), kernels.loops_for(torch.float32))


def batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    group: dist.ProcessGroup | None,
    memory: Memory | None,
    call: Call,
    channels: int | None,
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` with the statistics of all ranks.

    Arguments as in ``functional.batch_norm``; ``group`` None measures this rank alone; ``call`` is the forward's.

    Raises:
        Exception: what ``arguments.error`` finds, while the compiler traces.

    Collectives: one exchange of 2C+1 float64 forward, one of 2C backward (on a device all-reduces of equal length).
    """
    name = "" if group is None else group.group_name
    running = None if memory is None else memory.running
    state = (None, None, None, None) if running is None else running.state()
    y, moments = torch.ops.syncbn.batch_norm(
        x, mask, weight, bias, residual, *state, eps, relu, name, call.layer, call.flags, channels, _SOURCE
    )
    if memory is not None and running is None:
        memory.collect(unpack(moments), x, mask)
    return y


@torch.library.impl(exchange.library, "batch_norm", "CompositeImplicitAutograd")
def _batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    group: str,
    layer: str,
    flags: int,
    channels: int | None,
    source: int,
) -> tuple[Tensor, Tensor]:
    wrong = arguments.error(x, Vectors(mean, var, weight, bias), residual, mask, eps, channels=channels)
    if wrong is not None:
        raise wrong
    loops = exchange.on_host(x) and kernels.loops_for(x.dtype)
    if mask is not None and not loops:  # as kernels.clean_padding
        x = torch.where(mask | torch.isfinite(x), x, 0)
    function = Loops if loops else Formulas
    y, moments = function.apply(x, weight, bias, residual, mask, eps, relu, group, layer, flags)
    if mean is not None and var is not None and loops:
        move(moments, mean, var, batches, momentum)
    else:
        Running(mean, var, momentum, batches).move(unpack(torch.ops.syncbn.to_count(moments)))
    return y, moments


@torch.library.register_fake("syncbn::to_count", lib=exchange.library)  # type: ignore[untyped-decorator, unused-ignore]
def _(moments: Tensor) -> Tensor:
    return torch.empty_like(moments)


@torch.library.impl(exchange.library, "to_count", "CompositeExplicitAutograd")
def _to_count(moments: Tensor) -> Tensor:
    """The moments, or those of an empty batch where a checkpoint around the graph runs it again."""
    return torch.zeros_like(moments) if recomputing() else moments.clone()
