"""Results of an evaluation as loggers show them: keys, titles of columns for people, and the way back to results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = (
    "attack",
    "accuracy",
    "ci_low",
    "ci_high",
    "accuracy_drop",
    "correct",
    "n",
    "eps",
    "std",
    "loss",
    "linf",
    "l2",
)
"""Columns of the table of results."""


RESULTS, EXAMPLES = "results", "examples"
"""Second parts of the keys of the table and of the example images."""
_NOTE = "note"
"""Last column: the reason if an attack was not evaluated."""
TITLES = {
    "attack": "attack",
    "accuracy": "accuracy",
    "ci_low": "95 % interval from",
    "ci_high": "95 % interval to",
    "accuracy_drop": "accuracy lost",
    "correct": "samples right",
    "n": "samples",
    "eps": "radius ε",
    "std": "standard deviation of noise",
    "loss": "mean loss",
    "linf": "largest change, l∞",
    "l2": "largest change, l2",
    _NOTE: "note",
}
"""Titles of the table by the names of results."""
_NAMES = {title: name for name, title in TITLES.items()}
ORDER = (
    "Arrows point to predicted classes. From left: the image under each attack in this order, then the change that "
    "each attack made, at full contrast."
)
"""Text on how to read an example image."""


def table_of(document: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the titles and rows of the table of results, and of attacks that were not evaluated, with the reason.

    Args:
        document: Content of ``robustness.json``.
    """
    rows = [[*(row[column] for column in COLUMNS), ""] for row in document["results"]]
    for attack, why in document["not_evaluated"].items():
        rows.append([attack, *[None] * (len(COLUMNS) - 1), f"not evaluated: {why}"])
    return list(TITLES.values()), rows


def detail_tables(document: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return the titles and rows of the tables of details that an evaluation has, by the second part of their keys.

    Args:
        document: Content of ``robustness.json``, or its part of a test loader.
    """
    found = {
        "worst": (
            ["worst case", "attack", "breaks", "takes", "alone"],
            [
                [case["name"], attack, *(case[count][attack] for count in ("broken", "gained", "alone"))]
                for case in document.get("worst", [])
                for attack in case["attacks"]
            ],
        ),
        "radii": (
            ["attack", "norm", "median radius", "95 % interval from", "95 % interval to", "broken", "samples"],
            [
                [name, *(one[key] for key in ("norm", "median", "ci_low", "ci_high", "broken", "n"))]
                for name, one in document.get("radii", {}).items()
            ],
        ),
        "corruptions": (
            ["corruption", "accuracy"],
            [[kind, value] for kind, value in document.get("corruptions", {}).get("by_kind", {}).items()],
        ),
        "sanity": (
            ["check", "outcome", "numbers"],
            [list(check.values()) for check in document.get("sanity", [])],
        ),
        "verified": (
            ["attack", "samples", "repeated near the boundary", "changed", "repeated at random", "changed of these"],
            [[name, *counts.values()] for name, counts in document.get("verified", {}).items()],
        ),
    }
    return {name: table for name, table in found.items() if table[1]}


def rows_of(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results in the rows of a table, by name; names may also be titles, as in early versions."""
    named = [{_NAMES.get(title, title): value for title, value in row.items()} for row in table]
    return [{name: value for name, value in row.items() if name != _NOTE} for row in named if not row.get(_NOTE)]
