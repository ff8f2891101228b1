"""Tables of a report and their cells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Text that the cell shows.
        value: Number or text by which its column is sorted; empty for a missing value.
    """

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        anchor: Name of the table in links.
        title: Title above the table.
        caption: Text on what is shown and how to read it.
        columns: Titles of the columns.
        rows: Rows, each with a cell for every column.
    """

    anchor: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]


def text(value: str) -> Cell:
    """Return a cell with a text."""
    return Cell(value, value)


def number(value: float, form: str = ".4g") -> Cell:
    """Return a cell with a number, shown in a format such as ``.4g``."""
    return Cell(f"{value:{form}}", value)


def holds_number(table: Table, column: int) -> bool:
    """Whether all cells of a column are numbers or missing values."""
    return all(not isinstance(row[column].value, str) or not row[column].value for row in table.rows)
