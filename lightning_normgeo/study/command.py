"""``normgeo study``."""

from __future__ import annotations

import shlex
import signal
import sys
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from lightning_normgeo.cli import parse
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.command import write_quietly
from lightning_normgeo.study.definition import Study, arguments_of, load_study
from lightning_normgeo.study.display import ProgressDisplay, failures, listing
from lightning_normgeo.study.index import Index
from lightning_normgeo.study.runner import Runner
from lightning_normgeo.study.sweep import write_sweep

_DESCRIPTION = """Run a grid of trainings, each a process of its own with a folder of its own, and report on all of
them. The same command again goes on: runs that have finished are left alone, half runs go on from their last
checkpoint, failed ones are tried again."""


def study_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = ArgumentParser(prog="normgeo study", description=_DESCRIPTION)
    parser.add_argument("study", type=str, help="The study's YAML file.")
    parser.add_argument("--dry-run", action="store_true", help="List the runs and how far they are; run nothing.")
    parser.add_argument("--jobs", type=int, default=1, help="How many runs at a time; they share cores and GPUs.")
    parser.add_argument(
        "--report", type=bool, default=True, help="Write report.html into the study's folder at the end."
    )
    parser.add_argument(
        "--wandb-sweep", type=str | None, default=None, help="Write the grid as a W&B sweep; run nothing."
    )
    return parser


def main(args: list[str]) -> int:
    """Run the command and return its exit status: 1 if a run failed, 130 if it was interrupted."""
    options = study_parser().parse_args(args)
    if options.jobs < 1:
        raise ConfigurationError(f"--jobs {options.jobs} must be at least 1.")
    study, console = load_study(options.study), Console(soft_wrap=not sys.stdout.isatty())
    check(study)
    if options.wandb_sweep:
        path = write_sweep(study, options.wandb_sweep)
        console.print(f"Now: wandb sweep {path}, and on each machine wandb agent with what it prints.", highlight=False)
        return 0
    if options.dry_run:
        console.print(listing(Index(study)))
        console.print("normgeo fit " + shlex.join(study.shared) + " …", highlight=False, soft_wrap=True)
        return 0
    return _run(study, options, console)


def check(study: Study) -> None:
    """Parse every option with every value once, so that none is found wrong in the middle of the night."""
    first = {option: values[0] for option, values in study.grid.items()}
    checked: list[dict[str, Any]] = [first]
    checked += [{**first, option: value} for option, values in study.grid.items() for value in values[1:]]
    for options in checked:
        parse(["fit", *study.shared, *arguments_of(options)])


def _run(study: Study, options: Namespace, console: Console) -> int:
    study.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.folder / ".lock", timeout=0):
            index = Index(study)
            console.print(listing(index))
            signal.signal(signal.SIGTERM, _interrupt)  # as batch systems end a job
            with ProgressDisplay(console) as display:
                Runner(index, display, options.jobs).run()
    except Timeout as error:
        raise ConfigurationError(f"{study.folder} is being run by another process. Wait for it.") from error
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return 130
    failed = list(failures(index))
    for line in failed:
        console.print(line, style="red", markup=False)
    if options.report:
        console.print(f"report: {write_quietly([study.folder])}", highlight=False)
    console.print(f"index:  {index.path.absolute()}", highlight=False)
    return 1 if failed else 0


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
