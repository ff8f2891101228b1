"""Figures of a training itself: its loss and its accuracy, from the metrics that the project logged."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.figure import Figure, lines, unique
from lightning_normgeo.report.story import ACCURACY, LOSS, Section
from lightning_normgeo.report.training_keys import accuracy_keys, loss_keys


def loss(curves: Curves) -> Figure | None:
    """Return the figure of losses; None if the project logged none."""
    return _figure(curves, "loss", LOSS, loss_keys(curves.runs), log=True)


def accuracy(curves: Curves) -> Figure | None:
    """Return the figure of accuracies; None if the project logged none."""
    return _figure(curves, "accuracy", ACCURACY, accuracy_keys(curves.runs), log=False)


def _figure(curves: Curves, anchor: str, section: Section, keys: Sequence[str], log: bool) -> Figure | None:
    rows = curves.of({key: key for key in keys})
    if not rows:
        return None
    log = log and all(value > 0 for row in rows for value in row["value"])
    color = "series" if len(unique(rows, "series")) > 1 else "quantity"
    chart, several = lines(rows, anchor, color=color, dash="quantity", log=log, shared=True, by_layer=False)
    return Figure(anchor, section.title, section.caption, chart, rows, several)
