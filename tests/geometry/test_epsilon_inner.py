"""The exact part of ⟨W, g⟩ that ε causes for scale-invariant weights, on torch's layers."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    as_rows,
    batch_instances,
    batch_norm_epsilon_inner,
    epsilon_inner,
    group_instances,
    patch_columns,
    preactivation_epsilon_inner,
    standardize,
    standardize_gradient,
    weight_standardization_epsilon_inner,
)
from lightning_normgeo.normalization.parametrizations import WeightStandardization
from support import reference as ref
from support.tensors import draw, readout

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
SEED, SCALE, EPS = st.integers(0, 10**6), st.floats(0.01, 2), st.sampled_from([1e-5, 1e-3, 0.1])
IMAGE, FEATURES, TOKENS = (3, 4, 5, 5), (6, 4), (2, 3, 4)
# input, layer of eight channels behind the weight, units, instances per unit, whether a bias is part of the unit
NORMALIZATIONS = {
    "bn-image": (IMAGE, lambda eps: nn.BatchNorm2d(8, eps), 8, batch_instances, False),
    "bn-features": (FEATURES, lambda eps: nn.BatchNorm1d(8, eps), 8, batch_instances, False),
    "in": (IMAGE, lambda eps: nn.InstanceNorm2d(8, eps, affine=True), 8, partial(group_instances, groups=8), False),
    "gn": (IMAGE, lambda eps: nn.GroupNorm(4, 8, eps), 4, partial(group_instances, groups=4), True),
    "gn-1": (IMAGE, lambda eps: nn.GroupNorm(1, 8, eps), 1, partial(group_instances, groups=1), True),
    "ln-image": (IMAGE, lambda eps: nn.LayerNorm([8, 3, 3], eps), 1, partial(group_instances, groups=1), True),
    "ln-features": (FEATURES, lambda eps: nn.LayerNorm(8, eps), 1, partial(group_instances, groups=1), True),
    "ln-tokens": (TOKENS, lambda eps: nn.LayerNorm(8, eps), 1, lambda y: group_instances(y.flatten(0, -2), 1), True),
}


class Measured:
    """One backward pass through a weight, its bias and a real normalization layer with a random affine map."""

    def __init__(self, kind, eps, scale, seed):
        shape, make, self.units, self.instances, _ = NORMALIZATIONS[kind]
        apply = F.conv2d if shape == IMAGE else F.linear
        self.weight = (scale * draw(8, 4, *([3, 3] if shape == IMAGE else []), seed=seed)).requires_grad_()
        self.bias = (scale * draw(8, seed=seed + 1)).requires_grad_()
        self.layer = make(eps).double()
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed + parameter.ndim))
        self.x = draw(*shape, seed=seed + 2)
        y = apply(self.x, self.weight, self.bias)
        output = self.layer(y)
        self.loss = readout(output)
        by_output, self.by_y, self.by_gamma, self.by_weight, self.by_bias = torch.autograd.grad(
            self.loss, (output, y, self.layer.weight, self.weight, self.bias)
        )
        along = [1, -1, 1, 1] if shape == IMAGE and self.layer.weight.ndim == 1 else list(self.layer.weight.shape)
        self.gamma, self.beta = self.layer.weight.detach().reshape(along), self.layer.bias.detach().reshape(along)
        self.y, self.rows = y.detach(), self.instances(y.detach())
        self.variance = self.rows.var(-1, correction=0)
        self.normalized = self.instances(((output - self.beta) / self.gamma).detach())
        self.upstream = self.instances(by_output * self.gamma)

    def inner(self, units, with_bias):
        """Return ⟨W, g⟩ of each unit, and a bound on its rounding error."""
        parts = [(self.weight, self.by_weight), *([(self.bias, self.by_bias)] if with_bias else [])]
        pairs = [(as_rows(value, units), as_rows(gradient, units)) for value, gradient in parts]
        size = sum(value.norm(dim=1) * gradient.norm(dim=1) for value, gradient in pairs)
        return sum((value * gradient).sum(1) for value, gradient in pairs), 1e-12 * size


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@PROPERTY
@given(SEED, SCALE, EPS)
def test_epsilon_causes_the_inner_product_of_weight_and_gradient_of_every_normalization(kind, seed, scale, eps):
    """Jointly over the unit, including the bias unless it cancels; if it cancels, its gradient is 0."""
    measured, joint = Measured(kind, eps, scale, seed), NORMALIZATIONS[kind][-1]
    torch.testing.assert_close(measured.normalized, standardize(measured.rows, eps), rtol=1e-8, atol=1e-10)
    normalized = standardize(measured.rows, eps)
    value = epsilon_inner(measured.upstream, normalized, measured.variance, eps)
    inner, tolerance = measured.inner(measured.units, with_bias=joint)
    assert ((inner - value).abs() <= tolerance).all()
    size = epsilon_inner(measured.upstream.abs(), normalized.abs(), measured.variance, eps)
    assert (size > 100 * tolerance).all(), "the terms of the sum are seen"
    by_bias = as_rows(measured.by_bias, measured.units).sum(1)
    assert by_bias.abs().max() <= 1e-12 * measured.by_y.abs().sum()


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@PROPERTY
@given(SEED, SCALE, EPS)
def test_the_inner_product_is_minus_two_epsilon_times_the_derivative_by_epsilon(kind, seed, scale, eps):
    measured = Measured(kind, eps, scale, seed)
    free = torch.full((measured.units, 1, 1), eps, dtype=torch.float64, requires_grad=True)
    centered = measured.rows - measured.rows.mean(-1, keepdim=True)
    normalized = centered / (measured.variance[..., None] + free).sqrt()
    (by_eps,) = torch.autograd.grad(normalized, free, measured.upstream)
    value = epsilon_inner(measured.upstream, normalized.detach(), measured.variance, eps)
    size = (measured.upstream * normalized.detach()).abs().sum((1, 2))
    assert ((value + 2 * eps * by_eps.flatten()).abs() <= 1e-13 * size).all()


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_pre_activations_and_their_gradients_obey_the_identity_of_santurkar(kind):
    """⟨∂L/∂y, 1⟩ = 0 always and ⟨∂L/∂y, ŷ⟩ = ε/(σ²+ε)^1.5 ⟨∂L/∂ŷ, ŷ⟩, for each instance; the closed gradient agrees."""
    for seed, eps in itertools.product(range(3), (1e-5, 1e-3, 0.1)):
        measured = Measured(kind, eps, 0.3, seed)
        gradient, normalized = measured.instances(measured.by_y), standardize(measured.rows, eps)
        size = measured.upstream.norm(dim=-1) / (measured.variance + eps).sqrt()
        assert (gradient.sum(-1).abs() <= 1e-13 * size * gradient.shape[-1]).all()
        value = preactivation_epsilon_inner(measured.upstream, normalized, measured.variance, eps)
        assert (((gradient * normalized).sum(-1) - value).abs() <= 1e-13 * size * gradient.shape[-1]).all()
        closed = standardize_gradient(measured.rows, measured.upstream, eps)
        assert ((closed - gradient).norm(dim=-1) <= 1e-12 * size).all()


@pytest.mark.parametrize("kind", ["bn-image", "bn-features"])
def test_the_gradient_of_the_weight_is_that_of_the_pre_activations_times_the_data(kind):
    """∂L/∂w = (∂L/∂y)Xᵀ, for images with the patches as X: the direct computation of appendix 5.5."""
    measured = Measured(kind, 1e-3, 0.3, 4)
    by_y = standardize_gradient(measured.rows, measured.upstream, 1e-3).squeeze(1)
    data = patch_columns(measured.x, (3, 3)) if kind == "bn-image" else measured.x.T
    torch.testing.assert_close(by_y @ data.T, measured.by_weight.flatten(1), rtol=1e-10, atol=1e-11)


def test_gamma_and_its_gradient_give_the_same_for_batch_norm():
    measured = Measured("bn-image", 0.1, 0.3, 5)
    by_gamma = batch_norm_epsilon_inner(measured.gamma.flatten(), measured.by_gamma, measured.variance[:, 0], 0.1)
    value = epsilon_inner(measured.upstream, measured.normalized, measured.variance, 0.1)
    torch.testing.assert_close(by_gamma, value, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("kind", "with_bias", "finer"), [("gn", True, 8), ("ln-tokens", True, 8), ("gn", False, 4)])
def test_the_identity_holds_for_no_finer_unit_and_not_without_the_bias(kind, with_bias, finer):
    """Nor does it hold with each channel's own share of the sum."""
    measured = Measured(kind, 0.1, 0.3, 1)
    shares = (0.1 / (measured.variance + 0.1))[..., None] * measured.upstream * measured.normalized
    channels = shares.unflatten(-1, (finer // measured.units, -1)).sum((1, 3)).flatten()
    inner, tolerance = measured.inner(finer, with_bias)
    assert (inner - channels).abs().max() > 1e9 * tolerance.max()


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_the_identity_needs_the_biased_variance(kind):
    measured, joint = Measured(kind, 0.1, 0.3, 2), NORMALIZATIONS[kind][-1]
    inner, tolerance = measured.inner(measured.units, joint)
    unbiased = epsilon_inner(measured.upstream, measured.normalized, measured.rows.var(-1), 0.1)
    assert (inner - unbiased).abs().max() > 1e6 * tolerance.max()


def test_under_gradient_accumulation_the_terms_of_the_batches_add_up():
    """The formula has to be applied to each batch; applied to the sum over batches it is wrong."""
    weight, batches = draw(3, 4, seed=1), [draw(5, 4, seed=seed) * (seed - 1) for seed in (2, 3)]
    total, terms, sides = 0, [], []
    for x in batches:
        leaf = weight.clone().requires_grad_()
        y = F.linear(x, leaf)
        output = F.batch_norm(y, None, None, training=True, eps=0.1)
        upstream, gradient = torch.autograd.grad(readout(output), (output, leaf))
        sides.append([batch_instances(value.detach()) for value in (upstream, output, y)])
        terms.append(epsilon_inner(*sides[-1][:2], sides[-1][2].var(-1, correction=0), 0.1))
        total = total + gradient
    torch.testing.assert_close((weight * total).sum(1), sum(terms), rtol=1e-11, atol=1e-13)
    upstream, output, y = (torch.cat(parts, -1) for parts in zip(*sides, strict=True))
    at_once = epsilon_inner(upstream, output, y.var(-1, correction=0), 0.1)
    assert not torch.allclose(at_once, sum(terms), rtol=1e-2)


@PROPERTY
@given(SEED, SCALE)
def test_rms_normalization_obeys_it_with_mean_squares(seed, scale):
    weight, bias = (scale * draw(8, 4, seed=seed)).requires_grad_(), (scale * draw(8, seed=seed + 1)).requires_grad_()
    y = F.linear(draw(6, 4, seed=seed + 2), weight, bias)
    output = F.rms_norm(y, (8,), eps=0.1)
    upstream, *gradients = torch.autograd.grad(readout(output), (output, weight, bias))
    value = epsilon_inner(upstream[None], output.detach()[None], y.detach().square().mean(-1)[None], 0.1)
    inner = sum((p.detach() * g).sum() for p, g in zip((weight, bias), gradients, strict=True))
    torch.testing.assert_close(inner, value[0], rtol=1e-9, atol=1e-12)


@PROPERTY
@given(SEED, SCALE, st.floats(1e-5, 0.1), st.booleans(), st.sampled_from([0, 1]))
def test_epsilon_causes_the_inner_product_of_weight_standardization(seed, scale, eps, unbiased, dim):
    """The sums over rows stay 0; the test measures the library's own parametrization."""
    v, layer = (scale * draw(3, 4, 2, seed=seed)).requires_grad_(), WeightStandardization(dim, unbiased, eps)
    weight = layer(v)
    upstream, gradient = torch.autograd.grad(readout(weight), (weight, v))
    units = v.shape[dim]
    rows, by_rows, normalized, upstream = (as_rows(value, units, dim) for value in (v, gradient, weight, upstream))
    value = weight_standardization_epsilon_inner(upstream, normalized, rows.std(1, correction=int(unbiased)), eps)
    tolerance = 1e-12 * rows.norm(dim=1) * by_rows.norm(dim=1)
    assert (((rows * by_rows).sum(1) - value).abs() <= tolerance).all()
    assert (value.abs() > 100 * tolerance).all()
    assert by_rows.sum(1).abs().max() <= 1e-12 * by_rows.abs().sum()


@PROPERTY
@given(st.lists(st.tuples(*[st.floats(-5, 5, allow_subnormal=False)] * 2), min_size=3, max_size=6), EPS)
def test_epsilon_terms_equal_their_exact_twins_in_any_dtype(pairs, eps):
    v, c = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    both, ups, scales = torch.stack([v, c])[None], torch.stack([c, v.square()])[None], torch.tensor([[0.5, 2.0]])
    exact = ref.epsilon_inner(ups[0].tolist(), both[0].tolist(), [0.5, 2.0], eps)
    size = 1e-13 * (1 + (ups * both).abs().sum())
    assert (epsilon_inner(ups, both, scales, eps) - exact).abs() <= size
    by_row = weight_standardization_epsilon_inner(ups[0], both[0], scales[0], eps)
    assert (by_row.sum() - exact).abs() <= size
    shrunk = preactivation_epsilon_inner(ups, both, scales, eps) * (scales.double() + eps).sqrt()
    assert (shrunk.sum() - exact).abs() <= size
    low = epsilon_inner(ups.bfloat16(), both.bfloat16(), scales, eps)
    stored = ref.epsilon_inner(ups[0].bfloat16().tolist(), both[0].bfloat16().tolist(), [0.5, 2.0], eps)
    assert low.dtype == torch.float64
    assert (low - stored).abs() <= size
