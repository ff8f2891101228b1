"""Table of the paper's claims, in the order of reports: the one place that lists what verdicts are given on."""

from __future__ import annotations

from lightning_normgeo.runs.verdicts.claims.affine_claims import AFFINE_CLAIMS
from lightning_normgeo.runs.verdicts.claims.channel_claims import CHANNEL_CLAIMS
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.claims.growth_claims import GROWTH_CLAIMS
from lightning_normgeo.runs.verdicts.claims.orthogonality_claims import ORTHOGONALITY_CLAIMS
from lightning_normgeo.runs.verdicts.claims.robustness_claims import ROBUSTNESS_CLAIMS
from lightning_normgeo.runs.verdicts.claims.study_claims import STUDY_CLAIMS
from lightning_normgeo.runs.verdicts.claims.width_claims import WIDTH_CLAIMS

CLAIMS: dict[str, Claim] = {
    claim.key: claim
    for group in (
        ORTHOGONALITY_CLAIMS,
        GROWTH_CLAIMS,
        AFFINE_CLAIMS,
        ROBUSTNESS_CLAIMS,
        STUDY_CLAIMS,
        WIDTH_CLAIMS,
        CHANNEL_CLAIMS,
    )
    for claim in group
}
"""All claims by key."""
VERDICT_KEYS = tuple(dict.fromkeys(key for claim in CLAIMS.values() for key in claim.keys))
"""Metric keys that verdicts on a training are made from."""
