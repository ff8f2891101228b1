"""Gradients of scale-invariant weights: orthogonality, growth, decay, and exactly what ε adds. On torch's layers."""

import functools
import itertools
from functools import partial

import pytest
import reference as ref
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import (
    ExponentialSchedule,
    SGDRule,
    as_rows,
    balanced_norm,
    batch_instances,
    batch_norm_epsilon_inner,
    centered_weight_normalization,
    cosine,
    epsilon_inner,
    group_instances,
    measured_increment,
    norm_increment,
    patch_columns,
    preactivation_epsilon_inner,
    predicted_increment,
    spectral_normalization,
    standardize,
    standardize_gradient,
    update_products,
    weight_gradient_cosine,
    weight_normalization,
    weight_standardization,
    weight_standardization_epsilon_inner,
)
from lightning_normgeo.normalization.weights import CenteredWeightNormalization, WeightStandardization

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
SEED, SCALE, EPS = st.integers(0, 10**6), st.floats(0.01, 2), st.sampled_from([1e-5, 1e-3, 0.1])
TINY = 1e-60


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def readout(y, seed=9):
    return ((y + 0.3).tanh() * draw(*y.shape, seed=seed)).sum()


# --- what ε adds ------------------------------------------------------------------------------------------------------

IMAGE, FEATURES, TOKENS = (3, 4, 5, 5), (6, 4), (2, 3, 4)
# input, layer of eight channels behind the weight, units, instances of a unit, whether a bias belongs to the unit
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
    """One backward pass through a weight, its bias and a real normalization layer with a random affine."""

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
        """⟨W, g⟩ of each unit, and what rounding may be off."""
        parts = [(self.weight, self.by_weight), *([(self.bias, self.by_bias)] if with_bias else [])]
        pairs = [(as_rows(value, units), as_rows(gradient, units)) for value, gradient in parts]
        size = sum(value.norm(dim=1) * gradient.norm(dim=1) for value, gradient in pairs)
        return sum((value * gradient).sum(1) for value, gradient in pairs), 1e-12 * size


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@PROPERTY
@given(SEED, SCALE, EPS)
def test_epsilon_causes_the_inner_product_of_weight_and_gradient_of_every_normalization(kind, seed, scale, eps):
    """Jointly over the unit, with the bias where it does not cancel; where it does, its gradient is 0."""
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
    """Nor with each channel's own share of the sum."""
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
    """A single application to the sum does not do."""
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
    """And the sums over rows stay 0; the library's parametrization is what is measured."""
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
@given(SEED, st.floats(1e-6, 10), st.sampled_from([0, 1]))
def test_centered_weights_are_exactly_orthogonal_to_gradient_and_ones(seed, scale, dim):
    for layer in (CenteredWeightNormalization(dim), WeightStandardization(dim, eps=0.0)):
        v = (scale * draw(3, 4, 2, seed=seed)).requires_grad_()
        (gradient,) = torch.autograd.grad(readout(layer(v)), v)
        rows, by_rows = as_rows(v, v.shape[dim], dim), as_rows(gradient, v.shape[dim], dim)
        assert weight_gradient_cosine(rows, by_rows).abs().max() <= 1e-13
        assert weight_gradient_cosine(torch.ones_like(rows), by_rows).abs().max() <= 1e-13


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


# --- ε = 0: orthogonality, growth, decay ------------------------------------------------------------------------------


def conv(x, weight):
    return F.conv2d(x, weight)


@functools.cache
def frozen_spectral_norm():
    """Torch's own with the singular vectors of another matrix: as far from converged as can be."""
    torch.manual_seed(0)
    return parametrizations._SpectralNorm(draw(8, 4, seed=77)).eval()


