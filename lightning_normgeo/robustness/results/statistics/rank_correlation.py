"""Rank correlation over a few runs: Spearman's ρ, its interval, and a permutation test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.results.statistics.statistics import student_p_value
from lightning_normgeo.utilities.checked_values import numbers_of

EXACT = 8
"""Largest number of pairs for which all permutations are counted: 40,320."""
_DRAWN = 50_000
"""Permutations that are drawn for more pairs."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two quantities.

    Attributes:
        rho: ρ, in [-1, 1]; NaN if one of the quantities is the same in all pairs.
        low: lower end of the 95 % interval; NaN without one, for fewer than four pairs and for ρ = ±1.
        high: upper end.
        p_value: two-sided p-value of the permutation test; NaN where ρ is.
        n: number of pairs.
    """

    rho: float
    low: float
    high: float
    p_value: float
    n: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    r"""Return Spearman's rank correlation of pairs, with an interval and a permutation test.

    ρ is Pearson's correlation of the ranks, with mean ranks for ties. The p-value is the share of permutations of one
    quantity with a correlation at least as far from zero: of all up to eight pairs, of 50,000 drawn with a fixed seed
    beyond, the observed one included (Phipson, Smyth 2010). The interval is that of Bonett and Wright (2000),

    .. math:: \tanh\bigl(\operatorname{artanh}\rho \pm z\sqrt{(1 + \rho^2/2) / (n - 3)}\bigr)

    which holds for large n and is rough for few pairs.

    Args:
        first: one finite number per pair.
        second: the other one.

    Raises:
        ConfigurationError: for sequences of different lengths, and values that are no finite numbers.
    """
    allowed = "a list of numbers that are finite"
    x, y = (numbers_of(name, v, allowed) or () for name, v in (("first", first), ("second", second)))
    n = len(x)
    if n != len(y):
        raise ConfigurationError(f"first has {n} and second has {len(y)} numbers. Give one of each for every pair.")
    if len(set(x)) < 2 or len(set(y)) < 2:
        return RankCorrelation(math.nan, math.nan, math.nan, math.nan, n)
    a, b = _standardized(x), _standardized(y)
    rho = float(np.clip(a @ b, -1, 1))
    shuffled = np.abs(b[_permutations(n)] @ a) >= abs(rho) - _ROUNDING
    p = float(shuffled.mean()) if n <= EXACT else float((shuffled.sum() + 1) / (len(shuffled) + 1))
    return RankCorrelation(rho, *_interval(rho, n), p, n)


def correlations_differ(shared: Sequence[float], first: Sequence[float], second: Sequence[float]) -> float:
    r"""Return the p-value of Williams' test of whether a quantity goes with one of two others more than with the other.

    Williams' t (1959; Steiger 1980) is about two correlations that share a quantity, here of ranks, by magnitude:

    .. math:: t_{n-3} = (r_1 - r_2)\sqrt{\frac{(n - 1)(1 + r_{12})}{2\frac{n - 1}{n - 3}|R| + \bar r^2(1 - r_{12})^3}}

    That one correlation is significant and the other is not is no such test (Gelman, Stern 2006): of two quantities
    that are correlated alike with the shared one, this happens in up to half of the samples.

    Args:
        shared: one finite number per run.
        first: those of one of the quantities.
        second: those of the other one.

    Returns:
        The two-sided p-value; 1 for fewer than four runs, and if the quantities have the same ranks, NaN if one is the
        same in all runs.
    """
    n = len(shared)
    if min(len(set(values)) for values in (shared, first, second)) < 2:
        return math.nan
    a, b, c = map(_standardized, (shared, first, second))
    own, other, between = float(a @ b), float(a @ c), float(b @ c)
    if n < 4 or abs(abs(own) - abs(other)) < _ROUNDING:
        return 1.0
    if abs(own * other) < _ROUNDING:  # one of them has no sign: the larger p-value of both
        return max(_williams(abs(own), abs(other), sign * between, n) for sign in (1, -1))
    return _williams(abs(own), abs(other), between * math.copysign(1, own * other), n)


def _williams(own: float, other: float, between: float, n: int) -> float:
    """Return the p-value of two positive correlations with a shared quantity and of the one between them."""
    determinant = max(0.0, 1 - own**2 - other**2 - between**2 + 2 * own * other * between)
    spread = 2 * (n - 1) / (n - 3) * determinant + ((own + other) / 2) ** 2 * (1 - between) ** 3
    return student_p_value((own - other) * math.sqrt((n - 1) * (1 + between) / spread), n - 3)


def smallest_p_value(n: int) -> float:
    """Return the smallest two-sided p-value that a permutation test of n pairs can have, 2/n! without ties."""
    return min(1.0, 2 / math.factorial(n))


def _standardized(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the ranks of values, centered and of length one."""
    found = np.asarray(values, np.float64)
    less = (found[:, None] > found).sum(1)
    equal = (found[:, None] == found).sum(1)
    ranks = less + (equal + 1) / 2
    centered = ranks - ranks.mean()
    standardized: npt.NDArray[np.float64] = centered / np.linalg.norm(centered)
    return standardized


@cache
def _permutations(n: int) -> npt.NDArray[Any]:
    """Return permutations of n numbers, one per row: all of few numbers, else a sample."""
    if n <= EXACT:
        return np.array(list(itertools.permutations(range(n))))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (_DRAWN, 1)), axis=1)


def _interval(rho: float, n: int) -> tuple[float, float]:
    if n < 4 or abs(rho) > 1 - _ROUNDING:
        return math.nan, math.nan
    half = NormalDist().inv_cdf(0.975) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
