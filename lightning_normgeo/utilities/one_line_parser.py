"""Parser of the commands without a Trainer, with one-line errors."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from typing import NoReturn

from jsonargparse import ArgumentParser

from lightning_normgeo.errors import nearest_names, refused

_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
_MISSING = re.compile(r"arguments are required: (.+)")
_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":(?P<reason>.*?)(?:Got|Given) value: (?P<value>.*)', re.DOTALL)
_TYPE = re.compile(r"Expected an? <class '(\w+)'>|Expected an? typing\.Literal\[(.*?)\]")
TYPE_WORDS = {type(None): "null", int: "an integer", float: "a number", bool: "true or false", str: "text"}
"""Types of options as messages name them."""


def allowed_values(message: str) -> str:
    """Return a sentence about the values that an option can have; empty if they are not known.

    Args:
        message: What a parser says about a value, with the types it expected.
    """
    names = {kind.__name__: word for kind, word in TYPE_WORDS.items()}
    found = [choices or names.get(kind, "") for kind, choices in _TYPE.findall(message)]
    words = [word for word in dict.fromkeys(found) if word]
    return f"It has to be {' or '.join(words)}." if words else ""


class OneLineArgumentParser(ArgumentParser):
    """A parser that explains a mistake in one line, instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line about the mistake and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        refused(f"{self._explained(message)} See {self.prog} --help.")

    def _explained(self, message: str) -> str:
        unknown, missing, value = (kind.search(message) for kind in (_UNKNOWN, _MISSING, _VALUE))
        if unknown is not None:
            option = unknown[1].partition("=")[0]
            shown = (action for action in self._actions if action.help != SUPPRESS)
            known = [name for action in shown for name in action.option_strings if re.fullmatch(r"--[\w.-]+", name)]
            return f"{option} is no option of {self.prog}. Nearest: {nearest_names(option, known)}."
        if missing is not None:
            return f"{self.prog} needs {missing[1].strip()}."
        if value is not None:
            return (
                f"--{value['key']} {value['value'].strip()} cannot be used. {allowed_values(value['reason'])}".strip()
            )
        return f"{' '.join(message.split())}."
