"""Claims about spheres and orthogonality: Lemma 1, and Lemmas 2 and 3 for single weights and for several together."""

from __future__ import annotations

from statistics import median

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.curves import magnitudes, span
from lightning_normgeo.runs.verdicts.precision import cosine_limit
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import exactly, scientific

_COSINE, _WITHOUT_EPSILON = "orthogonality/max_abs_cos", "orthogonality/max_abs_cos_corrected"
_CONTROL = "orthogonality_control/max_abs_cos"
_CHARGE, _UNCANCELED = "symmetry/max_charge", "symmetry/max_uncanceled"


def _orthogonality(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge Lemma 3 by the cosines of single units, without the part of ε where it is known, against the control."""
    raw, without, control = (magnitudes(record, key) for key in (_COSINE, _WITHOUT_EPSILON, _CONTROL))
    if not raw:
        return None
    cosines = without or raw
    limit, precision = cosine_limit(record, thresholds)
    word, reason = _zero(cosines, control, limit, thresholds, epsilon_known=bool(without))
    parts = [
        f"{max(raw):.1e} with the part of ε" if without else "",
        f"{max(control):.1e} in other weights" if control else "",
    ]
    detail = "; ".join(filter(None, parts))
    return Verdict(
        word,
        "max |cos|",
        scientific(max(cosines), limit),
        f"limit {exactly(limit)}",
        reason,
        f"{detail}; limit of {precision}." if detail else f"Limit of {precision}.",
        span(record, _WITHOUT_EPSILON if without else _COSINE, _CONTROL),
        max(cosines),
        steps=len(cosines),
    )


def _zero(
    cosines: list[float], control: list[float], limit: float, thresholds: Thresholds, epsilon_known: bool
) -> tuple[str, str]:
    """Return whether cosines are zero while those of a control are not, and why this is not decided."""
    far = thresholds.far * limit
    if not control:
        return UNDECIDED, "no control"
    if median(control) < far:
        return UNDECIDED, "control near zero"
    if max(cosines) <= limit:
        return SUPPORTED, ""
    if median(cosines) <= far:
        above = sum(one > limit for one in cosines)
        return UNDECIDED, f"{above} of {len(cosines)} steps above"
    return (REFUTED, "") if epsilon_known else (UNDECIDED, "may be the part of ε")


def _charges(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge the charges of all scale symmetries, against what they would be if their terms did not cancel."""
    charges, terms = magnitudes(record, _CHARGE), magnitudes(record, _UNCANCELED)
    if not charges:
        return None
    limit, precision = cosine_limit(record, thresholds)
    apart = bool(terms) and median(charges) * thresholds.far >= median(terms)
    word, reason = _zero(charges, terms, limit, thresholds, epsilon_known=apart)
    detail = f"{max(terms):.1e} if its terms did not cancel; limit of {precision}." if terms else ""
    number, evidence = scientific(max(charges), limit), span(record, _CHARGE, _UNCANCELED)
    return Verdict(
        word, "charge", number, f"limit {exactly(limit)}", reason, detail, evidence, max(charges), steps=len(charges)
    )


ORTHOGONALITY_CLAIMS = (
    Claim(
        key="normalization_sphere",
        title="Lemma 1: spheres",
        statement="A normalization maps each vector onto a sphere, with γ and β of norm √n √(γ² + β²).",
        source="Lemma 1, eq 10",
        rule="Holds by construction for any input; no run is needed or measured.",
        needs="no run: it holds by construction, as tests in float64 check",
    ),
    Claim(
        key="orthogonality",
        title="Lemma 3: W ⟂ ∇W",
        statement="Scale-invariant weights are orthogonal to their gradients: ⟨W, ∇W⟩ = 0.",
        source="Lemmas 2 and 3, eq 15",
        rule=(
            "Number: the largest |cos(W, ∇W)| of all units and measured steps, without the part of ε where that is "
            "known. Supported if it is at most the limit of the training's precision, and the median of the control "
            "is at least `far` times this limit. Refuted if the median over the steps is above `far` times the "
            "limit, and ε is removed."
        ),
        needs="OrthogonalityMonitor",
        section="orthogonality",
        thresholds=("cos_double", "cos_single", "cos_half", "far", "min_steps"),
        keys=(_COSINE, _WITHOUT_EPSILON, _CONTROL),
        invariant=_COSINE,
        judge=_orthogonality,
        headline="max_abs_cos",
    ),
    Claim(
        key="charges",
        title="Lemma 2 for symmetries",
        statement=(
            "All scale symmetries have charge zero: Σ s⟨W, ∇W⟩ = 0, also where only several weights together "
            "are invariant."
        ),
        source="extends Lemma 2 to several weights",
        rule=(
            "Number: the largest charge of all symmetries and measured steps, relative to its largest possible value. "
            "Supported if it is at most the limit of the training's precision, and the median of the same sum without "
            "cancellation is at least `far` times this limit. Refuted if its median is above `far` times the limit, "
            "and above the sum without cancellation over `far`."
        ),
        needs="SymmetryMonitor",
        section="charges",
        thresholds=("cos_double", "cos_single", "cos_half", "far", "min_steps"),
        keys=(_CHARGE, _UNCANCELED),
        judge=_charges,
        headline="max_charge",
    ),
)
"""Claims of Lemmas 1 to 3."""
