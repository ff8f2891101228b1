"""Verdicts of a single run on all claims, from its record."""

from __future__ import annotations

from dataclasses import replace

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.curves import span
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import DECIDED, NOT_APPLICABLE, NOT_TESTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import too_few


def verdicts(record: Record, thresholds: Thresholds | None = None) -> dict[str, Verdict]:
    """Return the verdict of a run on each claim of the paper.

    A claim is not decided by a run that diverged, or if its number is made from fewer measured steps than
    ``thresholds.min_steps``; it is not tested by a run that measured nothing of it.

    Args:
        record: Record of the run.
        thresholds: Limits of the verdicts. Default: those that the documentation gives.

    Returns:
        Verdicts by the key of the claim, in the order of :data:`~lightning_normgeo.runs.verdicts.claims.claims.CLAIMS`.

    Example:
        >>> verdicts(read_record("runs/mine"))["orthogonality"].word
        'supported'
    """
    limits = thresholds or Thresholds()
    return {key: _verdict(claim, record, limits) for key, claim in CLAIMS.items()}


def _verdict(claim: Claim, record: Record, thresholds: Thresholds) -> Verdict:
    found = None if claim.judge is None else claim.judge(record, thresholds)
    if found is None:
        return _without_invariant_weights(claim, record) or Verdict(NOT_TESTED, reason=f"needs {claim.needs}")
    if found.word not in DECIDED:
        return found
    if record.diverged is not None:
        return replace(found, word=UNDECIDED, reason=f"diverged at step {record.diverged.step}")
    if found.steps is not None and found.steps < thresholds.min_steps:
        return replace(found, word=UNDECIDED, reason=too_few(found.steps, thresholds.min_steps))
    return found


def _without_invariant_weights(claim: Claim, record: Record) -> Verdict | None:
    """Return that a run has no weights that a claim is about; None if it has, or did not measure them."""
    controls = claim.invariant.replace("/", "_control/")
    if not claim.invariant or record.points(claim.invariant) or not record.points(controls):
        return None
    detail = "Weights that are invariant only together have charges instead; SymmetryMonitor measures them."
    reason = "no weight is scale invariant alone"
    return Verdict(NOT_APPLICABLE, reason=reason, detail=detail, evidence=span(record, controls))
