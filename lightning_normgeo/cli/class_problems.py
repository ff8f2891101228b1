"""Mistakes inside a ``class_path`` block, as the parser reports them: class, argument and value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_normgeo.utilities.one_line_parser import allowed_values

_PROBLEM = re.compile(r"^(?P<indent> *)(?:- )?Problem with given class_path '(?P<path>[^']+)':$", re.MULTILINE)
_REFUSED = re.compile(r"Option '(?P<name>[\w.-]+)' is not accepted|does not accept option '(?P<other>[\w.-]+)'")
WRONG_TYPE = re.compile(r'Parser key "(?P<key>[^"]+)":')
"""Beginning of a message about a value of a wrong type, with its option."""
GIVEN = re.compile(r"(?:Given value|Got value): (.*)")
"""The value in such a message; of a nested one it occurs several times, and the last is the innermost."""
_MISSING = re.compile("has no attribute|not a subclass|import path")


@dataclass(frozen=True)
class ClassProblem:
    """A block with ``class_path`` that the parser refused.

    Attributes:
        path: The class path that was given.
        detail: The parser's explanation, of one or more lines.
    """

    path: str
    detail: str

    @property
    def name(self) -> str:
        """Name of the class, without its module."""
        return self.path.rpartition(".")[2]

    @property
    def unknown(self) -> str:
        """Name of an argument that the class does not have; empty if that is not the problem."""
        found = _REFUSED.search(self.detail)
        return "" if found is None else found["name"] or found["other"]

    @property
    def argument(self) -> str:
        """Name of an argument whose value has a wrong type; empty if that is not the problem."""
        found = WRONG_TYPE.search(self.detail)
        return "" if found is None else found["key"]

    @property
    def value(self) -> str:
        """Value of :attr:`argument` as it was given."""
        given = GIVEN.findall(self.detail)
        return given[-1] if given else ""

    @property
    def expected(self) -> str:
        """Sentence about the values that :attr:`argument` can have; empty if they are not known."""
        return allowed_values(self.detail)

    @property
    def reason(self) -> str:
        """Reason why a class cannot be built, in one line; empty if there is no class of this name."""
        return "" if _MISSING.search(self.detail) else " ".join(self.detail.split())


def class_problem(message: str) -> ClassProblem | None:
    """Return the innermost block that a parser's message complains about; None if it is about no block.

    A union of types has a complaint for each of its members. The first is about the class that was given; those behind
    it are about the base class, which the parser tries as well.

    Args:
        message: The parser's message, whose indentation shows what belongs to which block.
    """
    found = _PROBLEM.search(message)
    if found is None:
        return None
    detail = _block(message[found.end() + 1 :], len(found["indent"]))
    return class_problem(detail) or ClassProblem(found["path"], detail)


def _block(text: str, indent: int) -> str:
    """Return the first lines of a text that are indented by more than ``indent``."""
    lines = []
    for line in text.splitlines():
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        lines.append(line)
    return "\n".join(lines)
