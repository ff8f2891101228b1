"""Figures of measured and predicted increments: coinciding values are told apart, and their ratio is exact."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.figures.comparison_figures import _place, _ticks, cumulative, increments, ratio
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.runs.records.record import Record

MEASURED, EXPLAINED, EQ_16 = "measured", "explained (all terms)", "eq 16: η²‖∇‖²"


def curves(**metrics: Any) -> Curves:
    named = {f"norm_growth/{name}": points for name, points in metrics.items()}
    return Curves(compare_runs([Record(Path("run"), metrics=named)]))


def rows(figure: Any) -> list[dict[str, Any]]:
    return figure.spec["data"]["values"]


def test_ratio_is_of_the_recorded_values_where_both_are_finite_and_the_prediction_is_not_zero() -> None:
    measured = [(0, 1.0 + 1e-9), (1, 2.0), (2, 3.0), (3, math.nan), (4, -4.0), (6, 1.0), (7, 1e308)]
    explained = [(0, 1.0), (1, 0.0), (2, math.nan), (3, 3.0), (4, 2.0), (5, 1.0), (6, math.inf), (7, 1e-300)]
    (row,) = rows(ratio(curves(increment=measured, explained=explained)))
    assert (row["quantity"], row["step"]) == (EXPLAINED, [0, 4])
    assert row["value"] == pytest.approx([1e-9, -3.0], rel=1e-4)


def test_no_ratio_without_a_prediction() -> None:
    assert ratio(curves(increment=[(0, 1.0)])) is None
    assert ratio(curves(increment=[(0, 1.0)], predicted=[(0, 0.0)])) is None
    assert ratio(curves(predicted=[(0, 1.0)])) is None


@pytest.mark.parametrize("make", [increments, cumulative])
def test_measured_values_are_points_on_a_thin_line_on_a_wide_line(make: Any) -> None:
    prefix = "" if make is increments else "cumulative_"
    names = (f"{prefix}increment", f"{prefix}explained", f"{prefix}predicted")
    chart = make(curves(**{name: [(0, 1.0), (1, 2.0)] for name in names})).spec
    wide, thin, _, points = chart["layer"]
    kinds = [(layer["mark"]["type"], len(layer["transform"][0]["filter"]["oneOf"])) for layer in (wide, thin, points)]
    assert kinds == [("line", 1), ("line", 1), ("point", 1)]
    domain = wide["encoding"]["strokeWidth"]["scale"]["domain"]
    widths = dict(zip(domain, wide["encoding"]["strokeWidth"]["scale"]["range"], strict=True))
    drawn = [layer["transform"][0]["filter"]["oneOf"][0] for layer in (wide, thin, points)]
    assert drawn == [domain[1], domain[2], domain[0]]
    assert widths[drawn[0]] > 3 * widths[drawn[1]]
    for channel in ("color", "shape"):
        assert points["encoding"][channel]["scale"]["domain"] == domain, "one legend, with the forms of the marks"


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (-0.001, 0.001, {-0.001, 0.0, 0.001}),
        (-0.2, 0.2, {-0.1, -0.01, 0.0, 0.01, 0.1}),
        (-6e5, 0.2, {-0.1, 0.0, 0.1, -1001.0, -100001.0}),
        (-math.inf, math.inf, {0.0}),
    ],
)
def test_axis_of_ratios_has_one_and_round_numbers_that_do_not_overlap(low: float, high: float, shown: Any) -> None:
    ticks = _ticks(max(low, -1e300), min(high, 1e300))
    assert shown <= set(ticks)
    assert ticks == sorted(ticks)
    places = [_place(tick) for tick in ticks]
    least = (_place(min(high, 1e300)) - _place(max(low, -1e300))) / 12
    assert all(b - a >= least for a, b in itertools.pairwise(places))
