"""A small training script to copy: DistributedDataParallel with synchronized batch normalization.

A convolutional network learns scikit-learn's handwritten digits. It runs on what is there (GPUs with NCCL,
else CPUs with gloo), on any number of ranks, and picks up from its checkpoint if there is one ::

    python -m syncbn.launch -n 4 examples/train.py --checkpoint out/train.pt

The batch is a *global* batch, cut into one slice per rank. As the statistics are global too, a checkpoint
written on 4 ranks goes on the same way on 2 ranks, or on one. `python examples/train.py` runs one rank
without a launcher.
"""

import argparse
import gc
import inspect
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as missing:
    text = f"{Path(__file__).name} needs {missing.name}, of the extra [examples]: pip install '.[examples]'"
    sys.exit(text if os.environ.get("RANK", "0") == "0" else 0)  # said once, and a failure of the job


def build_network() -> nn.Module:
    """Return a convolutional network from `(N, 1, 8, 8)` images to `(N, 10)` logits."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64 * 2 * 2, 10)),
    )


def load_data(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, training classes, test images, test classes."""
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, classes, test_size=0.25, stratify=classes, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).to(device) for part in parts)
    return train_x.float().view(-1, 1, 8, 8), train_y, test_x.float().view(-1, 1, 8, 8), test_y


def join_group(backend: str | None) -> torch.device:
    """Join the process group that the launcher prepared and return this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    backend = backend or ("nccl" if has_gpu else "gloo")
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    if backend == "mpi4py":
        import syncbn.mpi  # noqa: F401  (registers the backend)

        dist.init_process_group(backend)
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")


def global_batches(count: int, batch: int, epoch: int) -> Iterator[Tensor]:
    """Yield the indices of one epoch, batch by batch, alike on all ranks; drop an incomplete last batch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    yield from order[: count // batch * batch].split(batch)


def average_in_float64(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks for DDP, summed in float64.

    DDP places gradients differently after its first step, and a float32 sum rounds differently in another place.
    In float64 that difference is far below the last digit of float32: a resumed run repeats an uninterrupted one.
    """
    total = bucket.buffer().double()
    future = dist.all_reduce(total, async_op=True).get_future()
    return future.then(lambda _: bucket.buffer().copy_(total / dist.get_world_size()))


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch: int, epoch: int
) -> float:
    """Train for one epoch and return this rank's share of the mean loss."""
    model.train()
    world, rank = dist.get_world_size(), dist.get_rank()
    loss_sum, steps = 0.0, 0
    for indices in global_batches(len(x), batch, epoch):
        mine = indices.tensor_split(world)[rank].to(x.device)
        # DDP averages gradients over ranks. The sum over this rank's samples * world / global count is the
        # loss whose average is the mean over the global batch, also when the slices differ in size.
        loss = F.cross_entropy(model(x[mine]), y[mine], reduction="sum") * world / len(indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() / world
        steps += 1
    return loss_sum / max(steps, 1)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy on `x` in percent. Each rank looks at its own slice, and the hits are added up.

    Sums of hits, not means of accuracies: slices differ in size. Evaluation itself never communicates.
    """
    model.eval()
    part = torch.arange(len(x), device=x.device).tensor_split(dist.get_world_size())[dist.get_rank()]
    hits = (model(x[part]).argmax(1) == y[part]).sum()
    dist.all_reduce(hits)
    return 100.0 * hits.item() / len(x)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write a checkpoint from rank 0. A process that dies meanwhile leaves the previous one whole."""
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, draft)
        draft.replace(path)


def restore(data: bytes, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Load a checkpoint's bytes into model and optimizer; return the epochs that it has."""
    checkpoint = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return int(checkpoint["epoch"])


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Load the checkpoint, if rank 0 has one, on every rank; return the epoch to go on with.

    Rank 0 wrote it and sends it, as ranks on other hosts may not see its disk. What keeps rank 0 from reading the file,
    or would keep it from writing one after the first epoch, ends all ranks.
    """
    sent: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sent[0] = path.read_bytes() if path.exists() else None
            if sent[0] is not None:
                restore(sent[0], model, optimizer, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            sent = [None, f"{path} is no checkpoint to resume from ({reason}); move it, or give another --checkpoint"]
    dist.broadcast_object_list(sent, src=0, device=device)
    data, problem = sent
    if problem:
        sys.exit(problem if dist.get_rank() == 0 else 1)
    return 0 if data is None else restore(data, model, optimizer, device)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Train a small network on digits, on one or many ranks.")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training set, resumed ones included")
    parser.add_argument("--batch", type=int, default=64, help="samples in a global batch, all ranks together")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--backend", choices=["gloo", "nccl", "mpi4py"], help="default: nccl with GPUs, else gloo")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/train.pt"), help="written after each epoch")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: a global batch needs at least one sample")
    return args


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train from the checkpoint on, if there is one; evaluate and write a checkpoint after each epoch."""
    is_first = dist.get_rank() == 0
    train_x, train_y, test_x, test_y = load_data(device)
    if args.batch > len(train_x):
        sys.exit(f"--batch {args.batch} is more than the {len(train_x)} training samples" if is_first else 1)

    torch.manual_seed(0)
    network = syncbn.convert_sync_batchnorm(build_network()).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    first_epoch = resume(args.checkpoint, network, optimizer, device)
    if is_first and first_epoch:
        print(f"resumed {args.checkpoint} after epoch {first_epoch}")
    if first_epoch >= args.epochs:
        accuracy = evaluate(network, test_x, test_y)
        if is_first:
            print(
                f"{args.checkpoint} has {first_epoch} of {args.epochs} epochs: nothing is left to train; test accuracy "
                f"{accuracy:.2f} %. Give more --epochs, or another --checkpoint to begin anew."
            )
        return
    # Running statistics are bitwise equal on all ranks, so DDP need not broadcast them before each forward.
    # (The option was called broadcast_buffers before torch 2.13.)
    options: dict[str, Any] = {"forward_sync_buffers": False}
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
        options = {"broadcast_buffers": False}
    model = DistributedDataParallel(network, **options)
    model.register_comm_hook(None, average_in_float64)

    for epoch in range(first_epoch, args.epochs):
        share = torch.tensor(train_epoch(model, optimizer, train_x, train_y, args.batch, epoch), device=device)
        dist.all_reduce(share)
        accuracy = evaluate(network, test_x, test_y)
        save(args.checkpoint, network, optimizer, epoch + 1)
        if is_first:
            print(
                f"epoch {epoch + 1}: train loss {share.item():.4f}, test accuracy {accuracy:.2f} %",
                flush=True,
            )


def main() -> None:
    """Join the ranks that the launcher started, train, leave."""
    args = parse_arguments()
    device = join_group(args.backend)
    train(args, device)
    # DDP sits in reference cycles and holds the group. If it outlives destroy_process_group, the group dies in
    # DDP's destructor, which can deadlock with a thread of gloo that waits for the interpreter lock.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
