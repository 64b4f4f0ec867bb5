"""Train on until the last rank has run out of batches: a rank without data takes part with an empty batch.

A rank that simply stops leaves its peers waiting in the next layer. An empty batch has no weight in the statistics, and
its gradients are zeros, so that the others go on exactly as one process with their data would::

    for step in uneven.joined(loader):
        x, y = step.data
        with uneven.empty_views():
            output = model(x)
        loss = step.scale * F.cross_entropy(output, y, reduction="sum")
        loss.backward()

What an empty batch breaks in a network, and what to do:

* a mean loss is NaN, and so are its gradients: take a sum and ``step.scale``, or ``step.loss_from_mean``;
* ``x.view(N, -1)`` raises, for -1 could be anything: write ``x.flatten(1)``, or use ``empty_views``;
* ``max`` and ``argmax`` over the batch raise, and a mean over it is NaN: look at ``step.count`` first.

The alternative, ``DistributedDataParallel.join(throw_on_early_termination=True)``, ends the epoch on all ranks as soon
as one of them has run out, and drops what the others have left. Without that argument ``join`` does not know of the
layers' exchanges: the ranks that go on lose their peer there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from syncbn.comm import Link, link_of
from syncbn.groups import group_device, resolve_group
from syncbn.rounds import rounds, share_numbers
from syncbn.together import telling
from syncbn.wire import COUNT, LOSS_SCALE, Call


@dataclass(frozen=True, slots=True)
class Step:
    """One step that all ranks take together.

    Attributes:
        data: this rank's batch, as its loader gave it, or an empty one of the same structure.
        count: how many samples it has: n_r.
        total: how many samples all ranks have: n.
        world_size: how many ranks there are: W.
    """

    data: Any
    count: int
    total: int
    world_size: int

    @property
    def scale(self) -> float:
        """``W / n``, the factor that makes a sum over this rank's samples a term of the whole batch's mean loss.

        DistributedDataParallel averages gradients over ranks, so with ``loss_r = scale * sum_i l_i``::

            1/W * sum_r d(W/n * sum_i l_ri) = d(1/n * sum_r sum_i l_ri)
        """
        return self.world_size / max(self.total, 1)

    def loss_from_mean(self, criterion: Callable[..., Tensor], output: Tensor, *args: Any) -> Tensor:
        """The same loss by a criterion that takes the mean over samples: ``criterion(...) * n_r * W / n``.

        Args:
            criterion: called as ``criterion(output, *args)``; must be a plain mean over the samples that ``count``
                counts (no class weights, nothing ignored).
            output: of the model; for an empty batch the loss is a zero that depends on it, so that the backward runs.
            args: targets and whatever else the criterion takes.

        Returns:
            A scalar, to call ``backward`` on.

        >>> step = Step(None, 2, 8, 4)
        >>> step.loss_from_mean(torch.nn.functional.mse_loss, torch.ones(2), torch.zeros(2))
        tensor(1.)
        >>> step = Step(None, 0, 8, 4)
        >>> step.loss_from_mean(torch.nn.functional.mse_loss, torch.ones(0), torch.zeros(0))
        tensor(0.)
        """
        if self.count == 0:
            return output.sum() * 0.0
        return criterion(output, *args) * (self.count * self.scale)


def joined(
    loader: Iterable[Any],
    *,
    process_group: Any = None,
    device: torch.device | str | None = None,
    count: Callable[[Any], int] | None = None,
    empty: Callable[[Any], Any] | None = None,
) -> Iterator[Step]:
    """Iterate over this rank's ``loader`` until the loaders of all ranks have run out.

    In each step the ranks add up their numbers of samples: ``n = sum_r n_r``, with ``n_r = 0`` where a loader is done.
    A rank whose loader raises tells the others, which raise as well, so that nobody waits. All ranks must leave the
    loop alike: on an error, see ``syncbn.steps.vote``; to stop early, decide from a number that all ranks share.

    Args:
        loader: this rank's batches: tensors, or tuples, lists, dicts of them, in any depth. Ranks may have different
            numbers of batches, also none at all: such a rank gets the structure from a rank that has one.
        process_group: that of the layers; as in ``SyncBatchNorm``.
        device: that of the layers' inputs; None for the group's own (CUDA where it has a CUDA backend, else CPU).
        count: number of samples of a batch; None for the length of its first tensor. Tokens, say, for a loss per token.
        empty: makes an empty batch out of a batch; None for ``empty_like``.

    Yields:
        A ``Step``: the batch, the local and global counts, and the loss scale.

    Raises:
        RankMismatchError: the loader of another rank raised, or another rank is in another call.
        PeerLostError: a rank did not take part.
        Exception: whatever ``loader``, ``count`` or ``empty`` raises, on this rank.

    Collectives:
        One exchange of 2 float64 a step, read on the host, and one at the end. In the first step two more if some ranks
        have no batch at all: W float64, and a pickled empty batch with one byte in each float64.

    >>> [(step.count, step.total, step.scale) for step in joined([torch.ones(2, 3), torch.ones(1, 3)])]
    [(2, 2, 0.5), (1, 1, 1.0)]
    """
    group = resolve_group(process_group)
    where = group_device(group, device)
    link = link_of(group, where)
    example: Any = None  # an empty batch, of the structure of the others

    def counted() -> Iterator[tuple[Any, int]]:
        nonlocal example
        for number, batch in enumerate(loader):
            samples = (count or _count)(batch)
            if number == 0:
                example = (empty or empty_like)(batch)
            yield batch, samples

    for number, each in enumerate(rounds(counted(), link, where, Call(COUNT), "its loader")):
        if number == 0 and each.takers < link.size:
            with telling(link, Call(COUNT), link.size, "sharing an empty batch"):
                example = _share_example(link, where, example)
        yield Step(example if each.done else each.batch, each.count, each.total, link.size)


def _share_example(link: Link, where: torch.device, example: Any) -> Any:
    """The empty batch of the first rank that has one; what this rank has, if it has one."""
    text = b""
    if example is not None:
        stream = io.BytesIO()
        torch.save(example, stream)
        text = stream.getvalue()
    sizes = share_numbers([len(text) * (rank == link.rank) for rank in range(link.size)], link, where, Call(COUNT))
    giver = next(rank for rank, size in enumerate(sizes) if size)
    given = list(text) if giver == link.rank else [0] * sizes[giver]
    received = bytes(share_numbers(given, link, where, Call(COUNT)))
    if example is not None:
        return example
    # GPUs differ between ranks by their number alone. Any class may be unpickled: a peer is trusted, as its gradients
    # are.
    places = {f"{where.type}:{index}": str(where) for index in range(64)}
    return torch.load(io.BytesIO(received), map_location=places, weights_only=False)


def loss_scale(count: float | Tensor, *, process_group: Any = None) -> Tensor:
    """``W / n``: makes a sum over what this rank counts a term of the mean over what all ranks count.

    For a loss that is a mean over something else than samples: valid tokens, boxes, masked pixels, the weights of
    classes. DistributedDataParallel averages gradients over ranks, so with ``loss_r = loss_scale(n_r) * sum_i l_i``::

        1/W * sum_r d(W/n * sum_i l_ri) = d(1/n * sum_r sum_i l_ri)        n = sum_r n_r

    Under gradient accumulation, count all micro-batches of the step and call it once: each micro-batch's loss is its
    sum times that scale. Within ``joined``, a rank that has run out counts 0 and calls it all the same.

    Args:
        count: n_r, how many there are on this rank: a number, or a 0-dim tensor. 0 or more; need not be whole.
        process_group: the ranks whose gradients are averaged; as in ``SyncBatchNorm``.

    Returns:
        A 0-dim float64 tensor, on the device of ``count`` (the group's own for a number), without gradient; equal on
        all ranks. A scalar loss becomes float64 by it; gradients keep their dtypes. 0 where no rank counts anything.

    Raises:
        ValueError: a number that is negative or not finite, or a tensor with dimensions; peers raise RankMismatchError.
        RankMismatchError: another rank is in another call.
        PeerLostError: a rank did not take part.

    Collectives:
        One exchange of 1 float64. On a device nobody waits for it.

    >>> loss_scale(4).item(), loss_scale(torch.tensor(8)).item(), loss_scale(0).item()
    (0.25, 0.125, 0.0)
    """
    group = resolve_group(process_group)
    where = count.device if isinstance(count, Tensor) else group_device(group)
    link = link_of(group, where)
    with telling(link, Call(LOSS_SCALE), 1, "loss_scale"):
        if count.dim() if isinstance(count, Tensor) else not 0 <= count < float("inf"):
            raise ValueError(f"loss_scale: count must be a number of 0 or more or a 0-dim tensor, got {count!r:.200}")
        mine = torch.as_tensor(count, dtype=torch.float64, device=where).detach().reshape(1)
        total = link.sum(mine, Call(LOSS_SCALE))[0]
        return torch.where(total == 0, 0.0, link.size / total)


def empty_like(batch: Any) -> Any:
    """A batch without samples, of the structure of ``batch``.

    Tensors of one or more dimensions lose all their rows: shape ``(N, *)`` becomes ``(0, *)``. In tuples, named tuples,
    lists and dicts this is done for each entry; a list without any tensor in it (of strings, say) becomes empty.
    Everything else stays as it is.

    >>> empty_like({"image": torch.ones(4, 3), "name": ["a", "b", "c", "d"], "scale": 2.0})
    {'image': tensor([], size=(0, 3)), 'name': [], 'scale': 2.0}
    """
    if isinstance(batch, Tensor):
        return batch.detach()[:0].clone() if batch.dim() > 0 else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: empty_like(value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(empty_like, batch))
    if isinstance(batch, list | tuple):
        if isinstance(batch, list) and _first_tensor(batch) is None:
            return []
        return type(batch)(map(empty_like, batch))
    return batch


def _count(batch: Any) -> int:
    tensor = _first_tensor(batch)
    if tensor is None:
        raise TypeError(
            f"a batch of type {type(batch).__name__} has no tensor to count samples by; give joined(..., count=...)"
        )
    return len(tensor)


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() > 0 else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return None
    return next((found for entry in batch if (found := _first_tensor(entry)) is not None), None)


class empty_views(TorchFunctionMode):
    """Within it, ``x.view(0, -1)`` and ``x.reshape(0, -1)`` of a tensor without elements work.

    torch refuses, since any number in place of -1 would do. Here it is taken from the other dimensions, as it would be
    for any other number of samples::

        -1 = prod(nonzero sizes of x) / prod(nonzero sizes that are given)

    That is wrong where the batch is multiplied by another dimension, as in ``x.view(N * T, -1)``: the next layer then
    refuses the shape. Tensors that have elements are not touched.

    >>> x = torch.empty(0, 3, 4)
    >>> with empty_views():
    ...     x.view(len(x), -1).shape
    torch.Size([0, 12])
    """

    _FUNCTIONS = (Tensor.view, Tensor.reshape, torch.reshape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Fill in -1 and go on."""
        kwargs = kwargs or {}
        if func in self._FUNCTIONS and len(args) > 1 and args[0].numel() == 0:
            sizes = args[1:] if isinstance(args[1], int) else args[1]
            if not isinstance(sizes, torch.dtype):
                return func(args[0], _infer(args[0].shape, tuple(sizes)), **kwargs)
        return func(*args, **kwargs)


def _infer(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    known = [size for size in sizes if size != -1]
    if len(known) != len(sizes) - 1 or known.count(0) != shape.count(0):
        return sizes  # nothing to infer, or nothing to infer it from: torch says what is wrong
    rest, divisor = _product(shape), _product(known)
    return sizes if rest % divisor else tuple(rest // divisor if size == -1 else size for size in sizes)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size or 1
    return product
