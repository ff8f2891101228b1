"""Figures of the geometry of a batch: rank against width, effective rank, spheres reached, orthogonality of samples."""

from __future__ import annotations

from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.figure import Figure, unique
from lightning_normgeo.report.figures.section_figures import drawn
from lightning_normgeo.report.story import BATCH_OUTPUTS, BATCH_RANK, EFFECTIVE_RANK, GAP, Section
from lightning_normgeo.runs.quantities.table import labels


def rank_against_width(curves: Curves) -> Figure | None:
    """Return the figure of the rank of Σ_X over width, and of the share of weights in its kernel."""
    names = labels(*BATCH_RANK.keys)
    rows = curves.of(names)
    color = "series" if len(unique(rows, "series")) > 1 else "quantity"
    known = [*names.values()]
    return drawn(rows, "rank", BATCH_RANK, "share", color=color, dash="quantity", log=False, shared=True, known=known)


def effective_rank(curves: Curves) -> Figure | None:
    """Return the figure of the effective rank of Σ_X."""
    return _one(curves, "effective-rank", EFFECTIVE_RANK, "effective rank", log=True)


def spheres_reached(curves: Curves) -> Figure | None:
    """Return the figure of the smallest radius that the outputs of a channel reach."""
    return _one(curves, "radii", BATCH_OUTPUTS, "s/√(s² + ε)", log=False)


def orthogonality_of_samples(curves: Curves) -> Figure | None:
    """Return the figure of the orthogonality gap."""
    return _one(curves, "orthogonality-gap", GAP, "gap", log=False)


def _one(curves: Curves, anchor: str, section: Section, axis: str, log: bool) -> Figure | None:
    rows = curves.of(labels(*section.keys))
    color = "series" if len(unique(rows, "series")) > 1 else "quantity"
    return drawn(rows, anchor, section, axis, color=color, log=log)
