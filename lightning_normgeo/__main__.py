"""The console command ``normgeo``, also available as ``python -m lightning_normgeo``."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path

from lightning_normgeo._version import __version__
from lightning_normgeo.errors import one_line_errors, refused
from lightning_normgeo.terminal.any_encoding import speak_any_encoding
from lightning_normgeo.terminal.safe_streams import outlets
from lightning_normgeo.terminal.shipped_configs import find_config
from lightning_normgeo.terminal.short_help import (
    ALL_OPTIONS,
    OWN_COMMANDS,
    TRAINER_COMMANDS,
    command_help,
    config_list,
    overview,
    unknown_command,
)
from lightning_normgeo.utilities.versions import require

_HELP = ("-h", "--help")
_INTERRUPTED = 130


def main(args: list[str] | None = None) -> None:
    """Run a command of the shell; a setting that cannot work ends it with one line and exit status 2.

    Help, the version and lists of configurations are printed without importing torch.

    Args:
        args: the words after ``normgeo``. Default: those of the command line.
    """
    speak_any_encoding()
    given = sys.argv[1:] if args is None else args
    with outlets():
        _guarded(given)


def _guarded(given: list[str]) -> None:
    try:
        with one_line_errors():
            answer = _answer(given)
            if answer is None:
                _run(given)
            else:
                print(answer)
    except KeyboardInterrupt:
        sys.stderr.write("\nnormgeo: interrupted\n")
        sys.exit(_INTERRUPTED)


def _answer(given: list[str]) -> str | None:
    """Return the text of a command that only prints one, such as help; None for all others."""
    if not given or given[0] in (*_HELP, "help"):
        return overview()
    command, options = given[0], given[1:]
    if command == "--version":
        return f"normgeo {__version__}"
    if command in TRAINER_COMMANDS and any(option in _HELP for option in options):
        return command_help(command)
    if command == "configs":
        if not options or options[0] in _HELP:
            return config_list()
        return Path(find_config(options[0], "normgeo configs")).read_text(encoding="utf-8").rstrip()
    if command not in (*TRAINER_COMMANDS, *OWN_COMMANDS):
        refused(unknown_command(command))
    return None


def _run(given: list[str]) -> None:
    if given[0] != "report":  # it needs none of the packages for training
        require()
        _find_own_modules()
    if given[0] in OWN_COMMANDS:
        sys.exit(importlib.import_module(f"lightning_normgeo.{given[0]}.{given[0]}_command").main(given[1:]))
    cli = importlib.import_module("lightning_normgeo.cli")  # takes seconds, which a report does without
    cli.main([_HELP[1] if option == ALL_OPTIONS else option for option in given])


def _find_own_modules() -> None:
    """Let configurations name classes in files of the current folder, as after ``python -m``.

    The folder comes last, so that no file in it takes the place of an installed module.
    """
    with suppress(FileNotFoundError):  # the current folder has been removed
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)


if __name__ == "__main__":
    main()
