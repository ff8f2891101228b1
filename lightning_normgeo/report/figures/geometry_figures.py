"""Figures of the geometry, as Altair charts of recorded values; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from lightning_normgeo.report.figures.batch_geometry_figures import (
    effective_rank,
    orthogonality_of_samples,
    rank_against_width,
    spheres_reached,
)
from lightning_normgeo.report.figures.channel_figures import channels
from lightning_normgeo.report.figures.comparison_figures import cumulative, cumulative_ratio, increments, ratio
from lightning_normgeo.report.figures.curves import Curves, Row, last_by_layer
from lightning_normgeo.report.figures.figure import Figure, color_of, panels, unique, value_axis, value_scale
from lightning_normgeo.report.figures.robustness_figures import accuracies, against_eps
from lightning_normgeo.report.figures.section_figures import drawn, names_of
from lightning_normgeo.report.figures.symmetry_figures import charges, imbalance, joint_angles, joint_norm, spheres
from lightning_normgeo.report.figures.training_figures import accuracy, loss
from lightning_normgeo.report.story import (
    AFFINE,
    ANGLES,
    NORMS,
    ORTHOGONALITY,
    ORTHOGONALITY_BY_LAYER,
    TERMS,
)
from lightning_normgeo.runs.quantities.table import labels

_STATISTICS = {"mean": "mean of all channels", "median": "median", "q90": "90 % quantile", "channel": "one channel"}


def all_figures(curves: Curves) -> list[Figure]:
    """Return the figures for which the runs have data, in the order of the page, which has two small ones in a row.

    Args:
        curves: Curves of the runs to compare; one run is enough.
    """
    geometry = (
        loss,
        accuracy,
        _affine,
        _norms,
        _angles,
        increments,
        ratio,
        cumulative,
        cumulative_ratio,
        _terms,
        _orthogonality,
        _orthogonality_by_layer,
        charges,
        imbalance,
        joint_norm,
        joint_angles,
        spheres,
        rank_against_width,
        effective_rank,
        spheres_reached,
        orthogonality_of_samples,
    )
    evaluations = [accuracies(curves.runs), against_eps(curves.runs), channels(curves.runs)]
    found = [make(curves) for make in geometry] + evaluations
    return [figure for figure in found if figure is not None]


def _affine(curves: Curves) -> Figure | None:
    rows = []
    for key, title in labels(*AFFINE.keys).items():
        quantity = key.removesuffix("_mean")
        names = {f"{quantity}_{statistic}": label for statistic, label in _STATISTICS.items()}
        for row in curves.of(names) + _first_channel(curves, quantity):
            normalization = f", {row['panel']}" if row["panel"] else ""
            rows.append({**row, "panel": title + normalization})
    return drawn(
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
    names, section = names_of(curves, NORMS)
    return drawn(curves.of(names), "norms", section, "‖W‖")


def _terms(curves: Curves) -> Figure | None:
    names, section = names_of(curves, TERMS)
    rows = [row for row in curves.of(names) if any(row["value"])]  # without momentum its term is zero at all steps
    return drawn(
        rows,
        "terms",
        section,
        "|term| of Δ‖W‖²",
        panel="group",
        color="quantity",
        dash="quantity",
        log=True,
        signed=True,
        known=[*names.values()],
    )


def _orthogonality(curves: Curves) -> Figure | None:
    names = labels(*ORTHOGONALITY.keys)
    return drawn(
        curves.of(names),
        "orthogonality",
        ORTHOGONALITY,
        "largest |cos(W, ∇W)|",
        panel="group",
        color="quantity",
        dash="quantity",
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
            y=alt.Y("value:Q", title="largest |cos(W, ∇W)|", scale=value_scale(log=True), axis=value_axis(log=True)),
            color=color_of("quantity", unique(rows, "quantity"), [*names.values()]),
            tooltip=["run:N", "layer:N", "quantity:N", alt.Tooltip("value:Q", format=".3g")],
        )
    )
    return Figure(
        "orthogonality-layers",
        section.title,
        section.caption,
        panels(chart, rows, "group", shared=True),
        rows,
        wide=len(unique(rows, "group")) > 1,
    )


def _angles(curves: Curves) -> Figure | None:
    names, section = names_of(curves, ANGLES)
    rows = curves.of(names)
    return drawn(
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