# loss from (x, W), input, number of units, and a finer number for which nothing holds
INVARIANT = {
    "bn": (lambda x, w: F.batch_norm(conv(x, w), None, None, training=True, eps=TINY), IMAGE, 8, None),
    "bn-relu": (lambda x, w: F.batch_norm(conv(x, w).relu(), None, None, training=True, eps=TINY), IMAGE, 8, None),
    "in": (lambda x, w: F.instance_norm(conv(x, w), eps=TINY), IMAGE, 8, None),
    "gn": (lambda x, w: F.group_norm(conv(x, w), 4, eps=TINY), IMAGE, 4, 8),
    "ln-image": (lambda x, w: F.layer_norm(conv(x, w), (8, 3, 3), eps=TINY), IMAGE, 1, 8),
    "ln-features": (lambda x, w: F.layer_norm(F.linear(x, w), (8,), eps=TINY), FEATURES, 1, 8),
    "wn": (lambda x, w: F.linear(x, weight_normalization(w, 1.3), draw(8)), FEATURES, 8, None),
    "cwn": (lambda x, w: F.linear(x, centered_weight_normalization(w)), FEATURES, 8, None),
    "ws": (lambda x, w: F.linear(x, weight_standardization(w)), FEATURES, 8, None),
    "sn": (lambda x, w: F.linear(x, spectral_normalization(w)), FEATURES, 1, 8),
    "sn-torch": (lambda x, w: F.linear(x, frozen_spectral_norm()(w)), FEATURES, 1, 8),
}
KINDS = pytest.mark.parametrize("kind", INVARIANT)


def start(kind, seed, scale=1.0):
    shape = (8, 4, 3, 3) if INVARIANT[kind][1] == IMAGE else (8, 4)
    return (scale * draw(*shape, seed=seed)).requires_grad_()


def loss_of(kind, weight, seed=0):
    apply, shape, *_ = INVARIANT[kind]
    return readout(apply(draw(*shape, seed=seed), weight), seed)


def gradient_of(kind, weight, seed=0):
    return torch.autograd.grad(loss_of(kind, weight, seed), weight)[0]


@KINDS
@PROPERTY
@given(SEED, SCALE)
def test_scale_invariant_units_are_orthogonal_to_their_gradients_and_no_finer_ones(kind, seed, scale):
    weight, (units, finer) = start(kind, seed, scale), INVARIANT[kind][2:]
    gradient = gradient_of(kind, weight, seed)
    assume(gradient.abs().max() > 1e-9)  # not where the readout saturates
    assert weight_gradient_cosine(as_rows(weight, units), as_rows(gradient, units)).abs().max() <= 1e-12
    if finer:
        assert weight_gradient_cosine(as_rows(weight, finer), as_rows(gradient, finer)).abs().max() > 1e-2


def test_what_is_invariant_to_shifts_has_gradients_that_sum_to_zero():
    """Centered rows: over each row. LN over channels: over all rows. Not LN over images."""
    for kind, dim in (("cwn", 1), ("ws", 1), ("ln-features", 0)):
        gradient = gradient_of(kind, start(kind, 1))
        assert gradient.sum(dim).abs().max() <= 1e-12 * gradient.abs().sum()
        assert gradient.sum(1 - dim).abs().max() > 1e-3 * gradient.abs().max()
    gradient = gradient_of("ln-image", start("ln-image", 1))
    assert gradient.sum(0).abs().max() > 1e-2 * gradient.abs().max()


@KINDS
@PROPERTY
@given(SEED, st.floats(0.01, 100))
def test_gradients_scale_inversely_with_the_weight(kind, seed, alpha):
    weight = start(kind, seed)
    gradient = gradient_of(kind, weight, seed)
    scaled = gradient_of(kind, (alpha * weight).detach().requires_grad_(), seed)
    assert (alpha * scaled - gradient).norm() <= 1e-11 * gradient.norm()


@pytest.mark.parametrize("kind", ["ln-features", "wn", "sn"])
def test_second_derivatives_scale_with_the_inverse_square_of_the_weight(kind):
    weight, direction = start(kind, 3).detach(), draw(8, 4, seed=4)
    curvature = [
        torch.autograd.functional.vhp(partial(loss_of, kind), alpha * weight, direction)[1] for alpha in (1.0, 5.0)
    ]
    assert (25 * curvature[1] - curvature[0]).norm() <= 1e-11 * curvature[0].norm()


@KINDS
def test_negative_scales_are_not_symmetries(kind):
    """The paper's "for all λ" has to be λ > 0: these maps are odd (with ReLU, not even that).

    Torch's spectral normalization is even while its singular vectors u, v stand still: W / uᵀWv.
    """
    weight = start(kind, 2)
    loss = loss_of(kind, weight)
    assert (loss_of(kind, 3 * weight) - loss).abs() <= 1e-11
    assert ((loss_of(kind, -weight) - loss).abs() <= 1e-11) == (kind == "sn-torch")


