"""Claims of section 3.1: γ² approaches σ², and β approaches μ (Fig 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.curves import ends, magnitudes, span
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import NOT_APPLICABLE, REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import significant, too_few

_GAMMA, _BETA = "affine/abs_gamma2_minus_sigma2_median", "affine/abs_beta_minus_mu_median"
_RATIO, _NORM = "affine/gamma2_over_sigma2_median", "norm_growth/weight_norm"


def _gamma(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge γ² against σ², by their distance and by their ratio."""
    distances, ratios = magnitudes(record, _GAMMA), magnitudes(record, _RATIO)
    if not distances or not ratios:
        return None
    evidence = span(record, _GAMMA, _RATIO)
    if _is_frozen(record, "gamma"):
        return Verdict(NOT_APPLICABLE, reason="γ is frozen", evidence=evidence)
    share = _share(distances)
    if share is None:
        return _no_share(distances, evidence, thresholds)
    longer = _longer(record) ** 2
    first, last = ends(ratios)
    before, after = (abs(math.log(value)) if value > 0 else math.inf for value in (first, last))
    word, reason = _approached(share, longer, thresholds)
    if word == SUPPORTED and after > math.log(thresholds.affine_factor):
        word, reason = UNDECIDED, "but γ²/σ² is not near 1"
    elif word == REFUTED and after < before:
        word, reason = UNDECIDED, "but γ²/σ² is nearer to 1"
    detail = (
        f"Median γ²/σ² {first:.3g} → {last:.3g}; 1 would be γ = σ. Both change with the scale of the weights in front."
    )
    number, limit = _written(word, share, longer, thresholds)
    return Verdict(word, "end/start", number, limit, reason, detail, evidence, share, steps=len(distances))


def _beta(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge β against μ by their distance."""
    distances = magnitudes(record, _BETA)
    if not distances:
        return None
    evidence = span(record, _BETA, _NORM)
    if _is_frozen(record, "beta"):
        return Verdict(NOT_APPLICABLE, reason="β is frozen", evidence=evidence)
    share = _share(distances)
    if share is None:
        return _no_share(distances, evidence, thresholds)
    longer = _longer(record)
    word, reason = _approached(share, longer, thresholds)
    first, last = ends(distances)
    detail = f"Median |β − μ| {first:.3g} → {last:.3g}. It changes with the scale of the weights in front."
    number, limit = _written(word, share, longer, thresholds)
    return Verdict(word, "end/start", number, limit, reason, detail, evidence, share, steps=len(distances))


def _is_frozen(record: Record, parameter: str) -> bool:
    """Whether no layer trains its γ (``gamma``) or β (``beta``); False for records that do not say it."""
    trained = record.observed.get("trained_affine")
    return isinstance(trained, Mapping) and trained.get(parameter) == 0


def _approached(share: float, longer: float, thresholds: Thresholds) -> tuple[str, str]:
    """Return whether a distance has become small, or grown by more than longer weights explain."""
    if share <= thresholds.affine_share:
        return SUPPORTED, ""
    if share >= thresholds.affine_growth * longer:
        return REFUTED, ""
    return UNDECIDED, "may grow with ‖W‖" if share >= thresholds.affine_growth else "neither small nor grown"


def _longer(record: Record) -> float:
    """Return the growth of ‖W‖, with which σ and μ grow, of at least 1; infinite if it was not measured."""
    norms = magnitudes(record, _NORM)
    return max(1.0, norms[-1] / norms[0]) if norms and norms[0] else math.inf


def _share(distances: list[float]) -> float | None:
    """Return a distance at the end over that at the start; None if it was measured less than twice, or began at 0."""
    if len(distances) < 2:
        return None
    first, last = ends(distances)
    return last / first if first else None


def _no_share(distances: list[float], evidence: str, thresholds: Thresholds) -> Verdict:
    """Return that a distance has no change to be judged by."""
    few = len(distances) < thresholds.min_steps
    reason = too_few(len(distances), thresholds.min_steps) if few else "the distance began at 0"
    return Verdict(UNDECIDED, reason=reason, evidence=evidence)


def _written(word: str, share: float, longer: float, thresholds: Thresholds) -> tuple[str, str]:
    """Return the number and the limit: if the claim is refuted, the one that longer weights do not explain."""
    small, grown = thresholds.affine_share, thresholds.affine_growth * longer
    number = significant(share, small, thresholds.affine_growth, digits=3)
    if word != REFUTED:
        return number, f"limit {small:g}"
    limit = significant(grown, share, digits=3)
    return significant(share, float(limit), digits=3), f"refuted from {limit}"


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
            "refuted if it is at least `affine_growth` times the growth of ‖W‖², with which σ² grows, and γ²/σ² ends "
            "no nearer to 1. Not applicable to frozen γ."
        ),
        needs="AffineConvergenceMonitor, and batch normalization",
        section="affine",
        thresholds=("affine_share", "affine_factor", "affine_growth", "min_steps"),
        keys=(_GAMMA, _RATIO, _NORM),
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
            _NUMBER + "Supported if it is at most `affine_share`; refuted if it is at least `affine_growth` times the "
            "growth of ‖W‖, with which μ grows. Not applicable to frozen β."
        ),
        needs="AffineConvergenceMonitor, and batch normalization",
        section="affine",
        thresholds=("affine_share", "affine_growth", "min_steps"),
        keys=(_BETA, _NORM),
        judge=_beta,
    ),
)
"""Claims of section 3.1."""
