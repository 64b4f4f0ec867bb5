"""MNIST-1D: one-dimensional signals that the package `mnist1d` makes, and a small convolutional network for them.

Not a script: the experiments beside it import it. The networks of several seeds are stacked into one, whose channels
hold theirs side by side: convolutions work group by group, and batch norm treats each channel by itself, so this is
training them one by one, with the messages of one.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from training import Data, normalization

WIDTH = 24  # channels of each layer
CLASSES = 10


@functools.cache
def load_signals() -> Data:
    """Return 5000 signals of 40 values in 10 classes, with the package's own options and seed; 80 % for training."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as missing:
        text = f"{Path(sys.argv[0]).name} needs {missing.name}, of the extra [examples]: pip install '.[examples]'"
        sys.exit(text if os.environ.get("RANK", "0") == "0" else 0)  # said once, and a failure of the job
    made = make_dataset(get_dataset_args())
    x, test_x = (torch.from_numpy(made[name]).float() for name in ("x", "x_test"))
    y, test_y = (torch.from_numpy(made[name]).long() for name in ("y", "y_test"))
    return Data(x, y, test_x, test_y)


class StackedConvs(nn.Module):
    """Three convolutions of stride 2 with normalization and ReLU, and a linear layer, `seeds` times side by side.

    Shape: ``(N, seeds, 40)`` to ``(N, CLASSES, seeds)``.
    """

    def __init__(self, norm: Callable[[int], nn.Module], seeds: range) -> None:
        super().__init__()
        self.seeds = len(seeds)
        sizes = [(1, WIDTH, 5), (WIDTH, WIDTH, 3), (WIDTH, WIDTH, 3)]
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in sizes:
            stack = nn.Conv1d(
                self.seeds * inputs, self.seeds * outputs, kernel, 2, kernel // 2, groups=self.seeds, bias=False
            )
            layers += [stack, norm(self.seeds * outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv1d(self.seeds * WIDTH, self.seeds * CLASSES, 5, groups=self.seeds)  # of all 5 positions
        convolutions = [layer for layer in self.modules() if isinstance(layer, nn.Conv1d)]
        for i, seed in enumerate(seeds):  # each network has the weights that it has in a stack of another height
            chance = torch.Generator().manual_seed(seed)
            for layer in convolutions:
                bound = (layer.weight.shape[1] * layer.weight.shape[2]) ** -0.5
                for parameter in layer.parameters():
                    own = parameter.data.view(self.seeds, -1, *parameter.shape[1:])[i]
                    own.copy_(bound * (2 * torch.rand(own.shape, generator=chance) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).view(len(x), self.seeds, CLASSES).transpose(1, 2)


def build_convs(norm: str, seeds: range) -> StackedConvs:
    """Return the stacked networks of these seeds with normalization of this name (`training.normalization`)."""
    return StackedConvs(normalization(norm, len(seeds)), seeds)
