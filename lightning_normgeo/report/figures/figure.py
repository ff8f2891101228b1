"""What a figure is, and what all of them are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_normgeo.report.figures.curves import ALL, Row

WIDTH, HEIGHT = 400, 250
SMALL = {"width": 220, "height": 165}
COLUMNS = 4
COLORS = ["#3b6fb6", "#d1603d", "#4c9a6a", "#8d6cab", "#a98432", "#6b7787", "#c0567d", "#3a9ca6"]
_DASHES = [[1, 0], [5, 3], [1.5, 2.5], [6, 2, 1.5, 2]]


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows, how to read it, the chart, and whether it needs the whole width."""

    anchor: str
    title: str
    caption: str
    chart: Any
    wide: bool = False


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
) -> tuple[Any, bool]:
    """Return curves over the training step, in a panel each, and whether there are several panels.

    Args:
        rows: from :class:`Curves`.
        title: of the vertical axis.
        panel: the field that has a panel for each of its values.
        color: the field that has a color.
        dash: the field that has a dash pattern.
        log: whether the axis is logarithmic; points that have no place on it are left out.
        signed: whether values may be negative where the axis is logarithmic: then magnitudes are drawn.
        shared: whether all panels have the same axis.
        known: all quantities that there can be, so that each keeps its color where others are missing.
    """
    height = "magnitude" if signed else "value"
    scale = alt.Scale(type="log", nice=False, padding=6) if log else alt.Scale(zero=False)
    base = alt.Chart().encode(
        x=step_axis(),
        y=alt.Y(f"{height}:Q", title=title, scale=scale, axis=value_axis()),
        color=color_of(color, unique(rows, color), known),
        detail=["run:N", "quantity:N"],
    )
    shown = [name for name in ("run", "quantity") if len(unique(rows, name)) > 1]
    tooltip = [*(f"{name}:N" for name in shown), "layer:N", "step:Q", alt.Tooltip("value:Q", format=".4g")]
    pattern = {"strokeDash": dash_of(dash, unique(rows, dash), known, alone=dash != color)} if dash else {}
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(**pattern)
    # what reacts to the pointer is larger than what is seen
    touched = base.mark_point(size=90, opacity=0, filled=True, clip=True).encode(tooltip=tooltip)
    several = len(unique(rows, panel)) > 1
    chart = panels(alt.layer(line, touched.add_params(_zoom(both=shared or not several))), rows, panel, shared)
    chart = chart.add_params(alt.param(name="layer", value=ALL)).transform_filter("datum.layer === layer")
    chart = chart.transform_flatten(["step", "value"])
    if signed:
        chart = chart.transform_calculate(magnitude="abs(datum.value)")
    return (chart.transform_filter(f"datum.{height} > 0") if log else chart), several


def panels(chart: Any, rows: Sequence[Row], panel: str, shared: bool) -> Any:
    """Return a chart with its data, divided into panels if there are several."""
    names, data = unique(rows, panel), alt.Data(values=list(rows))
    if len(names) < 2:
        return chart.properties(data=data, width=WIDTH, height=HEIGHT)
    header = alt.Header(title=None, labelFontSize=12, labelLimit=SMALL["width"])
    facet = alt.Facet(f"{panel}:N", sort=names, header=header)
    divided = chart.properties(**SMALL).facet(facet=facet, columns=min(COLUMNS, len(names)), data=data)
    return divided if shared else divided.resolve_scale(y="independent")


def unique(rows: Sequence[Row], field: str) -> list[str]:
    """Return the values of a field in the order they come."""
    return list(dict.fromkeys(row[field] for row in rows))


def value_axis() -> Any:
    """Return an axis with numbers as people write them."""
    plain = "(datum.value == 0 || (abs(datum.value) >= 0.001 && abs(datum.value) < 10000))"
    return alt.Axis(labelExpr=f"format(datum.value, {plain} ? '~g' : '~e')", tickCount=5, labelOverlap=True)


def step_axis() -> Any:
    """Return the axis of training steps."""
    return alt.X("step:Q", title="training step", axis=alt.Axis(tickMinStep=1, tickCount=5, labelOverlap=True))


def color_of(field: str, domain: Sequence[str], known: Sequence[str] = ()) -> Any:
    """Return a color for each value of a field, with a legend if there are several."""
    drawn = alt.Legend(title=None, orient="bottom", columns=3, labelLimit=320, symbolOpacity=1)
    legend = drawn if len(domain) > 1 else None
    return alt.Color(f"{field}:N", scale=_scale(domain, known, COLORS), legend=legend)


def dash_of(field: str, domain: Sequence[str], known: Sequence[str] = (), alone: bool = True) -> Any:
    """Return a dash pattern for each value of a field; where it has no color as well, its legend is gray."""
    gray = {"symbolStrokeColor": "#808893"} if alone else {}
    shape = {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 1.6}
    drawn = alt.Legend(title=None, orient="bottom", columns=3, labelLimit=320, **shape, **gray)
    legend = drawn if len(domain) > 1 else None
    return alt.StrokeDash(f"{field}:N", scale=_scale(domain, known, _DASHES), legend=legend)


def _scale(domain: Sequence[str], known: Sequence[str], choices: Sequence[Any]) -> Any:
    order = list(known) if set(domain) <= set(known) else list(domain)
    ordered = [value for value in order if value in domain]
    return alt.Scale(domain=ordered, range=[choices[order.index(value) % len(choices)] for value in ordered])


def _zoom(both: bool) -> Any:
    """Zoom with Shift and the wheel, move with Shift and the pointer: else the page could not be scrolled.

    Args:
        both: whether both axes do; panels with vertical axes of their own have only the horizontal one in common.
    """
    held = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
    axes = {} if both else {"encodings": ["x"]}
    return alt.selection_interval(bind="scales", translate=held, zoom="wheel![event.shiftKey]", **axes)
