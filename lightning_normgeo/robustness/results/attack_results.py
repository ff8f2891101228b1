"""From decisions to accuracies: counts, intervals, classes, and signs that an attack does not do its work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.registry import Attack, Noise, ProjectedGradient
from lightning_normgeo.robustness.results.sample_results import SampleResults, SampleRows, load_decisions
from lightning_normgeo.robustness.results.statistics import mcnemar, paired_interval, wilson_interval
from lightning_normgeo.utilities.checked_values import shown


@dataclass(frozen=True)
class AttackResult:
    """Counted accuracy under one attack.

    Attributes:
        correct: samples classified correctly.
        n: samples evaluated.
        accuracy: correct / n; NaN for no samples.
        accuracy_drop: clean accuracy minus accuracy (the paper's Acc-Diff), in [-1, 1].
        ci_low: lower end of the 95 % Wilson interval of the accuracy.
        ci_high: upper end.
        loss: mean cross entropy, of the samples where it is finite.
        linf: largest l∞ norm of a perturbation that was reached, in the threat model's space.
        l2: largest l2 norm.
        by_class: for each class that occurs, correct and evaluated samples.
        not_finite: samples with a logit that is not finite, which count as wrong.
    """

    correct: int
    n: int
    accuracy: float
    accuracy_drop: float
    ci_low: float
    ci_high: float
    loss: float
    linf: float
    l2: float
    by_class: dict[int, tuple[int, int]]
    not_finite: int = 0

    def __repr__(self) -> str:
        interval = f"{100 * self.ci_low:.2f} … {100 * self.ci_high:.2f} %"
        drop = f"{100 * self.accuracy_drop:.2f} points"
        return f"AttackResult({100 * self.accuracy:.2f} % of {self.n}, 95 % interval {interval}, drop {drop})"


def results_of(decisions: SampleResults) -> dict[str, AttackResult]:
    """Return the result of every attack, ``clean`` first."""
    clean = _fraction(decisions.of("clean").correct)
    return {name: _result(decisions.of(name), clean) for name in decisions.attacks}


def sanity_warnings(decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    """Return in words what looks as if an attack was broken, so that the accuracy under it says too much.

    Looked for: logits and gradients that are not finite, classes that no label has, gradients that are zero, a loss
    that does not rise, less harm by a larger radius, and less harm by an attack than by noise. Attacks are compared
    pair by pair, and named where it is not chance at a level of 1 %.
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
    if zero > max(2, 0.05 * len(clean.index)):  # one or two can be images that the model is entirely sure of
        found.append(
            f"The gradient is zero for {zero} of {len(clean.index)} images: it is masked or has underflowed, and BIM "
            "and PGD cannot see where to go. Attack the logits before a saturating output, or in float64."
        )
    for attack in attacks:
        if isinstance(attack, ProjectedGradient):
            found += _useless(attack, decisions, attacks)
    found += _rising(decisions, attacks)
    return found


@runtime_checkable
class HasSampleResults(Protocol):
    """A report of an evaluation."""

    @property
    def decisions(self) -> SampleResults:
        """What became of each sample."""


def compare(
    first: SampleResults | HasSampleResults | str | Path,
    second: SampleResults | HasSampleResults | str | Path,
    attack: str,
) -> dict[str, Any]:
    """Compare two evaluations on the samples they share, pair by pair.

    Samples are the same where image and label are, whatever the order of the loaders.

    Args:
        first: of one model: its report, its decisions, or the file or folder where these were saved.
        second: of another, on the same data, likewise.
        attack: under which, a row of both reports.

    Returns:
        ``only_first`` and ``only_second``, how many samples only one of them gets right, ``both`` how many both do;
        ``difference`` of the accuracies, second minus first, with the ends ``ci_low`` and ``ci_high`` of its 95 %
        interval for paired samples; ``p_value`` of McNemar's exact test; ``n``, how many samples both have.

    Raises:
        ConfigurationError: if one lacks the attack, or samples differ in their label.

    Example:
        >>> compare(report_of_bn, "runs/normgeo/gn", "bim")["difference"]
    """
    one, other = _decisions_of("first", first), _decisions_of("second", second)
    return _paired(one.of(attack), other.of(attack))


def _decisions_of(name: str, given: SampleResults | HasSampleResults | str | Path) -> SampleResults:
    if isinstance(given, SampleResults):
        return given
    if isinstance(given, (str, Path)):
        return load_decisions(given)
    if isinstance(given, HasSampleResults) and isinstance(given.decisions, SampleResults):
        return given.decisions
    raise ConfigurationError(
        f"compare({name}={shown(given)}): give a report of evaluate_robustness, its decisions, or the folder it was "
        "saved in."
    )


def paired_drop(decisions: SampleResults, attack: str) -> dict[str, Any]:
    """Compare the clean images with what an attack made of them: the difference is the drop (the paper's Acc-Diff).

    Returns:
        As :func:`compare`; the attacked images are the first.

    Raises:
        ConfigurationError: if the attack was not evaluated.
    """
    return _paired(decisions.of(attack), decisions.of("clean"))


def _paired(one: SampleRows, other: SampleRows) -> dict[str, Any]:
    at, beside = _shared(one, other)
    if not torch.equal(one.label[at], other.label[beside]):
        raise ConfigurationError("The two evaluations have different labels: they are not of the same data.")
    won = int((~one.correct[at] & other.correct[beside]).sum())
    lost = int((one.correct[at] & ~other.correct[beside]).sum())
    n = len(at)
    low, high = paired_interval(lost, won, n)
    return {
        "only_first": lost,
        "only_second": won,
        "both": int((one.correct[at] & other.correct[beside]).sum()),
        "difference": (won - lost) / n if n else math.nan,
        "ci_low": low,
        "ci_high": high,
        "p_value": mcnemar(lost, won),
        "n": n,
    }


def _result(rows: SampleRows, clean: float) -> AttackResult:
    n, correct = len(rows.index), int(rows.correct.sum())
    accuracy = _fraction(rows.correct)
    low, high = wilson_interval(correct, n)
    classes = {}
    for label in torch.unique(rows.label).tolist():
        mine = rows.correct[rows.label == label]
        classes[label] = (int(mine.sum()), len(mine))
    return AttackResult(
        correct=correct,
        n=n,
        accuracy=accuracy,
        accuracy_drop=clean - accuracy,
        ci_low=low,
        ci_high=high,
        loss=_mean(rows.loss),
        linf=float(rows.linf.max()) if n else 0.0,
        l2=float(rows.l2.max()) if n else 0.0,
        by_class=classes,
        not_finite=int((rows.prediction < 0).sum()),
    )


def _mean(losses: Tensor) -> float:
    finite = losses[losses.isfinite()].double()
    return float(finite.mean()) if len(finite) else math.nan


def _fraction(correct: Tensor) -> float:
    return int(correct.sum()) / len(correct) if len(correct) else math.nan


def _useless(attack: ProjectedGradient, decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    rows, clean, found = decisions.of(attack.name), decisions.of("clean"), []
    at, beside = _shared(clean, rows)
    right = clean.correct[at]  # nothing has to rise where the image itself is wrong
    rise = (rows.loss[beside] - clean.loss[at]).double()[right]
    rise = rise[rise.isfinite()]
    if attack.eps > 0 and len(rise) > 1 and float(rise.mean()) <= 0:
        found.append(
            f"{attack.name} does not raise the loss ({float(rise.mean()):+.3g} on average): gradients do not lead up. "
            "Check that the model is differentiable and deterministic, and try smaller steps."
        )
    for noise in attacks:
        if isinstance(noise, Noise) and _no_larger(noise, decisions.of(noise.name), attack):
            harm = compare(decisions.renamed(attack.name, "it"), decisions.renamed(noise.name, "it"), "it")
            if harm["difference"] < 0 and harm["p_value"] < 0.01:
                found.append(
                    f"{noise.name} does more harm than {attack.name}, though it is no larger: gradients do not show "
                    "where the model is weak. Use more steps, restarts, or torchattacks.AutoAttack."
                )
    return found


def _no_larger(noise: Noise, rows: SampleRows, attack: ProjectedGradient) -> bool:
    """Whether noise is no longer than the longest perturbation of an attack."""
    if attack.norm == "linf" or attack.times_sqrt_d:
        return noise.std <= attack.eps
    return bool((rows.l2 <= attack.eps).all())


def _rising(decisions: SampleResults, attacks: Sequence[Attack]) -> list[str]:
    found = []
    ascending = sorted((a for a in attacks if isinstance(a, ProjectedGradient)), key=lambda a: a.eps)
    for k, small in enumerate(ascending):
        for large in ascending[k + 1 :]:
            if (large.norm, large.random_start) != (small.norm, small.random_start):
                continue
            gain = compare(decisions.renamed(small.name, "it"), decisions.renamed(large.name, "it"), "it")
            if gain["difference"] > 0 and gain["p_value"] < 0.01:
                found.append(
                    f"Accuracy rises from {small.name} to {large.name}, with the larger radius: the larger one is not "
                    "searched well. Use more steps or smaller ones."
                )
    return found


def _shared(first: SampleRows, second: SampleRows) -> tuple[Tensor, Tensor]:
    """Return where the samples are, in each, that both have."""
    at, beside = (
        torch.isin(one.sample, other.sample).nonzero()[:, 0] for one, other in ((first, second), (second, first))
    )
    return at[torch.argsort(first.sample[at])], beside[torch.argsort(second.sample[beside])]
