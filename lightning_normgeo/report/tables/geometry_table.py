"""Table of the geometry at the last measured step of each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.cells import NOTHING
from lightning_normgeo.report.tables.table import Cell, Table, number, text
from lightning_normgeo.runs.records.record import Record

_PREFIXES = ("orthogonality", "norm_growth", "affine")
_CAPTION = (
    "At the last measured step of each quantity, over all units; ‖W‖ before the first and before the last measured "
    "step. |cos(W, ∇W)| of scale-invariant units is the ε of the normalization and float rounding; the control is not "
    "invariant. A residual is measured minus explained increment: at a ratio to the storage floor of at most 1 it is "
    "what rounding the weights can add. A longer W is not by itself another function, but σ and μ grow with it, and so "
    "|γ² − σ²|, |β − μ| and γ²/σ² depend on its length."
)
_EQUILIBRIUM = " The turn per step approaches its equilibrium only after many steps, and only under weight decay."
_CUMULATIVE = " Σ: over all steps so far."

Quantity = Callable[[Record], Cell | None]
"""A column of the table: from a record to its cell, or None if the quantity was not measured."""


def geometry_table(runs: Sequence[Run]) -> Table | None:
    """Return a table with a row for each run that measured the geometry; None if no run did."""
    measured = [run for run in runs if any(_is_geometry(key) for key in run.record.metrics)]
    cells = {name: [quantity(run.record) for run in measured] for name, quantity in _QUANTITIES.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    if not shown:
        return None
    caption = _CAPTION
    if "turn / equilibrium" in shown:
        caption += _EQUILIBRIUM
    if "Σ Δ‖W‖²" in shown:
        caption += _CUMULATIVE
    rows = [
        [text(run.name), number(_last_step(run.record), "d"), *(column[k] or NOTHING for column in shown.values())]
        for k, run in enumerate(measured)
    ]
    return Table("geometry", "Geometry at the last measured step", caption, ["run", "step", *shown], rows)


def _is_geometry(key: str) -> bool:
    return key.startswith(_PREFIXES)


def _last_step(record: Record) -> int:
    return max(points[-1][0] for key, points in record.metrics.items() if _is_geometry(key))


def _last(key: str) -> Quantity:
    """Return a column with the last value of a metric."""

    def quantity(record: Record) -> Cell | None:
        points = record.points(key)
        return number(points[-1][1]) if points else None

    return quantity


def _ratio(above: str, below: str) -> Quantity:
    """Return a column with the ratio of two metrics' magnitudes at the last step that has both, the second not zero."""

    def quantity(record: Record) -> Cell | None:
        divisors = {step: abs(value) for step, value in record.points(below) if value}
        found = [abs(value) / divisors[step] for step, value in record.points(above) if step in divisors]
        return number(found[-1], ".3g") if found else None

    return quantity


def _growth(record: Record) -> Cell | None:
    """Return the cell of the first and the last norm of the weights, which sorts by their ratio."""
    points = record.points("norm_growth/weight_norm")
    if not points:
        return None
    first, last = points[0][1], points[-1][1]
    factor = f" (×{last / first:.4g})" if first else ""
    return Cell(f"{first:.4g} → {last:.4g}{factor}", last / first if first else last)


_QUANTITIES: dict[str, Quantity] = {
    "max |cos|": _last("orthogonality/max_abs_cos"),
    "max |cos|, ε removed": _last("orthogonality/max_abs_cos_corrected"),
    "max |cos|, control": _last("orthogonality_control/max_abs_cos"),
    "‖W‖, first → last": _growth,
    "|residual| / floor": _ratio("norm_growth/residual", "norm_growth/storage_floor"),
    "Σ Δ‖W‖²": _last("norm_growth/cumulative_increment"),
    "Σ η²‖∇W‖² (eq 16)": _last("norm_growth/cumulative_predicted"),
    "|Σ residual| / Σ floor": _ratio("norm_growth/cumulative_residual", "norm_growth/cumulative_storage_floor"),
    "turn per step, rad": _last("norm_growth/angular_update"),
    "turn / equilibrium": _ratio("norm_growth/angular_update", "norm_growth/equilibrium_angle"),
    "|γ² − σ²|, median": _last("affine/abs_gamma2_minus_sigma2_median"),
    "|β − μ|, median": _last("affine/abs_beta_minus_mu_median"),
    "γ²/σ², median": _last("affine/gamma2_over_sigma2_median"),
}