def train(kind, seed, steps, **flags):
    """Take steps of torch's SGD; yield W, g and W⁺ of each with one unit per row."""
    units, weight = INVARIANT[kind][2], start(kind, seed)
    optimizer = torch.optim.SGD([weight], **flags)
    for step in range(steps):
        weight.grad = gradient_of(kind, weight, seed + step)
        before, gradient = weight.detach().clone(), weight.grad
        optimizer.step()
        yield tuple(as_rows(value, units) for value in (before, gradient, weight.clone()))


@KINDS
@PROPERTY
@given(SEED, st.floats(0.001, 0.5))
def test_plain_sgd_adds_the_squared_length_of_the_step_to_the_squared_norm(kind, seed, lr):
    """Per unit and step, and cumulated: ‖W_T‖² - ‖W₀‖² = Σ η²‖g‖²."""
    total, path = 0.0, list(train(kind, seed, 4, lr=lr))
    for before, gradient, after in path:
        squared = gradient.square().sum(1)
        products = update_products(before, after)
        increment = measured_increment(products.weight_update, products.update_sq)
        predicted = predicted_increment(lr, squared)
        assert ((increment - predicted).abs() <= 1e-12 * predicted + 1e-15 * products.weight_sq).all()
        total = total + predicted
    grown = path[-1][2].square().sum(1) - path[0][0].square().sum(1)
    assert ((grown - total).abs() <= 1e-12 * (total + path[-1][2].square().sum(1))).all()


@KINDS
def test_norms_never_shrink_without_weight_decay_whatever_the_momentum(kind):
    for momentum in (0.0, 0.5, 0.9):
        for before, _, after in train(kind, 1, 8, lr=0.05, momentum=momentum):
            assert (after.norm(dim=1) >= before.norm(dim=1) * (1 - 1e-14)).all()


@KINDS
@PROPERTY
@given(SEED, st.floats(0.01, 0.5), st.floats(0.01, 1))
def test_weight_decay_shrinks_what_is_longer_than_the_balance_and_keeps_the_symmetry(kind, seed, lr, decay):
    """Δ = ((1-ηλ)² - 1)‖W‖² + η²‖g‖² < 0 just where ‖W‖⁴ > ηG²/(λ(2-ηλ)), with G = ‖g‖‖W‖."""
    ((before, gradient, after),) = train(kind, seed, 1, lr=lr, weight_decay=decay)
    norm, by_norm = before.norm(dim=1), gradient.norm(dim=1)
    assume(by_norm.min() > 0)
    increment = measured_increment(*update_products(before, after)[1:3])
    expected = ((1 - lr * decay) ** 2 - 1) * norm**2 + lr**2 * by_norm**2
    assert ((increment - expected).abs() <= 1e-12 * (norm**2 + lr**2 * by_norm**2)).all()
    terms = norm_increment(SGDRule(lr, weight_decay=decay), before, gradient)
    assert ((terms.total - expected).abs() <= 1e-12 * (norm**2 + lr**2 * by_norm**2)).all()
    assert (cosine((before * gradient).sum(1), norm**2, by_norm**2).abs() <= 1e-12).all()
    balance = balanced_norm(lr, decay, by_norm * norm)
    assume(((norm / balance - 1).abs() > 1e-9).all())
    assert ((increment < 0) == (norm > balance)).all()


@pytest.mark.parametrize(("lr", "decay", "gradient"), [(0.1, 5e-4, 3.0), (1.0, 0.5, 0.1), (1.5, 1.0, 20.0)])
def test_the_balanced_norm_equals_its_twin(lr, decay, gradient):
    assert balanced_norm(lr, decay, gradient) == pytest.approx(ref.balanced_norm(lr, decay, gradient), rel=1e-12)


# --- the schedule equivalent to weight decay --------------------------------------------------------------------------


def follow(seed, steps, rates, momentum, decay, buffer=None):
    """Train a toy of which only the direction counts, from a point and a momentum buffer; return its path."""
    weight = draw(6, seed=seed).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=decay)
    if momentum and buffer is not None:
        optimizer.state[weight]["momentum_buffer"] = buffer(weight.detach())
    path = [weight.detach().clone()]
    for step in range(steps):
        weight.grad = torch.autograd.grad(readout(draw(5, 6, seed=seed + step) @ F.normalize(weight, dim=0)), weight)[0]
        optimizer.param_groups[0]["lr"] = rates(step)
        optimizer.step()
        path.append(weight.detach().clone())
    return path


