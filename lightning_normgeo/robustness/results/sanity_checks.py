"""Sanity checks of an evaluation after Carlini et al. 2019 (arXiv 1902.06705): do its attacks find what there is?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.builders import ITERATIVE, RANDOM, SINGLE_STEP, UNBOUNDED
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack, Transfer
from lightning_normgeo.robustness.results.attack_results import compare
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.sanity_warnings import LEVEL, too_many

_UNBROKEN = 0.01
"""Share of images that an attack without a bound may leave unbroken: a few may saturate the softmax."""
PASSED, FAILED, UNTESTED = "passed", "failed", "not tested"


@dataclass(frozen=True)
class SanityCheck:
    """One check of an evaluation.

    Attributes:
        claim: what should hold.
        outcome: ``passed``, ``failed`` or ``not tested``.
        evidence: the numbers, or what is missing.
    """

    claim: str
    outcome: str
    evidence: str


def sanity_checks(decisions: SampleResults, attacks: Sequence[Attack]) -> list[SanityCheck]:
    """Return the checks of an evaluation; empty unless one of its attacks is there for them.

    Args:
        decisions: the per-sample results.
        attacks: the attacks of the evaluation.
    """
    if not any(attack.role for attack in attacks):
        return []
    roles = {attack.role: attack.name for attack in attacks if attack.role}
    balls = [attack for attack in attacks if isinstance(attack, BallAttack) and attack.needs_gradient]
    white = [attack.name for attack in balls if not attack.role]
    best = min(
        [*white, *filter(None, [roles.get(ITERATIVE)])], key=lambda name: _accuracy(decisions, name), default=None
    )
    transfer = next((attack.name for attack in attacks if isinstance(attack, Transfer)), None)
    return [
        _gradients(decisions),
        _no_weaker(decisions, "an iterative attack is no weaker than a single step", best, roles.get(SINGLE_STEP)),
        _no_weaker(decisions, "an attack with gradients is no weaker than random search", best, roles.get(RANDOM)),
        _no_weaker(decisions, "an attack on the model is no weaker than one on its surrogate", best, transfer),
        _unbounded(decisions, roles.get(UNBOUNDED)),
    ]


def verdict_on(checks: Sequence[SanityCheck]) -> str:
    """Return the verdict on an evaluation in one line; empty without checks."""
    if not checks:
        return ""
    tested = [check for check in checks if check.outcome != UNTESTED]
    failed = [check for check in tested if check.outcome == FAILED]
    if not failed:
        return f"sanity: passed {len(tested)} of {len(checks)} checks, none failed"
    return "sanity: failed. " + " ".join(f"Not so: {check.claim} ({check.evidence})." for check in failed)


def _gradients(decisions: SampleResults) -> SanityCheck:
    slopes = decisions.of("clean").gradient
    known = slopes[~slopes.isnan()]
    claim = "gradients are not masked"
    if not len(known):
        return SanityCheck(claim, UNTESTED, "no attack has computed the gradient at the images")
    bad = int((known == 0).sum() + known.isinf().sum())
    outcome = FAILED if too_many(bad, len(known)) else PASSED
    return SanityCheck(claim, outcome, f"{bad} of {len(known)} images have a gradient of zero or none")


def _no_weaker(decisions: SampleResults, claim: str, strong: str | None, weak: str | None) -> SanityCheck:
    if strong is None or weak is None or not {strong, weak} <= set(decisions.attacks):
        return SanityCheck(claim, UNTESTED, "one of the two attacks was not evaluated")
    found = compare(decisions.renamed(strong, "it"), decisions.renamed(weak, "it"), "it")
    fails = found["difference"] < 0 and found["p_value"] < LEVEL
    numbers = f"{strong} {100 * _accuracy(decisions, strong):.2f} %, {weak} {100 * _accuracy(decisions, weak):.2f} %"
    return SanityCheck(claim, FAILED if fails else PASSED, numbers)


def _unbounded(decisions: SampleResults, name: str | None) -> SanityCheck:
    claim = "an attack without a bound breaks every image"
    if name is None or name not in decisions.attacks or not len(decisions.of(name).index):
        return SanityCheck(claim, UNTESTED, "there is no such attack")
    left, n = int(decisions.of(name).correct.sum()), len(decisions.of(name).index)
    return SanityCheck(claim, FAILED if left > _UNBROKEN * n else PASSED, f"{name} leaves {left} of {n} images")


def _accuracy(decisions: SampleResults, name: str) -> float:
    correct = decisions.of(name).correct
    return float(correct.double().mean()) if len(correct) else math.nan
