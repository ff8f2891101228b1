"""Lemma 1: the effect of normalization on a vector."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    affine_decomposition,
    affine_norm,
    center,
    effective_weight,
    sphere_radius,
    standardize,
)
from support import reference as ref

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
NUMBER = st.floats(-10, 10, allow_subnormal=False)


@st.composite
def vectors(draw):
    v = torch.tensor(draw(st.lists(NUMBER, min_size=2, max_size=24)), dtype=torch.float64)
    assume(v.std(correction=0) > 0.1)
    return v


def close(value, expected, scale=1.0, tolerance=1e-12):
    value, expected = torch.as_tensor(value), torch.as_tensor(expected, dtype=torch.float64)
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * scale


@PROPERTY
@given(vectors(), st.sampled_from([0.0, 1e-5, 0.1]))
def test_functions_equal_their_exact_twins(v, eps):
    values = ref.floats(v)
    close(center(v), ref.center(values), 10)
    close(standardize(v, eps), ref.standardize(values, eps))
    gamma, beta = affine_decomposition(v)
    close(gamma, ref.root(ref.variance(values)))
    close(beta, float(ref.mean(values)))


@PROPERTY
@given(vectors())
def test_centering_is_the_projection_orthogonal_to_the_ones(v):
    once = center(v)
    close(center(once), once, 10)
    assert abs(once.sum()) <= 1e-12 * 10
    assert once.norm() <= v.norm() + 1e-12


@PROPERTY
@given(vectors())
def test_standardized_vectors_lie_on_the_sphere_of_radius_root_n(v):
    assert standardize(v).norm().item() == pytest.approx(math.sqrt(v.numel()), rel=1e-12)
    assert standardize(v, eps=0.1).norm() < math.sqrt(v.numel())


@PROPERTY
@given(vectors(), st.floats(0.1, 10), st.sampled_from([1, -1]), NUMBER)
def test_scale_and_shift_leave_only_the_sign(v, alpha, sign, shift):
    close(standardize(sign * alpha * v + shift), (sign * standardize(v)), 10)


@PROPERTY
@given(vectors())
def test_a_vector_is_gamma_times_its_standardization_plus_beta(v):
    gamma, beta = affine_decomposition(v)
    close(gamma * standardize(v) + beta, v, 10)
    assert affine_norm(gamma, beta, v.numel()).item() == pytest.approx(v.norm().item(), rel=1e-12)


@PROPERTY
@given(vectors(), NUMBER, NUMBER, st.sampled_from([0.0, 1e-3, 2.0]))
def test_affine_output_lies_on_the_predicted_sphere(v, gamma, beta, eps):
    """The sphere has center βe and radius |γ|√n·√(σ²/(σ²+ε)), for γ of either sign."""
    n, output = v.numel(), gamma * standardize(v, eps) + beta
    radius = sphere_radius(torch.tensor(gamma, dtype=torch.float64), n, v.var(correction=0), eps)
    assert radius.item() == pytest.approx((output - beta).norm().item(), rel=1e-12, abs=1e-12)
    assert (output - beta).sum().abs() <= 1e-11
    if eps == 0:
        norm = affine_norm(torch.tensor(gamma, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64), n)
        assert norm.item() == pytest.approx(output.norm().item(), rel=1e-12, abs=1e-12)
        assert sphere_radius(torch.tensor(gamma, dtype=torch.float64), n).item() == pytest.approx(radius.item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_and_leading_dimensions_are_kept(dtype):
    v = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert standardize(v, 1e-5).dtype == center(v).dtype == dtype
    gamma, beta = affine_decomposition(v)
    assert gamma.dtype == beta.dtype == dtype
    assert gamma.shape == beta.shape == (3, 2)
    wide = v.double()
    alone = torch.stack([torch.stack([standardize(row, 1e-5) for row in block]) for block in wide])
    close(standardize(wide, 1e-5), alone)
    assert (standardize(v, 1e-5).double() - alone).abs().max() <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 2.0, 0.1, 1.7], ids=lambda value: f"all-{value}")
@pytest.mark.parametrize("n", [4, 7, 10])
def test_a_constant_vector_standardizes_to_zeros(n, value, dtype):
    assert torch.equal(standardize(torch.full((n,), value, dtype=dtype)), torch.zeros(n, dtype=dtype))


@pytest.mark.parametrize("n", [2, 5])
def test_standardize_is_torchs_batch_and_layer_norm(n):
    v = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    close(standardize(v, 1e-5), F.layer_norm(v, (6,)))
    close(standardize(v.T, 1e-3).T.contiguous(), F.batch_norm(v, None, None, training=True, eps=1e-3))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_effective_weight_is_the_weight_batch_norm_applies(kind):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    weight, x = (draw(3, 4), draw(5, 4)) if kind == "linear" else (draw(3, 2, 3, 3), draw(4, 2, 5, 5))
    apply = F.linear if kind == "linear" else F.conv2d
    gamma, beta, mean, variance = draw(3), draw(3), draw(3), draw(3).square() + 0.1
    output = F.batch_norm(apply(x, weight), mean, variance, gamma, beta, training=False, eps=0.01)
    shift = beta - gamma * mean / (variance + 0.01).sqrt()
    close(apply(x, effective_weight(weight, gamma, variance, 0.01), shift), output, 10)


def test_effective_weight_ignores_the_scale_of_the_weight():
    weight, gamma = torch.arange(1.0, 9, dtype=torch.float64).reshape(2, 4), torch.tensor([2.0, -3.0]).double()
    variance = torch.tensor([0.5, 7.0]).double()
    once = effective_weight(weight, gamma, variance, 0.0)
    close(effective_weight(10 * weight, gamma, 100 * variance, 0.0), once, 100)
    assert not torch.allclose(effective_weight(10 * weight, gamma, 100 * variance, 1.0), once, rtol=1e-3)
