"""Intervals and tests of accuracies, and that an evaluation leaves no trace."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import mcnemar, wilson_interval
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.statistics.statistics import (
    holm,
    mean_interval,
    paired_interval,
    student_quantile,
)
from support import reference as ref

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)


# --- Wilson's interval ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1),
    ],
)
def test_known_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@PROPERTY
@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_interval_solves_the_quadratic(counts, level):
    correct, total = counts
    low, high = wilson_interval(correct, total, level)
    assert (low, high) == pytest.approx(ref.wilson(correct, total, level), rel=1e-8, abs=1e-10)
    assert 0 <= low <= correct / total <= high <= 1
    mirrored = wilson_interval(total - correct, total, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_ends_are_exact_where_nothing_or_everything_is_correct():
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0
        assert 0 < wilson_interval(0, n)[1] < 1
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_interval_covers_the_truth_about_as_often_as_it_says(n):
    """The coverage, summed exactly over the binomial distribution, is 95 % on average and never far below."""
    coverages = []
    for p in [k / 50 for k in range(1, 50)]:
        covered = 0.0
        for k in range(n + 1):
            low, high = wilson_interval(k, n)
            covered += math.comb(n, k) * p**k * (1 - p) ** (n - k) * (low <= p <= high)
        coverages.append(covered)
    assert min(coverages) > 0.82
    assert sum(coverages) / len(coverages) == pytest.approx(0.95, abs=0.012)


# --- McNemar's test ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(first, second) == mcnemar(second, first)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (2, 1, 1), (0, 5, 2 / 32), (6, 1, 16 / 128), (0, 1074, 2.0**-1073)],
)
def test_mcnemar_by_counting(first, second, expected):
    assert mcnemar(first, second) == expected


# --- paired differences -----------------------------------------------------------------------------------------------

CELLS = st.lists(st.integers(0, 30), min_size=3, max_size=3)


@PROPERTY
@given(CELLS, st.floats(0.5, 0.999))
def test_paired_interval_is_walds_with_two_samples_more(cells, level):
    lost, won, n = *cells[:2], sum(cells)
    low, high = paired_interval(lost, won, n, level)
    if n == 0:
        assert (low, high) == (-1, 1)
        return
    assert (low, high) == pytest.approx(ref.paired(lost, won, n, level), rel=1e-9, abs=1e-12)
    assert paired_interval(won, lost, n, level) == pytest.approx((-high, -low), abs=1e-15)
    assert -1 <= low < high <= 1
    if level >= 0.9:
        assert low <= (won - lost) / n <= high


@pytest.mark.parametrize(
    ("lost", "won", "n", "low", "high"),
    [
        (7, 1, 21, -0.5084, -0.0134),  # by hand: -6/23 ± 1.95996·√((10/23 - 36/529)/23)
        (0, 0, 100, -0.0272, 0.0272),
        (0, 8, 8, 0.4281, 1.0),  # 8/10 - 1.95996·√(0.36/10); the other end is beyond 1
    ],
)
def test_paired_intervals_known_by_hand(lost, won, n, low, high):
    assert paired_interval(lost, won, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [10, 20, 32, 60])
def test_paired_interval_covers_the_truth_about_as_often_as_it_says(n):
    """The coverage is summed exactly over the multinomial distribution, also if few samples or none differ."""
    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    ways = torch.tensor([math.lgamma(n + 1) - sum(map(math.lgamma, (b + 1, c + 1, n - b - c + 1))) for b, c in tables])
    low, high = torch.tensor([paired_interval(b, c, n) for b, c in tables], dtype=torch.float64).T
    counts = torch.tensor([(b, c, n - b - c) for b, c in tables], dtype=torch.float64)
    shares = [0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9]
    coverages = []
    for p in shares:
        for q in shares:
            if p + q < 1:
                logs = torch.tensor([p, q, 1 - p - q], dtype=torch.float64)
                probability = (ways.double() + torch.special.xlogy(counts, logs).sum(1)).exp()
                assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
                coverages.append(float(probability[(low <= q - p) & (q - p <= high)].sum()))
    assert min(coverages) > 0.91
    assert 0.95 < sum(coverages) / len(coverages) < 0.985


# --- means over runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 101, 1000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_student_quantiles(freedom, level):
    assert student_quantile(level, freedom) == pytest.approx(t.ppf((1 + level) / 2, freedom), rel=1e-11)


@PROPERTY
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.sampled_from([0.8, 0.95]))
def test_mean_interval_is_students(values, level):
    assume(len(set(values)) > 1)
    mean, error = math.fsum(values) / len(values), float(torch.tensor(values, dtype=torch.float64).std())
    half = t.ppf((1 + level) / 2, len(values) - 1) * error / math.sqrt(len(values))
    assert mean_interval(values, level) == pytest.approx((mean - half, mean + half), rel=1e-9, abs=1e-12)


def test_one_run_or_equal_ones_say_nothing_about_others():
    assert mean_interval([0.3]) == (-math.inf, math.inf)
    assert mean_interval([0.0, 0.0, 0.0]) == (-math.inf, math.inf)
    assert mean_interval([]) == (-math.inf, math.inf)


# --- families of tests ------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_closed_testing(p_values):
    assert holm(p_values) == pytest.approx(ref.holm(p_values), rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# --- leaving no trace -------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    """Return a model in training mode whose first block is in evaluation mode, except for one module inside."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Dropout(), nn.Linear(4, 2))
    net.train()
    net[0].eval()
    net[0][2].train()
    return net


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception inside"])
def test_modes_and_random_state_come_back(model, fails):
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    torch.manual_seed(0)
    state = torch.get_rng_state()
    parameters = [p.detach().clone() for p in model.state_dict().values()]
    try:
        with preserved_state(model):
            assert not any(module.training for module in model.modules())
            torch.rand(3)
            torch.manual_seed(123)
            model(torch.rand(5, 4))
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, parameters, model.state_dict().values()))


