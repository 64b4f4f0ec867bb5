"""SyncBatchNorm in Lightning: a plugin for its Trainer. Import this module by name; it needs Lightning (2.4 or later).

``Trainer(sync_batchnorm=True)`` converts to ``torch.nn.SyncBatchNorm``, which runs on GPUs only and forgets the classes
of the layers. This plugin takes its place.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm

# Lightning comes in two packages, whose classes are not each other's.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _layer_syncs() -> list[Any]:
    """``LayerSync`` of the packages that this program has imported, or else of the first that is installed."""
    for name in [name for name in _PACKAGES if sys.modules.get(name)] or _PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
        else:
            break
    else:
        raise ModuleNotFoundError(
            "syncbn.lightning needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed: "
            "pip install lightning (the extra [lightning])",
            name="lightning",
        )
    return [importlib.import_module(f"{name}.plugins").LayerSync for name in _PACKAGES if sys.modules.get(name)]


if TYPE_CHECKING:
    from lightning.pytorch.plugins import LayerSync
else:
    LayerSync = _layer_syncs()[0]


class SyncBatchNormPlugin(LayerSync):
    """Synchronizes the batch norm layers of a LightningModule while ``fit`` runs: ``Trainer(plugins=[...])``.

    The strategy (DDP or FSDP) calls ``apply`` before it wraps the model and makes the optimizers, and ``revert`` when
    ``fit`` ends, also by an exception. The layers are converted in place and get back the classes that they had.
    ``validate``, ``test`` and ``predict`` run with plain batch norm. On one device Lightning does not use it at all.

    Leave ``Trainer(sync_batchnorm=True)`` out: Lightning refuses the two together.

    Args:
        process_group: to synchronize over, as in ``convert_sync_batchnorm``; or a function without arguments that
            returns one, called in ``apply``: the Trainer connects its ranks after the plugin is made. None: all ranks.

    Raises:
        ModuleNotFoundError: on import, where Lightning is not installed.
    """

    def __init__(self, process_group: Any | Callable[[], Any] = None) -> None:
        self.process_group = process_group
        for layer_sync in _layer_syncs():  # the Trainer that is given this object is imported by now
            layer_sync.register(type(self))

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert, in place.

        Args:
            model: the LightningModule.

        Returns:
            ``model`` itself.

        Raises:
            ValueError, TypeError: as in ``convert_sync_batchnorm``.

        Collectives:
            None of its own; those of making a group, where ``process_group`` is a function that makes one.
        """
        group = self.process_group() if callable(self.process_group) else self.process_group
        return convert_sync_batchnorm(model, group)

    def revert(self, model: nn.Module) -> nn.Module:
        """Give every converted layer back the class that it had.

        Args:
            model: the LightningModule.

        Returns:
            ``model`` itself.

        Collectives:
            None.
        """
        return revert_sync_batchnorm(model)
