"""Axes and marks that all figures of a report share: labels of logarithmic axes, and curves of one point."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.figure import VEGA_LITE
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.runs.records.record import Record


def picture(anchor: str, *runs: dict[str, Any]) -> str:
    """Return a figure of some runs as SVG, with each element on a line of its own."""
    records = [Record(Path(f"run{k}"), metrics=metrics) for k, metrics in enumerate(runs)]
    figures = {figure.anchor: figure for figure in all_figures(Curves(compare_runs(records)))}
    return vl_convert.vegalite_to_svg(figures[anchor].spec, vl_version=VEGA_LITE).replace("><", ">\n<")


def labels(svg: str, axis: str = "Y-axis") -> list[str]:
    """Return the visible labels of the first axis of a kind."""
    part = svg[svg.index(f'aria-label="{axis}') :]
    part = part[part.index("role-axis-label") : part.index("role-axis-title")]
    return [text for shown, text in re.findall(r'<text[^>]*?opacity="(\d)"[^>]*>([^<]+)</text>', part) if shown == "1"]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (1.38, 1.46, ["1.38", "1.4", "1.42", "1.44", "1.46"]),  # no tick is 1, 2 or 5 times a power of ten
        (5.5e-4, 8.5e-4, ["6·10⁻⁴", "7·10⁻⁴", "8·10⁻⁴"]),
        (2.5, 4.5, ["3", "4"]),
        (0.9, 60, ["1", "2", "5", "10", "20", "50"]),
    ],
)
def test_logarithmic_axes_of_any_range_have_labels(low: float, high: float, shown: list[str]) -> None:
    assert labels(picture("loss", {"train_loss": [(1, low), (9, high)]})) == shown


def test_panels_with_axes_of_their_own_have_labels() -> None:
    keys = ("abs_gamma2_minus_sigma2", "abs_beta_minus_mu", "gamma2_over_sigma2")
    svg = picture("affine", {f"affine/{key}_mean": [(1, 1.38), (9, 1.46)] for key in keys})
    assert svg.count(">1.4<") == len(keys)


def test_the_only_point_of_a_curve_is_visible() -> None:
    runs = [{"norm_growth/weight_norm": [(step, 2.0 + step) for step in range(length)]} for length in (1, 2)]
    points = [line for line in picture("norms", *runs).splitlines() if 'aria-roledescription="point"' in line]
    opacities = sorted(re.findall(r'\bopacity="([\d.]+)"', line)[0] for line in points)
    assert opacities == ["0", "0", "1"], "of the run with one point only"
