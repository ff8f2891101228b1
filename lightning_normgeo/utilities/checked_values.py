"""Settings as users give them: plain values, or an error that says what was given, what is allowed and what to do."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from lightning_normgeo.errors import ConfigurationError, near_names

_T = TypeVar("_T")
_FEW = 20
"""How many names a message lists."""
_LONG = 80
"""How many characters of a value a message shows."""


class UnknownNameError(ConfigurationError, KeyError):
    """A name that nothing has; a KeyError for those who look things up."""

    __str__ = ConfigurationError.__str__  # that of KeyError shows its message as a literal


class _Short(reprlib.Repr):
    """Values in short: of collections the first entries, of tensors and arrays the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 8
        self.maxstring = self.maxother = _LONG

    def repr1(self, x: Any, level: int) -> str:
        """Return one value, at a depth."""
        if isinstance(x, type):
            return f"the class {x.__name__}"
        if hasattr(x, "shape") and hasattr(x, "dtype") and getattr(x, "ndim", None):
            return f"{type(x).__name__} of shape {tuple(x.shape)}"
        return super().repr1(x, level)


def shown(value: object) -> str:
    """A value as a message shows it: one line, not too long."""
    text = " ".join(_Short().repr(value).split())
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message: torch's go on for a page."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(" .:")


def nearest(name: object, known: Iterable[str], meanings: Mapping[str, str] | None = None) -> str:
    """What a wrong name is nearest to, and all that there are, or the first of many.

    Args:
        name: what was given.
        known: the names.
        meanings: of these, in words, which are looked at as well.
    """
    meanings = {one: (meanings or {}).get(one, "") for one in known}
    near = _near(name, meanings) if isinstance(name, str) else []
    hint = f"did you mean {' or '.join(map(_called(meanings), near[:3]))}? Known" if near else "known"
    listed = list(meanings) if len(meanings) <= _FEW else (near + [n for n in meanings if n not in near])[:8]
    more = f", … ({len(meanings)} in all)" if len(meanings) > len(listed) else ""
    return f"{hint} are {', '.join(map(repr, listed)) or 'none'}{more}"


def _called(meanings: Mapping[str, str]) -> Any:
    return lambda name: f"{name!r} ({meanings[name]})" if meanings[name] else repr(name)


def _near(name: str, meanings: Mapping[str, str]) -> list[str]:
    """The names that are near in letters, else those whose meaning contains what was said."""
    near = near_names(name, meanings)
    word = "".join(letter for letter in name.casefold() if letter.isalnum())
    said = {known: "".join(filter(str.isalnum, meaning.casefold())) for known, meaning in meanings.items()}
    return near or [known for known, meaning in said.items() if len(word) > 2 and word in meaning]


def plain(value: Any) -> Any:
    """Python's numbers and lists from those of numpy and torch; whatever else as it is."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return float(value) if isinstance(value, Fraction) else value


def one_or_more(value: Any) -> Any:
    """A list of what was given as one or several; a set in order, as that of a set differs between processes."""
    value = plain(value)
    if value is None or isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return value if value is None else [value]
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)


def strings(option: str, value: Any, what: str) -> list[str]:
    """One string or several, as a list.

    Args:
        option: its name.
        value: what was given.
        what: the strings are, with an example.

    Raises:
        ConfigurationError: for anything else.
    """
    found = one_or_more(value)
    if found is None or not all(isinstance(entry, str) for entry in found):
        raise ConfigurationError(f"{option}={shown(value)} must be {what}, or a list of these.")
    return list(found)


def numbers_of(option: str, value: Any, what: str) -> tuple[float, ...] | None:
    """One number or several that are finite, as a tuple, of an array of any shape; None stays what it is.

    Raises:
        ConfigurationError: for anything else.
    """
    found = one_or_more(value.reshape(-1) if hasattr(value, "reshape") else value)
    if found is not None and not all(is_number(entry) and math.isfinite(entry) for entry in found):
        raise ConfigurationError(f"{option}={shown(value)} must be {what}, without quotes.")
    return None if found is None else tuple(map(float, found))


def is_number(value: object) -> bool:
    """Whether a value is a number, and no truth value or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def whole(option: str, value: Any, least: int, advice: str = "") -> int:
    """A whole number, also one of numpy or torch.

    Raises:
        ConfigurationError: for anything else, or less than ``least``.
    """
    found = plain(value)
    if type(found) is not int or found < least:
        raise ConfigurationError(f"{option}={shown(value)} must be an integer, at least {least}. {advice}".rstrip())
    return found


def flag(option: str, value: Any) -> bool:
    """True or False.

    Raises:
        ConfigurationError: for anything else: text is always true.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{option}={shown(value)} must be True or False.")
    return found


def entry_of(option: str, name: Any, known: Mapping[str, _T], meanings: Mapping[str, str] | None = None) -> _T:
    """What is known by a name.

    Args:
        option: what the name was given as.
        name: what was given.
        known: by name.
        meanings: of the names, in words, where these help.

    Raises:
        ConfigurationError: for another name, with the nearest and all there are.
    """
    if not isinstance(name, str) or name not in known:
        raise ConfigurationError(f"{option}={shown(name)} is unknown; {nearest(name, known, meanings)}.")
    return known[name]
