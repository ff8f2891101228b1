"""Errors and warnings of the package, and how commands and trainings report them."""

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
    """A setting that cannot work, refused before any work is lost.

    The message names the option, the value given, what is allowed and what to do.
    """


class UnsuitableError(ConfigurationError):
    """A model or data set that an evaluation cannot use, although its settings are valid."""


class MeasurementWarning(UserWarning):
    """A measurement was skipped or covers less than was asked for; training continues unchanged."""


_FEW = 16
"""The largest number of known names of which a hint lists all."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint that lists known names, those similar to ``name`` first.

    Args:
        name: the name that was given.
        known: the names there are. Up to 16 are all listed; of more only the similar ones, or the first eight.
        count: the largest number of similar names.
    """
    known = list(dict.fromkeys(known))
    near = near_names(name, known, count)
    if len(known) <= _FEW:
        return ", ".join(map(repr, dict.fromkeys([*near, *known])))
    near = near or sorted(known)[:8]
    return ", ".join(map(repr, near)) + f" … ({len(known)} in all)"


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names that are spelled similarly to ``name``, ignoring case, the most similar first."""
    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(one.casefold(), one)
    return [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.5)]


def said_in_one_line(error: BaseException) -> str:
    """Return the message of an error in one line, or the name of its class where the message is empty."""
    return plain_line(error) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return the reason that reports give for an error: its message, with its class in front where it is unexpected."""
    return str(error) if isinstance(error, UnsuitableError) else f"{type(error).__name__}: {error}"


def is_rank_zero() -> bool:
    """Whether this process has rank zero, the only one that logs, writes and warns."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


_said: set[str] | None = None


def remember_warnings(while_training: bool) -> None:
    """Begin or end a training, during which :func:`warn_once` gives each warning once.

    Python's own record of warnings already shown is reset whenever any code uses ``warnings.catch_warnings``.

    Args:
        while_training: True when a training begins, False when it ends.
    """
    global _said
    _said = set() if while_training else None


def warn_once(message: str, about: str | None = None) -> None:
    """Give a warning from rank zero; during a training only once for each message.

    Args:
        message: the text.
        about: key by which repeated warnings are recognized, where their texts differ. Default: the text.
    """
    if is_rank_zero() and (about or message) not in (_said or ()):
        if _said is not None:
            _said.add(about or message)
        warnings.warn(message, MeasurementWarning, stacklevel=3)


def skipped_on_error(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """Decorator that turns an exception in a measurement into one warning, so that training continues.

    After an exception the decorated function returns None.
    """

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
    """Return an error's class and the line that raised it, a key that stays the same while its text may differ."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    return f"{type(error).__name__} {where}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context in which a :class:`ConfigurationError` ends the process with one line and exit status 2."""
    try:
        yield
    except ValueError as error:
        cause = _configuration_error(error)
        if cause is None:
            raise
        refused(str(cause), error)


def refused(message: str, cause: BaseException | None = None) -> NoReturn:
    """End the process with one line on the standard error and exit status 2, that of wrong usage."""
    sys.stderr.write(f"normgeo: error: {plain(message)}\n")
    raise SystemExit(2) from cause


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Return the ConfigurationError in an error's chain of causes: jsonargparse wraps errors of constructors."""
    if error is None or isinstance(error, ConfigurationError):
        return error
    return _configuration_error(error.__cause__ or error.__context__)
