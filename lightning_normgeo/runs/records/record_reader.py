"""Reading the records of runs, also damaged ones and those of runs under way; needs neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.runs.records.record import FINISHED_NAME, RECORD_NAME, Record
from lightning_normgeo.runs.records.record_curves import CurveReader
from lightning_normgeo.runs.records.whole_lines import whole_lines
from lightning_normgeo.utilities.checked_values import short_repr
from lightning_normgeo.utilities.contained_files import MEBIBYTE, contained_file
from lightning_normgeo.utilities.files import user_path

_LARGEST = 8192 * MEBIBYTE
"""Bytes of the largest record that is read."""


def read_record(run: str | Path, most_by_layer: int | None = None) -> Record:
    """Read a run's record, also while the run is under way or after it was killed.

    Where a run resumed from a checkpoint, the steps after it are those of the resumed run, so that the steps of each
    curve increase; so are those of another Trainer with the same logger, with a warning. A later evaluation, at step 0,
    replaces no curve. Damaged lines and lines of an unknown kind are skipped, with one warning.

    Args:
        run: Folder of the run, or path of the record itself.
        most_by_layer: Steps with values by layer to keep: of a record with more than twice as many, every second,
            fourth, eighth … is read, and the last one. Metrics are always complete. Default: all steps.

    Raises:
        ConfigurationError: If there is no record, it is not an ordinary file of the folder, or it cannot be read.
    """
    if not isinstance(run, (str, PathLike)):
        raise ConfigurationError(f"read_record({short_repr(run)}): give the path of a run's folder.")
    path = user_path(run)
    path = path / RECORD_NAME if path.is_dir() else path
    try:
        path = contained_file(path.parent, path.name, _LARGEST)
    except ConfigurationError as error:
        problem = str(error).replace(path.name, str(path), 1)
        raise ConfigurationError(f"{problem}. Give the folder of a run that was logged with RecordLogger.") from error
    record, curves = Record(path.parent), CurveReader(most_by_layer, path.stat().st_size)
    try:
        for line in whole_lines(path, curves.skips_layers):
            _add(record, line, curves)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}). Check the disk and who may read it."
        ) from error
    if curves.repeated:
        warn_once(f"{path}: curves have the last of several trainings. Give each a RecordLogger of its own.")
    record.metrics, record.layers = dict(curves.metrics), dict(curves.layers)
    return record


def read_records(runs: Sequence[str | Path], most_by_layer: int | None = None) -> list[Record]:
    """Read the records of several runs; those that cannot be read are left out, with a warning for each.

    Args:
        runs: Folders of the runs, or paths of their records.
        most_by_layer: See :func:`read_record`.

    Raises:
        ConfigurationError: If none of the records can be read.
    """
    records, problems = [], []
    for run in runs:
        try:
            records.append(read_record(run, most_by_layer))
        except ConfigurationError as error:
            problems.append(error)
    if problems and not records:
        raise problems[0]
    for problem in problems:
        warn_once(f"A run is left out. {problem}")
    return records


def _add(record: Record, line: dict[str, Any], curves: CurveReader) -> None:
    """Add a line to a record."""
    record.complete = line.get("name") == FINISHED_NAME or line.get("status", "failed") != "failed"
    record.begun = record.begun or line["time"]
    record.ended = max(record.ended, line["time"])
    match line["kind"]:
        case "metrics":
            curves.add_metrics(line["step"], line["values"])
        case "layers":
            curves.add_layers(line["step"], line["columns"], line["rows"])
        case "settings":
            record.settings.update(line["values"])
        case "environment":
            record.environment = line["values"]
            curves.begin_process()  # the first line of every process that writes the record
        case "results":
            record.results[line["name"]] = line["values"]
        case "observation":
            record.observations.append(line["values"])
        case "images":
            record.images[line["key"]] = line["images"]
        case "outage":
            record.lost += line["lost"]
