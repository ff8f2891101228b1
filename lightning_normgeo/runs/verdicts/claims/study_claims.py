"""Claims that only several runs together test: spheres against free training, and effective weights."""

from __future__ import annotations

from lightning_normgeo.runs.verdicts.claims.claim import Claim

STUDY_CLAIMS = (
    Claim(
        key="sphere_training",
        title="Sphere against free",
        statement="Optimization on a sphere, with the scaling symmetry removed, helps to stabilize the training.",
        source="abstract, section 2.5",
        rule=(
            "Number: mean difference of the accuracies on clean samples, on spheres minus free, over all pairs of runs "
            "that differ in callbacks alone, seed included. p as for weight decay; supported if it is below `alpha` "
            "and the difference positive, refuted if negative. It is about these learning rates: free training lowers "
            "its effective one by itself, training on spheres does not."
        ),
        needs="the same run free and with SphereProjection, and RobustnessEvaluation",
        stage="study",
        section="paired",
        thresholds=("alpha",),
    ),
    Claim(
        key="effective_weights",
        title="Effective weights",
        statement=(
            "Robustness goes with the effective weights γW/√(WΣWᵀ), which lie on an ellipsoid, more than with raw "
            "norms."
        ),
        source="section 2.2, eq 12",
        rule=(
            "Number: Spearman's rank correlation over runs of ‖W'‖ with the accuracy under the strongest attack. "
            "Supported if it is significant at `alpha` and that of the raw ‖W‖ is not, by permutation tests adjusted "
            "for both, and the two differ at `alpha` by Williams' test on ranks; refuted if it is the other way round. "
            "Undecided with too few runs for a p-value below `alpha`. A correlation over runs is no cause."
        ),
        needs="several runs with EffectiveWeightsSummary and RobustnessEvaluation",
        stage="study",
        section="correlations",
        thresholds=("alpha",),
    ),
)
"""Claims of sections 2.2 and 2.5 that are judged in reports of several runs."""
