"""Figures of the accuracy under attack, as Altair charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import Row
from lightning_normgeo.report.figures.figure import DATA, SMALL, WIDTH, Figure, color_of, dash_of, panels, unique
from lightning_normgeo.robustness.results.statistics.statistics import wilson_interval
from lightning_normgeo.utilities.attack_names import (
    NORM_TITLES,
    attack_title,
    control_of,
    family,
    is_control,
    norm_of,
    split_attack,
    strength,
)

_PERCENT = alt.Axis(format="%", tickCount=5)


def accuracies(runs: Sequence[Run]) -> Figure | None:
    """Return the figure of the accuracy of each run under each attack, without the control of rescaled weights."""
    found = [(run, result) for run in runs for result in run.results]
    rows = [_row(run, result, result["attack"]) for run, result in found if not is_control(result["attack"])]
    if not rows:
        return None
    several = len(unique(rows, "group")) > 1
    vertical = "group" if several else "title"
    base = alt.Chart().encode(
        y=alt.Y(f"{vertical}:N", sort=unique(rows, vertical), title=None, axis=alt.Axis(labelLimit=260)),
        color=color_of("series", unique(rows, "series")),
        tooltip=["run:N", "attack:N", *_numbers("accuracy", "ci_low", "ci_high"), "correct:Q", "n:Q"],
    )
    x = alt.X("accuracy:Q", scale=alt.Scale(domain=[0, 1]), title="accuracy, with 95 % interval", axis=_PERCENT)
    interval = base.mark_rule(strokeWidth=2, opacity=0.6).encode(x="ci_low:Q", x2="ci_high:Q")
    chart = alt.layer(interval, base.mark_point(filled=True, size=55, opacity=0.9).encode(x=x))
    size = {"width": SMALL["width"] - 20, "height": max(60, 24 * len(unique(rows, vertical)))}
    chart = panels(chart, rows, "title", shared=True) if several else chart.properties(data=DATA)
    if several and hasattr(chart, "spec"):  # several panels, whose size is that of each
        chart.spec = chart.spec.properties(**size)
    else:
        chart = chart.properties(width=WIDTH - 90, height=34 * len(unique(rows, vertical)))
    return Figure(
        "accuracies",
        "Accuracy under attack",
        "One point for each run, with its Wilson interval at 95 %: how sure the accuracy of this network is, not how "
        "much another training would differ.",
        chart,
        rows,
        wide=several,
    )


def against_eps(runs: Sequence[Run]) -> Figure | None:
    """Return the figure of the accuracy against the radius, for attacks that were evaluated with several radii."""
    rows = [row for run in runs for row in _by_radius(run)]
    if not rows:
        return None
    norms = unique(rows, "norm")
    if len(norms) > 1:  # radii in different norms cannot share an axis
        rows = [{**row, "panel": ", ".join(filter(None, (row["panel"], row["norm"])))} for row in rows]
    families = unique(rows, "attack")
    own_color = "series" if len(unique(rows, "series")) > 1 else "attack"
    base = alt.Chart().encode(
        x=alt.X("eps:Q", title="radius ε", axis=_radius_axis(rows)),
        color=color_of(own_color, unique(rows, own_color), line=True),
        detail=["run:N", "attack:N"],
        tooltip=["run:N", "attack:N", *_numbers("eps", "accuracy", "ci_low", "ci_high"), "n:Q"],
    )
    shown = {"scale": alt.Scale(domain=[0, 1]), "axis": _PERCENT, "title": "accuracy"}
    band = base.mark_area(opacity=0.1).encode(y=alt.Y("ci_low:Q", **shown), y2="ci_high:Q")
    line = base.mark_line(strokeWidth=1.6).encode(
        y=alt.Y("accuracy:Q", **shown), strokeDash=dash_of("attack", families, alone=own_color != "attack")
    )
    points = base.mark_point(filled=True, size=30, opacity=1).encode(y=alt.Y("accuracy:Q", **shown))
    chart = panels(alt.layer(band, line, points), rows, "panel", shared=True)
    return Figure(
        "against-eps",
        "Accuracy against the radius of the attack",
        "It has to fall towards zero as the radius grows; where it does not, the attack is too weak or gradients are "
        "masked. Bands are Wilson intervals at 95 %.",
        chart.resolve_scale(x="independent") if len(norms) > 1 else chart,
        rows,
        wide=len(unique(rows, "panel")) > 1,
    )


def _radius_axis(rows: Sequence[Row]) -> Any:
    """Return the axis of radii; those that are multiples of 1/255, a step of pixels, are written so."""
    radii = sorted({row["eps"] for row in rows})
    if any(row["norm"] != "l∞" for row in rows) or not all(strength(eps).endswith("/255") for eps in radii if eps):
        return alt.Axis(tickCount=5, labelOverlap=True)
    label = "datum.value == 0 ? '0' : format(255 * datum.value, '.0f') + '/255'"
    return alt.Axis(values=radii, labelExpr=label, labelOverlap="greedy")


def _row(run: Run, result: dict[str, Any], attack: str) -> Row:
    """Return the data of one point."""
    shown = ("accuracy", "ci_low", "ci_high", "correct", "n")
    labels = {"panel": run.panel, "series": run.series, "group": run.group, "run": run.name}
    return {**labels, "attack": attack, "title": attack_title(attack), **{name: result.get(name) for name in shown}}


def _by_radius(run: Run) -> Iterable[Row]:
    """Yield the data of attacks with several radii, each with the clean accuracy as the point at radius zero."""
    swept = [row for row in run.results if row.get("eps") is not None and "_eps" in row["attack"]]
    rows = {row["attack"]: row for row in run.results}
    for name in dict.fromkeys(family(row["attack"]) for row in swept):
        clean = f"clean{split_attack(name)[1]}"
        start = rows.get(control_of(clean) if is_control(name) else clean)
        if start is not None:
            yield {**_row(run, start, name), "norm": norm_of(name), "eps": 0.0}
    for row in swept:
        yield {**_row(run, row, family(row["attack"])), "norm": norm_of(row["attack"]), "eps": row["eps"]}
    for loader, document in run.evaluated_parts.items():
        for attack, radii in document.get("radii", {}).items():
            yield from _by_smallest_radius(run, attack + loader, radii)


def _by_smallest_radius(run: Run, attack: str, radii: Mapping[str, Any]) -> Iterable[Row]:
    """Yield the accuracy under perturbations up to each radius, from the smallest radii of the samples."""
    for eps, accuracy in radii["curve"]:
        correct, n = round(accuracy * radii["n"]), radii["n"]
        low, high = wilson_interval(correct, n)
        point = {"accuracy": accuracy, "ci_low": low, "ci_high": high, "correct": correct, "n": n}
        norm = NORM_TITLES.get(radii["norm"], radii["norm"])
        yield {**_row(run, point, f"{attack}, smallest radii"), "norm": norm, "eps": eps}


def _numbers(*names: str) -> list[Any]:
    return [alt.Tooltip(f"{name}:Q", format=".4f") for name in names]
