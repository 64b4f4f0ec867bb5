"""What watching the noise of batch statistics costs a training step: ``diagnostics.NoiseObserver``.

    python benchmarks/observer.py

Three sides in turn, on equal networks: no observer, one that measures no step of these, and one that measures every
step. Printed and written to a CSV: medians in microseconds for forward + backward, and ratios.
"""

from __future__ import annotations

from collections.abc import Callable

import timing
import torch
from torch import Tensor, nn

import syncbn
from syncbn import comm
from syncbn.diagnostics import NoiseObserver

CHANNELS = (16, 32, 64, 128)


def network() -> nn.Module:
    """Four convolutions of stride 2, each followed by a synchronized layer and a ReLU."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
        blocks += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return syncbn.convert_sync_batchnorm(nn.Sequential(*blocks))


def main() -> None:
    timing.keep_freed_memory()
    torch.set_num_threads(1)
    x = torch.randn(8, 3, 64, 64)
    models = {name: network() for name in ("none", "waiting", "measuring")}
    observers = [
        NoiseObserver(models["waiting"], every=1 << 30, window=16),
        NoiseObserver(models["measuring"], every=16, window=16),
    ]

    def step(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y: Tensor = model(x)
            y.square().mean().backward()
            return y

        return run

    sides = {name: step(model) for name, model in models.items()}
    with comm.forced():
        for observer in observers:
            observer.attach()
        assert torch.equal(sides["none"](), sides["measuring"]())
        times = timing.in_turn(sides, 160)
        for observer in observers:
            observer.detach()
    assert observers[0].report is None and observers[1].report is not None
    row: dict[str, object] = {f"{name} us": seconds * 1e6 for name, seconds in times.items()}
    row |= {f"{name} ratio": times[name] / times["none"] for name in ("waiting", "measuring")}
    for name, value in row.items():
        print(f"{name:>16} {value:10.3f}")
    print(f"{timing.machine()}\nwritten: {timing.write_csv('observer.csv', [row])}")


if __name__ == "__main__":
    main()
