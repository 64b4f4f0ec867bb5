"""What the experiments share: one `main` for all of them, and around it progress, tables and CSV.

Not a script: the experiments beside it import it.
"""

import argparse
import csv
import dataclasses
import gc
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pictures
import torch
import torch.distributed as dist
from tqdm import tqdm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

OPTIONS = {
    "samples": "samples per device",
    "seeds": "number of seeds",
    "epochs": "passes over the training set",
    "lr": "peak rate at a total batch of 32",
}

JOURNAL = "unfinished.jsonl"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment sweeps, measures and reports: all that `main` asks for.

    Attributes:
        about: what it is, in a line.
        options: by name, the value of the short form and that of the full one, and what it means (for those of
            `OPTIONS` this may be left out). A list takes several values.
        tables: by the names of the CSVs, the dataclasses of which each row of them is one.
        cases: what it sweeps, from the options: of each case a tuple of strings and numbers.
        measure: called with the options and a case, on all ranks; returns rows, which count on rank 0.
        draw: draws into the folder of the results what is in its CSVs.
        report: called on rank 0 with the options and the rows of each table; prints what was found, and returns the
            exit code.
        ranks: how many it is meant for.
        engine: of the launcher that it is meant for, if not the launcher's own.
        least_samples: fewest samples per device that it can do with.
    """

    about: str
    options: Mapping[str, tuple[Any, ...]]
    tables: Mapping[str, type]
    cases: Callable[[argparse.Namespace], Iterable[tuple[Any, ...]]]
    measure: Callable[..., Iterable[Any]]
    draw: Callable[[Path], None]
    report: Callable[[argparse.Namespace, dict[str, list[Any]]], int | None]
    ranks: int = 4
    engine: str = ""
    least_samples: int = 2


def main(experiment: Experiment) -> None:
    """Run the experiment on the ranks that the launcher started, with one thread each; rank 0 reports.

    It takes minutes, or with ``--full`` more of them. What a case gave is kept at once, in a journal in the folder of
    the results: started again with the same options, an interrupted experiment goes on with the next case. At the end
    the journal is removed, and ``run.json`` says which command has taken how long on how many ranks, and how many
    seconds of a processor: how long it takes on a machine that is busy with other things says little.
    """
    args = parse(command_line(experiment), experiment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    journal = Journal(args.out / JOURNAL, described(args), experiment.tables)
    done = [journal.begin() if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(done)
    cases = [tuple(case) for case in experiment.cases(args)]
    for number, case in enumerate(cases, 1):
        if list(case) in done[0]:
            continue
        start, busy = time.monotonic(), time.process_time()
        if dist.get_rank() == 0 and len(cases) > 1:
            print(f"{number} of {len(cases)}:", *case, file=sys.stderr, flush=True)
        rows = list(experiment.measure(args, case))
        cores = torch.tensor(time.process_time() - busy, dtype=torch.float64)
        dist.all_reduce(cores)
        if dist.get_rank() == 0:
            journal.add(case, time.monotonic() - start, cores.item(), rows)
    code = None
    if dist.get_rank() == 0:
        tables, seconds, processor = journal.read()
        for name, rows in tables.items():
            write_csv(rows, args.out / f"{name}.csv")
        experiment.draw(args.out)
        world = dist.get_world_size()
        how = {"command": command(experiment), "ranks": world, "torch": torch.__version__}
        how |= {"seconds": round(seconds), "processor_seconds": round(processor)}
        (args.out / "run.json").write_text(json.dumps(how, indent=2) + "\n")
        journal.path.unlink()
        print(f"{seconds:.0f} s on {world} ranks; wrote CSV and PNG to {args.out}")
        code = experiment.report(args, tables)
    gc.collect()  # nothing may hold on to the group when it goes
    dist.destroy_process_group()
    sys.exit(code)


def command_line(experiment: Experiment) -> argparse.ArgumentParser:
    """Return the parser of an experiment's options, whose defaults are those of the short form."""
    parser = argparse.ArgumentParser(description=experiment.about)
    for name, (short, _, *meaning) in experiment.options.items():
        shown = " ".join(map(str, short)) if isinstance(short, list) else short
        (text,) = meaning or [OPTIONS[name]]
        several: dict[str, Any] = {"nargs": "+"} if isinstance(short, list) else {}
        kind = type(short[0] if isinstance(short, list) else short)
        parser.add_argument(f"--{name}", type=kind, help=f"{text} ({shown})", **several)
    full = ", ".join(
        f"{name} {' '.join(map(str, more)) if isinstance(more, list) else more}"
        for name, (short, more, *_) in experiment.options.items()
        if more != short
    )
    folder = Path(parser.prog).stem
    parser.add_argument("--full", action="store_true", help=f"the full form: {full or 'the same'}")
    parser.add_argument(
        "--out", type=Path, help=f"folder for CSV and PNG (out/{folder}; with --full examples/results/{folder})"
    )
    return parser


