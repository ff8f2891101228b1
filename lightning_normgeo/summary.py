"""A run on one screen."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_normgeo.plain import plain_line
from lightning_normgeo.record import Record

_QUANTITIES = {
    "orthogonality/max_abs_cos": "largest |cos(W, ∇W)|, scale-invariant",
    "orthogonality/max_abs_cos_corrected": "  with the epsilon part removed",
    "orthogonality_control/max_abs_cos": "  of the other weights",
    "norm_growth/weight_norm": "‖W‖ of all scale-invariant weights",
    "norm_growth/increment": "Δ‖W‖² of a step, measured",
    "norm_growth/explained": "  explained by the optimizer's formula",
    "norm_growth/predicted": "  predicted by eq 16, η²‖∇‖²",
    "norm_growth/angular_update": "turn of the weights per step (rad)",
    "affine/abs_gamma2_minus_sigma2_mean": "|γ² - σ²|, mean over channels",
    "affine/abs_beta_minus_mu_mean": "|β - μ|, mean over channels",
}


def summary_table(record: Record) -> Group:
    """Return the geometry at the first and last measured step, and the accuracies, for the terminal."""
    geometry = Table(title="Geometry", box=box.SIMPLE, title_justify="left")
    geometry.add_column("")
    measured = {key: points for key in _QUANTITIES if (points := record.metrics.get(key))}
    steps = next(iter(measured.values()), [(0, 0.0)])
    for name in (f"step {steps[0][0]}", f"step {steps[-1][0]}"):
        geometry.add_column(name, justify="right")
    for key, points in measured.items():
        geometry.add_row(_QUANTITIES[key], f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}")
    accuracies = Table(title="Robustness", box=box.SIMPLE, title_justify="left")
    for name in ("attack", "accuracy", "95 % interval", "drop", "n"):
        accuracies.add_column(name, justify="left" if name == "attack" else "right")
    for row in [row for found in record.evaluations.values() for row in found.get("results", [])]:
        interval = f"{100 * row['ci_low']:.1f} … {100 * row['ci_high']:.1f} %"
        drop = f"{100 * row['accuracy_drop']:.2f} pt"
        accuracies.add_row(_text(row["attack"]), f"{100 * row['accuracy']:.2f} %", interval, drop, str(row["n"]))
    for found in record.evaluations.values():
        for attack, reason in found.get("not_evaluated", {}).items():
            accuracies.add_row(_text(attack), "not evaluated", _text(reason))
    return Group(*(table for table in (geometry, accuracies) if table.row_count))


def _text(name: object) -> Text:
    """Return a name from a record, which is no markup."""
    return Text(plain_line(name))
