"""What the experiments share around their measurements: command line, ranks, progress, tables and CSV.

Not a script: the experiments beside it import it.
"""

import argparse
import csv
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Found = TypeVar("Found")
Row = TypeVar("Row", bound="DataclassInstance")

OPTIONS = {
    "samples": "samples per device",
    "seeds": "number of seeds",
    "epochs": "passes over the training set",
    "lr": "peak rate at a total batch of 32",
}


def options(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a command line with those of `OPTIONS` that have a default here; one with a list takes several values."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        add_option(parser, name, default, OPTIONS[name])
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, default: Any, meaning: str) -> None:
    """Add an option whose type is that of its default, which its help shows."""
    if isinstance(default, list):
        shown = " ".join(map(str, default))
        parser.add_argument(f"--{name}", type=type(default[0]), nargs="+", default=default, help=f"{meaning} ({shown})")
    else:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} ({default})")


def parse(
    parser: argparse.ArgumentParser, in_full: str = "", full: Mapping[str, Any] | None = None, least_samples: int = 2
) -> argparse.Namespace:
    """Return the options of the command line; stop with a hint where no launcher has started this process.

    Adds ``--out``, and ``--full``, for which `full` has the options' values and `in_full` the help.
    """
    if full is not None:
        parser.add_argument("--full", action="store_true", help=in_full)
    parser.add_argument("--out", type=Path, help="folder for CSV and PNG", default=Path("out") / Path(parser.prog).stem)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start the ranks with: python -m syncbn.launch -n 4 examples/{parser.prog}")
    if full is not None and args.full:
        vars(args).update(full)
    samples = getattr(args, "samples", least_samples)
    least = min(samples) if isinstance(samples, list) else samples
    if least < least_samples:
        parser.error(f"--samples {least}: local statistics need at least {least_samples} samples per device")
    return args


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Found],
    report: Callable[[argparse.Namespace, Found], None],
) -> Found:
    """Measure on the ranks that the launcher started, with one thread each; rank 0 reports, and says how long it took.

    Returns what this rank measured.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    found = measure(args)
    if dist.get_rank() == 0:
        report(args, found)
        print(f"{time.monotonic() - start:.0f} s on {dist.get_world_size()} ranks; wrote CSV and PNG to {args.out}")
    dist.destroy_process_group()
    return found


def progress(steps: int) -> Any:
    """Return a progress bar on rank 0 for so many steps."""
    # Without a terminal a bar that is redrawn ten times a second would fill a log file.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, unit="step", disable=dist.get_rank() != 0, mininterval=pace)


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for one value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(results: Iterable[Any], field: str, **same: object) -> tuple[float, float]:
    """Return mean and standard deviation of one column over the results whose other columns have these values."""
    return mean_and_std(
        getattr(result, field)
        for result in results
        if all(getattr(result, name) == value for name, value in same.items())
    )


def curves(
    results: Iterable[Any], field: str, along: str, values: Sequence[Any], **same: object
) -> tuple[list[float], list[float]]:
    """Return the means and the standard deviations over seeds of one column, for each value of the column `along`."""
    results = list(results)
    pairs = [over_seeds(results, field, **{along: value}, **same) for value in values]
    return [mean for mean, _ in pairs], [std for _, std in pairs]


def spread(results: Iterable[Any]) -> str:
    """Say what error bars show, for a title."""
    seeds = len({result.seed for result in results})
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def cell(pair: tuple[float, float], digits: int) -> str:
    """Return mean and standard deviation as a table shows them."""
    mean, std = pair
    return f"{mean:.{digits}f} ± {std:.{digits}f}" if std else f"{mean:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def accuracy_and_loss(results: Sequence[Any], labels: Mapping[str, str], samples: Iterable[int]) -> str:
    """Return the table of test accuracy and train loss by samples per device, for each of the normalizations."""
    columns = [("test_accuracy", "test %", 1), ("train_loss", "loss", 4)]
    return markdown(
        ["samples per device", *(f"{label} {what}" for _, what, _ in columns for label in labels.values())],
        [
            [
                count,
                *(
                    cell(over_seeds(results, field, norm=norm, samples_per_device=count), digits)
                    for field, _, digits in columns
                    for norm in labels
                ),
            ]
            for count in samples
        ],
    )


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write one line for each of `rows`, which are dataclasses of one type; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read_csv(path: Path, row: type[Row]) -> list[Row]:
    """Return the lines of a file of `write_csv`, as dataclasses with columns of str, int, float, bool."""
    read: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": "True".__eq__}
    kinds = {field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(row)}
    with path.open(newline="") as file:
        return [row(**{name: read[kinds[name]](text) for name, text in line.items()}) for line in csv.DictReader(file)]
