"""Errors and warnings of the package."""

from __future__ import annotations

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, ParamSpec, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_normgeo.utilities.plain_text import plain, plain_line

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ConfigurationError(ValueError):
    """A setting that cannot work, found before any work is lost.

    The message names the option, the value given, what is allowed and what to do.
    """


class UnsuitableError(ConfigurationError):
    """A model or data set that an evaluation cannot work with, though its settings are right."""


class MeasurementWarning(UserWarning):
    """A measurement was skipped or is less than was asked for; training goes on unchanged."""


_FEW = 16
"""So many names are all listed."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names as a hint, the nearest to ``name`` first; of many only these, or the first."""
    known = list(dict.fromkeys(known))
    near = near_names(name, known, count)
    if len(known) <= _FEW:
        return ", ".join(map(repr, dict.fromkeys([*near, *known])))
    near = near or sorted(known)[:8]
    return ", ".join(map(repr, near)) + f" … ({len(known)} in all)"


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that are near to one in letters, whether large or small, the nearest first."""
    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(one.casefold(), one)
    return [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.5)]


def said_in_one_line(error: BaseException) -> str:
    """The message of an error in one line; its kind where it has none."""
    return plain_line(error) or type(error).__name__


def is_rank_zero() -> bool:
    """Whether this process is the one that logs, writes and warns."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


_said: set[str] | None = None


def remember_warnings(while_training: bool) -> None:
    """Begin or end a training, during which each warning is given once.

    Python's own memory of what it has shown is lost whenever anybody uses ``warnings.catch_warnings``.
    """
    global _said
    _said = set() if while_training else None


def warn_once(message: str, about: str | None = None) -> None:
    """Warn from rank zero; during a training once with the same text.

    Args:
        message: the text.
        about: what it is about, where the text differs from time to time: that is then warned of once.
    """
    if is_rank_zero() and (about or message) not in (_said or ()):
        if _said is not None:
            _said.add(about or message)
        warnings.warn(message, MeasurementWarning, stacklevel=3)


def skipped_on_error(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """Make a measurement that fails a skipped measurement: it is reported once and the training goes on."""

    @functools.wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            warn_once(
                f"A measurement failed and is skipped: {error!r}. Training goes on unchanged; please report this.",
                about=_place(error),
            )
            return None

    return guarded


def _place(error: BaseException) -> str:
    """Return the kind of an error and the line that raised it: its text may differ from step to step."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    return f"{type(error).__name__} {where}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Let a setting that cannot work end in one clear line and exit status 2."""
    try:
        yield
    except ValueError as error:
        cause = _configuration_error(error)
        if cause is None:
            raise
        refused(str(cause), error)


def refused(message: str, cause: BaseException | None = None) -> NoReturn:
    """End the process with one line on the standard error, and the status of a command that was not understood."""
    sys.stderr.write(f"normgeo: error: {plain(message)}\n")
    raise SystemExit(2) from cause


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Return the error of ours that ``error`` is or was caused by: jsonargparse wraps what constructors raise."""
    if error is None or isinstance(error, ConfigurationError):
        return error
    return _configuration_error(error.__cause__ or error.__context__)
