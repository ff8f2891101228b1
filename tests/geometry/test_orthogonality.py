"""Lemmas 2 and 3, the exact effect of ε, and the row reductions behind every statistic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    angular_update,
    as_rows,
    batch_norm_epsilon_inner,
    cosine,
    effective_lr,
    input_shares,
    normalized_charge,
    rows,
    standardize,
    standardize_gradient,
    weight_gradient_cosine,
    weight_gradient_products,
    weight_normalization,
)
from support import reference as ref
from support.tensors import draw, readout

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
NUMBER = st.floats(-10, 10, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0)


LAYERS = {
    "linear": (lambda x, w: F.linear(x, w), (12, 5), (4, 5), 0),
    "conv": (lambda x, w: F.conv2d(x, w), (3, 2, 5, 5), (4, 2, 3, 3), 0),
    "grouped-conv": (lambda x, w: F.conv2d(x, w, groups=2), (3, 4, 5, 5), (4, 2, 3, 3), 0),
    "transposed-conv": (lambda x, w: F.conv_transpose2d(x, w), (3, 2, 4, 4), (2, 4, 3, 3), 1),
    "conv-relu": (lambda x, w: F.conv2d(x, w).relu(), (3, 2, 5, 5), (4, 2, 3, 3), 0),
}


def weight_and_gradient(kind, normalize, scale=1.0):
    apply, x_shape, w_shape, dim = LAYERS[kind]
    weight = (scale * draw(*w_shape, seed=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(readout(normalize(apply(draw(*x_shape), weight))), weight)
    return as_rows(weight, 4, dim), as_rows(gradient, 4, dim)


def batch_norm(y):
    return F.batch_norm(y, None, None, training=True, eps=1e-60)


def frozen_batch_norm(y):
    return F.batch_norm(y, torch.zeros(4).double(), torch.ones(4).double(), training=False)


@PROPERTY
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=12))
def test_cosine_and_products_equal_their_exact_twins(pairs):
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    a_sq, inner, b_sq = (value.item() for value in weight_gradient_products(a[None], b[None]))
    for value, x, y in ((a_sq, a, a), (inner, a, b), (b_sq, b, b)):
        assert value == pytest.approx(ref.dot(x.tolist(), y.tolist()), rel=1e-12, abs=1e-13 * (a_sq * b_sq) ** 0.5)
    value = weight_gradient_cosine(a[None], b[None]).item()
    assert value == pytest.approx(ref.cosine(a.tolist(), b.tolist()), rel=1e-12, abs=1e-13)
    assert abs(value) <= 1 + 1e-15
    assert weight_gradient_cosine(3 * b[None], -2 * a[None]).item() == pytest.approx(-value, rel=1e-12, abs=1e-13)


def test_cosine_is_zero_where_a_vector_is_zero():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert cosine(zero, zero, one) == cosine(zero, one, zero) == cosine(zero, zero, zero) == 0
    mixed = weight_gradient_cosine(torch.tensor([[0.0, 0], [1, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 0], [-2, 0]]))
    assert mixed.tolist() == [0, 0, -1]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_units_before_batch_norm_are_orthogonal_to_their_gradients(kind, scale):
    assert weight_gradient_cosine(*weight_and_gradient(kind, batch_norm, scale)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("normalize", [frozen_batch_norm, lambda y: y], ids=["frozen statistics", "no norm"])
def test_without_batch_statistics_the_orthogonality_is_lost(kind, normalize):
    assert weight_gradient_cosine(*weight_and_gradient(kind, normalize)).abs().max() > 1e-2


def test_group_norm_is_orthogonal_per_group_but_not_per_row():
    weight, gradient = weight_and_gradient("conv", lambda y: F.group_norm(y, 2, eps=1e-60))
    assert weight_gradient_cosine(as_rows(weight, 2), as_rows(gradient, 2)).abs().max() <= 1e-12
    assert weight_gradient_cosine(weight, gradient).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_epsilon_identity_is_what_autograd_finds(kind, eps, scale):
    """Both are equal: ⟨W, g⟩ = ε/(σ²+ε)·γ·∂L/∂γ = -2ε ∂L/∂ε."""
    apply, x_shape, w_shape, _ = LAYERS[kind]
    weight, gamma, beta = (scale * draw(*w_shape, seed=1)).requires_grad_(), draw(4, seed=2).requires_grad_(), draw(4)
    y = apply(draw(*x_shape), weight)
    by_weight, by_gamma = torch.autograd.grad(
        readout(F.batch_norm(y, None, None, gamma, beta, training=True, eps=eps)), (weight, gamma)
    )
    variance = as_rows(y.movedim(1, 0), 4).var(1, correction=0)
    predicted = batch_norm_epsilon_inner(gamma.detach(), by_gamma, variance, eps)

    norm_sq, inner, gradient_sq = weight_gradient_products(as_rows(weight, 4), as_rows(by_weight, 4))
    tolerance = 1e-13 * norm_sq.sqrt() * gradient_sq.sqrt()
    assert ((inner - predicted).abs() <= tolerance).all()
    assert (predicted.abs() > 100 * tolerance).all()

    free = torch.full((4,), eps, dtype=torch.float64, requires_grad=True)
    shape = [1, -1] + [1] * (y.ndim - 2)
    centered = y.detach() - y.detach().movedim(1, 0).reshape(4, -1).mean(1).reshape(shape)
    by_hand = gamma.detach().reshape(shape) * centered / (variance + free).sqrt().reshape(shape) + beta.reshape(shape)
    (by_eps,) = torch.autograd.grad(readout(by_hand), free)
    torch.testing.assert_close(predicted, -2 * eps * by_eps, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_inputs_lose_nothing_beyond_their_storage(dtype):
    """The statistics are those of the stored values as if in float64; summing in the low precision would be off."""
    weight, gradient = draw(3, 300).to(dtype), draw(3, 300, seed=1).to(dtype)
    values = weight_gradient_cosine(weight, gradient)
    assert values.dtype == torch.float64
    exact = [ref.cosine(*map(ref.floats, pair)) for pair in zip(weight, gradient, strict=True)]
    assert values.tolist() == pytest.approx(exact, rel=1e-12, abs=1e-14)
    assert F.cosine_similarity(weight, gradient).tolist() != pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("units", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("block", [1, 10, 11, 20, 10**6])
def test_blocks_of_rows_change_nothing(units, block, monkeypatch):
    """Covers rows longer than a block, several rows per block, and an incomplete last block."""
    monkeypatch.setattr(rows, "_BLOCK", block)
    weight, gradient = draw(units, 10), draw(units, 10, seed=1)
    sizes = []

    def reduce(a, b):
        sizes.append(len(a))
        return rows.dot(a, b), rows.dot(b, b)

    inner, squared = rows.map_rows(reduce, weight, gradient)
    assert sum(sizes) == units
    assert max(sizes) == min(units, max(1, block // 10))
    exact = [ref.dot(a, b) for a, b in zip(weight.tolist(), gradient.tolist(), strict=True)]
    assert inner.tolist() == pytest.approx(exact, rel=1e-12, abs=1e-14)
    assert squared.tolist() == pytest.approx([ref.dot(b, b) for b in gradient.tolist()], rel=1e-12)


def test_a_row_longer_than_the_real_block():
    a, b = draw(2, rows._BLOCK + 3).float(), draw(2, rows._BLOCK + 3, seed=1).float()
    _, inner, _ = weight_gradient_products(a, b)
    torch.testing.assert_close(inner, (a.double() * b.double()).sum(1), rtol=1e-11, atol=0)


@pytest.mark.parametrize("units", [4, 2, 1], ids=["filters", "groups", "layer"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed-conv"])
def test_units_hold_the_same_elements_in_every_memory_layout(layout, units):
    plain = draw(4, 3, 2, 2)
    weight, dim = {
        "contiguous": (plain, 0),
        "channels_last": (plain.to(memory_format=torch.channels_last), 0),
        "sliced": (torch.stack([plain, -plain], -1)[..., 0], 0),
        "transposed-conv": (plain.transpose(0, 1).contiguous(), 1),
    }[layout]
    matrix = as_rows(weight.requires_grad_(), units, dim)
    assert not matrix.requires_grad
    size = 4 // units
    for unit in range(units):
        channels = [weight.select(dim, size * unit + k).detach() for k in range(size)]
        assert torch.equal(matrix[unit], torch.cat([channel.flatten() for channel in channels]))
    norm_sq, _, _ = weight_gradient_products(matrix, matrix)
    assert norm_sq.tolist() == pytest.approx([ref.dot(row, row) for row in matrix.tolist()], rel=1e-12)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_values_that_are_not_finite_do_not_count_as_zero(special):
    spoiled, other = draw(3, 8, seed=1), draw(3, 8, seed=2)
    spoiled[0, 0] = special
    products = weight_gradient_products(spoiled, other)
    whole = {
        "cosine": weight_gradient_cosine(spoiled, other),
        "angle": angular_update(spoiled, other),
        "standardized": standardize(spoiled).sum(1),
        "its gradient": standardize_gradient(spoiled, other).sum(1),
        "normalized": weight_normalization(spoiled)[:, 0],
        "shares": input_shares(spoiled.abs(), other.abs())[:, 0],
        "rate": effective_lr(0.1, torch.tensor([math.nan, 1.0, 1.0])),
        "charge": normalized_charge(torch.eye(3).double().to_sparse(), *products[1::-1], products[2]),
    }
    for name, values in whole.items():
        assert values.isnan().tolist() == [True, False, False], name


def test_complex_numbers_are_pairs():
    weight, gradient = (torch.complex(draw(3, 8, seed=k), draw(3, 8, seed=k + 9)) for k in (1, 2))
    pairs = [torch.view_as_real(one).flatten(1) for one in (weight, gradient)]
    assert torch.equal(weight_gradient_cosine(weight, gradient), weight_gradient_cosine(*pairs))
    assert torch.equal(angular_update(weight, gradient), angular_update(*pairs))
