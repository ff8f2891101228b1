"""Tables of benchmark results, for the terminal and for Markdown."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table


class Result(NamedTuple):
    """Table of benchmark results."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def show(self, console: Console) -> None:
        """Print the table to a terminal."""
        table = Table(*(Column(name, justify="right") for name in self.columns), title=self.title)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def put(self, console: Console, markdown: bool) -> None:
        """Print the table to a terminal, or as Markdown for a document."""
        if markdown:
            print(self.markdown())
        else:
            self.show(console)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
