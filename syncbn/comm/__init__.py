"""Take a small float64 message over a process group, by the cheapest way for its backend and size.

The process group of torch.distributed is the only abstraction. A link is what this rank keeps per group. The ways:

* ``one_hop`` (gloo): to and from every peer, over Unix sockets between ranks of one host and over gloo to the others.
  One hop instead of the 2(W-1) of gloo's ring; each peer's header is seen. Of more than ``ONE_HOP_LIMIT`` ranks on
  several hosts, those of one host have a leader (``two_levels``): three hops.
* ``all_reduce`` (NCCL, MPI, gloo above ``LEVELS_LIMIT``): one all-reduce, with check slots in the message.
* ``all_gather`` (where ``SYNCBN_GATHER`` asks for it, for devices within a node): one all-gather, in which each rank's
  header is seen. On devices without float64 always, of pairs of float32.

All give equal bits on all ranks. Without peers there is a link all the same (``Alone``), which sends nothing.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from syncbn import _torch
from syncbn.comm.all_gather import AllGatherOfPairs, AllGatherOnDevice
from syncbn.comm.all_reduce import AllReduce, AllReduceOnDevice, AllReduceOnHost
from syncbn.comm.base import Alone, Link, Pretended, gather_limit
from syncbn.comm.gloo import is_gloo
from syncbn.comm.one_hop import OneHop
from syncbn.groups import on_one_node

__all__ = ["AllReduce", "Alone", "Link", "OneHop", "forced", "link_of", "must_synchronize", "synchronizes"]

ONE_HOP_LIMIT = 32
"""World size above which the ranks of a host send through a leader, if there are several hosts (docs/transports.md).

The limit bounds how many peers send to a rank at once over gloo.
"""

LEVELS_LIMIT = 4096
"""World size above which gloo groups use one all-reduce, in which no rank sees another's message.

It bounds memory: a rank has room for the messages of all ranks, 131 kB each if they are the longest.
"""

_PLAIN = dist.ProcessGroup if dist.is_available() else type(None)  # groups that do not change
_forced = 0  # how many are within forced(): ranks may be threads of one process
_forced_lock = threading.Lock()
_alone = {torch.device("cpu"): Alone(torch.device("cpu"))}
_links: weakref.WeakKeyDictionary[Any, dict[torch.device, Link]] = weakref.WeakKeyDictionary()


def link_of(group: Any, device: torch.device) -> Link:
    """This rank's link of a group for tensors of a device, made at its first use.

    Without a group, or in one of one rank, there is nobody to talk to: ``Alone`` (but within ``forced()``).
    """
    if type(group) is not _PLAIN and group is not None:
        group = _torch.within(group)
    if group is None or (_forced == 0 and group.size() == 1):
        return _alone.get(device) or _alone.setdefault(device, Alone(device))
    links = _links.get(group)
    if links is None:
        links = _links.setdefault(group, {})
    known = links.get(device)
    if known is None:
        known = links[device] = _new_link(group, device, links)
    return known


def _new_link(group: Any, device: torch.device, links: dict[torch.device, Link]) -> Link:
    if _torch.is_fake(group):
        return Pretended(group, device)
    if is_gloo(group, device) and group.size() <= LEVELS_LIMIT:
        # One link for all devices, so that a message from one and a message from another count as calls of one group.
        known = next((other for other in links.values() if isinstance(other, OneHop)), None)
        return known or OneHop(group, device, levels=group.size() > ONE_HOP_LIMIT)
    if not _torch.has_float64(device):
        return AllGatherOfPairs(group, device)
    if device.type == "cpu":
        return AllReduceOnHost(group, device)
    return (AllGatherOnDevice if _gathers(group) else AllReduceOnDevice)(group, device)


def _gathers(group: Any) -> bool:
    """Whether messages on a device are gathered. By what all ranks know alike, and by nothing of a message: ranks that
    are in different calls must still make the same collective.
    """
    try:
        return group.size() <= gather_limit() and on_one_node(group)
    except ValueError:  # which the link raises in an exchange
        return False


def must_synchronize(link: Link) -> bool:
    """Whether a layer takes the synchronized path: there are peers, or a test asks for it (``forced``)."""
    return link.size > 1 or _forced > 0


def synchronizes(group: Any) -> bool:
    """``must_synchronize`` of the link of a group, where none may be made: for a compiler, which cannot see them."""
    return _forced > 0 or (group is not None and group.size() > 1)


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Within it, layers take the synchronized path also on a group of one rank or without a group.

    For tests and benchmarks of that path on one rank; process-wide.
    """
    global _forced
    with _forced_lock:
        _forced += 1
    try:
        yield
    finally:
        with _forced_lock:
            _forced -= 1
