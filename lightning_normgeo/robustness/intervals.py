"""How sure a counted accuracy is, and a difference between two."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    r"""Return Wilson's score interval for a proportion.

    .. math:: \frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    It keeps its level for proportions near 0 and 1 and small n, where the normal interval leaves [0, 1]
    (Wilson 1927; Brown, Cai, DasGupta 2001).

    Args:
        correct: number of successes.
        total: number of trials.
        level: confidence level.

    Returns:
        Lower and upper end, in [0, 1]; (0, 1) for no trials.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, shrink = correct / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / shrink
    half = z / shrink * sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # the ends are exactly 0 and 1 there; rounding would miss them
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    r"""Return the two-sided p-value of McNemar's exact test for paired decisions.

    .. math:: p = \min\Bigl(1, 2\sum_{k \le \min(b, c)} \binom{b + c}{k} 2^{-(b + c)}\Bigr)

    Samples that both get right, or both get wrong, say nothing about which is better (McNemar 1947).

    Args:
        only_first: b, samples that only the first gets right.
        only_second: c, samples that only the second gets right.

    Returns:
        In [0, 1]; 1 where both counts are equal.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    total, term = 0, 1
    for k in range(fewer + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(2 * total / 2**n))
