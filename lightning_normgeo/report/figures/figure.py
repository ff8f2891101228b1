"""Figures of a report, and the charts, axes and legends that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from lightning_normgeo.report.figures.curves import ALL, Row

WIDTH, HEIGHT = 400, 250
SMALL = {"width": 220, "height": 165}
COLUMNS = 4
COLORS = ["#3b6fb6", "#d1603d", "#4c9a6a", "#8d6cab", "#a98432", "#6b7787", "#c0567d", "#3a9ca6"]
VEGA_LITE = alt.SCHEMA_VERSION.rpartition(".")[0]
"""Version of Vega-Lite that draws the figures."""
DATA = alt.Data(values="rows")
"""The data of every chart, which :attr:`Figure.spec` replaces by the rows."""
_DASHES = [[1, 0], [5, 3], [1.5, 2.5], [6, 2, 1.5, 2]]
_STROKE = {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 1.6}
"""Symbols of legends of lines."""


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Attributes:
        anchor: Name of the figure in links and files.
        title: Title above the figure.
        caption: Text on what is shown and how to read it.
        chart: Altair chart; its data is a name that stands for the rows.
        rows: Rows of data that the chart draws. Altair would copy and check each number of them several times.
        wide: Whether the figure takes the whole width of the page.
    """

    anchor: str
    title: str
    caption: str
    chart: Any
    rows: Sequence[Any]
    wide: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification of the chart, with its rows."""
        spec: dict[str, Any] = self.chart.to_dict()
        return {**spec, "data": {"values": list(self.rows)}}

    def save(self, path: Path, scale: float) -> None:
        """Draw the figure as ``.png`` or ``.pdf``; ``scale`` has the pixels of a PNG per point."""
        drawn = {"vl_version": VEGA_LITE, "scale": scale}
        if path.suffix == ".pdf":
            path.write_bytes(vl_convert.vegalite_to_pdf(self.spec, **drawn))
        else:
            path.write_bytes(vl_convert.vegalite_to_png(self.spec, **drawn))


def lines(
    rows: Sequence[Row],
    title: str,
    *,
    panel: str = "panel",
    color: str = "series",
    dash: str | None = None,
    log: bool = False,
    signed: bool = False,
    shared: bool = False,
    known: Sequence[str] = (),
    by_layer: bool = True,
) -> tuple[Any, bool]:
    """Return a chart of curves over the training step, and whether it has several panels.

    Args:
        rows: Rows of :class:`Curves`.
        title: Title of the vertical axis; empty where the titles of the panels say it.
        panel: Field whose values have a panel each.
        color: Field whose values have a color each.
        dash: Field whose values have a dash pattern each. Default: all lines are solid.
        log: Whether the vertical axis is logarithmic; values that are not positive are left out of it.
        signed: Whether to draw magnitudes, because values may be negative and the axis is logarithmic.
        shared: Whether all panels have the same vertical axis.
        known: All possible quantities, so that each has the same color in figures where others are missing.
        by_layer: Whether the reader's choice of a layer changes the figure.
    """
    height = "magnitude" if signed else "value"
    base = alt.Chart().encode(
        x=step_axis(),
        y=alt.Y(f"{height}:Q", title=title or None, scale=value_scale(log), axis=value_axis(log)),
        color=color_of(color, unique(rows, color), known, line=True),
        detail=["run:N", "quantity:N"],
    )
    pattern = {"strokeDash": dash_of(dash, unique(rows, dash), known, alone=dash != color)} if dash else {}
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(**pattern)
    marks = [line, touched(base, tooltip(rows, by_layer))]
    chart, several = over_steps(marks, rows, panel, shared=shared, by_layer=by_layer)
    return positive(chart, log=log, signed=signed), several


def over_steps(
    marks: Sequence[Any], rows: Sequence[Row], panel: str, *, shared: bool, by_layer: bool = True
) -> tuple[Any, bool]:
    """Return a chart of marks over the training step, and whether it has several panels.

    Args:
        marks: Charts without data, the last one drawn on top of the others.
        rows: Rows of :class:`Curves`.
        panel: Field whose values have a panel each.
        shared: Whether all panels have the same vertical axis.
        by_layer: Whether the reader's choice of a layer changes the figure.
    """
    several = len(unique(rows, panel)) > 1
    *below, top = marks
    chart = panels(alt.layer(*below, top.add_params(_zoom(both=shared or not several))), rows, panel, shared)
    if by_layer:
        chart = chart.add_params(alt.param(name="layer", value=ALL)).transform_filter("datum.layer === layer")
    return chart.transform_calculate(alone="length(datum.step) == 1").transform_flatten(["step", "value"]), several


def positive(chart: Any, *, log: bool, signed: bool) -> Any:
    """Return a chart with the field ``magnitude`` if it is signed, and without what a logarithmic axis cannot show."""
    if signed:
        chart = chart.transform_calculate(magnitude="abs(datum.value)")
    return chart.transform_filter(f"datum.{'magnitude' if signed else 'value'} > 0") if log else chart


def touched(base: Any, shown: Sequence[Any]) -> Any:
    """Return points that are invisible, unless their curve has no other; page.js shows the nearest to the pointer."""
    alone = alt.condition("datum.alone", alt.value(1), alt.value(0))
    return base.mark_point(size=90, filled=True, clip=True).encode(tooltip=shown, opacity=alone)


def tooltip(rows: Sequence[Row], by_layer: bool = True, *values: Any) -> list[Any]:
    """Return the fields that a point shows: what tells it from others, and its values.

    Args:
        rows: Rows of :class:`Curves`.
        by_layer: Whether to show the layer.
        values: Fields of the values. Default: the value of the curve.
    """
    shown = [name for name in ("run", "quantity") if len(unique(rows, name)) > 1]
    names = [*shown, *(["layer"] if by_layer else [])]
    return [*(f"{name}:N" for name in names), "step:Q", *(values or [alt.Tooltip("value:Q", format=".4g")])]


def panels(chart: Any, rows: Sequence[Row], panel: str, shared: bool) -> Any:
    """Return a chart with its data, with a panel for each value of a field if there are several."""
    names, data = unique(rows, panel), DATA
    if len(names) < 2:
        return chart.properties(data=data, width=WIDTH, height=HEIGHT)
    header = alt.Header(title=None, labelFontSize=12, labelLimit=SMALL["width"])
    facet = alt.Facet(f"{panel}:N", sort=names, header=header)
    divided = chart.properties(**SMALL).facet(facet=facet, columns=min(COLUMNS, len(names)), data=data)
    return divided if shared else divided.resolve_scale(y="independent")


def unique(rows: Sequence[Row], field: str) -> list[str]:
    """Return the different values of a field in the order of their first occurrence."""
    return list(dict.fromkeys(row[field] for row in rows))


def value_scale(log: bool = False) -> Any:
    """Return the scale of values, with room at its ends so that marks are not cut off."""
    return alt.Scale(type="log", nice=False, padding=6) if log else alt.Scale(zero=False, nice=False, padding=6)


def value_axis(log: bool = False) -> Any:
    """Return an axis whose numbers are decimal if neither large nor small, and otherwise have a power of ten.

    Args:
        log: Whether the axis is logarithmic: only 1, 2 and 5 times powers of ten have labels, those that fit; within a
            factor of five, where there may be none of these, all its ticks have.
    """
    label = number_label("datum.value")
    if log:
        few = f"test(/^[125]$/, {_MANTISSA.format('datum.value')})"
        return alt.Axis(labelExpr=f"{_NARROW} || {few} ? {label} : ''", tickCount=3, labelOverlap="greedy")
    return alt.Axis(labelExpr=label, tickCount=5, labelOverlap=True)


_NARROW = "(" + " || ".join(f"domain('{scale}')[1] < 5 * domain('{scale}')[0]" for scale in ("y", "child_y")) + ")"
"""Vega expression for whether the vertical axis spans less than a factor of five, also after the reader has zoomed.

