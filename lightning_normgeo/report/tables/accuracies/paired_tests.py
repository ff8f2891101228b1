"""Tables of paired differences between runs: McNemar's test on the same samples, and means over several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.setting_roles import is_norm
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, attacks_of
from lightning_normgeo.report.tables.accuracies.run_pairs import Contrast, Pair, contrasts_of
from lightning_normgeo.report.tables.cells import NOTHING, anchor, interval, named, percent, points, sentences
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.robustness.results.statistics.statistics import holm, mean_interval
from lightning_normgeo.utilities.attack_names import attack_title

_TABLES, _ROWS = 6, 50
"""Largest number of tables, and of the rows of each."""
_MEAN = "mean of "
"""Beginning of the seed's cell in a row with the mean of several pairs."""
_LAST_NAME = 2
"""Index in ``_COLUMNS`` of the last column that only tells rows apart."""
_LEAST = 1e-300
"""A smaller p-value is shown as smaller than this."""
_COLUMNS = ["compared", "among", "seed", "attack", "accuracy", "difference", "won", "lost", "n", "p", "p (Holm)"]
_READ = (
    "Accuracy of the reference → of what is compared with it, and their difference in percentage points, with a 95 % "
    "interval for paired samples (Bonett, Price 2012). Won and lost: samples that only the compared network, or only "
    "the reference, gets right."
)
_TESTS = (
    "p: McNemar's exact test of won against lost; p (Holm): adjusted for all tests of this table. A test is about two "
    "networks, not about two ways to train: other seeds give other networks."
)
_SEVERAL_PAIRS = "Rows of several pairs: mean of the differences, Student's 95 % interval over pairs, counts summed."
_TOGETHER = "The runs differ in {settings} at once: a difference cannot be put down to one of them."


@dataclass(frozen=True)
class _Outcome:
    """The comparisons of one contrast under one attack.

    Attributes:
        contrast: The contrast.
        attack: Name of the attack.
        pairs: The pairs of evaluations that could be compared.
        found: Result of the comparison of each pair; see :meth:`Evaluation.against`.
    """

    contrast: Contrast
    attack: str
    pairs: list[Pair]
    found: list[dict[str, Any]]


