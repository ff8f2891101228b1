"""Console output at the beginning and end of a command: its folder, its summary or predictions, how to resume it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.report.report_command import write_quietly
from lightning_normgeo.runs.records.record_logger import RecordLogger
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.runs.summary import summary_table

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses of shells for a command that SIGINT or SIGTERM ended."""
_PLAIN_WIDTH = 100


class NothingToTrain(Callback):
    """Notes whether a training began, and says so where it did not, since its checkpoint has all epochs or steps.

    Args:
        resumes: Whether the run goes on from its own checkpoint, as after a kill; then nothing is said.
    """

    def __init__(self, resumes: bool) -> None:
        self._is_expected = resumes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the training began."""
        self._is_expected = True

    def tell(self, trainer: Trainer) -> None:
        """Print that nothing was trained, if that is so, and what to raise."""
        ends = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        limits = " or ".join(f"trainer.{name}: {end}" for name, end in ends.items() if end not in (None, -1))
        if self._is_expected or not limits or not trainer.limit_train_batches or not trainer.is_global_zero:
            return
        progress = f"epoch {trainer.current_epoch}, step {trainer.global_step:,}"
        said = f"normgeo fit trained nothing: it is at {progress}, where {limits} ends. Raise it to train on."
        _show(_console(sys.stderr), said)


def interruption_of(error: BaseException, trainer: Trainer | None) -> int | None:
    """Return the exit status for the signal that ended a command, or None if no signal did.

    Lightning turns Ctrl-C into an exit with status 1, and SIGTERM into one with status 0.
    """
    if isinstance(error, SIGTERMException):
        return TERMINATED
    interrupted = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
    by_exit = isinstance(error, SystemExit) and interrupted and isinstance(error.__context__, KeyboardInterrupt)
    return INTERRUPTED if by_exit or isinstance(error, KeyboardInterrupt) else None


def tell_no_checkpoint(command: str) -> None:
    """Print that a command evaluates random weights, since it was given no checkpoint."""
    _show(_console(sys.stderr), f"normgeo {command} without --ckpt_path: the weights are random, not trained.")


def tell_interruption(trainer: Trainer, arguments: Sequence[str], folder: Path, checkpoint: str | None) -> None:
    """Print the progress and folder of an interrupted run, and the command that resumes it.

    Args:
        trainer: Trainer of the run.
        arguments: Arguments of the interrupted command.
        folder: Folder of the run.
        checkpoint: Path of the newest checkpoint; None before the first.
    """
    console = _console(sys.stderr)
    progress = f"interrupted at step {trainer.global_step:,}, in epoch {trainer.current_epoch + 1}"
    if trainer.max_epochs is not None and trainer.max_epochs > 0:  # Lightning uses -1 for no limit
        progress += f" of {trainer.max_epochs}"
    _show(console, f"{progress}.")
    _show(console, f"run:    {folder.absolute()}")
    if checkpoint is None:
        _show(console, "There is no checkpoint yet: the same command begins anew.")
        return
    _show(console, f"resume: {resume_command(arguments, folder)}")


def resume_command(arguments: Sequence[str], folder: Path) -> str:
    """Return the command that resumes a run: the given arguments with ``--run`` set to its folder."""
    kept = []
    is_value_of_run = False
    for argument in arguments:
        if not is_value_of_run and argument != "--run" and not argument.startswith("--run="):
            kept.append(argument)
        is_value_of_run = argument == "--run"
    return shlex.join(["normgeo", *kept, "--run", str(folder)])


def tell_begin(loggers: Sequence[Any]) -> None:
    """Print the folder of a run before it begins."""
    for logger in loggers:
        if isinstance(logger, RecordLogger):
            _show(_console(sys.stdout), f"run:    {logger.folder.absolute()}")
            return


def tell_end(loggers: Sequence[Any], with_report: bool) -> None:
    """Write the report, and print the summary and the paths of report, record and offline W&B runs."""
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


def save_predictions(trainer: Trainer, folder: Path | None) -> None:
    """Save what ``Trainer.predict`` returns, the output of ``predict_step`` for each batch in a list; print the path.

    The file is ``predictions.pt``; with several processes each writes its own, ``predictions_RANK.pt``, since it has
    seen other samples. Nothing is written where there are no predictions to keep.

    Args:
        trainer: Trainer after ``predict``.
        folder: Folder of the run on rank zero; None for the Trainer's ``default_root_dir``.
    """
    predictions = trainer.predict_loop.predictions
    if trainer.fast_dev_run or not predictions:  # type: ignore[attr-defined]
        return
    place = Path(trainer.strategy.broadcast(str(folder or trainer.default_root_dir)))
    place.mkdir(parents=True, exist_ok=True)
    path = place / ("predictions.pt" if trainer.world_size == 1 else f"predictions_{trainer.global_rank}.pt")
    torch.save(predictions, path)
    _show(_console(sys.stdout), f"predictions: {path.absolute()}")


def _console(file: Any) -> Console:
    return Console(file=file, width=None if file.isatty() else _PLAIN_WIDTH)


def _show(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
