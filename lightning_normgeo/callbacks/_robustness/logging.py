"""Output of a robustness evaluation to loggers and files: metrics, a table, example images, and results on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import hide_charts, is_wandb
from lightning_normgeo.callbacks._robustness.example_pictures import example_strips
from lightning_normgeo.errors import warn_once
from lightning_normgeo.robustness.results.logged_results import EXAMPLES, ORDER, RESULTS, detail_tables, table_of
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.results.samples.process_shares import EVERYTHING
from lightning_normgeo.runs.records.record import Record, evaluation_stem
from lightning_normgeo.runs.records.record_lines import VALIDATION
from lightning_normgeo.runs.verdicts import logged_verdicts
from lightning_normgeo.utilities.files import is_address, parsed, write_document

_QUANTITIES = ("accuracy", "accuracy_drop", "ci_low", "ci_high", "n")
_IN_THE_TABLE = re.compile(r"robustness/(.+/(ci_low|ci_high|n)|clean(/.+)?/accuracy_drop)")
"""Metrics that W&B draws no chart of: the table has them, and clean images lose no accuracy."""
_OF_LOADER = ("settings", "warnings", "not_evaluated", "weights")
_DETAILS = ("worst", "radii", "corruptions", "sanity", "verified", "clean_draws")
"""Parts of the document of a loader, the second ones where they were evaluated."""


def metrics_of(reports: Mapping[str, RobustnessReport]) -> dict[str, float]:
    """Return the logged metrics by key, without those that are not finite; of details the accuracy only."""
    found: dict[str, float] = {}
    for suffix, report in reports.items():
        for attack, result in report.results.items():
            for quantity in ("accuracy",) if attack in report.parts else _QUANTITIES:
                found[f"robustness/{attack}{suffix}/{quantity}"] = float(getattr(result, quantity))
        for quantity in ("accuracy", "ci_low", "ci_high", "n") if report.corruptions is not None else ():
            found[f"robustness/corruptions{suffix}/{quantity}"] = float(getattr(report.corruptions, quantity))
    return {key: value for key, value in found.items() if math.isfinite(value)}


def rows_left_out(report: RobustnessReport, suffix: str) -> dict[str, list[str]]:
    """Return the rows that were not evaluated by reason, as warnings name them."""
    found: dict[str, list[str]] = {}
    for row, reason in report.not_evaluated.items():
        found.setdefault(reason, []).append(f"{'Robustness' if row == EVERYTHING else row}{suffix}")
    return found


def document_of(reports: Mapping[str, RobustnessReport]) -> dict[str, Any]:
    """Return the content of ``robustness.json`` over all loaders.

    It has the rows of all loaders, the settings of the first, and, if there are several, the settings of each under
    ``loaders``.
    """
    documents = {suffix: report.as_dict() for suffix, report in reports.items()}
    first = next((one for one in documents.values() if one["results"]), next(iter(documents.values())))
    rows = [{**row, "attack": row["attack"] + suffix} for suffix, one in documents.items() for row in one["results"]]
    reasons = {name + suffix: why for suffix, one in documents.items() for name, why in one["not_evaluated"].items()}
    warnings = dict.fromkeys(warning for one in documents.values() for warning in one["warnings"])
    found = {**first, "warnings": list(warnings), "results": rows, "not_evaluated": reasons}
    if len(documents) > 1:
        keys = (*_OF_LOADER, *_DETAILS)
        found["loaders"] = {suffix: {key: one[key] for key in keys if key in one} for suffix, one in documents.items()}
    return found


def log_evaluation(trainer: Any, reports: Mapping[str, RobustnessReport], name: str | None, count: int) -> bool:
    """Write the results to files and to every logger; a logger that fails does not stop the others.

    Args:
        trainer: has the loggers; only rank zero writes.
        reports: the reports by suffix of their keys (name of the evaluation and of the loader).
        name: the name of the evaluation, if it has one.
        count: largest number of example images.

    Returns:
        Whether all results are on disk. If not, a warning shows them.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return True
    document, stem = {**document_of(reports), **data_of(trainer)}, evaluation_stem(name)
    problem, files = _save(trainer, reports, document, stem)
    images, captions = _pictures(reports, count)
    for logger in trainer.loggers:
        try:
            if hasattr(logger, "log_results") and logger.log_results(stem, document) is False:
                problem = problem or f"cannot be written to {logger.log_dir} for the time being"
            if hasattr(logger, "log_table"):
                _log_tables(logger, stem, document)
            if hasattr(logger, "log_image") and images:
                shown = captions if hasattr(logger, "log_results") else [f"{text}. {ORDER}" for text in captions]
                logger.log_image(key=f"{stem}/{EXAMPLES}", images=images, caption=shown)
            if is_wandb(logger):
                hide_charts(logger, filter(_IN_THE_TABLE.fullmatch, metrics_of(reports)))
                logger.experiment.summary[stem] = _for_summary(document)
                logger.experiment.summary.update(logged_verdicts.headlines(_record(stem, document)))
                _log_artifact(logger.experiment, files)
        except Exception as error:
            kind = type(logger).__name__
            if not problem and hasattr(logger, "log_results"):
                problem = f"cannot be written by {kind} ({error!r})"
            warn_once(f"{kind} failed to log the robustness results: {error!r}.")
    if problem:
        tables = "\n".join(f"{suffix}\n{report}".strip() for suffix, report in reports.items())
        warn_once(
            f"The robustness results {problem}. Loggers get them; the journal in {trainer.default_root_dir} is kept, "
            f"and running the same test again resumes from it.\n{tables}"
        )
    return not problem


