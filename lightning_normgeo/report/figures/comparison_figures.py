"""Figures that compare measured increments with predicted ones, which coincide where a prediction is right.

So that coinciding values are told apart, each has a form of its own: a point, a wide line, a thin line inside it. The
ratio of measured to predicted is a figure of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from lightning_normgeo.report.figures.curves import Curves, Row
from lightning_normgeo.report.figures.figure import (
    COLORS,
    SMALL,
    Figure,
    legend_of,
    number_label,
    over_steps,
    positive,
    step_axis,
    tooltip,
    touched,
    unique,
    value_axis,
    value_scale,
)
from lightning_normgeo.report.figures.section_figures import names_of
from lightning_normgeo.report.story import CUMULATIVE, CUMULATIVE_RATIO, INCREMENTS, RATIO, Section

_SYMBOL = 400
"""Area of the box around a symbol, in square pixels."""
_POINT = "M-.27,0A.27,.27,0,1,1,.27,0A.27,.27,0,1,1,-.27,0Z"
"""Small circle in a symbol as large as those of lines, so that all texts of a legend have the same height."""
_FORMS: dict[str, list[Any]] = {
    "color": [COLORS[0], "#e08f72", COLORS[7]],
    "strokeWidth": [0, 7, 1.6],
    "shape": [_POINT, "stroke", "stroke"],
}
"""Forms of the measured values, of those explained with all terms, and of those of eq 16."""
_LINEAR = 0.001
"""Largest deviation of a ratio from 1 up to which its axis is linear; beyond it is logarithmic."""
_APART = 14
"""Smallest distance of two numbers at an axis, in pixels."""


def increments(curves: Curves) -> Figure | None:
    """Return the figure of the increments of single steps."""
    return _compared(curves, "increments", INCREMENTS, "|Δ‖W‖²| per step", log=True)


def ratio(curves: Curves) -> Figure | None:
    """Return the figure of the ratio of measured to predicted increments."""
    return _ratio(curves, "increments-ratio", RATIO)


def cumulative(curves: Curves) -> Figure | None:
    """Return the figure of the increments of all steps together."""
    return _compared(curves, "cumulative", CUMULATIVE, "since the first step", log=False)


def cumulative_ratio(curves: Curves) -> Figure | None:
    """Return the figure of the ratio of measured to predicted increments of all steps together."""
    return _ratio(curves, "cumulative-ratio", CUMULATIVE_RATIO)


def _compared(curves: Curves, anchor: str, section: Section, axis: str, *, log: bool) -> Figure | None:
    """Return the figure of measured values as points on the lines of the predictions."""
    names, section = names_of(curves, section)
    rows, (measured, *predicted) = curves.of(names), names.values()
    if not rows:
        return None
    y = alt.Y(f"{'magnitude' if log else 'value'}:Q", title=axis, scale=value_scale(log), axis=value_axis(log))
    base, shown = _base(rows, [*names.values()], y), tooltip(rows)
    shape = _form("shape", rows, [*names.values()])
    points = base.mark_point(filled=True, opacity=1, size=_SYMBOL, clip=True).encode(tooltip=shown, shape=shape)
    marks = [*_lines(base, rows, [*names.values()]), _only(touched(base, shown), predicted), _only(points, [measured])]
    chart, several = over_steps(marks, rows, "group", shared=False)
    return Figure(anchor, section.title, section.caption, positive(chart, log=log, signed=log), rows, several)


def _ratio(curves: Curves, anchor: str, section: Section) -> Figure | None:
    """Return the figure of the ratio of measured values to each prediction."""
    names, section = names_of(curves, section)
    (measured, _), *predicted = names.items()
    rows = curves.ratios(measured, dict(predicted))
    if not rows:
        return None
    base = _base(rows, [*names.values()], alt.Y("value:Q", title="measured / predicted", **_axis(rows)))
    values = (alt.Tooltip("ratio:Q", title="ratio", format=".7~g"), alt.Tooltip("value:Q", title="− 1", format=".3g"))
    marks = [*_lines(base, rows, [*names.values()]), touched(base, tooltip(rows, True, *values))]
    chart, several = over_steps(marks, rows, "group", shared=True)
    chart = chart.transform_calculate(ratio="1 + datum.value")
    return Figure(anchor, section.title, section.caption, chart, rows, several)


def _base(rows: Sequence[Row], names: Sequence[str], y: Any) -> Any:
    """Return a chart of the fields and colors that all its marks share."""
    return alt.Chart().encode(x=step_axis(), y=y, color=_form("color", rows, names), detail=["run:N", "quantity:N"])


def _lines(base: Any, rows: Sequence[Row], names: Sequence[str]) -> list[Any]:
    """Return the line of each prediction; the thin line is drawn on the wide one."""
    line = base.mark_line(clip=True, strokeJoin="round").encode(strokeWidth=_form("strokeWidth", rows, names))
    return [_only(line, [name]) for name in names[1:] if name in unique(rows, "quantity")]


def _only(chart: Any, names: Sequence[str]) -> Any:
    return chart.transform_filter(alt.FieldOneOfPredicate(field="quantity", oneOf=list(names)))


def _form(channel: str, rows: Sequence[Row], names: Sequence[str]) -> Any:
    """Return the form of each quantity that is drawn, with a legend if there are several."""
    drawn = unique(rows, "quantity")
    forms = {name: form for name, form in zip(names, _FORMS[channel], strict=True) if name in drawn}
    scale = alt.Scale(type="ordinal", domain=list(forms), range=list(forms.values()))
    legend = legend_of(symbolType="stroke", symbolSize=_SYMBOL, symbolOpacity=1) if len(forms) > 1 else None
    kinds = {"color": alt.Color, "strokeWidth": alt.StrokeWidth, "shape": alt.Shape}
    # Vega-Lite warns of widths without an order and of shapes with one
    return kinds[channel]("quantity", type="nominal" if channel == "shape" else "ordinal", scale=scale, legend=legend)


def _axis(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the scale and the axis of ratios, which are the same for all layers so that these can be compared."""
    values = [value for row in rows for value in row["value"]]
    low, high = min(-_LINEAR, *values), max(_LINEAR, *values)
    width = alt.condition("datum.value == 0", alt.value(2), alt.value(1))
    axis = alt.Axis(values=_ticks(low, high), labelExpr=number_label("(1 + datum.value)"), gridWidth=width)
    scale = alt.Scale(type="symlog", constant=_LINEAR, domain=[low, high], nice=False, padding=6)
    return {"scale": scale, "axis": axis}


def _ticks(low: float, high: float) -> list[float]:
    """Return the deviations from 1 at which the axis has round ratios: 1 itself, and others as far as there is room."""
    apart = _APART / SMALL["height"] * (_place(high) - _place(low))
    found = [0.0]
    for tick in _round_ratios():
        if low <= tick <= high and all(abs(_place(tick) - _place(other)) >= apart for other in found):
            found.append(tick)
    return sorted(found)


def _round_ratios() -> Iterable[float]:
    """Yield deviations from 1, those first that the axis should rather have."""
    for deviation in (0.1, 0.01, 0.001, 1.0):
        yield from (deviation, -deviation)
    for power in range(1, 300):
        yield from (10.0**power - 1, -(10.0**power) - 1)


def _place(deviation: float) -> float:
    """Return the place of a deviation on the axis, as d3 computes it for its scale ``symlog``."""
    return math.copysign(math.log1p(abs(deviation) / _LINEAR), deviation)
