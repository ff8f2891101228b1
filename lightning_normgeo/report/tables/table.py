"""What a table of a report is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what its column is sorted by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """One table: what it shows, how to read it, its columns, and its rows of as many cells."""

    anchor: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]


def text(value: str) -> Cell:
    """Return a cell of plain text."""
    return Cell(value, value)


def number(value: float, form: str = ".4g") -> Cell:
    """Return a cell with a number."""
    return Cell(f"{value:{form}}", value)


def is_number(table: Table, column: int) -> bool:
    """Whether a column has numbers and nothing else, but for cells that are empty."""
    return all(not isinstance(row[column].value, str) or not row[column].value for row in table.rows)
