"""Measure the noise of a model whose weights are held still."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from syncbn._torch import BatchNormBase
from syncbn.comm import link_of
from syncbn.diagnostics.gathered import checked_sizes, report_of, same_layers
from syncbn.diagnostics.recorder import Recorder, batch_norm_layers
from syncbn.diagnostics.report import MIN_GROUPS, THRESHOLD, NoiseReport
from syncbn.diagnostics.timing import time_exchanges
from syncbn.dry_run import check_is_iterable, check_is_module, dry_run, first_batches, run_on_batch
from syncbn.errors import RankMismatchError
from syncbn.groups import group_device, resolve_group
from syncbn.rounds import rounds
from syncbn.together import telling
from syncbn.wire import NOISE, Call


def measure_noise(
    model: nn.Module,
    batches: Iterable[Any],
    group_sizes: Sequence[int] | None = None,
    *,
    threshold: float = THRESHOLD,
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    process_group: Any = None,
) -> NoiseReport:
    """Measure, for each batch norm layer, how noisy the statistics of k ranks are, and what sharing them costs.

    Formulas and estimator are in the docstring of ``syncbn.diagnostics``. Measured are all layers of ``nn.BatchNorm*``
    and ``SyncBatchNorm`` in training mode that run. The forwards are those of training, without gradients; afterwards
    buffers (running statistics among them) and torch's random state are what they were, also after an error.

    All ranks call it together. Ranks may hold different numbers of samples; it ends with the first rank that has run
    out of batches. A rank that raises tells the others, which raise ``RankMismatchError``. (Not those that wait in a
    layer with a process group of its own: they wait until their timeout. See ``syncbn.steps.vote`` for what can be
    told over which backend.)

    Args:
        model: in training mode, on its device. Layers in eval mode use no batch statistics and are left out.
        batches: this rank's batches, of the size that it trains with, on the model's device. About 30 times W/k give
            the noise at k to a few percent.
        group_sizes: the k to measure; None for 1, 2, 4, ... while there are ``MIN_GROUPS`` groups.
        threshold: noise up to which a group is large enough.
        num_batches: take at most so many.
        forward: called as ``forward(model, batch)``. None: ``model(batch)`` for a tensor, ``model(batch[0])`` for a
            tuple or list, ``model(**batch)`` for a mapping.
        process_group: the ranks that take part; as in ``SyncBatchNorm``.

    Returns:
        ``NoiseReport``, the same on all ranks.

    Raises:
        ValueError: no batch norm layer in training mode, no batch, too few batches, or a group size below 1.
        RankMismatchError: another rank raised, or its model has other layers.
        PeerLostError: a rank did not take part.
        Whatever ``batches`` or ``forward`` raise, on this rank.

    Collectives:
        Per batch one exchange of 2 float64, and those of the model's own forward. Afterwards one of 3; one of
        T * (2C+1) for each layer and T batches (W times as long where only sums are seen); 22 of 2C+1 for each width,
        which are timed; and one for the times.

    >>> import torch
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> report = measure_noise(nn.BatchNorm1d(8), (torch.randn(4, 8) for _ in range(256)), group_sizes=[1, 4, 16])
    >>> [round(row.mean_noise, 1) for row in report.rows]  # 1 / sqrt(4 k)
    [0.5, 0.2, 0.1]
    >>> print(report.recommendations[0])
    BatchNorm1d: per-device noise 0.76, synchronize over at least 16
    """
    group = resolve_group(process_group)
    where = group_device(group)
    link = link_of(group, where)
    call = Call(NOISE)
    with telling(link, call, 1, "measure_noise"):
        sizes = checked_sizes(group_sizes)
        recorder = Recorder(_layers(model))
        check_is_iterable(batches)
        counted = ((batch, 1) for batch in first_batches(batches, num_batches))
        with dry_run(model):
            for each in rounds(counted, link, where, call, "its batches"):
                if each.takers < link.size:
                    break
                with recorder.attached(), telling(link, call, 1, "its forward"):
                    (forward or run_on_batch)(model, each.batch)
                recorder.next()
    # From here on all is decided from numbers that all ranks share.
    if not same_layers(recorder, link):
        raise RankMismatchError(
            "the ranks ran different batch norm layers, or different numbers of batches: this rank "
            f"{recorder.steps} batches of {len(recorder.names)} layers. "
            "syncbn.check_ranks_agree(model) compares the layers."
        )
    report = report_of(recorder, link, sizes, threshold)
    with telling(link, call, 1, "measure_noise"):  # but for the sizes, which ranks may have been given differently
        if not report.rows:
            least = min(sizes or [1])
            raise ValueError(
                f"{recorder.steps} batches on {link.size} rank(s), in which {len(recorder.names)} batch norm layers "
                f"ran, are too few: a group size of {least} takes {MIN_GROUPS * least} measurements of a layer; give "
                "more"
            )
    seconds = time_exchanges(recorder, link, where)
    rows = tuple(dataclasses.replace(row, sync_seconds=seconds[row.layer]) for row in report.rows)
    return dataclasses.replace(report, rows=rows)


def _layers(model: nn.Module) -> dict[str, BatchNormBase]:
    """The batch norm layers, of which there is something to measure."""
    check_is_module(model)
    layers = batch_norm_layers(model)
    if not any(layer.training for layer in layers.values()):
        raise ValueError(
            f"the model has {len(layers)} batch norm layers, none of them in training mode, so there are no batch "
            "statistics to measure; call model.train() first"
        )
    for name, module in model.named_modules():
        if any(isinstance(buffer, nn.UninitializedBuffer) for buffer in module._buffers.values()):
            raise ValueError(f"layer {name!r} does not know its number of channels yet; run one batch first")
    return layers
