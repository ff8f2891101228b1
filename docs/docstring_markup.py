"""Extension of griffe: docstrings with Sphinx's roles and tables become Markdown for the API reference.

Names with a page in the reference become links, formulas become ``$…$``, and simple tables become Markdown tables.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

_API = Path(__file__).parent / "api"
_ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^\.\. math:: (.+(?:\n +.+)*)", re.MULTILINE)
_RULE = re.compile(r"^\s*=+(?:\s+=+)+\s*$")


@cache
def documented() -> dict[str, str]:
    """Return the full path of each entry in the API reference, by full path and by short name."""
    paths = [path for page in sorted(_API.glob("*.md")) for path in _ENTRY.findall(page.read_text(encoding="utf-8"))]
    return {path.rpartition(".")[2]: path for path in paths} | {path: path for path in paths}


def _linked(match: re.Match[str]) -> str:
    name = " ".join(match[1].split())
    short = name.rpartition(".")[2]
    found = documented()
    path = found.get(name) or (found.get(short) if name == short or name.startswith("lightning_normgeo.") else None)
    return f"[`{short}`][{path}]" if path else f"`{short}`"


def _cells(line: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in re.split(r" {2,}", line.strip())) + " |"


def _tables(text: str) -> str:
    """Replace simple tables, whose rows lie between lines of ``=``; without a header the header is empty."""
    lines, found = text.splitlines(), []
    rules = [number for number, line in enumerate(lines) if _RULE.match(line)]
    position = 0
    while rules:
        start = rules.pop(0)
        columns = len(lines[start].split())
        end = rules.pop(0)
        header = ["|" + " |" * columns]
        if rules and lines[end + 1 : rules[0]] and all(line.strip() for line in lines[end + 1 : rules[0]]):
            header, end, first = [_cells(lines[start + 1])], rules.pop(0), end + 1
        else:
            first = start + 1
        rows = [_cells(line.replace(r"\|", "|")) for line in lines[first:end]]
        found += [*lines[position:start], *header, "|" + "---|" * columns, *rows]
        position = end + 1
    return "\n".join([*found, *lines[position:]])


def markdown(text: str) -> str:
    """Return a docstring as Markdown."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    if any(_RULE.match(line) for line in text.splitlines()):
        text = _tables(text)
    text = _BLOCK.sub(lambda match: f"$$\n{' '.join(match[1].split())}\n$$", text)
    return _MATH.sub(lambda match: f"${' '.join(match[1].split())}$", _ROLE.sub(_linked, text))


class DocstringMarkup(griffe.Extension):
    """Converts each docstring after its object was read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
