"""The console script ``normgeo``, also as ``python -m lightning_normgeo``."""

from __future__ import annotations

import importlib
import sys

from lightning_normgeo.errors import one_line_errors
from lightning_normgeo.versions import require

_OWN = ("study", "report")
"""Commands that are not the Trainer's; each has a module ``<name>.command``."""


def main(args: list[str] | None = None) -> None:
    """Run a command from the shell: a setting that cannot work ends in one clear line and exit status 2."""
    given = sys.argv[1:] if args is None else args
    if not given or given[0] != "report":
        with one_line_errors():
            require()
    if not given or given[0] not in _OWN:
        from lightning_normgeo import cli  # takes seconds, which a report does without

        cli.main(args)  # Lightning warns of arguments that are not the shell's
        return
    with one_line_errors():
        sys.exit(importlib.import_module(f"lightning_normgeo.{given[0]}.command").main(given[1:]))


if __name__ == "__main__":
    main()
