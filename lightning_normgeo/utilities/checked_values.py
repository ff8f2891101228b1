"""Checks of settings: plain Python values, or an error that names what was given, what is allowed and what to do."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from lightning_normgeo.errors import ConfigurationError, near_names

_T = TypeVar("_T")
_FEW = 20
"""The largest number of names of which a message lists all."""
_LONG = 80
"""The largest number of characters of a value in a message."""


class UnknownNameError(ConfigurationError, KeyError):
    """An unknown name; also a KeyError, as lookups in a mapping raise."""

    __str__ = ConfigurationError.__str__  # KeyError would show the message in quotes


class _Short(reprlib.Repr):
    """Short representation of values: the first entries of collections, the shape of tensors and arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 8
        self.maxstring = self.maxother = _LONG

    def repr1(self, x: Any, level: int) -> str:
        """Return the representation of one value at a depth of nesting."""
        if isinstance(x, type):
            return f"the class {x.__name__}"
        if hasattr(x, "shape") and hasattr(x, "dtype") and getattr(x, "ndim", None):
            return f"{type(x).__name__} of shape {tuple(x.shape)}"
        return super().repr1(x, level)


def short_repr(value: object) -> str:
    """Return a value as messages show it, in one line of at most 80 characters."""
    text = " ".join(_Short().repr(value).split())
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, as torch's messages may fill a page."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(" .:")


def nearest(name: object, known: Iterable[str], meanings: Mapping[str, str] | None = None) -> str:
    """Return a hint for an unknown name: "did you mean …? Known are …", with at most 20 names.

    Args:
        name: the value that was given.
        known: the names there are.
        meanings: descriptions of names, which are searched and shown as well.
    """
    meanings = {one: (meanings or {}).get(one, "") for one in known}
    near = _near(name, meanings) if isinstance(name, str) else []
    hint = "known"
    if near:
        suggestions = [f"{one!r} ({meanings[one]})" if meanings[one] else repr(one) for one in near[:3]]
        hint = f"did you mean {' or '.join(suggestions)}? Known"
    listed = list(meanings)
    if len(meanings) > _FEW:
        listed = [*near, *(one for one in meanings if one not in near)][:8]
    more = f", … ({len(meanings)} in all)" if len(meanings) > len(listed) else ""
    return f"{hint} are {', '.join(map(repr, listed)) or 'none'}{more}"


def _near(name: str, meanings: Mapping[str, str]) -> list[str]:
    """Return the names that are spelled similarly, or else those whose description contains the given word."""
    near = near_names(name, meanings)
    word = _letters(name)
    return near or [known for known, meaning in meanings.items() if len(word) > 2 and word in _letters(meaning)]


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def plain_values(value: Any) -> Any:
    """Convert numbers and arrays of numpy and torch, and fractions, to Python's numbers and lists.

    Lists and tuples are converted entry by entry. Other values are returned unchanged, as are subclasses of list and
    tuple.
    """
    if hasattr(value, "tolist"):
        return plain_values(value.tolist())
    if type(value) in (list, tuple):
        return type(value)(map(plain_values, value))
    return float(value) if isinstance(value, Fraction) else value


def one_or_more(value: Any) -> Any:
    """Return one value or several as a list, and None as None.

    Sets are sorted, as their order may differ between processes.
    """
    value = plain_values(value)
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return [value]
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)


def strings(option: str, value: Any, what: str) -> list[str]:
    """Return a setting that is one string or several, as a list.

    Args:
        option: name of the setting.
        value: the value that was given.
        what: noun for the allowed strings, with an example, for the message.

    Raises:
        ConfigurationError: for anything else.
    """
    found = one_or_more(value)
    if found is None or not all(isinstance(entry, str) for entry in found):
        raise ConfigurationError(f"{option}={short_repr(value)} must be {what}, or a list of these.")
    return list(found)


def numbers_of(option: str, value: Any, what: str) -> tuple[float, ...] | None:
    """Return a setting that is one finite number or several, or an array of any shape, as a tuple; None stays None.

    Args:
        option: name of the setting.
        value: the value that was given.
        what: noun for the allowed values, for the message.

    Raises:
        ConfigurationError: for anything else.
    """
    found = one_or_more(value.reshape(-1) if hasattr(value, "reshape") else value)
    if found is not None and not all(is_number(entry) and math.isfinite(entry) for entry in found):
        raise ConfigurationError(f"{option}={short_repr(value)} must be {what}, without quotes.")
    return None if found is None else tuple(map(float, found))


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, but neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def whole(option: str, value: Any, least: int, advice: str = "") -> int:
    """Return a setting that is a whole number, of Python, numpy or torch.

    Args:
        option: name of the setting.
        value: the value that was given.
        least: the smallest allowed number.
        advice: sentence at the end of the message.

    Raises:
        ConfigurationError: for anything else, or less than ``least``.
    """
    found = plain_values(value)
    if type(found) is not int or found < least:
        raise ConfigurationError(
            f"{option}={short_repr(value)} must be an integer, at least {least}. {advice}".rstrip()
        )
    return found


def flag(option: str, value: Any) -> bool:
    """Return a setting that is True or False, of Python, numpy or torch.

    Args:
        option: name of the setting.
        value: the value that was given.

    Raises:
        ConfigurationError: for anything else, also for text: ``"false"`` would count as true.
    """
    found = plain_values(value)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{option}={short_repr(value)} must be True or False.")
    return found


def entry_of(option: str, name: Any, known: Mapping[str, _T], meanings: Mapping[str, str] | None = None) -> _T:
    """Return the entry of a table by its name.

    Args:
        option: name of the setting.
        name: the value that was given.
        known: the table.
        meanings: descriptions of the names, to find and explain similar ones. Default: none.

    Raises:
        ConfigurationError: for an unknown name; the message lists similar names and the known ones.
    """
    if not isinstance(name, str) or name not in known:
        raise ConfigurationError(f"{option}={short_repr(name)} is unknown; {nearest(name, known, meanings)}.")
    return known[name]
