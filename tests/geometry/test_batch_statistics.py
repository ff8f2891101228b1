"""Statistics of batch normalization against the batch: gaps, gain, rank and kernel of the covariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    covariance,
    covariance_rank,
    kernel_fraction,
    scale_gap,
    shift_gap,
    squared_gain,
)
from support import reference as ref
from support.tensors import draw

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def integer_data(draw, max_n=6, max_samples=7):
    """Return (n, samples) small integers, for which the rank is known exactly and often deficient."""
    n, samples = draw(st.integers(1, max_n)), draw(st.integers(1, max_samples))
    column = st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    return torch.tensor(draw(st.lists(column, min_size=samples, max_size=samples)), dtype=torch.float64).T


def test_gaps_are_absolute_differences_per_channel():
    gamma, variance = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 1.0, 4.0])
    assert scale_gap(gamma, variance).tolist() == [0, 3, 3.75]
    assert shift_gap(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.5])).tolist() == [2, 0.5]


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_squared_gain_is_the_ratio_of_variances_across_the_layer(eps):
    y, gamma = 3 * draw(16, 4) + 1, draw(4, seed=1)
    output = F.batch_norm(y, None, None, gamma, torch.ones(4).double(), training=True, eps=eps)
    before, after = y.var(0, correction=0), output.var(0, correction=0)
    torch.testing.assert_close(squared_gain(gamma, before, eps), after / before, rtol=1e-12, atol=0)


@PROPERTY
@given(integer_data())
def test_covariance_equals_its_exact_twin(x):
    rows = [ref.center(row) for row in x.tolist()]
    exact = [[ref.dot(a, b) / x.shape[1] for b in rows] for a in rows]
    torch.testing.assert_close(covariance(x), torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@PROPERTY
@given(integer_data())
def test_rank_equals_exact_elimination_and_loses_one_to_centering(x):
    rank = covariance_rank(x)
    assert rank == len(ref.span(x.T.tolist()))
    assert rank <= min(x.shape[0], x.shape[1] - 1)


@pytest.mark.parametrize("offset", [0, 1, 100])
@pytest.mark.parametrize(("n", "samples", "rank"), [(6, 20, 6), (6, 7, 6), (6, 6, 5), (20, 8, 7), (5, 1, 0)])
def test_rank_of_generic_data_is_the_bound_whatever_its_mean(n, samples, rank, offset):
    x = draw(n, samples) + offset
    assert covariance_rank(x) == rank
    assert torch.linalg.matrix_rank(covariance(x), hermitian=True, rtol=1e-9) == rank


@PROPERTY
@given(integer_data(), st.data())
def test_kernel_fraction_equals_the_exact_projection(x, data):
    number = st.integers(-5, 5)
    w = data.draw(st.lists(number, min_size=x.shape[0], max_size=x.shape[0]).filter(any))
    value = kernel_fraction(torch.tensor([w, [0] * len(w)], dtype=torch.float64), x)
    assert value[0].item() == pytest.approx(ref.kernel_fraction(w, x.T.tolist()), rel=1e-12, abs=1e-13)
    assert value[1] == 0, "W = 0 has nothing in the kernel"
    assert 0 <= value[0] <= 1


@PROPERTY
@given(integer_data(), st.integers(1, 10**6))
def test_kernel_fraction_ignores_scale_and_order(x, scale):
    w = draw(3, x.shape[0], seed=scale)
    once = kernel_fraction(w, x)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(scale))
    for same in (kernel_fraction(scale * w, x), kernel_fraction(w, x[:, order]), kernel_fraction(w, scale * x)):
        torch.testing.assert_close(same, once, rtol=1e-11, atol=1e-12)


def test_a_generic_weight_has_its_share_of_dimensions_in_the_kernel():
    fraction = kernel_fraction(draw(4000, 12), draw(12, 8, seed=1))
    assert covariance_rank(draw(12, 8, seed=1)) == 7
    standard_error = fraction.std().item() / 4000**0.5
    assert abs(fraction.mean().item() - 5 / 12) < 5 * standard_error


def test_a_weight_in_the_kernel_has_no_effect_on_batch_norm():
    """BN(w x) ≡ β, while the complement of w in the row space has an effect."""
    x = draw(6, 4)
    basis = torch.linalg.svd(x - x.mean(1, keepdim=True)).U
    inside, outside = basis[:, 3:].T, basis[:, :3].T
    assert kernel_fraction(inside, x).min() > 1 - 1e-12
    assert kernel_fraction(outside, x).max() < 1e-12
    bias = torch.full((3,), 0.7, dtype=torch.float64)
    silent, loud = (F.batch_norm((w @ x).T, None, None, None, bias, training=True) for w in (inside, outside))
    assert (silent - 0.7).abs().max() < 1e-10
    assert (loud - 0.7).abs().max() > 0.5
