"""The plain forms of the kernels (``syncbn.kernels.reference``) by way of a module's fused ones, for tests of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.messages import Message, Shared


class Plain:
    """Plain forms of a module that has fused forms alone."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def moments(self, x: Tensor, raw: bool = False) -> Tensor:
        message = _message(2 * x.shape[1] + 1, raw)
        self.module.pack_moments(x, None, message)
        return message.payload

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        one = Shared(torch.cat([torch.ones(1).double(), mean, _variance(invstd)])[None], False)
        return self.module.normalize_shared(x, None, one, weight, bias, residual, relu, 0.0, None)[0]

    def gradient_sums(self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        message = _message(2 * x.shape[1], False)
        stats = torch.cat([mean, invstd, torch.ones(1).double()])
        given = self.module.operands(grad, x, None, stats, None, None, None, False)
        self.module.pack_gradient_sums(given, message, (None, None))
        return message.payload

    def relu_gradient(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        again = _variance(invstd).sqrt().reciprocal()  # as `normalize` has it, to the bit
        stats = torch.cat([mean, again, torch.ones(1).double()])
        return self.module.passed_gradient(self.module.operands(grad, x, None, stats, weight, bias, residual, True))

    def input_gradient(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Tensor:
        stats = torch.cat([mean, invstd, count.view(1).double()])
        given = self.module.operands(grad, x, None, stats, weight, None, None, False)
        return self.module.shared_input_gradient(given, Shared(sums[None], False), False)[0]


def _message(width: int, raw: bool) -> Message:
    payload = torch.full((width,), torch.nan, dtype=torch.float64)
    return Message(payload, payload, raw)


def _variance(invstd: Tensor) -> Tensor:
    return invstd.double().square().reciprocal()
