"""Memory of a layer: bytes that it keeps for the backward, and the peak above what is there before.

    python benchmarks/memory.py

"kept" counts the storages saved for the backward, without the input and the parameters, which live anyway. "peak" is
the highest sum of bytes allocated at one time in forward and backward, without what was there before, and with the
output and the gradients. The input is 8x64x56x56 float32 (6.4 MB), for all sides alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bars
import counting
import timing
import torch
from torch import Tensor, nn

import syncbn
from syncbn import comm

SHAPE = (8, 64, 56, 56)


def sides(relu: bool, residual: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The layer by PyTorch out of plain operators, and ours in one call."""
    plain = nn.BatchNorm2d(SHAPE[1])
    ours = syncbn.SyncBatchNorm(SHAPE[1], activation="relu" if relu else None)

    def composed(x: Tensor, r: Tensor) -> Tensor:
        y = plain(x) + r if residual else plain(x)
        return y.relu() if relu else y

    return {"nn": composed, "syncbn": lambda x, r: ours(x, r) if residual else ours(x)}


def measure(name: str, layer: Callable[[Tensor, Tensor], Tensor], relu: bool, residual: bool) -> dict[str, object]:
    """One row of the table."""
    x, r = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=residual)
    grad = torch.randn(SHAPE)
    leaves = [x, r] if residual else [x]
    return {
        "side": name,
        "layer": "bn" + " + add" * residual + " + relu" * relu,
        "kept MB": counting.kept_bytes(lambda: layer(x, r), [x, r]) / 1e6,
        "peak MB": counting.peak_bytes(lambda: torch.autograd.grad(layer(x, r), leaves, grad)) / 1e6,
        "input MB": 4e-6 * x.numel(),
    }


def plot(path: Path) -> Path:
    """What each layer keeps, and its peak."""
    rows = timing.read_csv(path)
    title = f"Memory of a layer, input {rows[0]['input MB']:.1f} MB"
    sides = {"local": "nn", "sync": "syncbn"}

    def of(column: str) -> bars.Values:
        return {key: {row["layer"]: row[column] for row in rows if row["side"] == name} for key, name in sides.items()}

    return bars.draw(path, title, {"kept for the backward, MB": of("kept MB"), "peak of a step, MB": of("peak MB")})


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with comm.forced():
        for relu, residual in ((False, False), (True, False), (True, True)):
            for name, layer in sides(relu, residual).items():
                row = measure(name, layer, relu, residual)
                rows.append(row)
                print(f"{row['layer']:<16} {name:<8} kept {row['kept MB']:6.2f} MB   peak {row['peak MB']:6.2f} MB")
    path = timing.write_csv("memory.csv", rows)
    print(f"{timing.machine()}\nwritten: {path}, {plot(path)}")


if __name__ == "__main__":
    main()