def parse(parser: argparse.ArgumentParser, experiment: Experiment) -> argparse.Namespace:
    """Return the options of the command line; stop with a hint where no launcher has started this process."""
    args = parser.parse_args()
    for name, (short, full, *_) in experiment.options.items():
        if getattr(args, name) is None:
            setattr(args, name, full if args.full else short)
    if args.out is None:
        folder = Path(parser.prog).stem
        args.out = Path(__file__).parent / "results" / folder if args.full else Path("out") / folder
    if "RANK" not in os.environ:
        start = " ".join(launcher(experiment, experiment.ranks))
        parser.error(f"start the ranks with: {start} examples/{parser.prog}")
    samples = getattr(args, "samples", experiment.least_samples)
    least = min(samples) if isinstance(samples, list) else samples
    if least < experiment.least_samples:
        parser.error(f"--samples {least}: local statistics need at least {experiment.least_samples} samples per device")
    return args


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return what two runs must have in common for one to go on with what the other has measured."""
    options = {name: value for name, value in vars(args).items() if name not in ("out", "full")}
    return {"options": options, "ranks": dist.get_world_size()}


def launcher(experiment: Experiment, ranks: int) -> list[str]:
    """Return the words that start so many ranks."""
    engine = ["--engine", experiment.engine] if experiment.engine else []
    return ["python", "-m", "syncbn.launch", *engine, "-n", str(ranks)]


def command(experiment: Experiment) -> str:
    """Return the command that started this."""
    program = Path(sys.argv[0])
    words = [f"{program.parent.name}/{program.name}", *sys.argv[1:]]
    return shlex.join([*launcher(experiment, dist.get_world_size()), *words])


class Journal:
    """The cases that an unfinished experiment has measured: a file with a line for each.

    Args:
        path: of the file.
        what: the options and the number of ranks.
        tables: the dataclasses of rows, by the names of their tables.
    """

    def __init__(self, path: Path, what: dict[str, Any], tables: Mapping[str, type]) -> None:
        self.path, self.what, self.tables = path, what, tables

    def begin(self) -> list[list[Any]]:
        """Return the cases that are there already; begin a new journal if there are none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.write_text(json.dumps(self.what) + "\n")
        what, *lines = self._lines()
        if what != json.loads(json.dumps(self.what)):
            sys.exit(f"{self.path} is of a run with other options, {what}: go on with those, or remove it")
        return [line["case"] for line in lines]

    def add(self, case: tuple[Any, ...], seconds: float, processor: float, rows: list[Any]) -> None:
        """Write down what a case gave, in one line, so that an interruption leaves all of it or nothing."""
        name = {kind: table for table, kind in self.tables.items()}
        found = [[name[type(row)], dataclasses.asdict(row)] for row in rows]
        with self.path.open("a") as file:
            line = {"case": case, "seconds": seconds, "processor_seconds": processor, "rows": found}
            file.write(json.dumps(line) + "\n")

    def read(self) -> tuple[dict[str, list[Any]], float, float]:
        """Return the rows of each table, and the seconds and processor seconds that all cases took together."""
        tables: dict[str, list[Any]] = {name: [] for name in self.tables}
        _, *lines = self._lines()
        for line in lines:
            for name, row in line["rows"]:
                tables[name].append(self.tables[name](**row))
        seconds, processor = (sum(line[name] for line in lines) for name in ("seconds", "processor_seconds"))
        return tables, seconds, processor

    def _lines(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]