@PROPERTY
@given(SEED, st.floats(0.01, 0.1), st.sampled_from([0.0, 0.3, 0.9]), st.floats(0, 1))
def test_weight_decay_is_an_exponentially_growing_learning_rate(seed, lr, momentum, share):
    """θ_k = α^k θ̃_k at every step, up to and including the double root of the momentum's equation."""
    limit = min((1 - momentum**0.5) ** 2, 0.1)
    schedule = ExponentialSchedule(lr, share * limit / lr * (1 - 1e-14), momentum)
    decayed = follow(seed, 20, lambda _: lr, momentum, schedule.weight_decay)
    grown = follow(seed, 20, schedule.lr_at, momentum, 0.0, schedule.initial_buffer)
    for step, (theta, other) in enumerate(zip(decayed, grown, strict=True)):
        assert (schedule.scale_at(step) * theta - other).norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("wrong", ["constant", "shifted", "once", "no buffer"])
def test_no_other_schedule_is_equivalent(momentum, wrong):
    if wrong == "no buffer" and not momentum:
        return
    schedule = ExponentialSchedule(0.1, 0.01, momentum)
    rates = {
        "constant": lambda _: 0.1,
        "shifted": lambda step: 0.1 * schedule.scale_at(2 * step),
        "once": lambda step: 0.1 * schedule.scale_at(step),
        "no buffer": schedule.lr_at,
    }[wrong]
    buffer = None if wrong == "no buffer" else schedule.initial_buffer
    theta, other = follow(1, 20, lambda _: 0.1, momentum, 0.01)[-1], follow(1, 20, rates, momentum, 0.0, buffer)[-1]
    assert (F.normalize(theta, dim=0) - F.normalize(other, dim=0)).norm() > 1e-6


def test_the_schedule_is_a_heavy_ball_of_momentum_mu_over_alpha_squared():
    schedule = ExponentialSchedule(0.1, 0.02, 0.9)
    path = follow(2, 10, schedule.lr_at, 0.9, 0.0, schedule.initial_buffer)
    path = [schedule.root * path[0], *path]
    for step, (last, here, after) in enumerate(zip(path, path[1:], path[2:], strict=False)):
        leaf = here.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(readout(draw(5, 6, seed=2 + step) @ F.normalize(leaf, dim=0)), leaf)
        moved = here + 0.9 / schedule.root**2 * (here - last) - schedule.lr_at(step) * gradient
        torch.testing.assert_close(after, moved, rtol=1e-12, atol=1e-14)


@PROPERTY
@given(st.floats(1e-4, 1), st.floats(-14, 0), st.floats(0, 0.99))
def test_the_root_equals_its_exact_twin_for_the_smallest_decay_too(lr, exponent, momentum):
    """Also α^-k for large k, where the rounding of 1 - λη would be multiplied by k."""
    decay = 10**exponent * (1 - momentum**0.5) ** 2 / lr * 0.999
    schedule, root = ExponentialSchedule(lr, decay, momentum), ref.schedule_root(lr, decay, momentum)
    assert schedule.shrink == pytest.approx(float(1 - root), rel=1e-11, abs=0)
    step = int(20 / schedule.shrink)
    if schedule.root > 0.01:
        assert schedule.scale_at(step) == pytest.approx(float(root**-step), rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("lr", "decay", "momentum", "message"),
    [
        (1.0, 0.01, 0.9, "lr=1.0 times weight_decay=0.01 is 0.01: with momentum=0.9 .* below 0.00263"),
        (1.0, 0.01, 0.9, "Choose weight_decay < 0.00263.*, or momentum < 0.81"),
        (0.5, 2.0, 0.0, "Choose weight_decay < 2.$"),  # α = 0
        (1.0, 5.0, 0.5, "an equivalent exponential schedule exists below 0.0857"),  # real roots, but negative
        (0.0, 0.1, 0.0, "choose lr > 0"),
        (0.1, -0.1, 0.0, "weight_decay >= 0"),
        (0.1, 0.1, 1.0, "momentum < 1"),
        (float("nan"), 0.1, 0.0, "lr=nan"),
    ],
)
def test_settings_without_an_equivalent_schedule_are_refused_with_values_and_remedy(lr, decay, momentum, message):
    with pytest.raises(ConfigurationError, match=message):
        ExponentialSchedule(lr, decay, momentum)


def test_a_remedy_that_is_named_works():
    assert ExponentialSchedule(1.0, 0.01, 0.81).root == pytest.approx(0.9, abs=1e-6)
    assert ExponentialSchedule(0.1, 0.0, 0.9).lr_at(1000) == 0.1, "without weight decay nothing grows"
