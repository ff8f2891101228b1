"""Accuracies from per-sample results: counts, intervals, classes, comparisons, and warnings about failing attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults, load_decisions
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.robustness.results.statistics.statistics import mcnemar, paired_interval, wilson_interval
from lightning_normgeo.utilities.attack_names import control_of
from lightning_normgeo.utilities.checked_values import short_repr


@dataclass(frozen=True)
class AttackResult:
    """Accuracy under one attack, with its counts.

    Attributes:
        correct: number of samples classified correctly.
        n: number of samples evaluated.
        accuracy: correct / n, in [0, 1]; NaN for no samples.
        accuracy_drop: clean accuracy minus accuracy (the paper's Acc-Diff), in [-1, 1].
        ci_low: lower end of the 95 % Wilson interval of the accuracy, in [0, 1].
        ci_high: upper end of the interval, in [0, 1].
        loss: mean cross entropy in nats, over the samples where it is finite.
        linf: largest l∞ norm of a perturbation, in units of the threat model's space.
        l2: largest l2 norm of a perturbation, in units of the threat model's space.
        by_class: numbers of correct and of evaluated samples, for each class that occurs.
        not_finite: number of samples whose largest logit is not finite, as which NaN counts; they count as wrong.
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
    """Return the result under each attack by name, ``clean`` first.

    Args:
        decisions: the per-sample results of an evaluation.
    """
    clean = _fraction(decisions.of("clean").correct)
    return {name: _result(decisions.of(name), clean) for name in decisions.attacks}


@runtime_checkable
class HasSampleResults(Protocol):
    """An object with per-sample results, as the report of an evaluation."""

    @property
    def decisions(self) -> SampleResults:
        """The per-sample results."""


def compare(
    first: SampleResults | HasSampleResults | str | Path,
    second: SampleResults | HasSampleResults | str | Path,
    attack: str,
) -> dict[str, Any]:
    """Compare the evaluations of two models under an attack, on the samples that both have.

    Samples are matched by their image and label, so that the order of the loaders does not matter.

    Args:
        first: evaluation of the first model: its report, its per-sample results, or the file or folder of these.
        second: evaluation of the second model on the same data, likewise.
        attack: name of a row that both evaluations have.

    Returns:
        ``only_first`` and ``only_second``, the numbers of samples that only one model classifies correctly; ``both``,
        the number that both do; ``difference`` of the accuracies, second minus first, in [-1, 1], with the ends
        ``ci_low`` and ``ci_high`` of its 95 % interval for paired samples; ``p_value`` of McNemar's exact test; and
        ``n``, the number of samples that both have.

    Raises:
        ConfigurationError: if an evaluation lacks the attack or cannot be read, or if labels differ.

    Example:
        >>> compare(report_of_bn, "runs/normgeo/gn", "bim")["difference"]
    """
    one, other = _decisions_of("first", first), _decisions_of("second", second)
    return _paired(one.of(attack), other.of(attack))


def _decisions_of(name: str, given: SampleResults | HasSampleResults | str | Path) -> SampleResults:
    """Return the per-sample results of an argument of :func:`compare`."""
    if isinstance(given, SampleResults):
        return given
    if isinstance(given, (str, Path)):
        return load_decisions(given)
    if isinstance(given, HasSampleResults) and isinstance(given.decisions, SampleResults):
        return given.decisions
    raise ConfigurationError(
        f"compare({name}={short_repr(given)}): give a report of evaluate_robustness, its decisions (the per-sample "
        "results), or the folder it was saved in."
    )


def paired_drop(decisions: SampleResults, attack: str) -> dict[str, Any]:
    """Compare the results under an attack with those on clean images; the difference is the accuracy drop (Acc-Diff).

    Args:
        decisions: the per-sample results of an evaluation.
        attack: name of the attack.

    Returns:
        As :func:`compare`, with the attacked images as the first evaluation and the clean images as the second.

    Raises:
        ConfigurationError: if the attack was not evaluated.
    """
    return _paired(decisions.of(attack), decisions.of("clean"))


def changed_decisions(decisions: SampleResults, attack: str) -> int:
    """Return the number of samples that only one of an attack and its control with rescaled weights gets right.

    Args:
        decisions: the per-sample results of an evaluation that has both.
        attack: name of the attack.
    """
    found = _paired(decisions.of(attack), decisions.of(control_of(attack)))
    return int(found["only_first"] + found["only_second"])


def _paired(one: SampleRows, other: SampleRows) -> dict[str, Any]:
    """Return the comparison of two rows of results on their common samples; see :func:`compare`."""
    in_one, in_other = shared(one, other)
    if not torch.equal(one.label[in_one], other.label[in_other]):
        raise ConfigurationError("The two evaluations have different labels: they are not of the same data.")
    only_first = int((one.correct[in_one] & ~other.correct[in_other]).sum())
    only_second = int((~one.correct[in_one] & other.correct[in_other]).sum())
    n = len(in_one)
    low, high = paired_interval(only_first, only_second, n)
    return {
        "only_first": only_first,
        "only_second": only_second,
        "both": int((one.correct[in_one] & other.correct[in_other]).sum()),
        "difference": (only_second - only_first) / n if n else math.nan,
        "ci_low": low,
        "ci_high": high,
        "p_value": mcnemar(only_first, only_second),
        "n": n,
    }


def _result(rows: SampleRows, clean: float) -> AttackResult:
    """Return the result of one attack, given the clean accuracy."""
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


def shared(first: SampleRows, second: SampleRows) -> tuple[Tensor, Tensor]:
    """Return the positions of the common samples in the first and in the second, in the same order of samples."""
    in_first = torch.isin(first.sample, second.sample).nonzero()[:, 0]
    in_second = torch.isin(second.sample, first.sample).nonzero()[:, 0]
    return in_first[torch.argsort(first.sample[in_first])], in_second[torch.argsort(second.sample[in_second])]
