"""What loggers get of a robustness evaluation: numbers, a table, pictures, and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_normgeo.callbacks.examples import example_strips
from lightning_normgeo.errors import warn_once
from lightning_normgeo.files import write_document
from lightning_normgeo.robustness.report import COLUMNS, RobustnessReport

_QUANTITIES = ("accuracy", "accuracy_drop", "ci_low", "ci_high", "n")


def metrics_of(reports: Mapping[str, RobustnessReport]) -> dict[str, float]:
    """Return the numbers by key."""
    return {
        f"robustness/{attack}{suffix}/{quantity}": float(getattr(result, quantity))
        for suffix, report in reports.items()
        for attack, result in report.results.items()
        for quantity in _QUANTITIES
    }


def document_of(reports: Mapping[str, RobustnessReport]) -> dict[str, Any]:
    """Return what ``robustness.json`` holds, of all loaders."""
    first = next(iter(reports.values())).as_dict()
    rows = [{**row, "attack": row["attack"] + suffix} for suffix, report in reports.items() for row in report.rows()]
    warnings = [warning for report in reports.values() for warning in report.warnings]
    return {**first, "warnings": list(dict.fromkeys(warnings)), "results": rows}


def publish(trainer: Any, reports: Mapping[str, RobustnessReport], folder: Path, count: int) -> None:
    """Write the files, and give every logger what it can take; one that fails does not stop the others."""
    document = document_of(reports)
    files = _save(reports, folder, document, any(hasattr(logger, "log_results") for logger in trainer.loggers))
    rows = [[row[column] for column in COLUMNS] for row in document["results"]]
    images, captions = example_strips(next(iter(reports.values())).shown, count)
    for logger in trainer.loggers:
        try:
            if hasattr(logger, "log_results"):
                logger.log_results("robustness", document)
            if hasattr(logger, "log_table"):
                logger.log_table(key="robustness/table", columns=list(COLUMNS), data=rows)
            if hasattr(logger, "log_image") and images:
                logger.log_image(key="robustness/examples", images=images, caption=captions)
            if any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__):
                about = {key: value for key, value in document.items() if key != "results"}
                logger.experiment.summary["robustness"] = about
                _log_artifact(logger.experiment, files)
        except Exception as error:
            warn_once(f"{type(logger).__name__} failed to log the robustness results: {error!r}.")


def folder_of(trainer: Any, log_dir: str | None) -> Path:
    """Return where the files go: the run's record, or else the first logger's folder, or the Trainer's."""
    records = [logger.log_dir for logger in trainer.loggers if hasattr(logger, "log_results")]
    return Path(next(iter([*records, log_dir or trainer.default_root_dir])))


def _save(
    reports: Mapping[str, RobustnessReport], folder: Path, document: dict[str, Any], recorded: bool
) -> list[Path]:
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, report in reports.items():
            files.append(folder / f"robustness{suffix.replace('/', '_')}.npz")
            report.decisions.save(files[-1])
        if not recorded:
            write_document(folder / "robustness.json", document)
    except OSError as error:
        warn_once(f"The robustness results cannot be written to {folder} ({error.strerror}); loggers get them.")
    return [file for file in files if file.is_file()]


def _log_artifact(run: Any, files: Iterable[Path]) -> None:
    for file in files:
        run.log_artifact(str(file), name=f"{run.id}-{file.stem}", type="evaluation")
