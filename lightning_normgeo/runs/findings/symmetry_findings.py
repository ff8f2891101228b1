"""Findings about the scale symmetries of a network, from the record of a run."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_normgeo.runs.findings.finding import Finding
from lightning_normgeo.runs.record import Record

SYMMETRY_KEYS = (
    "symmetry/max_charge",
    "symmetry/max_uncanceled",
    "symmetry/joint_norm",
    "symmetry/imbalance",
)
"""Metric keys that these findings are made from."""


def symmetry_findings(record: Record) -> Iterator[Finding]:
    """Yield the largest charge, the norm of what is invariant as one vector, and the imbalance of rescalings."""
    charges, terms, norms, imbalances = ([value for _, value in record.points(key)] for key in SYMMETRY_KEYS)
    if charges:
        largest = max(charges)
        detail = f"{max(terms):.2g} if its terms did not cancel." if terms else ""
        quantity = "largest charge Σ s⟨W, ∇W⟩ of all scale symmetries"
        yield Finding("Symmetries", f"{largest:.1e}", quantity, detail, "charges", largest, headline="max_charge")
    if len(norms) > 1 and norms[0]:
        ratio = norms[-1] / norms[0]
        detail = f"{norms[0]:.4g} → {norms[-1]:.4g}; no output changes by that alone."
        quantity = "‖W‖ of weights invariant jointly, last over first measured step"
        yield Finding("Joint norm", f"× {ratio:.4f}", quantity, detail, "joint-norm", ratio)
    if imbalances:
        detail = f"{imbalances[0]:.2g} at the start; 0 is the balanced point, which plain SGD approaches."
        quantity = "mean imbalance of rescalings at the end"
        yield Finding("Balance", f"{imbalances[-1]:.2g}", quantity, detail, "imbalance", imbalances[-1])
