"""The command ``normgeo study``."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO, cast

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from rich import filesize
from rich.console import Console

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.report_command import write_quietly
from lightning_normgeo.study.definition import Study, load_study
from lightning_normgeo.study.disk_needs import DiskNeeds
from lightning_normgeo.study.display import ProgressDisplay, failures, listing, outdated
from lightning_normgeo.study.runner import Runner, arguments_for
from lightning_normgeo.study.study_index import Index
from lightning_normgeo.study.wandb_sweep import write_sweep
from lightning_normgeo.terminal.safe_streams import PipeSafeStream
from lightning_normgeo.utilities.checked_values import first_line
from lightning_normgeo.utilities.one_line_parser import OneLineArgumentParser

_DESCRIPTION = """Run a grid of trainings, each in a process and a folder of its own, and report on all of them. The
same command again resumes the study: finished runs are left alone, unfinished ones resume from their last checkpoint,
failed ones are tried again."""
_BY_SIGNAL = 128
"""Exit status of a command that a signal ended, as in shells: this plus the number of the signal."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Sent by Ctrl-C in a terminal, by a batch system at the end of a job's time, and when a connection is lost."""


def study_parser() -> OneLineArgumentParser:
    """Return the parser of ``normgeo study``."""
    parser = OneLineArgumentParser(prog="normgeo study", description=_DESCRIPTION)
    parser.add_argument(
        "study",
        type=str,
        help="YAML file of the study, or the name of one that comes with the package, such as paper_small; normgeo "
        "configs lists them. The file has name and grid, and may have configs, settings, save_dir, and "
        "keep_optimizer_states: true, without which checkpoints of finished runs keep the weights only.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="List the runs and their states, the bytes they will write and the free disk space; run nothing.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Number of concurrent runs, which share cores and GPUs.")
    parser.add_argument(
        "--report", type=bool, default=True, help="Write report.html into the study's folder at the end."
    )
    parser.add_argument(
        "--wandb-sweep", type=str | None, default=None, help="Write the grid as a W&B sweep; run nothing."
    )
    return parser


def main(args: list[str]) -> int:
    """Run ``normgeo study`` and return its exit status.

    Args:
        args: Arguments after ``normgeo study``.

    Returns:
        0; 1 if a run failed; 128 plus the number of the signal, such as 130 for Ctrl-C, if it was interrupted.

    Raises:
        ConfigurationError: If the study cannot work.
    """
    options = study_parser().parse_args(args)
    if options.jobs < 1:
        raise ConfigurationError(f"--jobs {options.jobs} must be at least 1.")
    terminal = sys.stdout.isatty()
    outlet = cast(TextIO, PipeSafeStream(sys.stdout))
    console = Console(file=outlet, soft_wrap=not terminal, width=None if terminal else 160)
    study = load_study(options.study)
    cases = checked_cases(study, options.study)
    if options.wandb_sweep:
        path = write_sweep(study, cases[0].settings, options.wandb_sweep)
        console.print(f"Now: wandb sweep {path}, and on each machine wandb agent with what it prints.", highlight=False)
        return 0
    if options.dry_run:
        _list(index := Index(study), console)
        _show_sizes(index, cases, options.jobs, console)
        first = index.entries[0]
        command = shlex.join(arguments_for(study, first.options, index.folder_of(first).path))
        console.print(f"The first is: normgeo {command}", highlight=False, markup=False, soft_wrap=True)
        return 0
    return _run(study, cases, options, console)


def _run(study: Study, cases: list[Any], options: Namespace, console: Console) -> int:
    """Execute a study and return the exit status."""
    with _claimed(study) as index:
        _list(index, console)
        _warn_of_a_full_disk(index, cases, options.jobs, console)
        with ProgressDisplay(console) as display, _listening(runner := Runner(index, display, options.jobs)):
            runner.run()
    if runner.freed:
        console.print(
            f"Optimizer states of finished runs were dropped from their checkpoints: {filesize.decimal(runner.freed)}. "
            "keep_optimizer_states: true in the study's file keeps them.",
            highlight=False,
        )
    if runner.interrupted:
        console.print(f"interrupted; the same command resumes it. study: {study.folder.absolute()}", markup=False)
        return _BY_SIGNAL + runner.signal
    return _conclude(index, options, console)


def checked_cases(study: Study, name: str) -> list[Any]:
    """Check a study before its first run; see :func:`lightning_normgeo.study.validation.checked_cases`."""
    from lightning_normgeo.study import validation  # takes seconds, which the command's help need not wait for

    return validation.checked_cases(study, name)


@contextmanager
def _claimed(study: Study) -> Iterator[Index]:
    """Lock a study against other processes, and yield its index."""
    with ExitStack() as claim:
        try:
            study.folder.mkdir(parents=True, exist_ok=True)
            claim.enter_context(FileLock(study.folder / ".lock", timeout=0))
            index = Index(study)
            index.save()
        except Timeout as error:
            raise ConfigurationError(f"{study.folder} is being run by another process. Wait for it.") from error
        except OSError as error:
            raise ConfigurationError(f"{study.folder}: cannot write there ({error.strerror}).") from error
        yield index


def _conclude(index: Index, options: Namespace, console: Console) -> int:
    """Print failures, write the report, and return the exit status."""
    failed = list(failures(index))
    for line in failed:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if options.report:
        console.print(f"report: {write_quietly([index.study.folder])}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"index:  {index.path.absolute()}", highlight=False, soft_wrap=True, markup=False)
    return 1 if failed else 0


def _list(index: Index, console: Console) -> None:
    console.print(listing(index))
    if warning := outdated(index):
        console.print(warning, style="yellow", soft_wrap=True)


def _show_sizes(index: Index, cases: list[Any], jobs: int, console: Console) -> None:
    """Print what the runs will write, and a warning if the disk has too little space."""
    try:
        needs = DiskNeeds(index, cases, jobs)
        for line in needs.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if needs.warning:
            console.print(needs.warning, style="yellow", markup=False, soft_wrap=True)
    except Exception as error:  # an estimate does not stop a command
        console.print(f"sizes: unknown ({first_line(error)})", highlight=False, markup=False, soft_wrap=True)


def _warn_of_a_full_disk(index: Index, cases: list[Any], jobs: int, console: Console) -> None:
    """Print a warning if the disk has too little space for the runs that have not finished."""
    if all(entry.status == "finished" for entry in index.entries):
        return
    with suppress(Exception):  # an estimate does not stop a study
        if warning := DiskNeeds(index, cases, jobs).warning:
            console.print(warning, style="yellow", markup=False, soft_wrap=True)


@contextmanager
def _listening(runner: Runner) -> Iterator[None]:
    """Let signals interrupt a runner, except those that this process was told to ignore, as by ``nohup``."""
    heard = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before: dict[int, Any] = {number: signal.getsignal(number) for number in heard}
    heard = [number for number in heard if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, runner.interrupt)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