def test_gradients_can_be_taken_inside_inference_mode(model):
    with torch.inference_mode():
        with preserved_state(model), torch.enable_grad():
            x = torch.rand(3, 4).requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        assert gradient.abs().sum() > 0
        assert torch.is_inference_mode_enabled()


# --- what users give --------------------------------------------------------------------------------------------------

WHOLE = [int, float, np.int64, np.int32, torch.tensor]


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_counts_of_any_kind_are_exact(kind):
    """Products of numpy's and torch's integers overflow: p of (100, 200) would be -inf."""
    assert mcnemar(kind(100), kind(200)) == mcnemar(100, 200) == pytest.approx(binomtest(100, 300).pvalue, rel=1e-12)
    found = wilson_interval(kind(3), kind(10)), paired_interval(kind(1), kind(2), kind(9))
    assert found == (wilson_interval(3, 10), paired_interval(1, 2, 9))
    assert all(type(end) is float for interval in found for end in interval)


@pytest.mark.parametrize(
    "p_values",
    [np.array([0.01, 0.04]), (0.01, np.float64(0.04)), torch.tensor([0.01, 0.04])],
    ids=["array", "tuple", "tensor"],
)
def test_p_values_of_any_kind_are_adjusted(p_values):
    assert holm(p_values) == pytest.approx([0.02, 0.04], rel=1e-6)
    assert all(type(p) is float for p in holm(p_values))


@pytest.mark.parametrize("count", [-1, 3.5, "3", None, True, math.nan, math.inf, np.int64(-1), [3]], ids=repr)
def test_what_is_no_count_is_refused(count):
    for function, arguments in ((mcnemar, (count, 1)), (mcnemar, (1, count)), (wilson_interval, (count, 9)),
                                (wilson_interval, (0, count)), (paired_interval, (0, 0, count))):  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"=.* must be an integer, at least 0"):
            function(*arguments)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "0.1", None, True], ids=repr)
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ConfigurationError, match=r"p=.* is no probability"):
        holm([0.01, p])


@pytest.mark.parametrize("level", [0, 1, 95, math.nan, "0.95", None], ids=repr)
def test_what_is_no_level_is_refused(level):
    for function, arguments in ((wilson_interval, (1, 2)), (paired_interval, (1, 2, 4)), (mean_interval, ([1, 2],))):
        with pytest.raises(ConfigurationError, match=r"level=.* must be between 0 and 1, as 0.95"):
            function(*arguments, level=level)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None], ids=repr)
def test_means_of_what_is_unknown_are_refused(value):
    with pytest.raises(ConfigurationError, match=r"values=.* must be a list of numbers that are finite"):
        mean_interval([1.0, 2.0, value])
