"""Reports as text: Markdown and comma-separated values; LaTeX is imported from its own module."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.formats.latex import as_latex as as_latex
from lightning_normgeo.report.run_settings import number_of
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, evaluations_of
from lightning_normgeo.report.tables.table import Table, holds_number
from lightning_normgeo.utilities.plain_text import plain

_COLUMNS = ("run", "folder", "group", "complete", "attack", "correct", "n", "accuracy", "ci_low", "ci_high")
_DROP_COLUMNS = ("drop", "drop_ci_low", "drop_ci_high", "only_clean", "only_attack")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Beginnings of texts that spreadsheets take for a formula."""
_STRENGTH_COLUMNS = ("eps", "std", "loss", "linf", "l2")


def as_markdown(title: str, tables: Sequence[Table]) -> str:
    """Return tables as Markdown, in GitHub's syntax.

    Args:
        title: Title of the report.
        tables: Tables of the report.
    """
    return "\n".join([f"# {_escaped(title)}", *(_markdown_section(table) for table in tables)])


def markdown_table(table: Table) -> str:
    """Return the columns and rows of a table as Markdown, without its title and caption."""
    marks = ["---:" if holds_number(table, k) else "---" for k in range(len(table.columns))]
    lines = [map(_escaped, table.columns), marks, *([_escaped(cell.text) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(runs: Sequence[Run]) -> str:
    """Return comma-separated values in full precision, with a row for each run and attack.

    The columns are the settings that differ, counts, accuracies and drops. Accuracies and drops are shares between 0
    and 1. ``drop_ci_low`` and ``drop_ci_high`` are the ends of the paired 95 % interval, and ``only_clean`` and
    ``only_attack`` the counts from which it is computed; all four are empty if there are no per-sample results.
    Settings with the name of another column get the prefix ``setting.``. Runs without an evaluation have no row.

    Args:
        runs: Runs of the report.
    """
    evaluations = evaluations_of(runs)
    own = (*_COLUMNS, *_DROP_COLUMNS, *_STRENGTH_COLUMNS)
    settings = {name: f"setting.{name}" if name in own else name for run in runs for name in run.differing}
    file = io.StringIO()
    columns = [*_COLUMNS[:4], *settings.values(), *own[4:]]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    for evaluation in evaluations:
        chosen = {settings[name]: value for name, value in evaluation.run.differing.items()}
        for values in _values(evaluation):
            row = {**chosen, **values}
            writer.writerow([_cell(row.get(column)) for column in columns])
    return file.getvalue()


def _cell(value: Any) -> Any:
    """Return a value that a spreadsheet reads as a text or a number, never as a formula.

    A text that begins like a formula gets an apostrophe in front, which spreadsheets do not show; numbers do not.
    """
    text = plain(value) if isinstance(value, str | Path) else ""
    if text.startswith(_FORMULA) and number_of(text) is None:
        return f"'{text}"
    return text or value


def _values(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield the values by column for each attack of an evaluation."""
    run = evaluation.run
    which = {"run": run.name, "folder": run.record.folder, "group": run.group, "complete": run.record.complete}
    for attack, row in evaluation.rows.items():
        drop = evaluation.drop(attack) or {}
        yield {
            **which,
            **{name: row.get(name) for name in (*_COLUMNS[4:], *_STRENGTH_COLUMNS)},
            "drop": row["accuracy_drop"],
            "drop_ci_low": drop.get("ci_low"),
            "drop_ci_high": drop.get("ci_high"),
            "only_clean": drop.get("only_second"),
            "only_attack": drop.get("only_first"),
        }


def _markdown_section(table: Table) -> str:
    return f"\n## {_escaped(table.title)}\n\n{_escaped(table.caption)}\n\n{markdown_table(table)}\n"


def _escaped(text: str) -> str:
    """Return Markdown that shows a text; underscores inside a word mean nothing in Markdown and stay."""
    text = re.sub(r"([\\`*<|$~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;))", r"\\\1", re.sub(r"\s+", " ", text))
    return text.replace("](", "]\\(")
