"""Figures of the report's sections: the keys that each of them draws, and its title and caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_normgeo.report.figures.curves import Curves, Row
from lightning_normgeo.report.figures.figure import Figure, lines
from lightning_normgeo.report.story import CONTROLS_ONLY, Section
from lightning_normgeo.runs.quantities.table import labels


def drawn(
    rows: Sequence[Row], anchor: str, section: Section, axis: str, wide: bool = False, **options: Any
) -> Figure | None:
    """Return a figure of curves drawn by :func:`lines`, None without rows; with several panels it is always wide."""
    if not rows:
        return None
    chart, several = lines(rows, axis, **options)
    return Figure(anchor, section.title, section.caption, chart, rows, wide or several)


def names_of(curves: Curves, section: Section) -> tuple[dict[str, str], Section]:
    """Return the labels of a section by key, and the section: those of the controls if no weight is invariant."""
    names = labels(*section.keys)
    controls = {key.replace("norm_growth/", "norm_growth_control/", 1): label for key, label in names.items()}
    logged = {key for run in curves.runs for key in run.record.metrics}
    if logged & names.keys() or not logged & controls.keys():
        return names, section
    return controls, replace(section, caption=f"{CONTROLS_ONLY} {section.caption}")
