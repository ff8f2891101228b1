"""Claim about the batch against the width of a layer: the kernel of Σ_X."""

from __future__ import annotations

from statistics import median

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.curves import curve, span
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import NOT_APPLICABLE, REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import percent

_G = "batch_geometry"
_SHARE, _RANK, _SAMPLES = f"{_G}/kernel_share_mean", f"{_G}/rank_over_inputs", f"{_G}/samples_over_inputs"


def _kernel(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge whether weights lie in or near the kernel of Σ_X, where there is one."""
    shares, ranks, samples = (curve(record, key) for key in (_SHARE, _RANK, _SAMPLES))
    if not samples:
        return None
    batch = median(samples.values())
    evidence = span(record, _SAMPLES, _RANK)
    if ranks and median(ranks.values()) >= 1:
        detail = f"A layer's batch has at least {batch:.3g} × as many input vectors as a unit has inputs."
        return Verdict(NOT_APPLICABLE, reason="Σ_X has no kernel", detail=detail, evidence=evidence)
    if not shares:
        return Verdict(UNDECIDED, reason="the kernel is not known", evidence=evidence)
    share = median(shares.values())
    word, reason = UNDECIDED, "neither in nor out"
    if share >= thresholds.kernel_share:
        word, reason = SUPPORTED, ""
    elif share < thresholds.kernel_share / 2:
        word, reason = REFUTED, ""
    detail = f"N/n is {batch:.3g}; the part in the kernel never gets a gradient."
    limit = f"least {100 * thresholds.kernel_share:g} %"
    evidence = span(record, _SHARE, _SAMPLES)
    number = percent(share, thresholds.kernel_share, thresholds.kernel_share / 2)
    return Verdict(word, "in the kernel", number, limit, reason, detail, evidence, share, steps=len(shares))


WIDTH_CLAIMS = (
    Claim(
        key="batch_rank",
        title="Kernel of Σ_X",
        statement="If the batch is smaller than a layer is wide, its weights lie in or near the kernel of Σ_X.",
        source="section 2.2",
        rule=(
            "Number: share of ‖W‖² in the kernel of Σ_X, mean over units and median over measured steps. Supported "
            "from `kernel_share` on, refuted below half of it. Not applicable where Σ_X has full rank. By chance the "
            "share is 1 − rank/n."
        ),
        needs="BatchGeometryMonitor",
        section="rank",
        thresholds=("kernel_share", "min_steps"),
        keys=(_SAMPLES, _SHARE, _RANK),
        judge=_kernel,
    ),
)
"""Claim of section 2.2 about the rank of Σ_X."""
