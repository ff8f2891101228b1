"""Values as notebooks show them: a table in HTML, and a data frame of pandas where that is installed."""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_normgeo.errors import ConfigurationError

LINE = 120
"""How many characters a value has in a prompt."""
_ROWS = 60
_CELL = "padding: 0.15em 0.8em; text-align: {side}; border: none; background: none; color: inherit"
_RULE = "border-bottom: 1px solid currentColor"


def one_line(text: str, length: int = LINE) -> str:
    """A text in one line of limited length, without what a terminal would take for a command."""
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return text if len(text) <= length else f"{text[: length - 2]}…{text[-1]}"


def shortened(path: str, length: int = 60) -> str:
    """A path as a literal, of a long one its end."""
    return repr(path if len(path) <= length else f"…{path[1 - length :]}")


def summary(kind: str, parts: Sequence[str], end: str = "") -> str:
    """``Kind(part, part, …)`` in one line, with as many parts as there is room for, and how it ends."""
    for count in range(len(parts), 0, -1):
        more = "" if count == len(parts) else f", … {len(parts)} in all"
        text = f"{kind}({', '.join(parts[:count])}{more}{end})"
        if len(text) <= LINE:
            return one_line(text)
    return one_line(f"{kind}({', '.join(parts[:1])}{end})")


@dataclass(frozen=True)
class Table:
    """Rows under names.

    Attributes:
        caption: what they are.
        columns: the names.
        rows: one entry for each column; texts, numbers and None.
        notes: below the rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def to_html(self) -> str:
        """The table in HTML, all text escaped, in the colours of the page around it; of many rows the first."""
        sides = [_style(next((cell for cell in cells if cell is not None), "")) for cells in self._by_column()]
        head = "".join(
            f'<th style="{side}; {_RULE}">{escaped(name)}</th>' for name, side in zip(self.columns, sides, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows[:_ROWS])
        hidden = len(self.rows) - _ROWS
        notes = [*([f"… {hidden} more rows: print it, or use to_frame()"] if hidden > 0 else []), *self.notes]
        below = "".join(f'<div style="margin: 0.3em 0">{escaped(note)}</div>' for note in notes)
        title = f'<div style="margin: 0.3em 0; font-weight: bold">{escaped(self.caption)}</div>'
        table = f'<table style="border-collapse: collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return f'<div style="max-width: 100%; overflow-x: auto">{title}{table}{below}</div>'

    def _by_column(self) -> list[tuple[object, ...]]:
        return list(zip(*self.rows, strict=True)) or [()] * len(self.columns)

    def to_frame(self, index: str) -> Any:
        """The rows as a data frame of pandas.

        Args:
            index: the column whose values name the rows.

        Raises:
            ConfigurationError: where pandas is not installed.
        """
        columns = {name: [row[k] for row in self.rows] for k, name in enumerate(self.columns)}
        return pandas().DataFrame(columns, columns=list(self.columns)).set_index(index)


def curves_frame(curves: Mapping[str, Sequence[tuple[int, float]]], what: str) -> Any:
    """Curves as a data frame of pandas, a row for each step and a column for each curve.

    Args:
        curves: by name, points (step, value); of several at one step the last counts.
        what: the columns are.

    Raises:
        ConfigurationError: where pandas is not installed.
    """
    module = pandas()
    columns = {name: module.Series(dict(points), dtype="float64") for name, points in curves.items()}
    steps = sorted({step for points in curves.values() for step, _ in points})
    index = module.Index(steps, name="step", dtype="int64")
    return module.DataFrame(columns, index=index, columns=module.Index(columns, name=what, dtype="object"))


def pandas() -> Any:
    """The module, which nothing else here needs.

    Raises:
        ConfigurationError: where it is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ConfigurationError("to_frame() makes a data frame of pandas: pip install pandas.") from error


def escaped(text: str) -> str:
    """A text for HTML, also one that no encoding has."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _style(cell: object) -> str:
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    return _CELL.format(side="right" if is_number else "left")


def _cell(cell: object) -> str:
    text = "" if cell is None or cell is False else "yes" if cell is True else str(cell)
    text = f"{cell:.4g}" if isinstance(cell, float) else text
    return f'<td style="{_style(cell)}">{escaped(text)}</td>'
