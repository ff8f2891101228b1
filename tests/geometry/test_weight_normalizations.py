"""The paper's identities for weight-based normalizations, with corrections, and exact reference values."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normgeo.geometry import (
    centered_weight_normalization,
    covariance,
    preactivation_variance,
    spectral_normalization,
    standardize_gradient,
    weight_normalization,
    weight_standardization,
)
from lightning_normgeo.normalization.parametrizations import CenteredWeightNormalization, WeightStandardization
from support import reference as ref
from support.tensors import EPS, POSITIVE, PROPERTY, SEED, SIZE, close, draw


@PROPERTY
@given(SEED, st.integers(2, 9), POSITIVE)
def test_weight_norm_puts_rows_on_spheres_of_radius_g(seed, n, alpha):
    v, gain = draw(4, n, seed=seed), draw(4, seed=seed + 1)
    weight = weight_normalization(v, gain)
    close(weight.norm(dim=1), gain.abs())
    close(weight_normalization(alpha * v, gain), weight)
    close(weight_normalization(-alpha * v, gain), -weight)
    layer = parametrizations.weight_norm(nn.Linear(n, 4, bias=False).double())
    layer.parametrizations.weight.original0.data = gain[:, None].clone()
    layer.parametrizations.weight.original1.data = v.clone()
    close(weight, layer.weight.detach())


@PROPERTY
@given(SEED, st.integers(2, 6), st.integers(2, 9), POSITIVE)
def test_spectral_norm_has_largest_singular_value_one_and_ignores_the_scale(seed, m, n, alpha):
    weight = draw(m, n, seed=seed)
    once = spectral_normalization(weight)
    close(torch.linalg.svdvals(once)[0], 1.0)
    close(spectral_normalization(alpha * weight), once)
    close(spectral_normalization(-alpha * weight), -once)
    rows = weight * torch.arange(1, m + 1)[:, None]
    assert (spectral_normalization(rows) - once).abs().max() > 1e-3, "one unit: rows have no scale of their own"


def test_spectral_norm_is_the_limit_of_torchs_power_iteration():
    layer = nn.Conv2d(3, 4, 2, bias=False).double()
    weight = layer.weight.detach().clone()
    parametrizations.spectral_norm(layer, n_power_iterations=500)
    close(layer.weight.detach(), spectral_normalization(weight), 1e-10)


@PROPERTY
@given(SEED, SIZE, POSITIVE, st.floats(-5, 5))
def test_weight_standardization_is_root_n_times_centered_weight_normalization(seed, n, alpha, shift):
    """The factor is √n for the biased deviation of the formula, √(n-1) for the unbiased one of Qiao's code."""
    v = draw(4, n, seed=seed)
    unit = centered_weight_normalization(v)
    close(unit.norm(dim=1), torch.ones(4))
    assert unit.sum(1).abs().max() <= 1e-12
    close(weight_standardization(v), math.sqrt(n) * unit)
    close(weight_standardization(v, unbiased=True), math.sqrt(n - 1) * unit)
    moved, worst = alpha * v + shift, 1 + (1 + abs(shift)) / (alpha * v.std(1).min())
    close(centered_weight_normalization(moved), unit, 1e-13 * worst)
    close(centered_weight_normalization(-moved), -unit, 1e-13 * worst)


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (CenteredWeightNormalization, centered_weight_normalization),
        (lambda dim: WeightStandardization(dim, unbiased=False, eps=0.0), weight_standardization),
        (lambda dim: WeightStandardization(dim), lambda v: weight_standardization(v, unbiased=True, eps=1e-5)),
        (lambda dim: WeightStandardization(dim, False, 0.1), lambda v: weight_standardization(v, False, 0.1)),
    ],
    ids=["cwn", "ws-paper", "ws-qiao", "ws-eps"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_parametrizations_are_these_maps_of_rows(make, function, dim):
    layer, v = make(dim), draw(3, 4, 2, 2) + 0.5
    value = layer(v)
    assert value.shape == v.shape
    close(value.movedim(dim, 0).flatten(1), function(v.movedim(dim, 0).flatten(1)))
    assert torch.autograd.gradcheck(layer, draw(3, 4, 2, 2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(function, draw(3, 4, seed=2).requires_grad_())


# --- twins and conventions --------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.tuples(*[st.floats(-10, 10, allow_subnormal=False)] * 2), min_size=3, max_size=9), EPS)
def test_functions_equal_their_exact_twins(pairs, eps):
    v, c = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assume(v.std(correction=0) > 0.1)
    values, upstream = v.tolist(), c.tolist()
    close(weight_normalization(v, eps), ref.weight_normalization(values, eps))
    close(centered_weight_normalization(v), ref.centered_weight_normalization(values), 1e-11)
    for unbiased in (False, True):
        twin = ref.weight_standardization(values, unbiased, eps)
        close(weight_standardization(v, unbiased, eps), twin, 1e-11)
    twin = torch.tensor(ref.standardize_gradient(values, upstream, eps), dtype=torch.float64)
    assert (standardize_gradient(v, c, eps) - twin).abs().max() <= 1e-12 * (c.abs().max() + 1) / v.std(correction=0)
    exact = float(ref.variance([3 * Fraction(x) - 2 * Fraction(y) for x, y in pairs]))
    variance = preactivation_variance(torch.tensor([[3.0, -2.0]]).double(), covariance(torch.stack([v, c])))
    assert variance.item() == pytest.approx(exact, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 5), (3, 3), (4, 2)])
def test_the_largest_singular_value_equals_its_exact_twin(m, n):
    weight = draw(m, n, seed=m)
    largest = ref.two_norm_squared(weight.tolist()) ** 0.5
    close(weight / spectral_normalization(weight), torch.full((m, n), largest, dtype=torch.float64))


@pytest.mark.parametrize(
    "function",
    [weight_normalization, centered_weight_normalization, weight_standardization, spectral_normalization],
    ids=lambda function: function.__name__,
)
def test_a_weight_without_direction_gives_zeros_and_finite_gradients(function):
    weight = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = function(weight)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(2, 3).double())
    assert weight.grad.isfinite().all()
    if function in (centered_weight_normalization, weight_standardization):
        assert torch.equal(function(torch.full((2, 3), 0.1)), torch.zeros(2, 3))
