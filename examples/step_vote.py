"""Survive an out-of-memory error on one rank: all ranks skip the step together and go on.

A rank that catches the error and takes the next batch leaves the others waiting in a layer. So each rank votes on its
own step, and the vote reaches the others wherever they are, in a layer's forward or backward included. Three rules:

* the gradients are averaged after the vote, by hand: what DistributedDataParallel has under way cannot be given up;
* who hears of another's failure inside a layer must not vote again: that was the vote;
* a step that was given up leaves no trace: the running statistics are put back.

It needs a group whose ranks see each other's messages: gloo, up to 32 ranks. Run it (the error is a staged one) ::

    python -m syncbn.launch -n 2 examples/step_vote.py --fail-rank 1 --fail-step 3 --fail-in forward
"""

import argparse
import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.steps import vote


def try_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> bool:
    """Run forward and backward on this rank's batch; return whether they went well on all ranks.

    If they did, the parameters hold this rank's gradients. If not, the model is as it was before.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    try:
        loss_of().backward()
        ok = vote(True)
    except torch.OutOfMemoryError as error:
        ok = vote(False, f"out of memory: {error}")
    except syncbn.RankMismatchError as error:
        if not error.refused_by:
            raise  # the ranks really run different layers
        ok = False  # another rank's vote, which met this one in a layer
    if not ok:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
    return ok


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over all ranks, in one all-reduce."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def out_of_memory_in(where: str, model: nn.Sequential) -> list[torch.utils.hooks.RemovableHandle]:
    """Stage the error in the middle of the network, forward or backward, or behind it ("loss")."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("staged")

    if where == "forward":
        return [model[3].register_forward_pre_hook(fail)]
    if where == "backward":
        return [model[3].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)]
    return [model[-1].register_forward_hook(fail)]


def train(steps: int, fail_rank: int, fail_step: int, fail_in: str) -> tuple[int, dict[str, Tensor]]:
    """Return how many steps were done, and the weights and statistics at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on all ranks
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model.append(nn.Linear(16, 1))
    syncbn.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    done = 0
    for step in range(steps):
        x = torch.randn(4, 8, generator=generator)
        hooks = out_of_memory_in(fail_in, model) if (rank, step) == (fail_rank, fail_step) else []
        ok = try_step(model, lambda x=x: F.mse_loss(model(x), x.sum(1, keepdim=True)))  # type: ignore[misc]
        for hook in hooks:
            hook.remove()
        if not ok:
            print(f"rank {rank} of {world}: step {step} skipped", flush=True)
            continue
        average_gradients(model)
        optimizer.step()
        done += 1
    print(f"rank {rank} of {world}: {done} of {steps} steps done", flush=True)
    return done, model.state_dict()


def main() -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="training steps (6)")
    parser.add_argument("--fail-rank", type=int, default=1, help="the rank that fails (1)")
    parser.add_argument("--fail-step", type=int, default=3, help="the step in which it fails (3)")
    parser.add_argument(
        "--fail-in", choices=["forward", "backward", "loss"], default="forward", help="where it fails (forward)"
    )
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(args.steps, args.fail_rank, args.fail_step, args.fail_in)
    gc.collect()  # DistributedDataParallel must go before its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