def progress(steps: int) -> Any:
    """Return a progress bar on rank 0 for so many steps."""
    # Without a terminal a bar that is redrawn ten times a second would fill a log file.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, unit="step", disable=dist.get_rank() != 0, mininterval=pace)


@dataclasses.dataclass(frozen=True)
class Number:
    """One line of a table of single numbers."""

    name: str
    value: float


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, in a line of a CSV: its normalization, and what else it may be swept over."""

    norm: str
    samples_per_device: int
    ranks: int
    seed: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class Classified(Trained):
    """A network that classifies: `test_accuracy` in percent, `train_loss` in nats, mean over last epoch and ranks."""

    test_accuracy: float
    train_loss: float


@dataclasses.dataclass(frozen=True)
class Reached:
    """A network that classifies, and how soon: `test_accuracy` is in percent, at the end.

    `epochs_needed`: after so many the test accuracy was first `training.GOAL` or more; infinite if it never was.
    """

    norm: str
    seed: int
    epochs: int
    test_accuracy: float
    epochs_needed: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the curve of a loss: the mean train loss of an epoch, in nats."""

    norm: str
    samples_per_device: int
    seed: int
    epoch: int
    train_loss: float


def classified(
    args: argparse.Namespace, samples: int, norm: str, accuracies: Sequence[float], losses: Sequence[Sequence[float]]
) -> list[Classified]:
    """Return a line for each seed of stacked networks, from their accuracies and their losses by epoch."""
    return [
        Classified(norm, samples, dist.get_world_size(), seed, args.epochs, accuracy, loss)
        for seed, (accuracy, loss) in enumerate(zip(accuracies, losses[-1], strict=True))
    ]


def points(norm: str, samples: int, losses: Sequence[Sequence[float]]) -> list[Point]:
    """Return the points of the curves of stacked networks, from their losses by epoch and seed."""
    return [
        Point(norm, samples, seed, epoch, loss)
        for epoch, by_seed in enumerate(losses, 1)
        for seed, loss in enumerate(by_seed)
    ]


def each_size(args: argparse.Namespace) -> list[tuple[int]]:
    """Return the cases of a sweep over samples per device, with all seeds side by side."""
    return [(samples,) for samples in args.samples]


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for one value, or where one is infinite)."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return sum(values), 0.0
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
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f} ± {std:.{digits}f}" if std else f"{mean:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def draw_by_samples(results: Sequence[Any], norms: Iterable[str], data: str, path: Path) -> None:
    """Draw test accuracy and train loss of each norm against samples per device, with error bars over seeds."""
    first, samples = results[0], sorted({result.samples_per_device for result in results})
    panels = [("test_accuracy", "test accuracy (%)"), ("train_loss", "train loss, last epoch (nats)")]
    with pictures.figure(path, f"{data}, {first.ranks} ranks, {first.epochs} epochs: {spread(results)}") as axes:
        for axis, (field, label) in zip(axes, panels, strict=True):
            for norm in norms:
                means, stds = curves(results, field, "samples_per_device", samples, norm=norm)
                axis.errorbar(samples, means, stds, **pictures.look(norm))
            pictures.powers_of_two(axis, samples, "samples per device")
            axis.set_ylabel(label)
        axes[1].set_yscale("log")
        pictures.legend_below(axes)


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
