"""Warnings about signs of a failing attack, whose accuracy would overestimate the robustness."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_normgeo.robustness.attacks.attack import Attack, Noise
from lightning_normgeo.robustness.attacks.native_attacks import ProjectedGradient
from lightning_normgeo.robustness.results.attack_results import compare, shared
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.robustness.results.verified_decisions import VerifiedDecisions, verification_warnings
from lightning_normgeo.utilities.attack_names import family

LEVEL = 0.01
"""Significance level at which a difference between two attacks is a sign of failure, in McNemar's test."""


def sanity_warnings(decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    """Return warnings about signs of a failing attack, whose accuracy would overestimate the robustness.

    Signs are: logits or gradients that are not finite, decisions in bfloat16 that full precision changes, predicted
    classes that no label has, gradients that are zero, a loss that does not increase, a larger radius that does less
    harm, and an attack that does less harm than noise. Two attacks are compared on the same samples, and reported if
    the difference is significant at a level of 1 %.

    Args:
        decisions: the per-sample results of an evaluation.
        attacks: the attacks of the evaluation.
    """
    found = []
    clean = decisions.of("clean")
    for attack_name in decisions.attacks:
        broken = int((decisions.of(attack_name).prediction < 0).sum())
        if broken:
            found.append(
                f"{attack_name}: {broken} of {len(decisions.of(attack_name).index)} images have logits that are not "
                "finite, and count as wrong. Check the weights and the precision."
            )
        found += verification_warnings(attack_name, VerifiedDecisions.of(decisions.of(attack_name).checked))
    beyond = int((clean.prediction > clean.label.max()).sum()) if len(clean.label) >= 30 else 0
    if beyond > len(clean.label) / 2:
        found.append(
            f"{beyond} of {len(clean.label)} clean images are given a class above the largest label that occurs "
            f"({int(clean.label.max())}). Does the model return logits of these classes? Else override "
            "RobustnessEvaluation.logits."
        )
    blind = int((clean.gradient == math.inf).sum())
    if blind:
        found.append(
            f"The gradient is not finite for {blind} of {len(clean.index)} images, which BIM and PGD cannot move."
        )
    zero = int((clean.gradient == 0).sum())
    if too_many(zero, len(clean.index)):
        found.append(
            f"The gradient is zero for {zero} of {len(clean.index)} images: it is masked or has underflowed, and gives "
            "BIM and PGD no direction. Attack the logits before a saturating output, or in float64."
        )
    for attack in attacks:
        if isinstance(attack, ProjectedGradient) and not attack.role:
            found += _useless(attack, decisions, attacks)
    found += _rising(decisions, attacks)
    return found


def too_many(images: int, n: int) -> bool:
    """Whether so many of n images without a gradient are a failure: a few may have a softmax that saturates."""
    return images > max(2, 0.05 * n)


def _useless(attack: ProjectedGradient, decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    """Return warnings about an attack that does not raise the loss, or does less harm than noise."""
    rows, clean, found = decisions.of(attack.name), decisions.of("clean"), []
    in_clean, in_rows = shared(clean, rows)
    correct = clean.correct[in_clean]  # an attack does not have to raise the loss of images that are wrong already
    rise = (rows.loss[in_rows] - clean.loss[in_clean]).double()[correct]
    rise = rise[rise.isfinite()]
    if attack.eps > 0 and len(rise) > 1 and float(rise.mean()) <= 0:
        found.append(
            f"{attack.name} does not raise the loss ({float(rise.mean()):+.3g} on average): gradients do not lead to a "
            "higher loss. Check that the model is differentiable and deterministic, and try smaller steps."
        )
    for noise in attacks:
        if isinstance(noise, Noise) and _no_larger(noise, decisions.of(noise.name), attack):
            harm = compare(decisions.renamed(attack.name, "it"), decisions.renamed(noise.name, "it"), "it")
            if harm["difference"] < 0 and harm["p_value"] < LEVEL:
                found.append(
                    f"{noise.name} does more harm than {attack.name}, though it is no larger: gradients do not show "
                    "where the model is weak. Use more steps, restarts, or torchattacks.AutoAttack."
                )
    return found


def _no_larger(noise: Noise, rows: SampleRows, attack: ProjectedGradient) -> bool:
    """Whether noise is not larger than an attack's radius: its std in l∞, the l2 norms of its perturbations in l2."""
    if attack.norm == "linf" or attack.times_sqrt_d:
        return noise.std <= attack.eps
    return bool((rows.l2 <= attack.eps).all())


def _rising(decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    """Return warnings about attacks under which accuracy is higher with a larger radius."""
    found = []
    ascending = sorted((a for a in attacks if isinstance(a, ProjectedGradient)), key=lambda a: a.eps)
    for k, small in enumerate(ascending):
        for large in ascending[k + 1 :]:
            if family(large.name) != family(small.name) or large.eps == small.eps or large.role:
                continue  # another attack
            gain = compare(decisions.renamed(small.name, "it"), decisions.renamed(large.name, "it"), "it")
            if gain["difference"] > 0 and gain["p_value"] < LEVEL:
                found.append(
                    f"Accuracy rises from {small.name} to {large.name}, with the larger radius: the larger one is not "
                    "searched well. Use more steps or smaller ones."
                )
    return found
