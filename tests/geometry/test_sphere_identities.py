"""The paper's identities for data-based normalizations, with corrections: spheres, ellipsoids, kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    affine_decomposition,
    affine_norm,
    center,
    covariance,
    covariance_rank,
    effective_bias,
    effective_weight,
    kernel_fraction,
    pair_gradient,
    pair_standardize,
    patch_columns,
    preactivation_variance,
    sphere_radius,
    standardize,
    standardize_gradient,
    subtract_mean_row,
    weight_normalization,
)
from support import reference as ref
from support.tensors import EPS, POSITIVE, PROPERTY, SEED, SIZE, close, draw


def batch_norm(y, gamma=None, beta=None, eps=1e-60):
    """Return torch's batch normalization of ``(units, samples)``, the paper's layout."""
    return F.batch_norm(y.T, None, None, gamma, beta, training=True, eps=eps).T


# --- Lemma 1 ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(SEED, SIZE)
def test_centering_is_the_projection_matrix_orthogonal_to_the_ones(seed, n):
    projection = torch.eye(n).double() - 1 / n
    close(projection @ projection, projection)
    assert torch.linalg.matrix_rank(projection) == n - 1
    v = draw(n, seed=seed) + 3
    close(center(v), projection @ v)
    assert center(v).sum().abs() <= 1e-13 * n


@PROPERTY
@given(SEED, SIZE)
def test_the_biased_variance_is_the_squared_length_of_the_centered_vector_over_n(seed, n):
    v = 5 * draw(n, seed=seed) - 2
    squared = center(v).square().sum()
    close(squared / n, v.var(correction=0))
    close(affine_decomposition(v)[0], (squared / n).sqrt())
    assert abs(squared / n / v.var() - 1) > 0.1, "the unbiased variance is another number"


@PROPERTY
@given(SEED, SIZE, POSITIVE, st.floats(-50, 50))
def test_standardized_vectors_have_norm_root_n_and_flip_with_the_sign_of_the_scale(seed, n, alpha, shift):
    """N(αv + te) = N(v) for α > 0 only; the paper claims it for all α."""
    v = draw(n, seed=seed)
    once, tolerance = standardize(v), 1e-12 * (1 + (1 + abs(shift)) / (alpha * v.std()))
    close(once.norm(), math.sqrt(n))
    close(standardize(alpha * v + shift), once, tolerance)
    close(standardize(-alpha * v + shift), -once, tolerance)


@PROPERTY
@given(SEED, SIZE)
def test_a_vector_splits_orthogonally_into_gamma_and_beta(seed, n):
    """v = γN(v) + βe with ⟨N(v), e⟩ = 0, so ‖v‖² = n(γ² + β²)."""
    v = 3 * draw(n, seed=seed) + 1
    gamma, beta = affine_decomposition(v)
    close(gamma * standardize(v) + beta, v)
    close(v.square().sum(), n * (gamma**2 + beta**2))
    close(affine_norm(gamma, beta, n), v.norm())


# --- batch normalization ----------------------------------------------------------------------------------------------


@PROPERTY
@given(SEED, st.integers(2, 9), st.sampled_from([(), (3, 4)]), st.sampled_from([1e-60, 1e-5, 0.1]), st.floats(-2, 2))
def test_batch_norm_maps_every_channel_onto_a_sphere_around_beta(seed, batch, image, eps, offset):
    """The radius is |γ|√n·σ/√(σ²+ε) with n = B, or B·H·W for images; for ε = 0 points have norm √(n(γ²+β²))."""
    layer = (nn.BatchNorm2d if image else nn.BatchNorm1d)(5, eps=eps).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(layer.bias, mean=offset, generator=torch.Generator().manual_seed(seed))
    y = 0.5 * draw(batch, 5, *image, seed=seed) + offset
    rows, output = (t.detach().movedim(1, 0).flatten(1) for t in (y, layer(y)))
    n, gamma, beta = rows.shape[1], layer.weight.detach(), layer.bias.detach()
    around = output - beta[:, None]
    close(around.norm(dim=1), sphere_radius(gamma, n, rows.var(1, correction=0), eps), 1e-11)
    assert around.sum(1).abs().max() <= 1e-12 * n
    if eps < 1e-20:
        close(output.norm(dim=1), affine_norm(gamma, beta, n), 1e-11)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(
    ("make", "instance"),
    [
        (lambda eps: nn.LayerNorm(6, eps), (-1,)),
        (lambda eps: nn.LayerNorm([6, 3, 4], eps), (1, 2, 3)),
        (lambda eps: nn.GroupNorm(1, 6, eps), (1, 2, 3)),
        (lambda eps: nn.InstanceNorm2d(6, eps), (2, 3)),
    ],
    ids=["ln-features", "ln-image", "gn-1", "in"],
)
def test_other_normalizations_map_every_instance_onto_a_sphere_before_their_affine(make, instance, eps):
    y = draw(5, 3, 4, 6) if instance == (-1,) else draw(5, 6, 3, 4)
    count, variance = math.prod(y.shape[d] for d in instance), y.var(instance, correction=0)
    output = make(eps).double()(y).detach()
    close(output.square().sum(instance).sqrt(), sphere_radius(torch.ones_like(variance), count, variance, eps))
    assert output.sum(instance).abs().max() <= 1e-12 * count


@PROPERTY
@given(SEED, SIZE, st.integers(3, 12))
def test_batch_norm_is_the_centered_data_over_the_root_of_w_sigma_w(seed, n, samples):
    weight, x = draw(4, n, seed=seed), draw(n, samples, seed=seed + 1) + 2
    centered, variance = center(x), preactivation_variance(weight, covariance(x))
    close(variance, (weight @ x).var(1, correction=0), 1e-11)
    close(batch_norm(weight @ x), weight @ centered / variance.sqrt()[:, None], 1e-10)


@PROPERTY
@given(SEED, st.integers(1, 12), st.integers(1, 14), st.floats(-5, 5))
def test_the_rank_of_sigma_is_at_most_n_and_samples_minus_one(seed, n, samples, offset):
    """The paper omits the -1 that centering costs. Generic data attain the bound."""
    x = draw(n, samples, seed=seed) + offset
    assert covariance_rank(x) == min(n, samples - 1)
    assert (torch.linalg.eigvalsh(covariance(x)) < 1e-12 * x.square().sum()).sum() >= n - samples + 1


def test_for_convolutions_sigma_is_that_of_patches_over_batch_and_positions():
    x, weight = draw(2, 3, 5, 4), draw(4, 3, 3, 2, seed=1)
    columns = patch_columns(x, (3, 2))
    assert columns.shape == (3 * 3 * 2, 2 * 3 * 3)
    assert covariance_rank(columns) == 17
    assert covariance_rank(patch_columns(x[:1], (3, 2))) == 8
    y = F.conv2d(x, weight).movedim(1, 0).flatten(1)
    close(preactivation_variance(weight.flatten(1), covariance(columns)), y.var(1, correction=0))


@pytest.mark.parametrize("window", [(3, 2, 1, 0, 1), (2, 2, 2, 1, 1), (2, 3, 1, 1, 2)], ids=str)
def test_patches_equal_their_twin_and_carry_the_convolution(window):
    x, (height, width, stride, padding, dilation) = draw(2, 3, 6, 7), window
    columns = patch_columns(x, (height, width), stride, padding, dilation)
    close(columns.T, ref.patches(x.tolist(), *window))
    weight = draw(4, 3, height, width, seed=1)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    close(weight.flatten(1) @ columns, y.movedim(1, 0).flatten(1))


@PROPERTY
@given(SEED, st.integers(4, 9), st.integers(2, 4), EPS, st.floats(-3, 3))
def test_a_weight_in_the_kernel_of_sigma_gives_beta_for_every_sample(seed, n, samples, eps, beta):
    """The sphere shrinks to its center; with ε > 0 the output is finite and exact. A generic weight is no such case."""
    x, generic = draw(n, samples, seed=seed) + 1, draw(3, n, seed=seed + 1)
    basis = torch.linalg.svd(center(x)).U
    inside = generic @ basis[:, samples - 1 :] @ basis[:, samples - 1 :].T
    shift = torch.full((3,), beta, dtype=torch.float64)
    assert kernel_fraction(inside, x).min() > 1 - 1e-9
    assert (batch_norm(inside @ x, shift + 1, shift, eps) - beta).abs().max() <= 1e-10
    assert kernel_fraction(generic, x).max() < 1 - 1e-9
    assert (batch_norm(generic @ x, None, shift, eps) - beta).abs().max() > 1e-3


@PROPERTY
@given(SEED, SIZE, st.integers(3, 12), st.sampled_from([1e-60, 1e-3, 0.5]))
def test_batch_norm_applies_an_effective_weight_on_the_ellipsoid_of_gamma_squared(seed, n, samples, eps):
    """γBN(WX + c) + β = W'X + b' and W'ΣW'ᵀ = γ²·σ²/(σ²+ε); any constant c cancels."""
    weight, x = draw(4, n, seed=seed), draw(n, samples, seed=seed + 1) + 1
    gamma, beta, bias = draw(3, 4, seed=seed + 2)
    y = weight @ x
    mean, variance = y.mean(1), y.var(1, correction=0)
    effective = effective_weight(weight, gamma, variance, eps)
    shift = effective_bias(gamma, beta, mean, variance, eps)
    close(effective @ x + shift[:, None], batch_norm(y + bias[:, None], gamma, beta, eps), 1e-10)
    squared = preactivation_variance(effective, covariance(x))
    close(squared, gamma**2 * variance / (variance + eps), 1e-10)


@PROPERTY
@given(SEED, st.integers(5, 9), st.integers(2, 5), POSITIVE)
def test_the_ellipsoid_is_an_unbounded_cylinder_where_sigma_has_no_full_rank(seed, n, samples, far):
    """The paper calls the ellipsoid compact."""
    weight, x = draw(1, n, seed=seed), draw(n, samples, seed=seed + 1)
    along = torch.linalg.svd(center(x)).U[:, -1]
    once, moved = (preactivation_variance(w, covariance(x)) for w in (weight, weight + far * along))
    close(moved, once, 1e-11 * (1 + far**2 / once.item()))


@PROPERTY
@given(SEED, POSITIVE, EPS)
def test_batch_norm_of_two_values_keeps_only_their_order(seed, scale, eps):
    y = scale * draw(6, 2, seed=seed)
    close(batch_norm(y), torch.sign(y - y.flip(1)))
    close(pair_standardize(y, 0.0), torch.sign(y - y.flip(1)))
    close(pair_standardize(y, eps), batch_norm(y, eps=eps), 1e-11)
    image = F.batch_norm(draw(2, 1, 3, 3), None, None, training=True)
    assert (image.abs() - 1).abs().max() > 0.1, "two images have more values"


@PROPERTY
@given(SEED, st.floats(1e-3, 10), EPS)
def test_the_gradient_through_two_values_vanishes_like_eps_over_the_cubed_distance(seed, scale, eps):
    y, upstream = (scale * draw(6, 2, seed=seed)).requires_grad_(), draw(6, 2, seed=seed + 1)
    (gradient,) = torch.autograd.grad(batch_norm(y, eps=eps), y, upstream)
    y = y.detach()
    value, deviation = pair_gradient(y, upstream, eps), (y.var(1, correction=0) + eps).sqrt()
    size = upstream.abs().amax(1) / deviation * (1 + y.abs().amax(1) / deviation)
    for other in (gradient, standardize_gradient(y, upstream, eps)):  # which subtracts nearly equal numbers
        assert ((value - other).abs().amax(1) <= 1e-14 * size).all()
    exact = [ref.standardize_gradient(*pair, eps) for pair in zip(y.tolist(), upstream.tolist(), strict=True)]
    torch.testing.assert_close(value, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    far = pair_gradient(torch.tensor([1e4, -1e4]).double(), upstream[0], eps)
    close(far[0], (upstream[0, 0] - upstream[0, 1]) / 2 * eps / 1e12, 1e-8)


@PROPERTY
@given(SEED, SIZE, EPS)
def test_batch_norm_commutes_with_permutations_of_the_batch(seed, samples, eps):
    y, order = draw(3, samples, seed=seed), torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    close(batch_norm(y[:, order], eps=eps), batch_norm(y, eps=eps)[:, order])


@PROPERTY
@given(SEED, SIZE, EPS, POSITIVE)
def test_batch_norm_is_odd_so_weights_are_invariant_to_positive_scales_only(seed, n, eps, alpha):
    weight, x = draw(4, n, seed=seed), draw(n, 7, seed=seed + 1)
    close(batch_norm(-weight @ x, eps=eps), -batch_norm(weight @ x, eps=eps))
    close(batch_norm(alpha * weight @ x), batch_norm(weight @ x), 1e-11)


@PROPERTY
@given(SEED, st.integers(2, 5), st.integers(7, 12))
def test_batch_norm_of_white_data_is_weight_norm_with_a_bias(seed, n, samples):
    """Σ = I ⇒ BN(WX) = WN(W, γ)X + β - γŴX̄. Uncorrelated inputs are not enough: variances must be 1."""
    basis = torch.linalg.qr(torch.cat([torch.ones(1, samples).double(), draw(n, samples, seed=seed)]).T).Q[:, 1:]
    white = math.sqrt(samples) * basis.T + 3 * draw(n, 1, seed=seed + 1)
    weight, (gamma, beta) = draw(4, n, seed=seed + 2), draw(2, 4, seed=seed + 3)
    close(covariance(white), torch.eye(n), 1e-11)
    rows = weight_normalization(weight, gamma)
    shift = beta - rows @ white.mean(1)
    close(batch_norm(weight @ white, gamma, beta), rows @ white + shift[:, None], 1e-10)
    uncorrelated = white * torch.arange(1, n + 1)[:, None]
    apart = batch_norm(weight @ uncorrelated, gamma, beta) - center(rows @ uncorrelated) - beta[:, None]
    assert apart.abs().max() > 1e-2 * gamma.abs().max()


# --- layer normalization ----------------------------------------------------------------------------------------------


@PROPERTY
@given(SEED, st.integers(3, 8), SIZE)
def test_layer_norm_subtracts_the_mean_row_of_the_weight(seed, m, n):
    """LN(Wx) = √m (W - W̄)x / ‖(W - W̄)x‖; columns of W - W̄ sum to 0, and W + e cᵀ gives the same."""
    weight, x, c = draw(m, n, seed=seed), draw(n, 5, seed=seed + 1), draw(n, seed=seed + 2)
    centered = subtract_mean_row(weight)
    assert centered.sum(0).abs().max() <= 1e-13 * m
    assert centered.sum(1).abs().max() > 1e-3, "rows keep their means"
    inside, normalized = centered @ x, F.layer_norm((weight @ x).T, (m,), eps=1e-60).T
    close(math.sqrt(m) * inside / inside.norm(dim=0), normalized, 1e-10)
    moved = F.layer_norm(((weight + c) @ x).T, (m,), eps=1e-60).T
    close(moved, normalized, 1e-10)
    across = F.layer_norm(((weight + c.new_tensor(range(m))[:, None]) @ x).T, (m,), eps=1e-60).T
    assert (across - normalized).abs().max() > 1e-3, "a constant of its own for every row does change it"


def test_layer_norm_over_channels_subtracts_the_mean_filter_but_over_images_does_not():
    x, weight, c = draw(3, 2, 5, 5), draw(4, 2, 3, 3, seed=1), draw(2, 3, 3, seed=2)
    close(subtract_mean_row(weight).sum(0) + 1, torch.ones(2, 3, 3))
    y, moved = F.conv2d(x, weight), F.conv2d(x, weight + c)
    close(F.layer_norm(moved.movedim(1, -1), (4,)), F.layer_norm(y.movedim(1, -1), (4,)), 1e-10)
    assert (F.layer_norm(moved, (4, 3, 3)) - F.layer_norm(y, (4, 3, 3))).abs().max() > 0.1
