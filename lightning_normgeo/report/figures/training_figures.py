"""Figures of a training itself: its loss and its accuracy, from the metrics that the project logged."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.figure import Figure, lines, unique
from lightning_normgeo.report.story import ACCURACY, LOSS, Section
from lightning_normgeo.runs.quantities import QUANTITIES

_MOST = 3
"""Curves of a figure: more would be those of the classes or heads of a model."""
_TESTED = re.compile(r"test", re.IGNORECASE)


def loss(curves: Curves) -> Figure | None:
    """Return the figure of losses; None if the project logged none."""
    return _figure(curves, "loss", LOSS, re.compile(r"loss", re.IGNORECASE), log=True)


def accuracy(curves: Curves) -> Figure | None:
    """Return the figure of accuracies; None if the project logged none."""
    return _figure(curves, "accuracy", ACCURACY, re.compile(r"acc(?!el)", re.IGNORECASE), log=False)


def _figure(curves: Curves, anchor: str, section: Section, pattern: re.Pattern[str], log: bool) -> Figure | None:
    rows = curves.of({key: key for key in _keys(curves.runs, pattern)})
    if not rows:
        return None
    log = log and all(value > 0 for row in rows for value in row["value"])
    color = "series" if len(unique(rows, "series")) > 1 else "quantity"
    chart, several = lines(rows, anchor, color=color, dash="quantity", log=log, shared=True, by_layer=False)
    return Figure(anchor, section.title, section.caption, chart, several)


def _keys(runs: Sequence[Run], pattern: re.Pattern[str]) -> list[str]:
    """Return the keys of one kind of curve, but for a single value at the end and those of the package."""
    keys = dict.fromkeys(key for run in runs for key, points in run.record.metrics.items() if len(points) > 1)
    ours = tuple({f"{key.partition('/')[0]}/" for key in QUANTITIES})
    found = [key for key in keys if pattern.search(key) and not key.startswith(ours) and not _TESTED.search(key)]
    # Lightning logs a metric of a step also as its mean over an epoch, under names with these endings
    return sorted(key for key in found if f"{key.removesuffix('_epoch')}_step" not in keys)[:_MOST]