def paired_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return a table for each setting in which runs differ that are otherwise equal; see :func:`contrasts_of`."""
    contrasts = contrasts_of(evaluations)
    shown = [_table(settings, found) for settings, found in list(contrasts.items())[:_TABLES]]
    left_out = list(contrasts)[_TABLES:]
    if left_out:
        names = ", ".join(name for settings in left_out for name in settings)
        note = f"Settings without a table, beyond the first {_TABLES}: {names}."
        shown[-1] = replace(shown[-1], caption=sentences(shown[-1].caption, note))
    return shown


def _table(settings: Sequence[str], contrasts: Sequence[Contrast]) -> Table:
    """Return the table of the contrasts by one setting, or by several settings at once."""
    outcomes, refused = _outcomes(contrasts)
    adjusted = iter(holm([one["p_value"] for outcome in outcomes for one in outcome.found]))
    several = any(len(outcome.found) > 1 for outcome in outcomes)
    rows = [row for outcome in outcomes for row in _rows(outcome, adjusted)]
    rows, cut = _cut(rows)
    columns, cells = _without_empty(rows)
    together = _TOGETHER.format(settings=named(settings)) if len(settings) > 1 else ""
    names = list(dict.fromkeys(contrast.name for contrast in contrasts))
    subject = names[0] if len(names) == 1 else _titled(settings)
    tests = _TESTS if "p" in columns else ""
    caption = sentences(_READ, _SEVERAL_PAIRS if several else "", tests, together, cut, *refused)
    name = "paired" if len(settings) > 1 else anchor("paired", *settings)
    return Table(name, f"Paired differences: {subject}", caption, columns, cells)


def _outcomes(contrasts: Sequence[Contrast]) -> tuple[list[_Outcome], list[str]]:
    """Return the comparisons by contrast and attack, and sentences about the pairs that could not be compared."""
    outcomes, refused = [], dict[str, list[str]]()
    for contrast in contrasts:
        for attack in attacks_of(pair.first for pair in contrast.pairs):
            outcome = _Outcome(contrast, attack, [], [])
            for pair in contrast.pairs:
                if attack not in pair.first.rows or attack not in pair.second.rows:
                    continue
                try:
                    outcome.found.append(pair.first.against(pair.second, attack))
                    outcome.pairs.append(pair)
                except ConfigurationError as error:
                    names = f"{pair.second.run.name} with {pair.first.run.name}"
                    refused.setdefault(f"{error}".rstrip("."), []).append(names)
            if outcome.found:
                outcomes.append(outcome)
    return outcomes, [f"Not paired: {named(dict.fromkeys(names))} ({why})." for why, names in refused.items()]


def _rows(outcome: _Outcome, adjusted: Iterator[float]) -> list[list[Cell]]:
    """Return a row for each pair, and one with their mean if there are several; takes p-values from ``adjusted``."""
    head = [text(outcome.contrast.name), text(outcome.contrast.rest)]
    rows = [
        [
            *head,
            text(pair.repeat),
            text(attack_title(outcome.attack)),
            *_difference([one], one["ci_low"], one["ci_high"]),
            _p_value(one["p_value"]),
            _p_value(next(adjusted)),
        ]
        for pair, one in zip(outcome.pairs, outcome.found, strict=True)
    ]
    if len(rows) > 1:
        mean = text(f"{_MEAN}{len(rows)}")
        found = _difference(outcome.found, *mean_interval([one["difference"] for one in outcome.found]))
        rows.append([*head, mean, text(attack_title(outcome.attack)), *found, NOTHING, NOTHING])
    return rows


def _p_value(p: float) -> Cell:
    return number(p, ".2g") if p >= _LEAST else Cell(f"<{_LEAST:.0e}", p)


def _difference(found: Sequence[dict[str, Any]], low: float, high: float) -> list[Cell]:
    """Return the cells of accuracies, difference and counts, of one comparison or of the mean of several."""
    lost, won, n = (sum(one[key] for one in found) for key in ("only_first", "only_second", "n"))
    first, second = (
        fmean((one["both"] + one[key]) / one["n"] for one in found) for key in ("only_first", "only_second")
    )
    difference = fmean(one["difference"] for one in found)
    return [
        Cell(f"{100 * first:.2f} → {percent(second)}", second),
        Cell(f"{points(difference, '+')} {interval(low, high, '+')}", difference),
        *(number(count, "d") for count in (won, lost, n)),
    ]


def _cut(rows: list[list[Cell]]) -> tuple[list[list[Cell]], str]:
    """Return at most ``_ROWS`` rows, and a sentence on those left out: first rows of single pairs that have a mean."""
    if len(rows) <= _ROWS:
        return rows, ""
    averaged = {_case(row) for row in rows if _is_mean(row)}
    short = [row for row in rows if _is_mean(row) or _case(row) not in averaged]
    if len(short) == len(rows):
        return rows[:_ROWS], f"The first {_ROWS} of {len(rows)} rows."
    cut = f", and what is beyond {_ROWS} rows" if len(short) > _ROWS else ""
    return short[:_ROWS], f"Left out of {len(rows)} rows: those of single pairs{cut}."


def _case(row: list[Cell]) -> tuple[str, ...]:
    """Return the columns of a row that are the same for all its seeds: contrast and attack."""
    return tuple(cell.text for cell in (row[0], row[1], row[3]))


def _is_mean(row: list[Cell]) -> bool:
    return row[2].text.startswith(_MEAN)


def _without_empty(rows: list[list[Cell]]) -> tuple[list[str], list[list[Cell]]]:
    """Return columns and rows without empty columns, and without names that are the same in all rows."""
    if not rows:
        return _COLUMNS[_LAST_NAME + 1 :], []
    kept = []
    for k in range(len(_COLUMNS)):
        texts = {row[k].text for row in rows} - {NOTHING.text}
        is_name = k <= _LAST_NAME
        if len(texts) > 1 or (texts and not is_name):
            kept.append(k)
    return [_COLUMNS[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _titled(settings: Sequence[str]) -> str:
    """Return the end of the title of a table with several contrasts."""
    if len(settings) > 1:
        return "several settings at once"
    return "by normalization" if is_norm(settings[0]) else f"by {settings[0].rpartition('.')[2].replace('_', ' ')}"
