"""Figures of the geometry, as Altair charts of recorded values; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import Curves, Row, last_by_layer
from lightning_normgeo.report.figures.figure import Figure, color_of, lines, panels, unique, value_axis
from lightning_normgeo.report.figures.robustness_figures import accuracies, against_eps

_COSINES = {
    "orthogonality/max_abs_cos": "scale invariant",
    "orthogonality/max_abs_cos_corrected": "scale invariant, ε removed",
    "orthogonality_control/max_abs_cos": "control (no invariance)",
}
_INCREMENTS = {
    "norm_growth/increment": "measured",
    "norm_growth/explained": "explained (all terms)",
    "norm_growth/predicted": "eq 16: η²‖∇‖²",
}
_TERMS = {
    "norm_growth/term_quadratic": "quadratic, η²‖u‖²",
    "norm_growth/term_momentum": "momentum",
    "norm_growth/term_weight_decay": "weight decay",
    "norm_growth/term_gradient": "gradient, ⟨W, ∇W⟩",
    "norm_growth/residual": "residual",
    "norm_growth/storage_floor": "storage floor",
}
_CUMULATIVE = {
    "norm_growth/cumulative_increment": "measured, ‖W_t‖² − ‖W_0‖²",
    "norm_growth/cumulative_explained": "explained (all terms)",
    "norm_growth/cumulative_predicted": "eq 16: Σ η²‖∇‖²",
}
_ANGLES = {"norm_growth/angular_update": "measured", "norm_growth/equilibrium_angle": "equilibrium"}
_STATISTICS = {"mean": "mean of all channels", "median": "median", "q90": "90 % quantile", "channel": "one channel"}
_AFFINE = {
    "abs_gamma2_minus_sigma2": "|γ² − σ²|",
    "abs_beta_minus_mu": "|β − μ|",
    "gamma2_over_sigma2": "γ²/σ²",
}
_BY_QUANTITY: dict[str, Any] = {"color": "quantity", "dash": "quantity", "log": True, "signed": True}
"""Options of figures that compare quantities whose values can be negative."""


def all_figures(runs: Sequence[Run], layers: Sequence[str] = ()) -> list[Figure]:
    """Return the figures for which the runs have data, in the order of the page.

    Args:
        runs: Runs to compare; one is enough.
        layers: Globs of the layers that the reader can choose; see :class:`Curves`.
    """
    curves = Curves(runs, layers)
    geometry = (_affine, _norms, _increments, _terms, _cumulative, _orthogonality, _orthogonality_by_layer, _angles)
    found = [make(curves) for make in geometry] + [accuracies(runs), against_eps(runs)]
    return [figure for figure in found if figure is not None]


def _drawn(
    rows: Sequence[Row], anchor: str, title: str, caption: str, axis: str, wide: bool = False, **options: Any
) -> Figure | None:
    """Return a figure of curves drawn by :func:`lines`, None without rows; with several panels it is always wide."""
    if not rows:
        return None
    chart, several = lines(rows, axis, **options)
    return Figure(anchor, title, caption, chart, wide or several)


def _affine(curves: Curves) -> Figure | None:
    rows = []
    for quantity, title in _AFFINE.items():
        names = {f"affine/{quantity}_{statistic}": label for statistic, label in _STATISTICS.items()}
        for row in curves.of(names) + _first_channel(curves, quantity):
            normalization = f", {row['panel']}" if row["panel"] else ""
            rows.append({**row, "panel": title + normalization})
    return _drawn(
        rows,
        "affine",
        "γ, β against σ, μ (Fig 2)",
        "The paper says both distances settle at small values. |γ² − σ²| changes with the scale of weights that has no "
        "effect on the function; γ²/σ² is free of it. One channel, drawn at random by a seed, as in the paper.",
        "distance; ratio",
        color=_color(rows),
        dash="quantity",
        log=True,
        known=[*_STATISTICS.values()],
        wide=True,
    )


def _first_channel(curves: Curves, quantity: str) -> list[Row]:
    """Return the curve of one channel for the choice of all layers: that of the first layer that has one."""
    start = f"affine/{quantity}_channel/"
    keys = [key for run in curves.runs for key in run.record.metrics if key.startswith(start)][:1]
    return curves.of(dict.fromkeys(keys, _STATISTICS["channel"]))


def _color(rows: Sequence[Row]) -> str:
    """Return the field to color by: the series if there are several, else the quantity."""
    return "series" if len(unique(rows, "series")) > 1 else "quantity"


def _norms(curves: Curves) -> Figure | None:
    rows = curves.of({"norm_growth/weight_norm": "‖W‖"})
    return _drawn(
        rows,
        "norms",
        "Norms of the weights (Fig 3)",
        "Of all scale-invariant weights, or of the chosen layer. Without weight decay the norm can only grow under "
        "SGD. It does not by itself change the function the network computes.",
        "‖W‖",
    )


def _increments(curves: Curves) -> Figure | None:
    rows = curves.of(_INCREMENTS)
    return _drawn(
        rows,
        "increments",
        "What one step adds to ‖W‖²",
        "Measured, explained by the optimizer's formula, and predicted by the paper's eq 16, summed over all "
        "scale-invariant weights; magnitudes, hover for signs. Eq 16 covers plain SGD; momentum and weight "
        "decay are in the explained curve only.",
        "|Δ‖W‖²| per step",
        panel="group",
        known=[*_INCREMENTS.values()],
        **_BY_QUANTITY,
    )


def _terms(curves: Curves) -> Figure | None:
    rows = [row for row in curves.of(_TERMS) if any(row["value"])]  # without momentum its term is zero at all steps
    return _drawn(
        rows,
        "terms",
        "The terms of the increment",
        "Magnitudes; hover for signs. The residual is measured minus explained: it stays below the storage floor, "
        "what rounding of the stored weights adds at random, unless steps are so short that most weights hardly move.",
        "|term| of Δ‖W‖²",
        panel="group",
        known=[*_TERMS.values()],
        **_BY_QUANTITY,
    )


def _cumulative(curves: Curves) -> Figure | None:
    rows = curves.of(_CUMULATIVE)
    return _drawn(
        rows,
        "cumulative",
        "What all steps together added to ‖W‖²",
        "Every step counted, measured or not. Under plain SGD without weight decay the three agree.",
        "since the first step",
        panel="group",
        color="quantity",
        dash="quantity",
        known=[*_CUMULATIVE.values()],
    )


def _orthogonality(curves: Curves) -> Figure | None:
    rows = curves.of(_COSINES)
    return _drawn(
        rows,
        "orthogonality",
        "Weights are orthogonal to their gradients",
        "Largest |cos(W, ∇W)| over all units (Lemma 2). What remains for scale-invariant units is the ε of the "
        "normalization, known exactly, and float rounding.",
        "largest |cos(W, ∇W)|",
        panel="group",
        color="quantity",
        log=True,
        shared=True,
        known=[*_COSINES.values()],
    )


def _orthogonality_by_layer(curves: Curves) -> Figure | None:
    found: list[Row] = [
        {"group": run.group, "run": run.name, "quantity": label, "layer": layer, "value": value}
        for run in curves.runs
        for key, label in _COSINES.items()
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
            y=alt.Y("value:Q", title="largest |cos(W, ∇W)|", scale=alt.Scale(type="log"), axis=value_axis()),
            color=color_of("quantity", unique(rows, "quantity"), [*_COSINES.values()]),
            tooltip=["run:N", "layer:N", "quantity:N", alt.Tooltip("value:Q", format=".3g")],
        )
    )
    return Figure(
        "orthogonality-layers",
        "Orthogonality, layer by layer",
        "At the last measured step, one point for each layer and run. Hover for the layer's name.",
        panels(chart, rows, "group", shared=True),
        wide=len(unique(rows, "group")) > 1,
    )


def _angles(curves: Curves) -> Figure | None:
    rows = curves.of(_ANGLES)
    return _drawn(
        rows,
        "angles",
        "How far the weights turn per step",
        "Root mean square angle between W and W⁺ over all units; with weight decay it approaches the equilibrium of "
        "decay and gradient noise, which only runs with weight decay have.",
        "radians",
        color=_color(rows),
        dash="quantity",
        log=True,
        shared=True,
        known=[*_ANGLES.values()],
    )
