"""Figures of the geometry, as Altair charts of recorded values; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import Curves, Row, last_by_layer
from lightning_normgeo.report.figures.figure import Figure, color_of, lines, panels, unique, value_axis
from lightning_normgeo.report.figures.robustness_figures import accuracies, against_eps
from lightning_normgeo.report.figures.training_figures import accuracy, loss
from lightning_normgeo.report.story import (
    AFFINE,
    ANGLES,
    CONTROLS_ONLY,
    CUMULATIVE,
    INCREMENTS,
    NORMS,
    ORTHOGONALITY,
    ORTHOGONALITY_BY_LAYER,
    TERMS,
    Section,
)
from lightning_normgeo.runs.quantities import labels

_STATISTICS = {"mean": "mean of all channels", "median": "median", "q90": "90 % quantile", "channel": "one channel"}
_BY_QUANTITY: dict[str, Any] = {"color": "quantity", "dash": "quantity", "log": True, "signed": True}
"""Options of figures that compare quantities whose values can be negative."""


def all_figures(runs: Sequence[Run], layers: Sequence[str] = ()) -> list[Figure]:
    """Return the figures for which the runs have data, in the order of the page.

    Args:
        runs: Runs to compare; one is enough.
        layers: Globs of the layers that the reader can choose; see :class:`Curves`.
    """
    curves = Curves(runs, layers)
    geometry = (
        loss,
        accuracy,
        _affine,
        _norms,
        _increments,
        _terms,
        _cumulative,
        _orthogonality,
        _orthogonality_by_layer,
        _angles,
    )
    found = [make(curves) for make in geometry] + [accuracies(runs), against_eps(runs)]
    return [figure for figure in found if figure is not None]


def _drawn(
    rows: Sequence[Row], anchor: str, section: Section, axis: str, wide: bool = False, **options: Any
) -> Figure | None:
    """Return a figure of curves drawn by :func:`lines`, None without rows; with several panels it is always wide."""
    if not rows:
        return None
    chart, several = lines(rows, axis, **options)
    return Figure(anchor, section.title, section.caption, chart, wide or several)


def _names(curves: Curves, section: Section) -> tuple[dict[str, str], Section]:
    """Return the labels of a section by key, and the section: those of the controls if no weight is invariant."""
    names = labels(*section.keys)
    controls = {key.replace("norm_growth/", "norm_growth_control/", 1): label for key, label in names.items()}
    logged = {key for run in curves.runs for key in run.record.metrics}
    if logged & names.keys() or not logged & controls.keys():
        return names, section
    return controls, replace(section, caption=f"{CONTROLS_ONLY} {section.caption}")


def _affine(curves: Curves) -> Figure | None:
    rows = []
    for key, title in labels(*AFFINE.keys).items():
        quantity = key.removesuffix("_mean")
        names = {f"{quantity}_{statistic}": label for statistic, label in _STATISTICS.items()}
        for row in curves.of(names) + _first_channel(curves, quantity):
            normalization = f", {row['panel']}" if row["panel"] else ""
            rows.append({**row, "panel": title + normalization})
    return _drawn(
        rows,
        "affine",
        AFFINE,
        "",
        color=_color(rows),
        dash="quantity",
        log=True,
        known=[*_STATISTICS.values()],
        wide=True,
    )


def _first_channel(curves: Curves, quantity: str) -> list[Row]:
    """Return the curve of one channel for the choice of all layers: that of the first layer that has one."""
    start = f"{quantity}_channel/"
    keys = [key for run in curves.runs for key in run.record.metrics if key.startswith(start)][:1]
    return curves.of(dict.fromkeys(keys, _STATISTICS["channel"]))


def _color(rows: Sequence[Row]) -> str:
    """Return the field to color by: the series if there are several, else the quantity."""
    return "series" if len(unique(rows, "series")) > 1 else "quantity"


def _norms(curves: Curves) -> Figure | None:
    names, section = _names(curves, NORMS)
    return _drawn(curves.of(names), "norms", section, "‖W‖")


def _increments(curves: Curves) -> Figure | None:
    names, section = _names(curves, INCREMENTS)
    return _drawn(
        curves.of(names),
        "increments",
        section,
        "|Δ‖W‖²| per step",
        panel="group",
        known=[*names.values()],
        **_BY_QUANTITY,
    )


def _terms(curves: Curves) -> Figure | None:
    names, section = _names(curves, TERMS)
    rows = [row for row in curves.of(names) if any(row["value"])]  # without momentum its term is zero at all steps
    return _drawn(
        rows,
        "terms",
        section,
        "|term| of Δ‖W‖²",
        panel="group",
        known=[*names.values()],
        **_BY_QUANTITY,
    )


def _cumulative(curves: Curves) -> Figure | None:
    names, section = _names(curves, CUMULATIVE)
    return _drawn(
        curves.of(names),
        "cumulative",
        section,
        "since the first step",
        panel="group",
        color="quantity",
        dash="quantity",
        known=[*names.values()],
    )


def _orthogonality(curves: Curves) -> Figure | None:
    names = labels(*ORTHOGONALITY.keys)
    return _drawn(
        curves.of(names),
        "orthogonality",
        ORTHOGONALITY,
        "largest |cos(W, ∇W)|",
        panel="group",
        color="quantity",
        log=True,
        shared=True,
        known=[*names.values()],
    )


def _orthogonality_by_layer(curves: Curves) -> Figure | None:
    section = ORTHOGONALITY_BY_LAYER
    names = labels(*section.keys)
    found: list[Row] = [
        {"group": run.group, "run": run.name, "quantity": label, "layer": layer, "value": value}
        for run in curves.runs
        for key, label in names.items()
        for layer, value in last_by_layer(run, key).items()
    ]
    rows = [row for row in found if row["value"] > 0]
    if not rows:
        return None
    chart = (
        alt.Chart()
        .mark_point(filled=True, size=26, opacity=0.85)
        .encode(
            x=alt.X("layer:N", sort=unique(found, "layer"), title="layers", axis=alt.Axis(labels=False, ticks=False)),
            y=alt.Y("value:Q", title="largest |cos(W, ∇W)|", scale=alt.Scale(type="log"), axis=value_axis(log=True)),
            color=color_of("quantity", unique(rows, "quantity"), [*names.values()]),
            tooltip=["run:N", "layer:N", "quantity:N", alt.Tooltip("value:Q", format=".3g")],
        )
    )
    return Figure(
        "orthogonality-layers",
        section.title,
        section.caption,
        panels(chart, rows, "group", shared=True),
        wide=len(unique(rows, "group")) > 1,
    )


def _angles(curves: Curves) -> Figure | None:
    names, section = _names(curves, ANGLES)
    rows = curves.of(names)
    return _drawn(
        rows,
        "angles",
        section,
        "radians",
        color=_color(rows),
        dash="quantity",
        log=True,
        shared=True,
        known=[*names.values()],
    )
