"""Guards for loggers whose failures must not stop a run, and the start and end of W&B."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import said_in_one_line, warn_once

_METHODS = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "log_image",
    "log_table",
    "log_text",
    "save",
    "after_save_checkpoint",
    "finalize",
)
"""Methods of a logger that Lightning and this package call."""
_PATIENCE = 3
"""Failures in a row after which a logger is not called again: each call to a dead service can take minutes."""


def start_wandb(loggers: list[Any]) -> list[Any]:
    """Start the W&B loggers; return all loggers without those that could not be started, with a warning for each."""
    able = []
    for logger in loggers:
        try:
            if is_wandb(logger):
                _without_anonymous(logger)
                Path(logger.save_dir or ".").mkdir(parents=True, exist_ok=True)
                _ = logger.experiment  # the first access starts the run
        except Exception as error:
            warn_once(
                f"W&B could not start ({said_in_one_line(error)}); the run goes on without it. --wandb offline "
                "needs no account."
            )
        else:
            able.append(logger)
    return able


def _without_anonymous(logger: Any) -> None:
    """Remove an argument that Lightning always passes to W&B, and that W&B warns about."""
    arguments = getattr(logger, "_wandb_init", None)
    if isinstance(arguments, dict) and arguments.get("anonymous") is None:
        arguments.pop("anonymous", None)


def shield(logger: Any) -> None:
    """Make a logger warn once instead of ending the run when it fails: training is worth more than its curves.

    Args:
        logger: Logger whose methods are replaced, on this object alone.
    """
    failures = _Failures(type(logger).__name__)
    for name in _METHODS:
        method = getattr(logger, name, None)
        if callable(method):
            setattr(logger, name, failures.guard(method))


def end_wandb() -> None:
    """End W&B's run, and warn if its service does not respond."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        try:
            wandb.finish()
        except Exception as error:
            warn_once(f"W&B could not end its run ({error!r}).")
            sys.unraisablehook = lambda _: None  # W&B's own hook at exit would fail again, with two pages of traceback


class _Failures:
    """Guards the methods of one logger, and stops calling it when one of them fails repeatedly.

    Args:
        name: Class name of the logger, for the warnings.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._gone = False
        self._said: set[str] = set()

    def guard(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that warns where the given one raises."""
        in_a_row = 0

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal in_a_row
            if self._gone:
                return None
            try:
                result = method(*args, **kwargs)
            except Exception as error:
                in_a_row += 1
                self._gone = in_a_row >= _PATIENCE
                self._report(error)
                return None
            in_a_row = 0
            return result

        return guarded

    def _report(self, error: Exception) -> None:
        self._say(f"{self._name} failed ({said_in_one_line(error)}). The run goes on with its other loggers.", "failed")
        if self._gone:
            self._say(f"{self._name} failed {_PATIENCE} times in a row and is not called again.", "gone")

    def _say(self, message: str, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn_once(message)
