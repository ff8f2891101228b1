"""The picture of the README and the overview: four claims of the paper, each as one panel.

Drawn by ``docs/pictures.py`` from docs/records/paper_small.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from lightning_normgeo.report.figures.figure import COLORS, value_axis

PICTURES = {theme: Path(__file__).parent / "pictures" / f"overview-{theme}.png" for theme in ("light", "dark")}
WIDTH, HEIGHT = 1200, 500
KEYS = (
    "orthogonality/max_abs_cos",
    "orthogonality_control/max_abs_cos",
    "norm_growth/increment",
    "norm_growth/predicted",
    "norm_growth/weight_norm",
)
"""Metrics whose curves the picture shows."""
_THEMES = {"light": ("#ffffff", "#1d2430", "#dfe3e8"), "dark": ("#14181e", "#e6e9ee", "#343b46")}
_PLAIN = "weight_decay=0.0"
_NORMS = ["bn", "gn", "ln", "wn"]
_PANEL: dict[str, Any] = {"width": 222, "height": 384}


def picture(runs: Mapping[str, Any], theme: str) -> alt.HConcatChart:
    """Return the picture.

    Args:
        runs: Content of docs/records/paper_small.json.
        theme: ``light`` or ``dark``.
    """
    paper, ink, line = _THEMES[theme]
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
    chart = alt.hconcat(_orthogonality(runs), _increments(runs), _norms(runs), _accuracies(runs), spacing=22)
    return (
        chart.resolve_scale(color="independent", strokeDash="independent")
        .properties(background=paper, padding={"left": 8, "right": 12, "top": 12, "bottom": 8})
        .configure(font="DejaVu Sans", view=alt.ViewConfig(stroke=line))
        .configure_axis(**text, gridColor=line, domainColor=line, tickColor=line)
        .configure_legend(**text, orient="bottom", title=None, columns=4, symbolType="stroke", symbolStrokeWidth=2)
        .configure_title(color=ink, fontSize=12.5, anchor="start", offset=10)
    )


def _orthogonality(runs: Mapping[str, Any]) -> Any:
    names = {"orthogonality/max_abs_cos": "scale invariant", "orthogonality_control/max_abs_cos": "control"}
    rows = list(_curves(runs[f"norm=bn,{_PLAIN}"], names))
    return _lines(rows, "W is orthogonal to ∇W", "largest |cos(W, ∇W)|", [*names.values()], log=True)


def _increments(runs: Mapping[str, Any]) -> Any:
    names = {"norm_growth/increment": "measured", "norm_growth/predicted": "η²‖∇W‖²"}
    rows = list(_curves(runs[f"norm=bn,{_PLAIN}"], names))
    measured = [row for row in rows if row["curve"] == "measured"]
    predicted = [row for row in rows if row["curve"] != "measured"]
    color = _color([*names.values()])
    axis = alt.Y("value:Q", title="Δ‖W‖² of a step", scale=alt.Scale(type="log"), axis=value_axis(log=True))
    points = (
        alt.Chart(alt.Data(values=measured)).mark_point(size=26, filled=True).encode(x=_step(), y=axis, color=color)
    )
    line = alt.Chart(alt.Data(values=predicted)).mark_line(strokeWidth=1.6).encode(x=_step(), y=axis, color=color)
    return alt.layer(line, points).properties(**_PANEL, title="A step adds η²‖∇W‖² to ‖W‖²")


def _norms(runs: Mapping[str, Any]) -> Any:
    rows = []
    for name, decay in ((_PLAIN, "without decay"), ("weight_decay=0.05", "with weight decay")):
        points = runs[f"norm=bn,{name}"]["curves"]["norm_growth/weight_norm"]
        rows += [{"curve": decay, "step": step, "value": value / points[0][1]} for step, value in points]
    return _lines(
        rows, "Only weight decay shrinks ‖W‖", "‖W‖ / ‖W‖ at the start", ["without decay", "with weight decay"]
    )


def _accuracies(runs: Mapping[str, Any]) -> Any:
    rows = []
    for name in (f"norm={norm},{_PLAIN}" for norm in _NORMS):
        for attack, (correct, n) in runs[name]["accuracies"].items():
            radius = "0" if attack == "clean" else attack.removeprefix("bim_eps")
            if re.fullmatch(r"[\d.]+", radius):  # neither noise nor the control with rescaled weights
                rows.append({"curve": _norm(name), "radius": 255 * float(radius), "value": correct / n})
    x = alt.X("radius:Q", title="radius ε of BIM, in 1/255", axis=alt.Axis(tickCount=5))
    y = alt.Y("value:Q", title="accuracy", axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domain=[0, 1]))
    chart = alt.Chart(alt.Data(values=rows)).mark_line(strokeWidth=1.8, point=True)
    return chart.encode(x=x, y=y, color=_color(_NORMS)).properties(**_PANEL, title="Accuracy under attack")


def _curves(run: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for key, curve in names.items():
        for step, value in run["curves"][key]:
            yield {"curve": curve, "step": step, "value": value}


def _lines(rows: Sequence[Any], title: str, axis: str, curves: Sequence[str], log: bool = False) -> Any:
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    y = alt.Y("value:Q", title=axis, scale=scale, axis=value_axis(log))
    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(strokeWidth=1.8)
    return chart.encode(x=_step(), y=y, color=_color(curves)).properties(**_PANEL, title=title)


def _step() -> Any:
    return alt.X("step:Q", title="training step", axis=alt.Axis(tickCount=4))


def _color(curves: Sequence[str]) -> Any:
    return alt.Color("curve:N", scale=alt.Scale(domain=list(curves), range=COLORS[: len(curves)]), legend=alt.Legend())


def _norm(folder: str) -> str:
    return folder.removeprefix("norm=").partition(",")[0]


def draw(runs: Mapping[str, Any]) -> list[Path]:
    """Draw the picture in both themes; return its files."""
    for theme, path in PICTURES.items():
        picture(runs, theme).save(path, scale_factor=1.5)
    return [*PICTURES.values()]
