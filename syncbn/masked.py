"""Masks of the valid positions of a padded batch, over which a layer takes its statistics.

With m the mask (1 where valid), sums over the positions of all ranks, and every position normalized::

    n = sum(m)        mean = sum(m * x) / n        var = sum(m * (x - mean)^2) / n

The gradient is in ``autograd``. Ranks with and without a mask go together: their messages are the same. What is not
finite at padded positions counts as zero, so that no garbage in the padding gets into sums whose gradient is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_mask(lengths: Tensor, length: int) -> Tensor:
    """The mask of a padded batch of sequences, for inputs of shape ``(N, C, length)``::

        mask[i, 0, t] = t < lengths[i]

    For inputs with more dimensions, add them: ``sequence_mask(lengths, height)[..., None]`` for ``(N, C, H, W)``.

    Args:
        lengths: shape ``(N,)``, any integer dtype: valid positions per sample. Values above ``length`` mean all, values
            below 1 none; they are not read back, so that nothing waits for a device.
        length: the padded length, of the input's last dimension.

    Returns:
        Boolean tensor of shape ``(N, 1, length)`` on the device of ``lengths``, True at valid positions.

    Raises:
        ValueError: lengths of another shape or dtype.

    Collectives:
        None.

    >>> sequence_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[[1, 0, 0]], [[1, 1, 1]]]
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be an integer tensor of shape (N,), got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None]


def mask_error(input: Tensor, mask: Tensor) -> ValueError | None:
    """What is wrong with a mask for ``input``, of shape ``(N, C, *)``; None if nothing is."""
    shape, wanted = tuple(mask.shape), (input.shape[0], 1, *input.shape[2:])
    if mask.dtype != torch.bool:
        return ValueError(
            f"mask must be boolean, True at valid positions, got {mask.dtype} of shape {shape}; positions have no "
            "weights here: use mask.bool(), or a comparison"
        )
    fits = len(shape) == len(wanted) and all(size in (1, full) for size, full in zip(shape, wanted, strict=True))
    if not fits:
        hint = "; mask.unsqueeze(1) has it" if shape == wanted[:1] + wanted[2:] else ""
        return ValueError(
            f"mask must have shape {wanted}, or 1 in place of any of these, for an input of shape "
            f"{tuple(input.shape)}; got {shape}{hint}. All channels share one mask"
        )
    if mask.device != input.device:
        return ValueError(
            f"mask must be on the input's device: mask of shape {shape} on {mask.device}, input of shape "
            f"{tuple(input.shape)} on {input.device}"
        )
    return None
