"""The report's figures of accuracy under attack."""

from __future__ import annotations

import re
from typing import Any

import altair as alt

from lightning_normgeo.record import Record
from lightning_normgeo.report.figure import COLORS, HEIGHT, WIDTH, Figure


def accuracies(record: Record) -> Figure | None:
    """Return one bar for each attack."""
    results = record.results.get("robustness", {}).get("results", [])
    if not results:
        return None
    base = alt.Chart(alt.Data(values=results)).encode(
        y=alt.Y("attack:N", sort=None, title=None),
        tooltip=["attack:N", *(alt.Tooltip(f"{k}:Q", format=".4f") for k in ("accuracy", "ci_low", "ci_high")), "n:Q"],
    )
    bars = base.mark_bar(color=COLORS[0], opacity=0.75, height=18).encode(
        x=alt.X(
            "accuracy:Q",
            scale=alt.Scale(domain=[0, 1]),
            title="accuracy, with 95 % interval",
            axis=alt.Axis(format="%"),
        )
    )
    interval = base.mark_rule(strokeWidth=2, color=COLORS[5]).encode(x="ci_low:Q", x2="ci_high:Q")
    return Figure(
        "accuracies",
        "Accuracy under attack",
        "Wilson intervals at 95 %. The settings are below the table.",
        (bars + interval).properties(width=WIDTH - 80, height=36 * len(results)),
    )


def against_eps(record: Record) -> Figure | None:
    """Return accuracy against the radius, where an attack was evaluated with several."""
    points = _by_radius(record.results.get("robustness", {}).get("results", []))
    if not points:
        return None
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("eps:Q", title="radius ε"),
        color=alt.Color(
            "attack:N", scale=alt.Scale(range=COLORS), title=None, legend=alt.Legend(orient="bottom", symbolOpacity=1)
        ),
        tooltip=["attack:N", alt.Tooltip("eps:Q", format=".4f"), alt.Tooltip("accuracy:Q", format=".4f"), "n:Q"],
    )
    scale, axis = alt.Scale(domain=[0, 1]), alt.Axis(format="%")
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("ci_low:Q", scale=scale, title=None), y2="ci_high:Q")
    line = base.mark_line(point=True).encode(y=alt.Y("accuracy:Q", scale=scale, axis=axis, title="accuracy"))
    return Figure(
        "against-eps",
        "Accuracy against the radius of the attack",
        "It has to fall towards zero as the radius grows; where it does not, the attack is too weak or gradients are "
        "masked. Bands are Wilson intervals at 95 %.",
        (band + line).properties(width=WIDTH, height=HEIGHT),
    )


def _by_radius(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of attacks with several radii, each beginning with the clean accuracy at zero."""
    swept = [row for row in results if row.get("eps") is not None and "_eps" in row["attack"]]
    families = dict.fromkeys(_family(row["attack"]) for row in swept)
    clean = [{**row, "attack": name, "eps": 0.0} for name in families for row in results if row["attack"] == "clean"]
    return clean + [{**row, "attack": _family(row["attack"])} for row in swept]


def _family(attack: str) -> str:
    """Return the name of an attack without its radius: ``bim_eps0.03_rescaled`` is one of ``bim_rescaled``."""
    return re.sub(r"_eps[\d.e-]*\d", "", attack)
