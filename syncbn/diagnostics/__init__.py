"""How noisy the statistics of small groups of ranks are, and what sharing them costs.

A batch norm layer estimates mean and variance of each channel from the values at hand. Over k ranks it has k times as
many. ``measure_noise`` runs batches through a model with its weights held still and compares, per layer and group size
k, the statistics of groups of k with those of all that was measured::

    mean_noise(k) = RMS over groups g and channels c of  (mean_gc - mean_c) / sqrt(var_c + eps)
    std_noise(k)  = RMS over groups g and channels c of  log sqrt((var_gc + eps) / (var_c + eps))
    noise(k)      = sqrt(mean_noise(k)^2 + std_noise(k)^2)

``noise`` is, to first order, the RMS error of the normalized output: with y = (x - mean) / std, which has mean 0 and
variance 1, the group's statistics give ``y + y * log(std / std_g) - (mean_g - mean) / std``.

The estimator:

* **Reference** (mean_c, var_c): the population, all ranks over all measured batches, as the weights do not change. It
  contains the group, which understates the deviation: were values independent, ``Var(mean_g - mean)`` would be
  ``s^2 (1/n_g - 1/n)`` instead of ``s^2 / n_g``. Each squared deviation is multiplied by ``n / (n - n_g)``.
* **Groups**: the measurements form a line, in order of batch, then rank; groups are k neighbours in it. Where k divides
  the number of ranks W these are the groups of ``torch.distributed.new_subgroups(k)``. Where k is larger, groups take
  in the following batches: with the same weights they are what further ranks would have held. So one process alone can
  tell over how many ranks to synchronize. It cannot foresee further ranks that would see other kinds of data.
* **No independence is assumed** of the values within a batch: neighbouring positions of an image say nearly the same,
  and ``1 / sqrt(n)`` would be too good. Only the measured statistics count.
* **Standard errors** are taken over groups; channels, which depend on each other, are averaged within a group first.

For independent Gaussian values, n per device and channel, ``mean_noise`` is ``1 / sqrt(n k)`` exactly, and
``std_noise`` within 4 % of ``1 / sqrt(2 n k)`` for n k of 64 and more, and larger below.

What a layer sees depends on how the layers before it normalize: the model is measured as it is, in the mode it is in.
"""

from syncbn.diagnostics.measure import measure_noise
from syncbn.diagnostics.observer import NoiseObserver
from syncbn.diagnostics.report import MIN_GROUPS, THRESHOLD, NoiseReport, NoiseRow, Recommendation

__all__ = [
    "MIN_GROUPS",
    "THRESHOLD",
    "NoiseObserver",
    "NoiseReport",
    "NoiseRow",
    "Recommendation",
    "measure_noise",
]
