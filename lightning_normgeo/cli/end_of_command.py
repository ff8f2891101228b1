"""How a command ends: its summary, where everything is, and how to resume it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.report.report_command import write_quietly
from lightning_normgeo.runs.record import read_record
from lightning_normgeo.runs.record_logger import RecordLogger
from lightning_normgeo.runs.summary import summary_table

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses, as shells give them for SIGINT and SIGTERM."""
_PLAIN_WIDTH = 100


def interruption_of(error: BaseException, trainer: Trainer | None) -> int | None:
    """Return the exit status of a command that a signal has ended; None if it was something else.

    Lightning turns Ctrl-C into an exit with status 1, and SIGTERM into one with status 0.
    """
    if isinstance(error, SIGTERMException):
        return TERMINATED
    interrupted = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
    by_exit = isinstance(error, SystemExit) and interrupted and isinstance(error.__context__, KeyboardInterrupt)
    return INTERRUPTED if by_exit or isinstance(error, KeyboardInterrupt) else None


def tell_interruption(trainer: Trainer, arguments: Sequence[str], folder: Path, checkpoint: str | None) -> None:
    """Say how far an interrupted run is, where it is, and how it resumes.

    Args:
        trainer: of the run.
        arguments: of the command.
        folder: of the run.
        checkpoint: the newest one, None before the first.
    """
    console = _console(sys.stderr)
    said = f"interrupted at step {trainer.global_step:,}, in epoch {trainer.current_epoch + 1}"
    _show(console, said + (f" of {trainer.max_epochs}." if (trainer.max_epochs or -1) > 0 else "."))
    _show(console, f"run:    {folder.absolute()}")
    if checkpoint is None:
        _show(console, "There is no checkpoint yet: the same command begins anew.")
        return
    _show(console, f"resume: {resume_command(arguments, folder)}")


def resume_command(arguments: Sequence[str], folder: Path) -> str:
    """Return the command that resumes a run: the same with ``--run``."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--run" and not argument.startswith("--run="):
            kept.append(argument)
        skip = argument == "--run"
    return shlex.join(["normgeo", *kept, "--run", str(folder)])


def tell_begin(loggers: Sequence[Any]) -> None:
    """Say where a run is written, before it begins."""
    for logger in loggers:
        if isinstance(logger, RecordLogger):
            _show(_console(sys.stdout), f"run:    {logger.folder.absolute()}")
            return


def tell_end(loggers: Sequence[Any], with_report: bool) -> None:
    """Write the report, print the summary, and say where everything is."""
    folder = next((one.folder for one in loggers if isinstance(one, RecordLogger) and one.path.is_file()), None)
    if folder is None:
        return
    report = write_quietly([folder]) if with_report else None
    console = _console(sys.stdout)
    console.print(summary_table(read_record(folder)))
    if report is not None:
        _show(console, f"report: {report}")
    _show(console, f"record: {folder.absolute()}")
    for logger in loggers:
        if is_wandb(logger) and os.environ["WANDB_MODE"] == "offline":
            _show(console, f"W&B:    wandb sync {Path(logger.experiment.dir).absolute().parent}")


def _console(file: Any) -> Console:
    return Console(file=file, width=None if file.isatty() else _PLAIN_WIDTH)


def _show(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
