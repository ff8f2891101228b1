"""The table of results for loggers: its titles, and the results read back from it."""

from __future__ import annotations

from lightning_normgeo.robustness.results.logged_results import COLUMNS, rows_of, table_of


def test_results_are_read_back_from_the_table() -> None:
    result = {name: float(place) for place, name in enumerate(COLUMNS)} | {"attack": "bim", "by_class": {}}
    titles, rows = table_of({"results": [result], "not_evaluated": {"pgd": "no gradient"}})
    assert rows[1] == ["pgd", *[None] * (len(COLUMNS) - 1), "not evaluated: no gradient"]
    table = [dict(zip(titles, row, strict=True)) for row in rows]
    assert rows_of(table) == [{name: result[name] for name in COLUMNS}]


def test_tables_of_early_versions_are_read_too() -> None:
    assert rows_of([{"attack": "bim", "ci_low": 0.5, "note": ""}]) == [{"attack": "bim", "ci_low": 0.5}]
