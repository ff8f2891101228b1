"""Tables of channel evaluations: accuracies with channels masked, and the numbers of similar pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.recorded_channels import (
    REPLACED,
    clean_of,
    criterion_title,
    evaluation_of,
    results_of,
)
from lightning_normgeo.report.story import CHANNELS
from lightning_normgeo.report.tables.cells import NOTHING, interval, percent
from lightning_normgeo.report.tables.table import Cell, Table, number, text

_CAPTION = (
    "Accuracy with a share of the channels masked, without retraining, and Wilson's 95 % interval. All criteria remove "
    "channels from the same set. |γ| is network slimming (Liu et al. 2017); the share of the readers' input is free of "
    "the scales that have no effect on the function; the random controls tell what any choice would cost."
)
_PAIRS = (
    "Pairs of channels of one layer. The paper proposes to prune those with similar (γ, β). Before training all are "
    "similar, so that the outputs' correlation has to be asked as well: pairs that are close and correlated are "
    "redundant."
)
_COUNTS = {
    "pairs": "pairs",
    "close": "close in (γ, β)",
    "correlated": "correlated",
    "redundant": "both",
    "clusters": "clusters",
    "superfluous": "superfluous channels",
}
_ROUNDING = 0.01
"""A removed share that differs by more from the one asked for is shown."""


def channel_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of the runs that have an evaluation of channels."""
    return [table for table in (_accuracies(runs), _pairs(runs)) if table is not None]


def _accuracies(runs: Sequence[Run]) -> Table | None:
    found = [(run, row) for run in runs for row in results_of(run)]
    if not found:
        return None
    ratios = sorted({float(row["ratio"]) for _, row in found})
    rows = [
        [text(run.name), text("whole network"), text(""), *[_accuracy(clean)] * len(ratios)]
        for run in runs
        if (clean := clean_of(run)) is not None and results_of(run)
    ]
    curves: dict[tuple[str, str, str], dict[float, Mapping[str, Any]]] = {}
    for run, row in found:
        key = run.name, str(row.get("criterion")), str(row.get("replace"))
        curves.setdefault(key, {})[float(row["ratio"])] = row
    for (name, criterion, replace), by_ratio in curves.items():
        cells = [_accuracy(by_ratio[ratio]) if ratio in by_ratio else NOTHING for ratio in ratios]
        rows.append([text(name), text(criterion_title(criterion)), text(REPLACED.get(replace, replace)), *cells])
    columns = ["network", "removed first: least", "channels", *(f"{100 * ratio:g} % removed" for ratio in ratios)]
    return Table("channels", CHANNELS.title, _CAPTION, columns, rows)


def _accuracy(row: Mapping[str, Any]) -> Cell:
    shown = f"{percent(row['accuracy'])} {interval(row['ci_low'], row['ci_high'], least=0.0)}"
    share, asked = row.get("removed_share", 0.0), row.get("ratio", 0.0)
    if abs(share - asked) > _ROUNDING:
        shown += f" ({100 * share:.0f} % removed)"
    return Cell(shown, float(row["accuracy"]))


def _pairs(runs: Sequence[Run]) -> Table | None:
    found = [(run, pairs) for run in runs if isinstance(pairs := evaluation_of(run).get("pairs"), Mapping)]
    if not found:
        return None
    rows = [
        [text(run.name), *(number(value, "d") if type(value := pairs.get(key)) is int else NOTHING for key in _COUNTS)]
        for run, pairs in found
    ]
    return Table("channel-pairs", "Similar channels", _PAIRS, ["network", *_COUNTS.values()], rows)
