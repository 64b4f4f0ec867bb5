"""Runs torchrun: a job on one host listens on one interface, and a job that fails, or that Ctrl-C ends (code 130), ends
with one line about it.

Started by ``syncbn.launch``, by path ::

    python _agent.py [options of torchrun] script.py arguments
    python _agent.py --rdzv-backend one_host --local-addr 127.0.0.1 [options of torchrun] script.py arguments

torchrun's own ways to meet listen on all interfaces, twice: for the agents of several hosts, and for the ranks' store.
On one host there is one agent, so there is nobody to meet, and torch's store takes a socket that is bound already.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

if not sys.flags.safe_path:
    sys.path[0] = os.getcwd()  # as with -m, and not the folder of this file, whose modules are not for import by name

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a job that Ctrl-C ended, as shells have it."""


class OneHost(RendezvousHandler):
    """The rendezvous of an agent that has no others: complete at once, with a store on one interface."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._address = parameters.local_addr or "127.0.0.1"
        self._store = store_at(self._address)
        self._rounds = 0

    def get_backend(self) -> str:
        return "one_host"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        own = PrefixStore(f"agent_{self._rounds}", self._store)  # what the agent itself keeps, apart for each attempt
        self._rounds += 1
        return RendezvousInfo(own, 0, 1, RendezvousStoreInfo(self._address, self._store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else would come."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def store_at(address: str) -> TCPStore:
    """A store that listens on the interface of an address of this host, at a port that the system chooses."""
    family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.bind(place)
    port: int = listener.getsockname()[1]
    # The store owns the socket from here on, and closes it.
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def main() -> None:
    """Run torchrun.

    Raises:
        SystemExit: as torchrun does; code 1 after a rank has failed, 130 after Ctrl-C.
    """
    rendezvous_handler_registry.register("one_host", OneHost)
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(_is_news)
    try:
        run.main()
    except ChildFailedError as error:
        print(_failure(error), file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except BaseException as error:
        # torchrun's handlers raise an exception of its own, by then perhaps in the course of another.
        if not isinstance(error, KeyboardInterrupt) and getattr(error, "sigval", None) != signal.SIGINT:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("syncbn-launch: interrupted; all ranks have ended", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def _failure(error: ChildFailedError) -> str:
    """Which rank failed first, and how. Of a script with torch's ``@record``: its own report, with a traceback."""
    rank, first = error.get_first_failure()
    if first.error_file != "<N/A>":
        return str(error)
    how = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with code {first.exitcode}"
    others = len(error.failures) - 1
    they = f"; it was the first of {others + 1}" if others else ""
    return (
        f"syncbn-launch: rank {rank} (process {first.pid} on {socket.gethostname()}) {how}{they}. What it said is above"
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun says what nobody else does.

    How it ends the other ranks is none; that a rank has failed is one where the ranks start again.
    """
    text = record.getMessage()
    if "SIGINT" in text or f"Received {int(signal.SIGINT)} death signal" in text:
        return False
    if text.startswith("Sending process") and text.endswith("SIGTERM"):
        return False
    restarts = "PET_MAX_RESTARTS" in os.environ or any("max-restarts" in _dashes(word) for word in sys.argv)
    return restarts or not text.startswith("failed (exitcode")


def _dashes(word: str) -> str:
    return word.replace("_", "-")


if __name__ == "__main__":
    main()
