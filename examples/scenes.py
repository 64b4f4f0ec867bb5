"""Scenes to segment, composed of scikit-learn's handwritten digits, and a small U-Net for them.

Not a script: the experiments beside it import it; ``segmentation.py`` draws some scenes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from digits import load_data
from torch import Tensor, nn
from training import Data

SIZE = 32
CLASSES = 5  # background, and the digits 0 to 3 as 1 to 4
OBJECTS = (2, 4)  # fewest and most digits of a scene
SIDE = (10, 14)  # of a digit, in pixels
TURN = math.radians(15)  # most that a digit is rotated
PIECES = 4  # fragments of other digits, which belong to the background
BACKGROUND = 0.2  # weight of its pixels in the loss, which are four of five


def uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return independent numbers between two limits."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def placed(patches: Tensor, scale: Tensor, angle: Tensor, centre: Tensor) -> Tensor:
    """Return each of ``(N, 1, h, w)`` patches alone on a field of ``(N, SIZE, SIZE)`` zeros.

    Args:
        scale: of the patch's side against that of the field, ``(N,)``.
        angle: in radians, ``(N,)``.
        centre: in the field's coordinates, from -1 to 1, ``(N, 2)``.
    """
    cos, sin = angle.cos() / scale, angle.sin() / scale
    x, y = centre.unbind(1)
    rows = torch.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(patches), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(patches, grid, align_corners=False)[:, 0]


def compose(digits: Tensor, classes: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` scenes and the class of each of their pixels.

    A scene has a smooth background of chance, 4 fragments of the digits 4 to 9 (quarters, rotated and scaled, which
    belong to the background), and over them 2 to 4 of the digits 0 to 3: rotated by up to 15 degrees, 10 to 14 pixels
    large, of contrasts from 0.6 to 1.2, later ones in front of earlier ones. Noise of a standard deviation of 0.08 is
    added, and each scene has a gain (0.5 to 1.5) and an offset (-0.5 to 0.5) of its own, as photographs have their
    exposure.

    Args:
        digits: ``(N, 64)`` float32 in [0, 1], the images to choose from.
        classes: ``(N,)`` int64, their class numbers.
        seed: fixes all of it.

    Returns:
        Scenes ``(count, 1, SIZE, SIZE)`` float32, and labels ``(count, SIZE, SIZE)`` int64 in [0, CLASSES).
    """
    chance = torch.Generator().manual_seed(seed)
    wanted = classes < CLASSES - 1
    images, others, classes = digits[wanted].view(-1, 1, 8, 8), digits[~wanted].view(-1, 1, 8, 8), classes[wanted]

    def pasted(patches: Tensor, least: float, most: float, turn: float) -> Tensor:
        scale = uniform(least, most, (count,), chance) / SIZE
        angle = uniform(-turn, turn, (count,), chance)
        return placed(patches, scale, angle, uniform(-0.85, 0.85, (count, 2), chance))

    field = F.interpolate(torch.randn(count, 1, 5, 5, generator=chance), SIZE, mode="bicubic", align_corners=True)
    scene = 0.15 * field[:, 0]
    for _ in range(PIECES):
        chosen = others[torch.randint(len(others), (count,), generator=chance)]
        top, left = torch.randint(0, 5, (2,), generator=chance).tolist()
        piece = chosen[:, :, top : top + 4, left : left + 4]
        scene = scene + uniform(0.3, 1.0, (count, 1, 1), chance) * pasted(piece, 6, 11, math.pi)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    number = torch.randint(OBJECTS[0], OBJECTS[1] + 1, (count,), generator=chance)
    for i in range(OBJECTS[1]):
        which = torch.randint(len(images), (count,), generator=chance)
        shape = pasted(images[which], *SIDE, TURN)
        shape = shape * (number > i).view(-1, 1, 1)
        cover = shape.clamp(max=0.5) * 2
        scene = scene * (1 - cover) + cover * shape * uniform(0.6, 1.2, (count, 1, 1), chance)
        labels = torch.where(shape > 0.35, classes[which].view(-1, 1, 1) + 1, labels)
    scene = scene + 0.08 * torch.randn(scene.shape, generator=chance)
    gain, offset = uniform(0.5, 1.5, (count, 1, 1), chance), uniform(-0.5, 0.5, (count, 1, 1), chance)
    return (gain * scene + offset).unsqueeze(1), labels


@functools.cache
def load_scenes(train: int = 768, test: int = 384) -> Data:
    """Return scenes for training and for the test; their digits come from the two parts of the digits data set."""
    data = load_data()
    train_x, train_y = compose(data.train_x, data.train_y, train, seed=0)
    test_x, test_y = compose(data.test_x, data.test_y, test, seed=1)
    return Data(train_x, train_y, test_x, test_y, weights=torch.tensor([BACKGROUND] + [1.0] * (CLASSES - 1)))


class UNet(nn.Module):
    """Three levels down and up again, two 3x3 convolutions with normalization and ReLU at each.

    Shape: ``(N, 1, H, W)`` to ``(N, CLASSES, H, W)``, H and W divisible by 4.
    """

    def __init__(self, norm: Callable[[int], nn.Module], widths: tuple[int, int, int] = (8, 16, 32)) -> None:
        super().__init__()

        def block(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                norm(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                norm(width),
                nn.ReLU(),
            )

        a, b, c = widths
        self.down1, self.down2, self.bottom = block(1, a), block(a, b), block(b, c)
        self.up2, self.up1 = block(c + b, b), block(b + a, a)
        self.head = nn.Conv2d(a, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2), middle], 1))
        return self.head(self.up1(torch.cat([F.interpolate(middle, scale_factor=2), fine], 1)))


def build_unet(norm: Callable[[int], nn.Module], seed: int) -> UNet:
    """Return the network, with weights that `seed` fixes on every rank."""
    torch.manual_seed(seed)
    return UNet(norm)


def predicted(model: nn.Module, scenes: Tensor) -> Tensor:
    """Return the class of each pixel, ``(N, SIZE, SIZE)``; leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in scenes.split(64)])


def mean_iou(labels: Tensor, guesses: Tensor) -> float:
    """Return the intersection over union of the pixels of a class, averaged over the classes, in percent."""
    pairs = torch.bincount((labels * CLASSES + guesses).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = pairs.diagonal().double()
    return 100 * (both / (pairs.sum(0) + pairs.sum(1) - both)).mean().item()
