"""Where a command writes, and the way back: what a command that failed before it measured anything has left behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.runs.record import RECORD_NAME, read_record
from lightning_normgeo.runs.record_logger import RecordLogger

_OWN_FILES = ("record.jsonl", "config.yaml", ".lock")
_OWN_FOLDERS = ("checkpoints", "images")
_WANDB_LINKS = ("latest-run", "debug.log", "debug-internal.log")


def has_logged(folder: Path) -> bool:
    """Whether the record of a run holds anything that was measured or evaluated, or cannot be read."""
    if not (folder / RECORD_NAME).is_file():
        return False
    try:
        record = read_record(folder)
    except ConfigurationError:
        return True
    return bool(record.metrics or record.layers or record.results)


def missing_parents(folder: Path) -> list[Path]:
    """Return the folders on the way to one that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_traces(loggers: Sequence[Any], run: Path | None, made: Sequence[Path]) -> None:
    """Remove what a command left that failed before anything was logged; everything else stays.

    Args:
        loggers: of the run.
        run: its folder, None if it had none.
        made: folders that were not there before, the innermost first.
    """
    for logger in loggers:
        if is_wandb(logger):
            _remove_wandb_run(logger)
        elif isinstance(logger, RecordLogger):
            logger.finalize("failed")
    if run is not None:
        _remove_run(run)
    for folder in made:
        with suppress(OSError):  # not empty: somebody else has put something there
            folder.rmdir()


def _remove_run(folder: Path) -> None:
    for name in _OWN_FILES:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    for path in (*(folder / name for name in _OWN_FOLDERS), folder):
        with suppress(OSError):
            path.rmdir()


def _remove_wandb_run(logger: Any) -> None:
    """End the run of W&B as failed and remove its folder here; what is online by now stays there, as failed."""
    run = getattr(logger, "_experiment", None)
    folder = getattr(run, "dir", None)
    wandb = sys.modules.get("wandb")
    if wandb is None or not isinstance(folder, str) or not folder:
        return
    with suppress(Exception):  # whatever W&B raises is not the failure to tell of
        wandb.finish(exit_code=1)
    place = Path(folder).parent
    if not place.name.startswith(("run-", "offline-run-")):
        return
    shutil.rmtree(place, ignore_errors=True)
    for link in (place.parent / name for name in _WANDB_LINKS):
        if link.is_symlink() and not link.exists():
            link.unlink()
    for empty in (place.parent, place.parent.parent / "wandb-data"):
        with suppress(OSError):
            empty.rmdir()
