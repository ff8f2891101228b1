"""Figures of a network without scale-invariant weights: they show its controls, and say so."""

from __future__ import annotations

from pathlib import Path

from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.report.story import CONTROLS_ONLY
from lightning_normgeo.runs.records.record import Record

NAMES = ("weight_norm", "increment", "explained", "term_quadratic", "cumulative_increment", "angular_update")


def figures(*groups: str) -> dict[str, tuple[str, list[float]]]:
    metrics = {f"{group}/{name}": [(0, 1.0 + k), (1, 2.0)] for k, group in enumerate(groups) for name in NAMES}
    found = all_figures(Curves(compare_runs([Record(Path("run"), metrics=metrics)])))
    return {
        figure.anchor: (figure.caption, figure.spec["data"]["values"][0]["value"])
        for figure in found
        if figure.anchor not in ("orthogonality", "increments-ratio")
    }


def test_the_ratio_of_controls_is_that_of_their_increments() -> None:
    values = {"increment": 3.0, "explained": 2.0}
    metrics = {f"norm_growth_control/{name}": [(0, value), (1, value)] for name, value in values.items()}
    found = all_figures(Curves(compare_runs([Record(Path("run"), metrics=metrics)])))
    (figure,) = [figure for figure in found if figure.anchor == "increments-ratio"]
    assert figure.caption.startswith(CONTROLS_ONLY)
    assert [row["value"] for row in figure.spec["data"]["values"]] == [[0.5, 0.5]]


def test_controls_take_the_place_of_invariant_weights_only_where_there_are_none() -> None:
    alone = figures("norm_growth_control")
    assert set(alone) == {"norms", "increments", "terms", "cumulative", "angles"}
    assert all(caption.startswith(CONTROLS_ONLY) for caption, _ in alone.values())
    both = figures("norm_growth", "norm_growth_control")
    assert set(both) == set(alone)
    assert not any(CONTROLS_ONLY in caption for caption, _ in both.values())
    assert {values[0] for _, values in both.values()} == {1.0}, "those of the invariant weights"
