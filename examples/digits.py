"""The digits that the experiments learn, and the small network that learns them.

Not a script: the experiments beside it import it.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from training import Data, normalization, stacked_mlp

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as missing:
    text = f"{Path(sys.argv[0]).name} needs {missing.name}, of the extra [examples]: pip install '.[examples]'"
    sys.exit(text if os.environ.get("RANK", "0") == "0" else 0)  # said once, and a failure of the job


@functools.cache
def load_data() -> Data:
    """Return 1797 images of handwritten digits, which come with scikit-learn, split 75/25 with equal class shares.

    `train_x` is `(1347, 64)`, `test_x` `(450, 64)`, both in [0, 1].
    """
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Data(train_x.float(), train_y.long(), test_x.float(), test_y.long())


def build_mlp(norm: str | Callable[[int], nn.Module], seed: int) -> nn.Sequential:
    """Return the 64-128-64-10 network with normalization after both hidden layers.

    Args:
        norm: a name that `training.normalization` knows, or a function that makes the layer for a number of channels.
        seed: fixes the weights, which are the same on every rank and for every `norm`.
    """
    torch.manual_seed(seed)
    layer = normalization(norm) if isinstance(norm, str) else norm
    return nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), layer(128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), layer(64), nn.ReLU()),
        nn.Linear(64, 10),
    )


def build_mlps(norm: str | Callable[[int], nn.Module], seeds: range) -> nn.Sequential:
    """Return the networks of `build_mlp` for all seeds side by side (`training.stacked_mlp`)."""
    return stacked_mlp((64, 128, 64, 10), norm, seeds)


def test_accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of test images that the model, with its running statistics, gets right, in percent."""
    model.eval()
    with torch.no_grad():
        hits = model(data.test_x).argmax(1) == data.test_y
    return 100 * hits.double().mean().item()
