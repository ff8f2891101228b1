"""Claims that no callback of a training tests yet: spheres as constraints, ranks, effective weights."""

from __future__ import annotations

from lightning_normgeo.runs.verdicts.claim import Claim

_NONE = "No verdict function yet."
LATER_CLAIMS = (
    Claim(
        key="sphere_training",
        title="Sphere against free",
        statement="Optimization on the sphere, with the scaling symmetry removed, stabilizes the training.",
        source="abstract, section 2.5",
        rule=_NONE,
        needs="the same run free and with SphereProjection",
        stage="study",
    ),
    Claim(
        key="batch_rank",
        title="Rank of Σ_X and width",
        statement="If the batch is smaller than the layer is wide, Σ_X has a kernel that weights come close to.",
        source="section 2.2",
        rule=_NONE,
        needs="BatchGeometryMonitor",
    ),
    Claim(
        key="effective_weights",
        title="Effective weights",
        statement=(
            "Robustness goes with the effective weights γW/√(WΣWᵀ), which lie on an ellipsoid, more than with "
            "raw norms."
        ),
        source="section 2.2, eq 12",
        rule=_NONE,
        needs="several runs with EffectiveWeightMonitor and RobustnessEvaluation",
        stage="study",
    ),
)
"""Claims of sections 2.2 and 2.5 without a verdict function: each moves to the module of its subject with its judge."""
