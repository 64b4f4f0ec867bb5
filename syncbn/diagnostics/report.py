"""What is found: rows, recommendations, and the report that holds them, as a table, as files, as a picture."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from syncbn.diagnostics.plot import draw

THRESHOLD = 0.2
"""Noise up to which a group is large enough, unless another is given. Where it comes from: docs/diagnostics.md."""

MIN_GROUPS = 4
"""Fewest groups from which a noise is reported: below, its standard error means nothing."""


@dataclasses.dataclass(frozen=True)
class NoiseRow:
    """The noise of one layer at one group size.

    Attributes:
        layer: qualified name; with ``[1]``, ``[2]``, ... for the second and further calls of a layer in one forward.
        channels: C.
        values: values per channel that a device has in a batch (N times positions), on average.
        group_size: k.
        groups: how many groups of k were measured.
        mean_noise, std_noise, noise: see the module; 1 is one standard deviation of the channel.
        mean_noise_error, std_noise_error, noise_error: their standard errors.
        sync_seconds: time of one exchange of this layer's 2C+1 float64 on its process group: median, slowest rank. A
            training step makes two. None without peers.
    """

    layer: str
    channels: int
    values: float
    group_size: int
    groups: int
    mean_noise: float
    mean_noise_error: float
    std_noise: float
    std_noise_error: float
    noise: float
    noise_error: float
    sync_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Over how many ranks a layer should synchronize.

    Attributes:
        layer: as in ``NoiseRow``.
        noise: at the smallest group size measured.
        smallest: that size: 1 unless others were asked for.
        group_size: smallest size whose noise is not above the threshold; None if statistics were not finite.
        measured: whether that size was measured, or extrapolated by ``noise ~ 1 / sqrt(k)`` from the largest that was.
    """

    layer: str
    noise: float
    smallest: int
    group_size: int | None
    measured: bool

    def __str__(self) -> str:
        alone = "per-device noise" if self.smallest == 1 else f"noise over {self.smallest}"
        if self.group_size is None:
            return f"{self.layer}: {alone} {self.noise:.2g}, statistics are not finite"
        if self.group_size == 1:
            return f"{self.layer}: {alone} {self.noise:.2g}, no need to synchronize"
        about = "at least" if self.measured else "about"
        source = "" if self.measured else " (extrapolated)"
        return f"{self.layer}: {alone} {self.noise:.2g}, synchronize over {about} {self.group_size}{source}"


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """Noise per layer and group size, equal on all ranks bit for bit. ``print`` it for a table.

    Attributes:
        rows: layers in the order in which they ran, group sizes ascending.
        threshold: noise up to which a group is large enough.
        world_size: W, the ranks that took part.
        batches: how many batches each rank measured.
        skipped: group sizes that were asked for and had fewer than ``MIN_GROUPS`` groups.
    """

    rows: tuple[NoiseRow, ...]
    threshold: float
    world_size: int
    batches: int
    skipped: tuple[int, ...] = ()

    @property
    def recommendations(self) -> list[Recommendation]:
        """One for each layer, in the order of ``rows``. Each prints as a sentence."""
        return [_recommend(rows, self.threshold) for rows in self._by_layer().values()]

    @property
    def group_size(self) -> int | None:
        """The smallest group size that serves all layers; None if some layer's statistics were not finite."""
        sizes = [each.group_size for each in self.recommendations]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    def to_csv(self, path: str | Path) -> None:
        """Write one line per row, with the names of ``NoiseRow``'s fields in the first."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(NoiseRow)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in self.rows)

    def to_json(self, path: str | Path) -> None:
        """Write everything as one object; numbers that are not finite as null."""
        content = dataclasses.asdict(self)
        content["group_size"] = self.group_size
        content["recommendations"] = [{**dataclasses.asdict(r), "text": str(r)} for r in self.recommendations]
        Path(path).write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw noise against group size, one line per layer with its standard error, and the threshold.

        Args:
            path: of the picture; the ending says which format (.png, .pdf, .svg).

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves = {
            layer: [(row.group_size, row.noise, row.noise_error) for row in rows]
            for layer, rows in self._by_layer().items()
        }
        draw(curves, self.threshold, f"Noise of batch statistics ({self._ranks}, {self.batches} batches each)", path)

    def __str__(self) -> str:
        sizes = sorted({row.group_size for row in self.rows})
        head = ["layer", "values", *(f"noise, k={k}" for k in sizes), "sync us", "group size"]
        lines = [head]
        for (layer, rows), advice in zip(self._by_layer().items(), self.recommendations, strict=True):
            at = {row.group_size: f"{row.noise:.3f} ± {row.noise_error:.3f}" for row in rows}
            seconds = rows[0].sync_seconds
            size = "?" if advice.group_size is None else f"{'' if advice.measured else 'about '}{advice.group_size}"
            cost = "-" if seconds is None else f"{1e6 * seconds:.0f}"
            lines.append([layer, f"{rows[0].values:g}", *(at.get(k, "-") for k in sizes), cost, size])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        text += f"\n{self.batches} batches on {self._ranks}; threshold {self.threshold:g}. {self._verdict()}"
        if self.skipped:
            listed = ", ".join(map(str, self.skipped))
            text += f"\nNot measured: group size {listed} (each takes {MIN_GROUPS} groups; give more batches)."
        return text

    def _verdict(self) -> str:
        size = self.group_size
        if size is None:
            return "Some statistics are not finite."
        if size == 1:
            return "No layer needs synchronization."
        worst = max(self.recommendations, key=lambda advice: advice.group_size or 0)
        few = f"; this job has {self.world_size} ranks" if 1 < self.world_size < size else ""
        return f"Synchronize over {size} ranks or more, as {worst.layer} asks for{few}."

    @property
    def _ranks(self) -> str:
        return f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")

    def _by_layer(self) -> dict[str, list[NoiseRow]]:
        layers: dict[str, list[NoiseRow]] = {}
        for row in self.rows:
            layers.setdefault(row.layer, []).append(row)
        return layers


def _recommend(rows: list[NoiseRow], threshold: float) -> Recommendation:
    first, last = rows[0], rows[-1]
    advise = functools.partial(Recommendation, first.layer, first.noise, first.group_size)
    if not all(math.isfinite(row.noise) for row in rows):
        return advise(None, True)
    for row in rows:
        if row.noise <= threshold:
            return advise(row.group_size, True)
    needed = last.group_size * (last.noise / threshold) ** 2
    return advise(2 ** math.ceil(math.log2(needed)), False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
