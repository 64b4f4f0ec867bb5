"""What a layer that was built synchronized is when it has been reverted. TorchScript reads this file."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from syncbn import functional, tracing
from syncbn.modules import memory_of, refuse_other_converters


class LocalBatchNorm(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    """``activation(batch_norm(input) + residual)`` with this rank's own statistics, for ``(N, C, *)`` of any dimension.

    What ``revert_sync_batchnorm`` makes of a layer that was built as a ``SyncBatchNorm``.
    """

    _activation = None  # type: str | None
    _layer_name = ""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize, add, activate; shapes and mask as in ``SyncBatchNorm.forward``. Collectives: none."""
        if not is_scripting():
            if not isinstance(input, Tensor):
                known = type(self).forward is LocalBatchNorm.forward  # type: ignore[unreachable]
                node = tracing.leaf(self, not known, input, residual, mask=mask)
                if node is not None:
                    return node
            if mask is not None and (self.training or self.running_mean is None):
                return functional.batch_norm(
                    input, None, None, self.weight, self.bias, residual, training=True, eps=self.eps, group=None,
                    activation=self._activation, memory=memory_of(self) if self.training else None,
                    channels=self.num_features, check=self._check_input_dim, mask=mask,
                )  # fmt: skip
        if is_scripting():  # noqa: SIM108 (which TorchScript could not compile)
            y = self._scripted(input)
        else:
            y = super().forward(input)
        if residual is not None:
            y = y + residual
        if self._activation is not None:
            y = F.relu(y)
        return y

    def _scripted(self, input: Tensor) -> Tensor:
        """``super().forward``, which TorchScript does not know."""
        self._check_input_dim(input)
        momentum = 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        uses_batch = self.training or self.running_mean is None
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, uses_batch, momentum, self.eps
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions (N, C, *), got {input.dim()}-D")

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module.

        Raises:
            RuntimeError: to another library's converter, where that would lose an activation.
        """
        if self._activation is not None:
            refuse_other_converters(self)
        return super().named_children()