def data_of(trainer: Any) -> dict[str, str]:
    """Return the entry of a document of results on validation data that says so; empty for test data."""
    return {"data": VALIDATION} if trainer.state.fn == "validate" else {}


def warn_of_other_data(path: Path, document: Mapping[str, Any]) -> None:
    """Warn if a document of results is about to replace one that was evaluated on other data.

    Args:
        path: path of the document before, which need not exist.
        document: the new document.
    """
    try:
        before = parsed(path.read_bytes()).get("data", "test")
    except (OSError, ValueError):
        return
    data = document.get("data", "test")
    if before != data:
        warn_once(
            f"{path} had the results on the {before} data; now it has those on the {data} data, and so has a report. "
            f"To keep both, use a Trainer of its own for the {data} data, with a callback or loggers of another name."
        )


def folder_of(trainer: Any, name: str = "robustness") -> Path:
    """Return the folder of the run, for the files of results.

    It is the folder of the run's record, else that of the first logger's version, where Lightning puts checkpoints
    too. Without a logger, or with one that has no versions, it is a new folder of that name in the Trainer's
    ``default_root_dir``. Where that is an address of remote storage, the current folder takes its place.
    """
    for logger in trainer.loggers:
        if hasattr(logger, "log_results") and logger.log_dir is not None:  # a project's own may have no folder
            return Path(logger.log_dir)
    first = next(iter(trainer.loggers), None)
    version = None if first is None else first.version
    if first is None or version in (None, ""):
        return _new_folder(local_folder(trainer.default_root_dir) / name)
    version = version if isinstance(version, str) else f"version_{version}"
    return local_folder(first.save_dir or trainer.default_root_dir) / str(first.name) / version


def local_folder(address: str) -> Path:
    """Return a folder of the Trainer or of a logger; the current one, with a warning, for remote storage."""
    local = address.removeprefix("file://")
    if not is_address(local):
        return Path(local)
    warn_once(
        f"Files of an evaluation are written to the current folder, not to {address}: they need a folder of this "
        "machine. Loggers get the results too."
    )
    return Path()


def _new_folder(parent: Path) -> Path:
    for number in range(10_000):
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{parent} has ten thousand versions")


def _save(
    trainer: Any, reports: Mapping[str, RobustnessReport], document: dict[str, Any], stem: str
) -> tuple[str, list[Path]]:
    """Write the per-sample results and the JSON document; return the problem, empty if there is none, and the files."""
    files, folder = [], Path(trainer.default_root_dir)
    try:
        folder = folder_of(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        warn_of_other_data(folder / f"{stem}.json", document)
        for suffix, report in reports.items():
            if report.results:
                file = folder / f"robustness{suffix.replace('/', '_')}.npz"
                report.decisions.save(file)
                files.append(file)
        write_document(folder / f"{stem}.json", document)
        files.append(folder / f"{stem}.json")
    except OSError as error:
        return f"cannot be written to {folder} ({error.strerror or error})", files
    return "", files


def _log_tables(logger: Any, stem: str, document: Mapping[str, Any]) -> None:
    """Log the verdicts on an evaluation, and its results."""
    verdicts = logged_verdicts.verdict_rows(_record(stem, document))
    if verdicts:
        logger.log_table(key=f"{logged_verdicts.ABOUT}/{stem}", columns=logged_verdicts.COLUMNS, data=verdicts)
    columns, rows = table_of(document)
    logger.log_table(key=f"{stem}/{RESULTS}", columns=columns, data=rows)
    for loader, part in document.get("loaders", {"": document}).items():
        for name, (columns, rows) in detail_tables(part).items():
            logger.log_table(key=f"{stem}/{name}{loader}", columns=columns, data=rows)


def _record(stem: str, document: Mapping[str, Any]) -> Record:
    return Record(Path(), results={stem: document})


def _pictures(reports: Mapping[str, RobustnessReport], count: int) -> tuple[list[Any], list[str]]:
    """Return the example images of the first loader and their captions; if they cannot be drawn, warn only."""
    try:
        return example_strips(next(iter(reports.values())).shown, count)
    except Exception as error:
        warn_once(f"No examples are drawn: {error!r}.")
        return [], []


def _for_summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document for W&B's summary, without the rows and the norms of every layer.

    The rows are in W&B's table and the norms are in an artifact.
    """
    found = {key: value for key, value in document.items() if key not in ("results", "weights")}
    if "loaders" in found:
        found["loaders"] = {
            suffix: {key: value for key, value in one.items() if key != "weights"}
            for suffix, one in found["loaders"].items()
        }
    return found


def _log_artifact(run: Any, files: Iterable[Path]) -> None:
    """Log each file as a W&B artifact: per-sample results, and the document with settings and norms."""
    for file in files:
        name, kind = (file.stem, "evaluation") if file.suffix == ".npz" else (f"{file.stem}-settings", "settings")
        run.log_artifact(str(file), name=f"{run.id}-{name}", type=kind)
