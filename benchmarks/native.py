"""The compiled loops alone, without autograd and without peers, beside PyTorch's own batch normalization.

    python benchmarks/native.py [--threads 1] [--rounds 50] [--dtype float32] [--variant avx2]

For each shape and layout the sides run in turn (A B C A B C ...) in one process. Times are medians in us: of the four
functions, of `nn.BatchNorm2d`'s forward and backward without autograd around them, and of one `clone`. "hot" works on
one input again and again; "cold" goes through a working set of 64 MB and more. The last columns are ratios: four
functions over PyTorch's two, and over the four clones that read and write as much as a forward and a backward.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
from timing import in_turn, keep_freed_memory, machine, markdown, write_csv

from syncbn.kernels import native
from syncbn.memory import Running
from syncbn.messages import Message, Shared

SHAPES = [
    (8, 64, 56, 56),
    (2, 64, 112, 112),
    (8, 256, 14, 14),
    (8, 512, 7, 7),
    (2, 64, 56, 56),
    (2, 256, 14, 14),
    (2, 512, 7, 7),
    (2, 64, 7, 7),
    (1024, 64),
    (16384, 256),
]
WORKING_SET = 64 << 20


def sides(shape: tuple[int, ...], layout: str, dtype: torch.dtype, cold: bool) -> dict[str, Callable[[], object]]:
    """The functions to time, each on the next of the inputs."""
    channels = shape[1]
    size = torch.Size(shape).numel() * dtype.itemsize

    def make() -> torch.Tensor:
        t = torch.randn(shape).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t

    count = max(1, WORKING_SET // (2 * size)) if cold else 1
    inputs = cycle([(make(), make()) for _ in range(count)])
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    mean, var, batches = torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64)
    running = Running(mean, var, 0.1, batches)
    moments = torch.zeros(2 * channels + 1, dtype=torch.float64)
    sums = torch.zeros(2 * channels, dtype=torch.float64)
    forward_message, backward_message = Message(moments, moments, False), Message(sums, sums, False)
    forward_shared, backward_shared = Shared(moments[None], False), Shared(sums[None], False)
    x = next(inputs)[0]
    native.pack_moments(x, None, forward_message)
    stats = native.normalize_shared(x, None, forward_shared, weight, bias, None, False, 1e-5, None)[1]
    save_mean, save_invstd = stats[:channels].float(), stats[channels:-1].float()
    dtypes = torch.float32, torch.float32

    def operands(g: torch.Tensor, x: torch.Tensor) -> native.Prepared:
        return native.operands(g, x, None, stats, weight, bias, None, False)

    def ours_moments() -> None:
        native.pack_moments(next(inputs)[0], None, forward_message)

    def ours_output() -> object:
        return native.normalize_shared(next(inputs)[0], None, forward_shared, weight, bias, None, False, 1e-5, running)

    def ours_sums() -> object:
        x, g = next(inputs)
        return native.pack_gradient_sums(operands(g, x), backward_message, dtypes)

    def ours_gradient() -> object:
        x, g = next(inputs)
        return native.shared_input_gradient(operands(g, x), backward_shared, False)

    def ours_forward() -> object:
        x = next(inputs)[0]
        native.pack_moments(x, None, forward_message)
        return native.normalize_shared(x, None, forward_shared, weight, bias, None, False, 1e-5, running)

    def ours_backward() -> object:
        x, g = next(inputs)
        given = operands(g, x)
        native.pack_gradient_sums(given, backward_message, dtypes)
        return native.shared_input_gradient(given, backward_shared, False)

    def theirs_forward() -> object:
        return torch.native_batch_norm(next(inputs)[0], weight, bias, mean, var, True, 0.1, 1e-5)

    def theirs_backward() -> object:
        x, g = next(inputs)
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, mean, var, save_mean, save_invstd, True, 1e-5, [True, True, True]
        )

    return {
        "moments": ours_moments,
        "output": ours_output,
        "sums": ours_sums,
        "gradient": ours_gradient,
        "forward": ours_forward,
        "backward": ours_backward,
        "torch forward": theirs_forward,
        "torch backward": theirs_backward,
        "clone": lambda: next(inputs)[0].clone(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--variant", default=native._native.variants()[0], choices=native._native.variants())
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    native._native.choose(options.variant)
    print(f"{machine()}, {options.threads} threads, {options.variant}, {options.dtype}; us")
    rows = []
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        if options.only not in name:
            continue
        for layout in ("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",):
            for cold in (False, True):
                times = in_turn(sides(shape, layout, getattr(torch, options.dtype), cold), options.rounds)
                us = {key: value * 1e6 for key, value in times.items()}
                ours, theirs = us["forward"] + us["backward"], us["torch forward"] + us["torch backward"]
                shown = " ".join(f"{key} {value:.0f}" for key, value in us.items())
                memory = "cold" if cold else "hot"
                print(f"{name:>14} {layout:13} {memory:4} {ours / theirs:5.2f} {ours / us['clone'] / 4:5.2f}  {shown}")
                row = {"input": name, "layout": layout, "memory": memory, "threads": options.threads}
                row |= {"variant": options.variant, "dtype": options.dtype, **us}
                rows.append(row | {"over torch": ours / theirs, "over 4 clones": ours / us["clone"] / 4})
    columns = ("input", "layout", "memory", "over torch", "over 4 clones")
    texts = [{key: str(row[key])[:4] if key.startswith("over") else row[key] for key in columns} for row in rows]
    print(markdown(texts))
    if not options.only:
        print(write_csv(f"native-{options.dtype}-{options.threads}t.csv", rows))


if __name__ == "__main__":
    main()
