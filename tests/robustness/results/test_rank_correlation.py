"""Spearman's ρ with its permutation test and interval, against scipy and permutations counted one by one."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import rank_correlation
from lightning_normgeo.robustness.results.statistics.rank_correlation import correlations_differ, smallest_p_value

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
NUMBERS = st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0, 1e6]), min_size=2, max_size=6)


def ranks(values: list[float]) -> list[Fraction]:
    """Mean ranks, from the definition."""
    order = sorted(values)
    places = {value: [k for k, other in enumerate(order, 1) if other == value] for value in values}
    return [Fraction(sum(places[value]), len(places[value])) for value in values]


def product(a: list[Fraction], b: list[Fraction]) -> Fraction:
    middle = Fraction(len(a) + 1, 2)
    return sum(((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)), Fraction(0))


@PROPERTY
@given(st.data())
def test_rho_and_p_are_those_of_all_permutations(data: st.DataObject) -> None:
    """In rational arithmetic: |ρ| is as large as observed if |Σ ranks · ranks| is."""
    first = data.draw(NUMBERS)
    second = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.0]), min_size=len(first), max_size=len(first)))
    found = rank_correlation(first, second)
    assert found.n == len(first)
    a, b = ranks(first), ranks(second)
    if len(set(first)) < 2 or len(set(second)) < 2:
        assert math.isnan(found.rho)
        assert math.isnan(found.p_value)
        return
    observed = product(a, b)
    assert found.rho == pytest.approx(float(observed) / math.sqrt(product(a, a) * product(b, b)), abs=1e-12)
    every = [abs(product(a, list(shuffled))) >= abs(observed) for shuffled in itertools.permutations(b)]
    assert found.p_value == pytest.approx(sum(every) / len(every), abs=1e-12)


@pytest.mark.parametrize("n", [5, 7, 12, 40])
def test_against_scipy(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.normal(size=n)
    y = (x + generator.normal(size=n)).round(1)
    found, expected = rank_correlation(list(x), list(y)), stats.spearmanr(x, y)
    assert found.rho == pytest.approx(expected.statistic, abs=1e-12)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + found.rho**2 / 2) / (n - 3))
    assert found.low == pytest.approx(math.tanh(math.atanh(found.rho) - half), abs=1e-9)
    assert found.high == pytest.approx(math.tanh(math.atanh(found.rho) + half), abs=1e-9)
    if n == 12:
        drawn = stats.permutation_test(
            (y,),
            lambda other: stats.spearmanr(x, other).statistic,
            permutation_type="pairings",
            n_resamples=2000,
            rng=np.random.default_rng(1),
        )
        assert found.p_value == pytest.approx(drawn.pvalue, abs=0.03)
        assert rank_correlation(list(x), list(y)) == found


def test_only_the_order_counts() -> None:
    x, y = [3.0, 1.0, 2.0, 5.0, 4.0], [0.1, 0.4, 0.2, 0.3, 0.9]
    found = rank_correlation(x, y)
    assert rank_correlation([math.exp(v) for v in x], [v**3 for v in y]) == found
    mirrored = rank_correlation([-v for v in x], y)
    assert mirrored.rho == pytest.approx(-found.rho)
    assert mirrored.p_value == found.p_value


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
def test_a_perfect_order_has_the_smallest_p_value(n: int) -> None:
    found = rank_correlation(list(range(n)), [v**2 for v in range(n)])
    assert found.rho == pytest.approx(1)
    assert found.p_value == pytest.approx(smallest_p_value(n)) == pytest.approx(min(1, 2 / math.factorial(n)))
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_perfect_order_of_many_counts_as_one_of_those_drawn() -> None:
    found = rank_correlation(list(range(20)), list(range(20)))
    assert found.p_value == pytest.approx(1 / 50_001)


def test_what_is_no_list_of_pairs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="first has 2 and second has 3 numbers"):
        rank_correlation([1, 2], [1, 2, 3])
    with pytest.raises(ConfigurationError, match="must be a list of numbers that are finite"):
        rank_correlation([1, math.inf], [1, 2])


def williams(shared: list[float], first: list[float], second: list[float]) -> float:
    """The test as in Steiger (1980), equation 7, on ranks."""
    matrix = np.corrcoef([stats.rankdata(one) for one in (shared, first, second)])
    if np.abs(matrix).min() < 1e-9:
        return math.nan  # without a sign
    signs = np.sign([1.0, matrix[0, 1], matrix[0, 2]])
    matrix = matrix * np.outer(signs, signs)
    own, other, between, n = matrix[0, 1], matrix[0, 2], matrix[1, 2], len(shared)
    if abs(own - other) < 1e-9:
        return 1.0
    spread = 2 * (n - 1) / (n - 3) * np.linalg.det(matrix) + ((own + other) / 2) ** 2 * (1 - between) ** 3
    return float(2 * stats.t.sf(abs(own - other) * np.sqrt((n - 1) * (1 + between) / spread), n - 3))


@pytest.mark.parametrize("n", [4, 5, 8, 20])
@pytest.mark.parametrize("sign", [1, -1])
def test_two_correlations_with_the_same_quantity_are_compared_by_williams_test(n: int, sign: int) -> None:
    generator = np.random.default_rng(n)
    for _ in range(20):
        shared, noise, other = generator.normal(size=(3, n))
        first, second = shared + 0.5 * noise, sign * shared + 2 * other
        expected = williams(list(shared), list(first), list(second))
        found = correlations_differ(shared.tolist(), first.tolist(), second.tolist())
        assert math.isnan(expected) or found == pytest.approx(expected, abs=1e-6)
        assert found == pytest.approx(correlations_differ(shared.tolist(), second.tolist(), first.tolist()))


def test_correlations_of_the_same_ranks_do_not_differ() -> None:
    up = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert correlations_differ(up, [3.0, 1.0, 2.0, 5.0, 4.0], [30.0, 10.0, 20.0, 50.0, 40.0]) == 1
    assert correlations_differ(up[:3], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == 1
    assert math.isnan(correlations_differ(up, [1.0] * 5, up))
