"""``python -m syncbn noise script.py:build``: the noise report of a user's own model, from one process."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from syncbn.diagnostics.measure import measure_noise
from syncbn.diagnostics.report import THRESHOLD

ABOUT = "say over how many ranks a model's batch norm needs to synchronize: from one process, before there is a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "build",
        metavar="SCRIPT.py:FUNCTION",
        help="a function without arguments that returns (model, batches) or (model, batches, forward), with the "
        "batches of one rank, as measure_noise takes them; module:function works as well",
    )
    parser.add_argument("--ranks", type=_count, nargs="+", metavar="K", help="group sizes (default: 1, 2, 4, ...)")
    parser.add_argument("--batches", type=_count, default=128, metavar="N", help="take at most so many (default: 128)")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"noise up to which a group will do (default: {THRESHOLD})"
    )
    parser.add_argument("--out", type=Path, default=Path("noise"), help="name of the CSV and the PNG (default: noise)")


def run(options: argparse.Namespace) -> int:
    """Measure, print the report, and write CSV and picture. Returns the exit code: 0, or 2 for nothing to measure.

    Errors of the user's own function, and of the model's forward, are raised as they are.
    """
    try:
        build = found(options.build)
    except (ImportError, AttributeError, ValueError) as error:
        return _stop(error)
    made = build()
    try:
        model, batches, *more = made
        if not isinstance(model, nn.Module) or len(more) > 1:
            raise TypeError
    except (TypeError, ValueError):
        return _stop(f"{options.build} must return (model, batches) or (model, batches, forward), not {_kind(made)}")
    try:
        report = measure_noise(
            model,
            batches,
            options.ranks,
            threshold=options.threshold,
            num_batches=options.batches,
            forward=more[0] if more else None,
        )
    except ValueError as error:
        if not _ours(error):
            raise
        return _stop(error)
    print(report)
    table, picture = options.out.with_suffix(".csv"), options.out.with_suffix(".png")
    table.parent.mkdir(parents=True, exist_ok=True)
    report.to_csv(table)
    try:
        report.plot(picture)
    except ImportError as error:
        print(f"wrote {table}; no picture: {error}")
    else:
        print(f"wrote {table} and {picture}")
    return 0


def found(name: str) -> Callable[[], Any]:
    """Return the function that ``path/script.py:function`` or ``package.module:function`` names.

    A script finds the modules beside it, as it does when it is run.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"{name!r} names no function: give SCRIPT.py:FUNCTION or MODULE:FUNCTION")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ImportError(f"there is no file {place}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    build = getattr(module, function, None)
    if not callable(build):
        raise AttributeError(f"{place} has no function {function!r}")
    return build


def _ours(error: BaseException) -> bool:
    """Whether the error comes from this package, and not from a user's function that it called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent)


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in made)}"
    return type(made).__name__


def _stop(reason: object) -> int:
    print(f"syncbn noise: error: {reason}", file=sys.stderr)
    return 2


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return number
