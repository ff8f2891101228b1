"""Intervals and tests for accuracies, their paired differences, and means over runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, inf, pi, sin, sqrt, tan
from statistics import NormalDist, fmean, stdev
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import is_number, numbers_of, one_or_more, plain_values, short_repr


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    r"""Return Wilson's score interval for a proportion, such as an accuracy.

    .. math:: \frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    It keeps its level for small n and for proportions near 0 and 1, where the normal interval leaves [0, 1]
    (Wilson 1927; Brown, Cai, DasGupta 2001).

    Args:
        correct: number of successes, in [0, ``total``].
        total: number n of trials, at least 0.
        level: confidence level, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1]; (0, 1) for no trials.

    Raises:
        ConfigurationError: for a count or a level out of range.
    """
    correct, total = _counts(plain_values(total), correct=correct, total=total)
    level = _level(level)
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, shrink = correct / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / shrink
    half = z / shrink * sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # the ends are exactly 0 and 1 there; rounding would miss them
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    r"""Return the two-sided p-value of McNemar's exact test for two classifiers on the same samples.

    .. math:: p = \min\Bigl(1, 2\sum_{k \le \min(b, c)} \binom{b + c}{k} 2^{-(b + c)}\Bigr)

    Samples that both classify correctly, or both wrongly, do not enter, since they do not tell which is better
    (McNemar 1947).

    Args:
        only_first: b, number of samples that only the first classifies correctly.
        only_second: c, number of samples that only the second classifies correctly.

    Returns:
        The p-value, in [0, 1]; 1 if both counts are equal.

    Raises:
        ConfigurationError: for a count that is no integer or negative.
    """
    only_first, only_second = _counts(None, only_first=only_first, only_second=only_second)
    n, fewer = only_first + only_second, min(only_first, only_second)
    total, term = 0, 1
    for k in range(fewer + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(2 * total / 2**n))


def paired_interval(only_first: int, only_second: int, n: int, level: float = 0.95) -> tuple[float, float]:
    r"""Return Bonett and Price's interval for the difference of two accuracies on the same samples.

    .. math:: \tilde d \pm z\sqrt{\frac{\tilde p_1 + \tilde p_2 - \tilde d^2}{n + 2}}, \quad
        \tilde p_1 = \frac{b + 1}{n + 2}, \; \tilde p_2 = \frac{c + 1}{n + 2}, \; \tilde d = \tilde p_2 - \tilde p_1

    It is Wald's interval with one more sample in each of b and c, so that it keeps its level, and a width above zero,
    if few samples differ or none (Bonett, Price 2012). It uses that the samples are the same, which separate intervals
    of the two accuracies do not.

    Args:
        only_first: b, number of samples that only the first classifies correctly.
        only_second: c, number of samples that only the second classifies correctly.
        n: number of all samples, at least b + c.
        level: confidence level, in (0, 1).

    Returns:
        Lower and upper end of the difference, second minus first, in [-1, 1]; (-1, 1) for no samples.

    Raises:
        ConfigurationError: for a count or a level out of range.
    """
    only_first, only_second, n = _counts(plain_values(n), only_first=only_first, only_second=only_second, n=n)
    _counts(n, **{"only_first + only_second": only_first + only_second})
    level = _level(level)
    if n == 0:
        return -1.0, 1.0
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    middle = second - first
    half = NormalDist().inv_cdf((1 + level) / 2) * sqrt((first + second - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    r"""Return Student's interval for the mean over runs that differ only in their seed.

    .. math:: \bar x \pm t_{n-1} \frac{s}{\sqrt n}

    Args:
        values: one finite number per run.
        level: confidence level, in (0, 1).

    Returns:
        Lower and upper end; infinite for fewer than two values, or if all are equal, since these do not show how much
        runs differ.

    Raises:
        ConfigurationError: for values that are no finite numbers, or a level out of range.
    """
    level = _level(level)
    values = numbers_of("values", values, "a list of numbers that are finite") or ()
    if len(set(values)) < 2:
        return -inf, inf
    half = student_quantile(level, len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def student_quantile(level: float, freedom: int) -> float:
    """Return t with P(|T| ≤ t) = level for Student's distribution, by bisection of its finite series.

    Args:
        level: probability, in (0, 1).
        freedom: degrees of freedom ν, a positive integer.
    """
    low, high = 0.0, pi / 2  # of atan(t/√ν)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, freedom) < level else (low, middle)
    return sqrt(freedom) * tan(low)


def student_p_value(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t.

    Args:
        t: the statistic.
        freedom: degrees of freedom ν, a positive integer.
    """
    return max(0.0, 1 - _student_probability(atan(abs(t) / sqrt(freedom)), freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, adjusted by Holm's step-down procedure (Holm 1979).

    If all hypotheses with an adjusted p-value of at most α are rejected, the probability that a true one is among them
    is at most α.

    Args:
        p_values: p-values in [0, 1].

    Returns:
        The adjusted p-values in [0, 1], in the same order.

    Raises:
        ConfigurationError: for a p-value outside [0, 1].
    """
    p_values = one_or_more(p_values) or []
    wrong = [p for p in p_values if not (is_number(p) and 0 <= p <= 1)]
    if wrong:
        raise ConfigurationError(
            f"p={short_repr(wrong[0])} is no probability; p-values are in [0, 1]. Leave out tests without a p-value."
        )
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = least
    return adjusted


def _counts(most: Any, **counts: Any) -> list[int]:
    """Return counts as Python's integers, whose products do not overflow as those of numpy and torch do.

    Args:
        most: largest allowed count; None for no limit.
        **counts: the counts by name.

    Raises:
        ConfigurationError: for a count that is no integer, negative, or larger than ``most``.
    """
    found = []
    for name, given in counts.items():
        count = plain_values(given)
        if not is_number(count) or count != count // 1 or count < 0 or (is_number(most) and count > most):
            allowed = "an integer, at least 0"
            if most is not None:
                allowed += f" and at most {short_repr(most)}"
            raise ConfigurationError(f"{name}={short_repr(count)} must be {allowed}.")
        found.append(int(count))
    return found


def _level(level: Any) -> float:
    """Return a confidence level as a float, after a check of its range."""
    found = plain_values(level)
    if not (is_number(found) and 0 < found < 1):
        raise ConfigurationError(f"level={short_repr(found)} must be between 0 and 1, as 0.95.")
    return float(found)


def _student_probability(angle: float, freedom: int) -> float:
    """Return P(|T| ≤ t) as a function of atan(t/√ν), by the series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    total, term = 0.0, cos(angle) if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
