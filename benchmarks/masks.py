"""What a mask costs: forward and backward of a layer over a padded batch, against the same without a mask.

    python benchmarks/masks.py

16 sequences of 80 to 399 positions, padded to 400, 256 channels, float32. "packed" takes the valid positions out, runs
a layer without a mask over them, and puts them back. The outputs of all ways with masks are compared with float64
first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bars
import timing
import torch
from torch import Tensor

import syncbn
from syncbn import comm
from syncbn.masked import sequence_mask

N, C, LENGTH = 16, 256, 400


def sides(x: Tensor, mask: Tensor, grad: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each returns the output, after its backward."""
    layer = syncbn.SyncBatchNorm(C)
    garbage = torch.where(mask, x, float("nan")).requires_grad_()
    x = x.requires_grad_()
    valid = mask.squeeze(1)

    def run(input: Tensor, mask: Tensor | None) -> Tensor:
        y = layer(input, mask=mask)
        torch.autograd.grad(y, [input, layer.weight, layer.bias], grad)
        return y.detach()

    def packed() -> Tensor:
        y = x.new_zeros(N, LENGTH, C)
        y[valid] = layer(x.mT[valid])
        torch.autograd.grad(y.mT, [x, layer.weight, layer.bias], grad)
        return y.mT.detach()

    return {
        "no mask": lambda: run(x, None),
        "mask": lambda: run(x, mask),
        "mask, NaN in the padding": lambda: run(garbage, mask),
        "packed": packed,
    }


def plot(path: Path) -> Path:
    """The time of each way."""
    rows = timing.read_csv(path)
    title = f"A layer over padded sequences, {rows[0]['valid']:.0%} of it valid: {timing.where(rows)}"
    return bars.draw(path, title, {"forward and backward, ms": {"sync": {row["way"]: row["ms"] for row in rows}}})


def main() -> None:
    timing.keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mask = sequence_mask(torch.randint(LENGTH // 5, LENGTH, (N,)), LENGTH)
    x, grad = torch.randn(N, C, LENGTH), torch.randn(N, C, LENGTH) * mask
    values = x.double().mT[mask.squeeze(1)]
    expected = (values - values.mean(0)) * (values.var(0, correction=0) + 1e-5).rsqrt()
    rows: list[dict[str, object]] = []
    with comm.forced():
        ways = sides(x, mask, grad)
        for name, way in ways.items():
            error = (way().mT[mask.squeeze(1)] - expected).abs().max()
            assert name == "no mask" or error < 1e-5, (name, error)
        for name, seconds in timing.in_turn(ways, 20).items():
            rows.append({"way": name, "ms": 1e3 * seconds, "valid": float(mask.float().mean())})
            print(f"{name:<26} {1e3 * seconds:6.2f} ms")
    path = timing.write_csv("masks.csv", rows)
    print(f"{timing.machine()}\nwritten: {path}, {plot(path)}")


if __name__ == "__main__":
    main()
