"""Output of an evaluation with masked channels to loggers and files."""

from __future__ import annotations

import csv
import io
import math
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import hide_charts, is_wandb
from lightning_normgeo.callbacks._robustness.logging import data_of, folder_of, warn_of_other_data
from lightning_normgeo.channels import report as results
from lightning_normgeo.channels import table as channels
from lightning_normgeo.channels.report import MaskingReport
from lightning_normgeo.errors import warn_once
from lightning_normgeo.runs.quantities.channels import CHANNELS
from lightning_normgeo.utilities.files import replacing, write_document

_MAX_ROWS = 10_000
"""W&B truncates the file of a longer table."""


def metrics_of(report: MaskingReport) -> dict[str, float]:
    """Return the logged metrics by key, without those that are not finite."""
    found: dict[str, float] = {}
    if report.clean is not None:
        found[f"{CHANNELS}/clean/accuracy"] = report.clean.accuracy
    for one in report.results:
        found[f"{CHANNELS}/{one.criterion}/{one.replace}/{one.ratio:g}/accuracy"] = one.accuracy
    if report.pairs is not None and report.pairs.pairs:
        found[f"{CHANNELS}/close_pairs"] = report.pairs.close / report.pairs.pairs
        found[f"{CHANNELS}/redundant_pairs"] = report.pairs.redundant / report.pairs.pairs
    return {key: value for key, value in found.items() if math.isfinite(value)}


def log_report(trainer: Any, report: MaskingReport) -> None:
    """Write the results to files and to every logger; a logger that fails does not stop the others.

    Args:
        trainer: has the loggers; only rank zero writes.
        report: the report.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return
    document = {**report.as_dict(), **data_of(trainer)}
    try:
        _write(folder_of(trainer, CHANNELS), report, document)
    except OSError as error:
        warn_once(f"The results of the channels cannot be written ({error.strerror or error}).\n{report}")
    for logger in trainer.loggers:
        try:
            if hasattr(logger, "log_results"):
                logger.log_results(CHANNELS, document)
            if hasattr(logger, "log_table"):
                _log_tables(logger, report)
            if is_wandb(logger):
                hide_charts(logger, metrics_of(report))
                logger.experiment.summary[CHANNELS] = {
                    key: value for key, value in document.items() if key not in ("results", "layers")
                }
        except Exception as error:
            warn_once(f"{type(logger).__name__} failed to log the channels: {error!r}.")


def _write(folder: Path, report: MaskingReport, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    warn_of_other_data(folder / f"{CHANNELS}.json", document)
    write_document(folder / f"{CHANNELS}.json", document)
    if report.table is None:
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(channels.COLUMNS)
    writer.writerows(report.table.rows())
    with replacing(folder / f"{CHANNELS}.csv") as draft:
        draft.write_text(text.getvalue(), encoding="utf-8", newline="")


def _log_tables(logger: Any, report: MaskingReport) -> None:
    if report.results:
        rows = [list(row.values()) for row in report.rows()]
        logger.log_table(key=f"{CHANNELS}/results", columns=list(results.COLUMNS), data=rows)
    if report.table is not None:
        several = [[_cell(value) for value in row] for row in islice(report.table.rows(), _MAX_ROWS)]
        logger.log_table(key=f"{CHANNELS}/table", columns=list(channels.COLUMNS), data=several)


def _cell(value: Any) -> Any:
    """Return a value as tables take it: None in place of NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
