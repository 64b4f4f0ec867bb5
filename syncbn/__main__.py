"""The command line: ``python -m syncbn doctor``, ``launch`` and ``version``."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Sequence

import torch

from syncbn import _doctor, launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments of the command line, those of this process by default.

    Returns:
        The exit code: 0, or 1 if the doctor found something that does not work. ``launch`` does not return.

    Raises:
        SystemExit: code 2 for wrong arguments, 0 after a help text.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["launch"]:  # before argparse, as most of what follows is for others
        launch.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor.run(options)
    if options.command == "version":
        print(_version())
    else:
        parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m syncbn",
        description="Synchronized batch normalization: what needs no script.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    text = "say what is installed here, and try whether ranks on this host train exactly"
    doctor = commands.add_parser(
        "doctor",
        help=text,
        description=f"{text.capitalize()}: two processes over gloo, also over MPI and NCCL where they are here, "
        "compared with one process that has the whole batch. Exit code 0: all of it works; 1: something does not.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="for all (default: 120)")
    doctor.add_argument(
        "--mpi",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="insist on MPI, or leave it out (default: tried where mpi4py and an mpiexec are installed)",
    )
    doctor.add_argument("--verbose", action="store_true", help="print what the processes of a part that failed wrote")
    commands.add_parser("launch", help="start one process per rank; syncbn-launch (launch --help for more)")
    commands.add_parser("version", help="print the version")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return seconds


def _version() -> str:
    return f"syncbn {_doctor.versions()['syncbn']}, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
