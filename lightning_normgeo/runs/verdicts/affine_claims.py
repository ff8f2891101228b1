"""Claims of section 3.1: γ² approaches σ², and β approaches μ (Fig 2)."""

from __future__ import annotations

import math

from lightning_normgeo.runs.record import Record
from lightning_normgeo.runs.verdicts.claim import Claim
from lightning_normgeo.runs.verdicts.curves import ends, magnitudes, span
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import REFUTED, SUPPORTED, UNDECIDED, Verdict

_GAMMA, _BETA = "affine/abs_gamma2_minus_sigma2_median", "affine/abs_beta_minus_mu_median"
_RATIO, _NORM = "affine/gamma2_over_sigma2_median", "norm_growth/weight_norm"


def _gamma(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge γ² against σ², by their distance and by their ratio, which has no scale."""
    distances, ratios = magnitudes(record, _GAMMA), magnitudes(record, _RATIO)
    share = _share(distances)
    if share is None or not ratios:
        return None
    before, after = (abs(math.log(value)) if value > 0 else math.inf for value in ends(ratios))
    first, last = ends(ratios)
    word, reason = UNDECIDED, "neither small nor grown"
    if share <= thresholds.affine_share and after <= math.log(thresholds.affine_factor):
        word, reason = SUPPORTED, ""
    elif share >= thresholds.affine_growth and after >= before:
        word, reason = REFUTED, ""
    elif share <= thresholds.affine_share:
        reason = "but γ²/σ² is not near 1"
    detail = f"Median γ²/σ² {first:.3g} → {last:.3g}; 1 would be γ = σ. It has no scale, as the distance has."
    return _verdict(word, share, reason, detail, span(record, _GAMMA, _RATIO), thresholds)


def _beta(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge β against μ by their distance; one that grows no more than the weights do refutes nothing."""
    distances, norms = magnitudes(record, _BETA), magnitudes(record, _NORM)
    share = _share(distances)
    if share is None:
        return None
    longer = max(1.0, norms[-1] / norms[0]) if norms and norms[0] else math.inf
    word, reason = UNDECIDED, "neither small nor grown"
    if share <= thresholds.affine_share:
        word, reason = SUPPORTED, ""
    elif share >= thresholds.affine_growth:
        word, reason = (REFUTED, "") if share >= thresholds.affine_growth * longer else (UNDECIDED, "μ grows with ‖W‖")
    first, last = ends(distances)
    detail = f"Median |β − μ| {first:.3g} → {last:.3g}. It changes with the scale of the weights in front."
    return _verdict(word, share, reason, detail, span(record, _BETA, _NORM), thresholds)


def _share(distances: list[float]) -> float | None:
    """Return a distance at the end over that at the start; None if it was measured less than twice, or began at 0."""
    if len(distances) < 2:
        return None
    first, last = ends(distances)
    return last / first if first else None


def _verdict(word: str, share: float, reason: str, detail: str, evidence: str, thresholds: Thresholds) -> Verdict:
    refuted = word == REFUTED
    limit = f"refuted from {thresholds.affine_growth:g}" if refuted else f"limit {thresholds.affine_share:g}"
    return Verdict(word, "end/start", f"{share:.3g}", limit, reason, detail, evidence, share)


_NUMBER = "Number: the median distance over all channels, mean of the last over that of the first tenth of the steps. "
AFFINE_CLAIMS = (
    Claim(
        key="gamma_sigma",
        title="γ² → σ² (Fig 2)",
        statement=(
            "In training γ² approaches the variance σ² of what batch normalization normalizes: |γ² − σ²| "
            "settles at a small value."
        ),
        source="section 3.1, Fig 2",
        rule=(
            _NUMBER
            + "Supported if it is at most `affine_share` and the median γ²/σ² ends within `affine_factor` of 1; "
            "refuted if it is at least `affine_growth` and γ²/σ² ends no nearer to 1."
        ),
        needs="AffineConvergenceMonitor, and batch normalization",
        section="affine",
        thresholds=("affine_share", "affine_factor", "affine_growth", "min_steps"),
        keys=(_GAMMA, _RATIO),
        judge=_gamma,
    ),
    Claim(
        key="beta_mu",
        title="β → μ (Fig 2)",
        statement=(
            "In training β approaches the mean μ of what batch normalization normalizes: |β − μ| settles at a "
            "small value."
        ),
        source="section 3.1, Fig 2",
        rule=(
            _NUMBER
            + "Supported if it is at most `affine_share`; refuted if it is at least `affine_growth`, and that times "
            "the growth of ‖W‖, with which μ grows."
        ),
        needs="AffineConvergenceMonitor, and batch normalization",
        section="affine",
        thresholds=("affine_share", "affine_growth", "min_steps"),
        keys=(_BETA, _NORM),
        judge=_beta,
    ),
)
"""Claims of section 3.1."""
