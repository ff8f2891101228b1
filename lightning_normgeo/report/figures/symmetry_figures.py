"""Figures of scale symmetries."""

from __future__ import annotations

from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.figure import Figure, unique
from lightning_normgeo.report.figures.section_figures import drawn
from lightning_normgeo.report.story import CHARGES, IMBALANCE, JOINT_ANGLES, JOINT_NORM, SPHERES, Section
from lightning_normgeo.runs.quantities.table import labels


def charges(curves: Curves) -> Figure | None:
    """Return the figure of charges, and of what they would be if their terms did not cancel."""
    names = labels(*CHARGES.keys)
    return drawn(
        curves.of(names),
        "charges",
        CHARGES,
        "largest charge",
        panel="group",
        color="quantity",
        log=True,
        shared=True,
        known=[*names.values()],
        by_layer=False,
    )


def imbalance(curves: Curves) -> Figure | None:
    """Return the figure of the imbalance of rescalings."""
    return _one(curves, "imbalance", IMBALANCE, "imbalance", log=False)


def joint_norm(curves: Curves) -> Figure | None:
    """Return the figure of the norm of weights that are invariant as one vector."""
    return _one(curves, "joint-norm", JOINT_NORM, "‖W‖", log=False)


def joint_angles(curves: Curves) -> Figure | None:
    """Return the figure of the angles by which this vector turns."""
    return _one(curves, "joint-angles", JOINT_ANGLES, "angle, radians", log=True)


def spheres(curves: Curves) -> Figure | None:
    """Return the figure of the free training that moves directions as training on spheres does."""
    names = labels(*SPHERES.keys)
    rows = curves.of(names)
    return drawn(rows, "spheres", SPHERES, "", panel="quantity", log=True, known=[*names.values()], by_layer=False)


def _one(curves: Curves, anchor: str, section: Section, axis: str, log: bool) -> Figure | None:
    rows = curves.of({key: key for key in section.keys})
    color = "series" if len(unique(rows, "series")) > 1 else "quantity"
    return drawn(rows, anchor, section, axis, color=color, log=log, by_layer=False)
