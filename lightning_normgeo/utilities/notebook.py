"""Representations of results in notebooks: one line in a prompt, a table in HTML, and a pandas data frame."""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_normgeo.errors import ConfigurationError

LINE = 120
"""The largest number of characters of a value in a prompt."""
_ROWS = 60
"""The largest number of rows of a table in HTML."""
_CELL = "padding: 0.15em 0.8em; text-align: {side}; border: none; background: none; color: inherit"
_RULE = "border-bottom: 1px solid currentColor"


def one_line(text: str, length: int = LINE) -> str:
    """Return a text as one line of limited length, without control characters, which a terminal could interpret."""
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return text if len(text) <= length else f"{text[: length - 2]}…{text[-1]}"


def shortened(path: str, length: int = 60) -> str:
    """Return a path in quotes, of a long path only its end."""
    return repr(path if len(path) <= length else f"…{path[1 - length :]}")


def summary(kind: str, parts: Sequence[str], end: str = "") -> str:
    """Return ``Kind(part, part, …, end)`` in one line, with as many parts as fit.

    Args:
        kind: name of the class.
        parts: descriptions of the parts.
        end: text before the closing parenthesis.
    """
    for count in range(len(parts), 0, -1):
        more = "" if count == len(parts) else f", … {len(parts)} in all"
        text = f"{kind}({', '.join(parts[:count])}{more}{end})"
        if len(text) <= LINE:
            return one_line(text)
    return one_line(f"{kind}({', '.join(parts[:1])}{end})")


@dataclass(frozen=True)
class NotebookTable:
    """A table with named columns.

    Attributes:
        caption: title of the table.
        columns: names of the columns.
        rows: rows with one cell per column: a text, number or None.
        notes: lines of text below the rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def to_html(self) -> str:
        """Return the first 60 rows in HTML, with all text escaped and in the colors of the surrounding page."""
        sides = [_style(next((cell for cell in cells if cell is not None), "")) for cells in self._by_column()]
        head = "".join(
            f'<th style="{side}; {_RULE}">{html_escaped(name)}</th>'
            for name, side in zip(self.columns, sides, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows[:_ROWS])
        hidden = len(self.rows) - _ROWS
        notes = list(self.notes)
        if hidden > 0:
            notes.insert(0, f"… {hidden} more rows: print it, or use to_frame()")
        below = "".join(f'<div style="margin: 0.3em 0">{html_escaped(note)}</div>' for note in notes)
        title = f'<div style="margin: 0.3em 0; font-weight: bold">{html_escaped(self.caption)}</div>'
        table = f'<table style="border-collapse: collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return f'<div style="max-width: 100%; overflow-x: auto">{title}{table}{below}</div>'

    def _by_column(self) -> list[tuple[object, ...]]:
        return list(zip(*self.rows, strict=True)) or [()] * len(self.columns)

    def to_frame(self, index: str) -> Any:
        """Return the rows as a pandas data frame.

        Args:
            index: name of the column that becomes the index.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        columns = {name: [row[k] for row in self.rows] for k, name in enumerate(self.columns)}
        return pandas().DataFrame(columns, columns=list(self.columns)).set_index(index)


def curves_frame(curves: Mapping[str, Sequence[tuple[int, float]]], what: str) -> Any:
    """Return curves as a pandas data frame with one row per step and one column per curve.

    Args:
        curves: points (step, value) of each curve, by its name; the last of several points at one step counts.
        what: name of the columns' axis, such as "metric".

    Raises:
        ConfigurationError: if pandas is not installed.
    """
    module = pandas()
    columns = {name: module.Series(dict(points), dtype="float64") for name, points in curves.items()}
    steps = sorted({step for points in curves.values() for step, _ in points})
    index = module.Index(steps, name="step", dtype="int64")
    return module.DataFrame(columns, index=index, columns=module.Index(columns, name=what, dtype="object"))


def pandas() -> Any:
    """Return the module pandas, an optional dependency.

    Raises:
        ConfigurationError: if pandas is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ConfigurationError("to_frame() makes a data frame of pandas: pip install pandas.") from error


def html_escaped(text: str) -> str:
    """Return a text escaped for HTML, with question marks in place of characters that cannot be encoded."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _style(cell: object) -> str:
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    return _CELL.format(side="right" if is_number else "left")


def _cell(cell: object) -> str:
    if cell is None or cell is False:
        text = ""
    elif cell is True:
        text = "yes"
    else:
        text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return f'<td style="{_style(cell)}">{html_escaped(text)}</td>'
