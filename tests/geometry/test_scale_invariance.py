"""Gradients of scale-invariant weights for ε = 0: orthogonality, growth and decay, on torch's layers."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_normgeo.geometry import (
    SGDRule,
    as_rows,
    balanced_norm,
    centered_weight_normalization,
    cosine,
    measured_increment,
    norm_increment,
    predicted_increment,
    spectral_normalization,
    update_products,
    weight_gradient_cosine,
    weight_normalization,
    weight_standardization,
)
from lightning_normgeo.normalization.parametrizations import CenteredWeightNormalization, WeightStandardization
from support.tensors import draw, readout

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
SEED, SCALE = st.integers(0, 10**6), st.floats(0.01, 2)
TINY = 1e-60
IMAGE, FEATURES = (3, 4, 5, 5), (6, 4)


def conv(x, weight):
    return F.conv2d(x, weight)


@functools.cache
def frozen_spectral_norm():
    """Return torch's spectral norm with the singular vectors of another matrix, as far from converged as possible."""
    torch.manual_seed(0)
    return parametrizations._SpectralNorm(draw(8, 4, seed=77)).eval()


# loss from (x, W), input, number of units, and a finer number for which the identity fails
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
    assume(gradient.abs().max() > 1e-9)  # fails where the readout saturates
    assert weight_gradient_cosine(as_rows(weight, units), as_rows(gradient, units)).abs().max() <= 1e-12
    if finer:
        assert weight_gradient_cosine(as_rows(weight, finer), as_rows(gradient, finer)).abs().max() > 1e-2


@PROPERTY
@given(SEED, st.floats(1e-6, 10), st.sampled_from([0, 1]))
def test_centered_weights_are_exactly_orthogonal_to_gradient_and_ones(seed, scale, dim):
    for layer in (CenteredWeightNormalization(dim), WeightStandardization(dim, eps=0.0)):
        v = (scale * draw(3, 4, 2, seed=seed)).requires_grad_()
        (gradient,) = torch.autograd.grad(readout(layer(v)), v)
        rows, by_rows = as_rows(v, v.shape[dim], dim), as_rows(gradient, v.shape[dim], dim)
        assert weight_gradient_cosine(rows, by_rows).abs().max() <= 1e-13
        assert weight_gradient_cosine(torch.ones_like(rows), by_rows).abs().max() <= 1e-13


def test_what_is_invariant_to_shifts_has_gradients_that_sum_to_zero():
    """Centered rows: over each row. LN over channels: over all rows. Not so for LN over images."""
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
    """Take steps of torch's SGD; yield W, g and W⁺ of each step, with one unit per row."""
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
    """Per unit and step, and summed over steps: ‖W_T‖² - ‖W₀‖² = Σ η²‖g‖²."""
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
    """Δ = ((1-ηλ)² - 1)‖W‖² + η²‖g‖² < 0 exactly if ‖W‖⁴ > ηG²/(λ(2-ηλ)), with G = ‖g‖‖W‖."""
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
