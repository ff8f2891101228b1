"""Records of runs, read back: needs neither torch nor Lightning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.runs.record_lines import ROBUSTNESS as ROBUSTNESS
from lightning_normgeo.runs.record_lines import whole_lines
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, shown
from lightning_normgeo.utilities.contained_files import MEBIBYTE, contained_file
from lightning_normgeo.utilities.notebook import Table, curves_frame, shortened, summary

RECORD_NAME, STUDY_NAME = "record.jsonl", "study.json"
_LARGEST = 8192 * MEBIBYTE
GRADIENTS = "gradients"
"""Those that monitors measured, where a metric has a key."""
FINISHED_NAME = "run"
"""The results that a run writes last, after its tests."""


class NotFinite(NamedTuple):
    """From when on a quantity is not finite: its key, and the step of the first such value."""

    key: str
    step: int

    def __str__(self) -> str:
        """In words."""
        verb = "are" if self.key == GRADIENTS else "is"
        return f"diverged: {self.key} {verb} not finite from step {self.step} on"


def evaluation_stem(name: str | None) -> str:
    """Return what the results, files and tables of a robustness evaluation begin with."""
    return f"{ROBUSTNESS}_{name}" if name else ROBUSTNESS


@dataclass
class Record:
    """A record read back.

    Attributes:
        folder: the run's folder.
        metrics: for each key its (step, value) pairs in the order they were logged.
        layers: for each quantity its (step, values by layer) pairs.
        settings: everything passed to ``log_hyperparams``, later calls over earlier ones.
        environment: versions and hardware, of the last process that wrote.
        results: by name.
        images: for each key the files and captions logged last.
        observations: for each training what its monitors have measured, in a sentence, and what they left out.
        lost: how many lines were not written while the disk was full.
        complete: whether the last line says that the run ended, and not by an error or a signal.
        begun: when the first line was written, in seconds since 1970.
        ended: when the last one was.
    """

    folder: Path
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    layers: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    images: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    observations: list[dict[str, Any]] = field(default_factory=list)
    lost: int = 0
    complete: bool = False
    begun: float = 0.0
    ended: float = 0.0

    def __repr__(self) -> str:
        steps = [points[-1][0] for points in self.metrics.values()] + [points[-1][0] for points in self.layers.values()]
        since = self.diverged
        status = f"diverged at step {since.step}" if since else "complete" if self.complete else "not complete"
        results = [f"{len(self.results)} results"] if self.results else []
        counts = [f"to step {max(steps)}" if steps else "no steps", f"{len(self.metrics)} metrics", *results]
        return summary("Record", [shortened(str(self.folder)), *counts, status])

    def _repr_html_(self) -> str:
        columns = ("metric", "points", "first step", "last step", "last value")
        rows = [(key, len(curve), curve[0][0], *curve[-1]) for key, curve in self.metrics.items()]
        layers = [f"values by layer, as to_frame({name!r}): {', '.join(self.layers)}" for name in [*self.layers][:1]]
        results = [f"results: {', '.join(self.results)}"] if self.results else []
        return Table(repr(self), columns, rows, layers + results).to_html()

    def to_frame(self, quantity: str | None = None) -> Any:
        """Return curves as a data frame of pandas: a row for each step, NaN where nothing was logged at it.

        Args:
            quantity: one with values by layer, as ``norm_growth/weight_norm``, for a column for each layer; a metric,
                or a glob as ``robustness/*/accuracy``, for a column for each that matches. Default: all metrics, also
                those that have layers.

        Raises:
            UnknownNameError: a KeyError and a ConfigurationError, for a quantity that was not recorded.
            ConfigurationError: where pandas is not installed.

        Example:
            >>> read_record("runs/mine").to_frame("norm_growth/weight_norm").plot(logy=True)
        """
        if isinstance(quantity, str) and quantity in self.layers:
            return curves_frame(_by_layer(self.layers[quantity]), "layer")
        pattern = "*" if quantity is None else str(quantity)
        found = {key: curve for key, curve in self.metrics.items() if fnmatchcase(key, pattern)}
        if quantity is not None and not found:
            known = nearest(quantity, [*self.layers, *(key for key in self.metrics if key not in self.layers)])
            raise UnknownNameError(f"{quantity!r} was not recorded in {self.folder}; {known}.")
        return curves_frame(found, "metric")

    @property
    def diverged(self) -> NotFinite | None:
        """Since when the losses of a run are not finite, which they were no more until its end; None if they are.

        What counts are metrics with ``loss`` in the last part of their key, and the gradients of the steps that
        monitors measured. A loss that is finite later than that, as of a training in half precision that skips a step
        or of a batch without a label, refutes it.
        """
        losses = {key: points for key, points in self.metrics.items() if "loss" in key.rpartition("/")[2].lower()}
        finite = [step for points in losses.values() for step, value in points if math.isfinite(value)]
        found = [NotFinite(key, since) for key, points in losses.items() if (since := _since(points)) is not None]
        if self.observations:
            step = self.observations[-1].get("not_finite_since")
            found += [NotFinite(GRADIENTS, step)] if isinstance(step, int) else []
        found = [one for one in found if one.step >= max(finite, default=one.step)]
        return min(found, key=lambda one: one.step, default=None)

    def is_at_wandb(self, key: str) -> bool:
        """Whether a metric went to W&B as well, which gets a part of what monitors measure; True where none says so."""
        sent = [found for one in self.observations if isinstance(found := one.get("wandb_keys"), list)]
        groups = {str(name).partition("/")[0] for found in sent for name in found}
        return key.partition("/")[0] not in groups or any(key in found for found in sent)

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The robustness evaluations by name, which is empty for one without."""
        return {
            name.removeprefix(ROBUSTNESS).removeprefix("_"): found
            for name, found in self.results.items()
            if name.partition("_")[0] == ROBUSTNESS
        }

    @property
    def examples(self) -> list[tuple[str, str]]:
        """The files and captions of attacked images, of all evaluations."""
        return [
            picture
            for key, pictures in self.images.items()
            if key.partition("/")[0].partition("_")[0] == ROBUSTNESS
            for picture in pictures
        ]


def _by_layer(points: list[tuple[int, dict[str, float]]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in points:
        for layer, value in values.items():
            curves.setdefault(layer, []).append((step, value))
    return curves


def finite_points(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of a curve that can be drawn."""
    return [point for point in points if math.isfinite(point[1])]


def _since(points: Sequence[tuple[int, float]]) -> int | None:
    """The step from which on all values of a curve are not finite; None if the last one is."""
    found = None
    for step, value in points:
        if math.isfinite(value):
            found = None
        elif found is None:
            found = step
    return found


def read_record(run: str | Path) -> Record:
    """Read a run's record, also of a run that is under way or was killed.

    Where a run was killed and went on from a checkpoint, the steps that were lost are left out: steps rise. So are
    lines that are damaged or of an unknown kind, with one warning.

    Args:
        run: the run's folder, or the record itself.

    Raises:
        ConfigurationError: if there is no record, what has its name is no ordinary file of the folder, or it cannot be
            read.
    """
    if not isinstance(run, (str, PathLike)):
        raise ConfigurationError(f"read_record({shown(run)}): give the path of a run's folder.")
    path = Path(run)
    path = path / RECORD_NAME if path.is_dir() else path
    try:
        path = contained_file(path.parent, path.name, _LARGEST)
    except ConfigurationError as error:
        problem = str(error).replace(path.name, str(path), 1)
        raise ConfigurationError(f"{problem}. Give the folder of a run that was logged with RecordLogger.") from error
    record = Record(path.parent)
    earlier: set[tuple[str, str]] = set()
    try:
        for line in whole_lines(path):
            if line["kind"] == "environment":  # a process begins
                earlier = {(kind, key) for kind in ("metrics", "layers") for key in getattr(record, kind)}
            _add(record, line, earlier)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}). Check the disk and who may read it."
        ) from error
    return record


def read_records(runs: Sequence[str | Path]) -> list[Record]:
    """Read the records of several runs; those that cannot be read are left out, with a warning each.

    Raises:
        ConfigurationError: if none can.
    """
    records, problems = [], []
    for run in runs:
        try:
            records.append(read_record(run))
        except ConfigurationError as error:
            problems.append(error)
    if problems and not records:
        raise problems[0]
    for problem in problems:
        warn_once(f"A run is left out. {problem}")
    return records


def _add(record: Record, line: dict[str, Any], earlier: set[tuple[str, str]]) -> None:
    record.complete = line.get("name") == FINISHED_NAME or line.get("status", "failed") != "failed"
    record.begun, record.ended = record.begun or line["time"], max(record.ended, line["time"])
    match line["kind"]:
        case "metrics" | "layers":
            curves: dict[str, list[tuple[int, Any]]] = getattr(record, line["kind"])
            for key, value in line["values"].items():
                curve, step = curves.setdefault(key, []), line["step"]
                if (line["kind"], key) in earlier:  # a run that goes on replaces what was logged beyond its checkpoint
                    earlier.discard((line["kind"], key))
                    curve[:] = [point for point in curve if point[0] < step]
                curve.append((step, value))
        case "settings":
            record.settings.update(line["values"])
        case "environment":
            record.environment = line["values"]
        case "results":
            record.results[line["name"]] = line["values"]
        case "observation":
            record.observations.append(line["values"])
        case "images":
            record.images[line["key"]] = line["images"]
        case "outage":
            record.lost += line["lost"]
