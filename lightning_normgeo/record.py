"""Records of runs, read back: needs neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.files import read_lines
from lightning_normgeo.notebook import Table, curves_frame, shortened, summary
from lightning_normgeo.options import UnknownNameError, nearest, shown

RECORD_NAME, STUDY_NAME = "record.jsonl", "study.json"
ROBUSTNESS = "robustness"
"""The results of an evaluation; those of one with a name are called ``robustness_{name}``, also in files and W&B."""
FINISHED_NAME = "run"
"""The results that a run writes last, after its tests."""


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
    complete: bool = False
    begun: float = 0.0
    ended: float = 0.0

    def __repr__(self) -> str:
        steps = [points[-1][0] for points in self.metrics.values()] + [points[-1][0] for points in self.layers.values()]
        status = "complete" if self.complete else "not complete"
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


def read_record(run: str | Path) -> Record:
    """Read a run's record, also of a run that is under way or was killed.

    Where a run was killed and went on from a checkpoint, the steps that were lost are left out: steps rise.

    Args:
        run: the run's folder, or the record itself.

    Raises:
        ConfigurationError: if there is no record.
    """
    if not isinstance(run, (str, PathLike)):
        raise ConfigurationError(f"read_record({shown(run)}): give the path of a run's folder.")
    path = Path(run)
    path = path / RECORD_NAME if path.is_dir() else path
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist. Give the folder of a run that was logged with RecordLogger.")
    record = Record(path.parent)
    earlier: set[tuple[str, str]] = set()
    for line in read_lines(path):
        if line["kind"] == "environment":  # a process begins
            earlier = {(kind, key) for kind in ("metrics", "layers") for key in getattr(record, kind)}
        _add(record, line, earlier)
    return record


def _add(record: Record, line: dict[str, Any], earlier: set[tuple[str, str]]) -> None:
    record.complete = line.get("name") == FINISHED_NAME or line.get("status", "failed") != "failed"
    record.begun, record.ended = record.begun or line["time"], line["time"]
    match line["kind"]:
        case "metrics" | "layers":
            curves: dict[str, list[tuple[int, Any]]] = getattr(record, line["kind"])
            for key, value in line["values"].items():
                curve, step = curves.setdefault(key, []), line["step"] or 0
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
            captions: Sequence[str] = line["captions"] or [""] * len(line["files"])
            record.images[line["key"]] = list(zip(line["files"], captions, strict=True))
