"""Figure of the accuracy with a share of the channels removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import Row
from lightning_normgeo.report.figures.figure import Figure, color_of, dash_of, panels, unique
from lightning_normgeo.report.recorded_channels import (
    CRITERIA,
    REPLACED,
    clean_of,
    criterion_title,
    is_control,
    results_of,
)
from lightning_normgeo.report.story import CHANNELS

_PERCENT = alt.Axis(format="%", tickCount=5)
_RANKED, _RANDOM = "ranked", "at random"
_DRAWN = "The controls are dashed. Bars are Wilson intervals at 95 %."


def channels(runs: Sequence[Run]) -> Figure | None:
    """Return the figure of the accuracy against the share of channels removed, for each criterion."""
    rows = [row for run in runs for row in _rows(run, several=len(runs) > 1)]
    if not rows:
        return None
    known = [*CRITERIA.values()]
    base = alt.Chart().encode(
        x=alt.X("removed:Q", title="channels removed", axis=_PERCENT),
        color=color_of("criterion", unique(rows, "criterion"), known, line=True),
        detail=["run:N", "criterion:N"],
        tooltip=["run:N", "criterion:N", *_numbers("removed", "accuracy", "ci_low", "ci_high"), "n:Q"],
    )
    shown = {"scale": alt.Scale(domain=[0, 1]), "axis": _PERCENT, "title": "accuracy"}
    bars = base.mark_rule(strokeWidth=1.4, opacity=0.4).encode(y=alt.Y("ci_low:Q", **shown), y2="ci_high:Q")
    line = base.mark_line(strokeWidth=1.6).encode(
        y=alt.Y("accuracy:Q", **shown), strokeDash=dash_of("kind", unique(rows, "kind"), [_RANKED, _RANDOM])
    )
    points = base.mark_point(filled=True, size=30, opacity=1).encode(y=alt.Y("accuracy:Q", **shown))
    chart = panels(alt.layer(bars, line, points), rows, "panel", shared=True)
    return Figure(
        "channels", CHANNELS.title, f"{CHANNELS.caption} {_DRAWN}", chart, rows, wide=len(unique(rows, "panel")) > 1
    )


def _rows(run: Run, several: bool) -> Iterator[Row]:
    """Yield the points of a run; each curve begins with the whole network."""
    clean, begun = clean_of(run), set()
    for result in results_of(run):
        criterion, replace = str(result.get("criterion")), str(result.get("replace"))
        panel = REPLACED.get(replace, replace)
        label: dict[str, Any] = {
            "panel": f"{run.name}, {panel}" if several else panel,
            "run": run.name,
            "criterion": criterion_title(criterion),
            "kind": _RANDOM if is_control(criterion) else _RANKED,
        }
        if clean is not None and (criterion, replace) not in begun:
            begun.add((criterion, replace))
            yield {**label, **_point(clean, 0.0)}
        yield {**label, **_point(result, float(result["removed_share"]))}


def _point(result: Mapping[str, Any], removed: float) -> Row:
    return {"removed": removed, **{name: result[name] for name in ("accuracy", "ci_low", "ci_high", "n")}}


def _numbers(*names: str) -> list[Any]:
    return [alt.Tooltip(f"{name}:Q", format=".4f") for name in names]
