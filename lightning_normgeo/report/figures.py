"""The report's figures, from a record to Altair charts. Nothing is computed here but what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from lightning_normgeo.record import Record
from lightning_normgeo.report.attacks import accuracies, against_eps
from lightning_normgeo.report.figure import COLORS, HEIGHT, WIDTH, Figure

_FIRST_BLOCK = 8
"""At most so many layers get a curve of their own."""
_COSINES = {
    "orthogonality/max_abs_cos": "scale invariant",
    "orthogonality/max_abs_cos_corrected": "scale invariant, ε removed",
    "orthogonality_control/max_abs_cos": "control (no invariance)",
}


def all_figures(record: Record) -> list[Figure]:
    """Return the figures that the record has data for, in the order of the story."""
    makers = (
        _orthogonality,
        _orthogonality_by_layer,
        _increments,
        _terms,
        _norms,
        _affine,
        _angles,
        accuracies,
        against_eps,
    )
    return [figure for make in makers if (figure := make(record)) is not None]


def _orthogonality(record: Record) -> Figure | None:
    rows = _curves(record, _COSINES)
    if not rows:
        return None
    return Figure(
        "orthogonality",
        "Weights are orthogonal to their gradients",
        "Largest |cos(W, ∇W)| over all units (Lemma 2). What remains for scale-invariant units is the ε of the "
        "normalization, known exactly, and float rounding.",
        _lines(rows, "largest |cos(W, ∇W)|", log=True),
    )


def _orthogonality_by_layer(record: Record) -> Figure | None:
    last = {label: record.layers[key][-1][1] for key, label in _COSINES.items() if record.layers.get(key)}
    rows = [
        {"layer": layer, "series": label, "value": value}
        for label, layers in last.items()
        for layer, value in layers.items()
        if value > 0
    ]
    if not rows:
        return None
    order = list(dict.fromkeys(row["layer"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=26, opacity=0.85)
        .encode(
            x=alt.X(
                "layer:N", sort=order, title="layer, from input to output", axis=alt.Axis(labels=False, ticks=False)
            ),
            y=alt.Y("value:Q", title="largest |cos(W, ∇W)|", scale=_log(), axis=_axis()),
            color=_color(list(last)),
            tooltip=["layer:N", "series:N", alt.Tooltip("value:Q", format=".3g")],
        )
    )
    return Figure(
        "orthogonality-layers",
        "Orthogonality, layer by layer",
        "The same at the last measured step, one point per layer. Hover for the layer's name.",
        _sized(chart),
    )


def _increments(record: Record) -> Figure | None:
    names = {
        "norm_growth/increment": "measured",
        "norm_growth/explained": "explained (all terms)",
        "norm_growth/predicted": "eq 16: η²‖∇‖²",
    }
    rows = _curves(record, names)
    if not rows:
        return None
    return Figure(
        "increments",
        "What one step adds to ‖W‖²",
        "Measured, explained by the optimizer's formula, and predicted by the paper's eq 16, summed over all "
        "scale-invariant weights; magnitudes, hover for signs. Eq 16 covers plain SGD; momentum and weight "
        "decay are in the explained curve only.",
        _magnitudes(rows, "|Δ‖W‖²| per step"),
    )


def _terms(record: Record) -> Figure | None:
    names = {
        "norm_growth/term_quadratic": "quadratic, η²‖u‖²",
        "norm_growth/term_momentum": "momentum",
        "norm_growth/term_weight_decay": "weight decay",
        "norm_growth/term_gradient": "gradient, ⟨W, ∇W⟩",
        "norm_growth/residual": "residual",
        "norm_growth/storage_floor": "storage floor",
    }
    rows = _curves(record, names)
    if not rows:
        return None
    return Figure(
        "terms",
        "The terms of the increment",
        "Magnitudes; hover for signs. The residual is measured minus explained: it stays below the storage floor, "
        "which is what rounding in float32 can add.",
        _magnitudes(rows, "|term| of Δ‖W‖²"),
    )


def _norms(record: Record) -> Figure | None:
    total = _curves(record, {"norm_growth/weight_norm": "all scale-invariant weights"})
    layers = _layer_curves(record, "norm_growth/weight_norm")
    if not total:
        return None
    chart = _lines(total, "‖W‖, all weights") | _lines(layers, "‖W‖, first layers") if layers else _lines(total, "‖W‖")
    return Figure(
        "norms",
        "Norms of the weights (Fig 3)",
        "Without weight decay the norm of scale-invariant weights can only grow under SGD. It does not by itself "
        "change the function the network computes.",
        chart.resolve_scale(color="independent") if layers else chart,
        wide=bool(layers),
    )


def _angles(record: Record) -> Figure | None:
    names = {"norm_growth/angular_update": "measured", "norm_growth/equilibrium_angle": "equilibrium"}
    rows = _curves(record, names)
    if not rows:
        return None
    return Figure(
        "angles",
        "How far the weights turn per step",
        "Root mean square angle between W and W⁺ over all units; with weight decay it approaches the equilibrium of "
        "decay and gradient noise.",
        _lines(rows, "radians", log=True),
    )


def _affine(record: Record) -> Figure | None:
    def panel(quantity: str, title: str) -> Any:
        names = {
            f"affine/{quantity}_mean": "mean of all channels",
            f"affine/{quantity}_median": "median",
            f"affine/{quantity}_q90": "90 % quantile",
        }
        one = [key for key in record.metrics if key.startswith(f"affine/{quantity}_channel/")][:1]
        names.update({key: f"one channel of {key.rpartition('/')[2]}" for key in one})
        rows = _curves(record, names)
        return _lines(rows, title, log=True) if rows else None

    panels = [panel("abs_gamma2_minus_sigma2", "|γ² − σ²|"), panel("abs_beta_minus_mu", "|β − μ|")]
    shown = [chart for chart in panels if chart is not None]
    if not shown:
        return None
    return Figure(
        "affine",
        "γ, β against σ, μ (Fig 2)",
        "The paper says both settle at small values. |γ² − σ²| changes with the scale of weights that has no effect on "
        "the function; γ²/σ² in the record is scale free.",
        alt.hconcat(*shown).resolve_scale(color="shared"),
        wide=len(shown) > 1,
    )


def _curves(record: Record, names: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"series": label, "step": step, "value": value}
        for key, label in names.items()
        for step, value in record.metrics.get(key, [])
    ]


def _layer_curves(record: Record, quantity: str) -> list[dict[str, Any]]:
    keys = [key for key in record.metrics if key.startswith(f"{quantity}/")][:_FIRST_BLOCK]
    return _curves(record, {key: key.removeprefix(f"{quantity}/") for key in keys})


def _lines(rows: Sequence[dict[str, Any]], title: str, log: bool = False, field: str = "value") -> Any:
    rows = [row for row in rows if row[field] > 0] if log else rows
    scale = _log() if log else alt.Scale(zero=False)
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_line(point=alt.OverlayMarkDef(size=14))
        .encode(
            x=_step(),
            y=alt.Y(f"{field}:Q", title=title, scale=scale, axis=_axis()),
            color=_color(list(dict.fromkeys(row["series"] for row in rows))),
            strokeDash=alt.StrokeDash("series:N", legend=None),
            tooltip=["series:N", "step:Q", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return _sized(chart)


def _magnitudes(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Draw absolute values on a logarithmic axis; the tooltip keeps the signs."""
    shown = [{**row, "magnitude": abs(row["value"])} for row in rows if row["value"]]
    return _lines(shown, title, log=True, field="magnitude")


def _axis() -> Any:
    plain = "(datum.value == 0 || (abs(datum.value) >= 0.001 && abs(datum.value) < 10000))"
    return alt.Axis(labelExpr=f"format(datum.value, {plain} ? '~g' : '~e')", tickCount=6, labelOverlap=True)


def _step() -> Any:
    return alt.X("step:Q", title="training step", axis=alt.Axis(tickMinStep=1))


def _log() -> Any:
    return alt.Scale(type="log")


def _color(domain: list[str]) -> Any:
    legend = alt.Legend(title=None, orient="bottom", columns=2, labelLimit=300)
    own = {label: COLORS[i] for i, label in enumerate(_COSINES.values())}  # a control alone is no invariant unit
    colors = [own.get(label, COLORS[i % len(COLORS)]) for i, label in enumerate(domain)]
    return alt.Color("series:N", scale=alt.Scale(domain=domain, range=colors), legend=legend)


def _sized(chart: Any) -> Any:
    return chart.properties(width=WIDTH, height=HEIGHT)