Panels that have axes of their own have the scale ``child_y``; a scale that is not there has no domain.
"""
_MANTISSA, _EXPONENT = (f"split(format({{}}, '.3~e'), 'e')[{part}]" for part in (0, 1))


def number_label(number: str) -> str:
    """Return the Vega expression of a number's text: decimal, or as 2·10⁻⁵, or as 10⁻⁵ if nothing else is in front.

    Args:
        number: Vega expression of the number.
    """
    mantissa, raised = _MANTISSA.format(number), f"replace({_EXPONENT.format(number)}, '+', '')"
    for plain, high in zip("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True):
        raised = f"replace({raised}, /{plain}/g, '{high}')"
    factor = f"replace(replace({mantissa} + '·', /^(\\W?)1·$/, '$1'), '-', '−')"
    decimal = f"({number} == 0 || (abs({number}) >= 0.01 && abs({number}) < 10000))"
    return f"{decimal} ? format({number}, '~g') : {factor} + '10' + {raised}"


def step_axis() -> Any:
    """Return the axis of training steps."""
    axis = alt.Axis(tickMinStep=1, tickCount=5, labelOverlap=True, labelFlush=12)
    return alt.X("step:Q", title="training step", axis=axis, scale=alt.Scale(zero=True, nice=False, padding=5))


def color_of(field: str, domain: Sequence[str], known: Sequence[str] = (), line: bool = False) -> Any:
    """Return a color for each value of a field, with a legend if there are several.

    Args:
        field: Name of the field.
        domain: Its values in the chart.
        known: All its possible values, so that each has the same color in all charts.
        line: Whether they are lines, and so those of the legend.
    """
    legend = legend_of(**(_STROKE if line else {}), symbolOpacity=1) if len(domain) > 1 else None
    return alt.Color(f"{field}:N", scale=_scale(domain, known, COLORS), legend=legend)


def dash_of(field: str, domain: Sequence[str], known: Sequence[str] = (), alone: bool = True) -> Any:
    """Return a dash pattern for each value of a field, with a legend if there are several.

    Args:
        field: Name of the field.
        domain: Its values in the chart.
        known: All its possible values, so that each has the same pattern in all charts.
        alone: Whether the field has no colors, so that its legend is gray.
    """
    gray = {"symbolStrokeColor": "#808893"} if alone else {}
    legend = legend_of(**_STROKE, **gray) if len(domain) > 1 else None
    return alt.StrokeDash(f"{field}:N", scale=_scale(domain, known, _DASHES), legend=legend)


def legend_of(**options: Any) -> Any:
    """Return a legend below the chart; figures.js chooses the number of its columns on a screen."""
    return alt.Legend(title=None, orient="bottom", columns=3, labelLimit=320, **options)


def _scale(domain: Sequence[str], known: Sequence[str], choices: Sequence[Any]) -> Any:
    """Return a scale that gives each value a color or dash pattern, the same in all charts if it is known."""
    order = list(known) if set(domain) <= set(known) else list(domain)
    ordered = [value for value in order if value in domain]
    return alt.Scale(domain=ordered, range=[choices[order.index(value) % len(choices)] for value in ordered])


def _zoom(both: bool) -> Any:
    """Return the interaction that zooms with Shift and the wheel, and moves with Shift and the pointer.

    Without Shift the page could not be scrolled over a figure.

    Args:
        both: Whether it changes both axes. False for panels that have only the horizontal axis in common.
    """
    held = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
    axes = {} if both else {"encodings": ["x"]}
    return alt.selection_interval(bind="scales", translate=held, zoom="wheel![event.shiftKey]", **axes)
