"""The command line: ``syncbn launch``, ``doctor``, ``noise``, ``recipes``, ``version``; also ``python -m syncbn``."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from syncbn import _recipes, _version, launch
from syncbn._doctor import examination
from syncbn.diagnostics import command as noise

_VARIABLES = """environment variables:
  SYNCBN_CHECKS=on|off|sync    whether ranks compare what they are about to exchange (default: on)
  SYNCBN_SOCKETS=on|off        Unix sockets between the ranks of a host (default: on)
  SYNCBN_GATHER=RANKS          on GPUs, gather the messages of up to so many ranks of one node; 0: add them up (default)
  SYNCBN_KERNELS=native|aten   compiled loops on CPUs, or PyTorch's operators (default: native, where built)
  SYNCBN_PIN=CORES             pin ranks where there are so many cores for each; 0: never (see launch --help)

Give all ranks of a job the same values. `syncbn launch --help` has those of the launcher."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments of the command line, those of this process by default.

    Returns:
        The exit code: 0; 1 if the doctor found something that does not work, 2 if there is nothing to measure, or there
        are no recipes or their folder exists. ``launch`` does not return.

    Raises:
        SystemExit: code 2 for wrong arguments, 0 after a help text.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["launch"]:  # before argparse, as most of what follows is for others
        launch.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return examination.run(options)
    if options.command == "noise":
        return noise.run(options)
    if options.command == "recipes":
        return _show_recipes(options.folder)
    if options.command == "version":
        print(_versions())
    else:
        parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="syncbn",
        description="Synchronized batch normalization: start ranks, and find out what works here.",
        epilog=_VARIABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    text = "say what is installed here, and try whether ranks on this host train exactly"
    doctor = commands.add_parser(
        "doctor",
        help=text,
        description=f"{text.capitalize()}: two processes over gloo, also over MPI and NCCL where they are here, "
        "compared with one process that has the whole batch. A report of an error needs all that it prints. Exit code "
        "0: all of it works; 1: something does not.",
        epilog=_VARIABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    commands.add_parser("launch", help="start one process per rank, as syncbn-launch does (launch --help for more)")
    about = f"{noise.ABOUT.capitalize()}. Exit code 0: measured; 2: there is nothing to measure."
    noise.add_arguments(commands.add_parser("noise", help=noise.ABOUT, description=about, allow_abbrev=False))
    text = "say where the recipes for torchrun, MPI, Slurm and Kubernetes are, or copy them"
    recipes = commands.add_parser("recipes", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    recipes.add_argument("folder", nargs="?", type=Path, help="a new folder, to which they are copied")
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


def _show_recipes(target: Path | None) -> int:
    try:
        if target is not None:
            _recipes.copy(target)
        print(target or _recipes.folder())
    except OSError as error:
        print(f"syncbn recipes: error: {error}", file=sys.stderr)
        return 2
    return 0


def _versions() -> str:
    return f"syncbn {_version.version()}, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
