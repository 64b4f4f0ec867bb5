"""What the functions of the backward work on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of one backward. A kernel may keep them in another form: what it makes of them, it takes.

    Attributes:
        grad: gradient of the loss with respect to the output; shape of x, any strides.
        x, mask, weight, bias, residual, relu: as in the forward, ``normalize_shared``.
        stats: float64 ``(mean, invstd, n)``, its second result.
    """

    grad: Tensor
    x: Tensor
    mask: Tensor | None
    stats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
