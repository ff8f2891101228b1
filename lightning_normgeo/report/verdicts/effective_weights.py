"""Verdict on effective weights: the rank correlation of their norm with robustness, against that of raw norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation
from lightning_normgeo.report.tables.correlations import Correlation, correlation_of, strongest_attack
from lightning_normgeo.robustness.results.statistics.rank_correlation import correlations_differ, smallest_p_value
from lightning_normgeo.robustness.results.statistics.statistics import holm
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import p_value
from lightning_normgeo.utilities.attack_names import attack_title

_EFFECTIVE, _RAW = "effective/weight_norm", "effective/weight_norm_raw"


def effective_verdict(evaluations: Sequence[Evaluation], thresholds: Thresholds) -> Verdict | None:
    """Return the verdict on the runs of the data set with most runs; None without two runs that have both norms."""
    sets: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        if all(evaluation.run.record.points(key) for key in (_EFFECTIVE, _RAW)):
            sets.setdefault(evaluation.data, []).append(evaluation)
    members = max(sets.values(), key=len, default=[])
    attack = strongest_attack(members) if len(members) > 1 else None
    if attack is None:
        return None
    effective, raw = (correlation_of(key, attack, members) for key in (_EFFECTIVE, _RAW))
    return None if effective is None or raw is None else _judged(effective, raw, thresholds)


def _judged(effective: Correlation, raw: Correlation, thresholds: Thresholds) -> Verdict:
    """Return the verdict on two correlations over the same runs."""
    found, level = effective.found, thresholds.alpha
    evidence = f"{found.n} runs under {attack_title(effective.attack)}"
    if math.isnan(found.rho) or math.isnan(raw.found.rho):
        return Verdict(UNDECIDED, reason="a norm or the accuracy is the same in all runs", evidence=evidence)
    adjusted = holm([found.p_value, raw.found.p_value])
    differ = correlations_differ(effective.accuracies, effective.values, raw.values)
    own, other = (p < level for p in adjusted)
    word, reason = UNDECIDED, "both go with it" if own else "neither goes with it"
    if 2 * smallest_p_value(found.n) >= level:
        reason = f"too few runs: {found.n}"
    elif own != other and differ >= level:
        reason = "no significant difference"
    elif own != other:
        word, reason = (SUPPORTED if own else REFUTED), ""
    texts = [p_value(p, level, digits=2) for p in (*adjusted, differ)]
    detail = (
        f"ρ of the raw ‖W‖ is {raw.found.rho:+.2f}; p {texts[0]} and {texts[1]}, adjusted; p of their difference "
        f"{texts[2]}. A correlation over runs is no cause."
    )
    limit = f"p {p_value(adjusted[0], level)}, level {level:g}"
    return Verdict(word, "ρ", f"{found.rho:+.2f}", limit, reason, detail, evidence, found.rho)
