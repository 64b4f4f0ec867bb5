"""What this rank keeps of a process group: a link makes exchanges, counts them, and dies with the group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from syncbn.comm import handshake
from syncbn.errors import PeerLostError
from syncbn.groups import group_ranks
from syncbn.messages import Message, Shared, fill
from syncbn.wire import Call


def checks() -> str:
    """``SYNCBN_CHECKS`` in the environment: ``on`` (default), ``off`` (headers still travel, only refusals are heard;
    ranks may differ), ``sync`` (as on, and wait for a device to check in the same call).

    Raises:
        ValueError: anything else.
    """
    value = os.environ.get("SYNCBN_CHECKS", "").lower() or "on"
    if value not in ("on", "off", "sync"):
        raise ValueError(f"the environment variable SYNCBN_CHECKS must be on, off or sync, got {value!r}")
    return value


def gather_limit() -> int:
    """``SYNCBN_GATHER`` in the environment: how many ranks of one node share by an all-gather at most; 0 by default.

    Raises:
        ValueError: no whole number.
    """
    value = os.environ.get("SYNCBN_GATHER", "").strip() or "0"
    if not value.isdecimal():
        raise ValueError(f"the environment variable SYNCBN_GATHER must be a number of ranks, 0 or more, got {value!r}")
    return int(value)


class Link:
    """One rank's end of a process group.

    Attributes:
        rank, size: in the group.
        raw: whether moments travel as sums, which add up, and not as triples, which merge; see ``messages.Message``.
        direct: whether messages live where the tensors do, so that kernels fill them in and read them whole.
        device: where messages live; payloads may come from another.
        exchanges: how many were made so far; the number of the next one.
        broke_off: whether the last exchange ended in a refusal or a mismatch, of which every rank knows then.
    """

    raw = False
    direct = False

    def __init__(self, group: Any, device: torch.device) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.device = device
        self.broke_off = False
        self._ranks = group_ranks(group)
        self.exchanges = 0
        self._dead: str | None = None
        self._mistake = ""
        try:
            self._checks = checks()
            handshake.chosen()
            gather_limit()
        except ValueError as error:  # raised in an exchange, where peers hear of it
            self._checks, self._mistake = "on", str(error)
        self._warned: set[str] = set()

    def way(self) -> str:
        """How messages travel, in words; known from the first exchange on."""
        raise NotImplementedError

    def message(self, width: int, call: Call) -> Message:
        """Room for a payload of ``width`` float64, for the next exchange on this link.

        Raises:
            ValueError: ``SYNCBN_CHECKS``, ``SYNCBN_SOCKETS`` or ``SYNCBN_GATHER`` had no such value when the link was
                made.
                Peers raise RankMismatchError.
            PeerLostError: the group cannot be used any more.
        """
        raise NotImplementedError

    def share(self, message: Message, call: Call) -> Shared:
        """Give this rank's message to all ranks of the group, and get theirs.

        Args:
            message: from ``message``, filled in; equal in width on all ranks.
            call: what this exchange is for; must be the same on all ranks.

        Returns:
            The payloads of all ranks, or their sum. Valid until the next exchange on this link.

        Raises:
            RankMismatchError: on every rank, if the ranks' calls differ.
            PeerLostError: a rank did not take part.

        Collectives:
            One exchange with every peer, or one all-reduce.
        """
        raise NotImplementedError

    def refuse(self, call: Call, reason: str, width: int) -> None:
        """Take part in an exchange that this rank cannot make, so that no peer waits for it.

        Its peers raise RankMismatchError with ``reason``; the caller is to raise its own error after this returns.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Wait for the checks of all exchanges so far, and raise what they find. For a CPU they are done already."""

    def sum(self, payload: Tensor, call: Call) -> Tensor:
        """The sum of ``payload`` over all ranks: a new tensor beside it, equal in bits on all ranks."""
        message = self.message(payload.numel(), call)
        fill(message, payload)
        return self.share(message, call).sum().to(payload.device, copy=True)

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        """The ``payload`` of every rank in rank order, on the CPU.

        Where only sums are seen, a message is W times as wide.
        """
        raise NotImplementedError

    def warn_broken(self, shared: Shared | None, layer: str) -> None:
        """Warn, once per layer, that statistics are not finite, and name the ranks that brought them."""
        if layer not in self._warned:
            self._warned.add(layer)
            warnings.warn(
                f"batch statistics of {f'layer {layer!r}' if layer else 'a layer without a name'} are not finite; they "
                f"came from {self._broken_ranks(shared)}. The output is not finite either; running statistics keep "
                "their last finite values. (Said once per layer.)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _broken_ranks(self, shared: Shared | None) -> str:
        """Which ranks brought a payload that is not finite to the last exchange."""
        raise NotImplementedError

    def _check_alive(self, call: Call, width: int) -> None:
        if self._dead is not None:
            raise PeerLostError(
                f"{call.describe(width, self.exchanges)}: this process group cannot be used any more: {self._dead}"
            )

    def _check_ready(self, call: Call, width: int) -> None:
        """``_check_alive``; and refuse the call, with all peers, if this rank's settings are wrong."""
        self._check_alive(call, width)
        if self._mistake:
            self.refuse(call, f"ValueError: {self._mistake}", width)
            raise ValueError(self._mistake)

    def _lost(self, reason: str, call: Call, width: int, waited: float, missing: Sequence[int]) -> NoReturn:
        who = ""
        if missing:
            ranks = ", ".join(self._name_rank(rank) for rank in missing)
            who = f" Not arrived: rank {ranks}."
        self._dead = f"it lost a peer in {call.describe(width, self.exchanges)}"
        raise PeerLostError(
            f"{call.describe(width, self.exchanges)}: lost a peer after {waited:.1f} s.{who} This is rank "
            f"{self._name_rank(self.rank)} of a group of {self.size} (global ranks {self._ranks}). "
            f"The process group cannot be used again: end this process, or restart the job. What is known: {reason}"
        )

    def _interrupted(self, error: BaseException, call: Call, width: int) -> None:
        """An exchange was left in the middle: the next one would be taken for this one by the peers."""
        self._dead = f"{type(error).__name__} interrupted it in {call.describe(width, self.exchanges)}"

    def _name_rank(self, rank: int) -> str:
        return str(rank) if self._ranks[rank] == rank else f"{rank} (global {self._ranks[rank]})"


class Alone(Link):
    """The link of a rank without peers: what it sends, it gets."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device
        self.exchanges = 0
        self.broke_off = False
        self.raw = self.direct = device.type != "cpu"  # as the kernels of a device want it

    def way(self) -> str:
        return "no message: there are no peers"

    def message(self, width: int, call: Call) -> Message:
        payload = torch.empty(width, dtype=torch.float64, device=self.device)
        return Message(payload, payload, self.raw)

    def share(self, message: Message, call: Call) -> Shared:
        return Shared(message.payload.unsqueeze(0), message.raw)

    def refuse(self, call: Call, reason: str, width: int) -> None:
        """Nobody waits."""

    def sum(self, payload: Tensor, call: Call) -> Tensor:
        return payload.clone()

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        return [payload.to("cpu")]

    def warn_broken(self, shared: Shared | None, layer: str) -> None:
        """One rank sees for itself."""


class Pretended(Alone):
    """The link of a group whose collectives do nothing: for estimates of a step, whose values mean nothing."""

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.size = group.rank(), group.size()

    def gather(self, payload: Tensor, call: Call) -> list[Tensor]:
        return super().gather(payload, call) * self.size
