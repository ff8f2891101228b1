"""Cleanup after a command that failed before it logged anything."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.runs.records.record import RECORD_NAME
from lightning_normgeo.runs.records.record_logger import RecordLogger
from lightning_normgeo.runs.records.record_reader import read_record

_OWN_FILES = ("record.jsonl", "config.yaml", ".lock")
_OWN_FOLDERS = ("checkpoints", "images")
_WANDB_LINKS = ("latest-run", "debug.log", "debug-internal.log")
"""Symbolic links from W&B's folder into the folder of its latest run."""


def has_logged(folder: Path) -> bool:
    """Whether a run's record holds a measurement or a result; True also for a record that cannot be read."""
    if not (folder / RECORD_NAME).is_file():
        return False
    try:
        record = read_record(folder)
    except ConfigurationError:
        return True
    return bool(record.metrics or record.layers or record.results)


def missing_parents(folder: Path) -> list[Path]:
    """Return those of a folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_traces(loggers: Sequence[Any], run: Path | None, made: Sequence[Path]) -> None:
    """Remove the files and folders of a command that failed before it logged anything, and nothing else.

    Args:
        loggers: Loggers of the run.
        run: Folder of the run; None if it had none.
        made: Folders that the command created, the innermost first.
    """
    for logger in loggers:
        if is_wandb(logger):
            _remove_wandb_run(logger)
        elif isinstance(logger, RecordLogger):
            logger.finalize("failed")
    if run is not None:
        _remove_run(run)
    for folder in made:
        with suppress(OSError):  # not empty: another process has written into it
            folder.rmdir()


def _remove_run(folder: Path) -> None:
    for name in _OWN_FILES:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    for path in (*(folder / name for name in _OWN_FOLDERS), folder):
        with suppress(OSError):
            path.rmdir()


def _remove_wandb_run(logger: Any) -> None:
    """End W&B's run as failed and remove its local folder; what was already uploaded stays online, marked as failed."""
    run = getattr(logger, "_experiment", None)
    folder = getattr(run, "dir", None)
    wandb = sys.modules.get("wandb")
    if wandb is None or not isinstance(folder, str) or not folder:
        return
    with suppress(Exception):  # an error of W&B must not replace the one that ended the command
        wandb.finish(exit_code=1)
    place = Path(folder).parent
    if not place.name.startswith(("run-", "offline-run-")):  # not W&B's layout: the folder may hold other files
        return
    shutil.rmtree(place, ignore_errors=True)
    for link in (place.parent / name for name in _WANDB_LINKS):
        if link.is_symlink() and not link.exists():
            link.unlink()
    for empty in (place.parent, place.parent.parent / "wandb-data"):
        with suppress(OSError):
            empty.rmdir()
