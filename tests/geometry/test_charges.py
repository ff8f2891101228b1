"""Charges, conserved quantities and imbalances of generators, from sums over slices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.geometry import (
    AdamRule,
    SGDRule,
    charge,
    conserved_quantity,
    imbalance,
    norm_increment,
    normalized_charge,
    quantity_increment,
)
from support import reference as ref
from support.tensors import PROPERTY, SEED, SIZE, close, draw

EXPONENT = st.sampled_from([0.0, 1.0, -1.0, 2.0, -0.5, 3.0])
ROWS = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(EXPONENT, min_size=n, max_size=n), min_size=1, max_size=4))
KINDS = pytest.mark.parametrize("kind", [lambda s: s, lambda s: s.to_sparse()], ids=["dense", "sparse"])


def slices(rows, size, seed):
    exponents = torch.tensor(rows, dtype=torch.float64)
    weight, gradient = draw(2, exponents.shape[1], size, seed=seed)
    return exponents, weight, gradient


@KINDS
@PROPERTY
@given(ROWS, SIZE, SEED)
def test_charges_equal_the_exact_sums(kind, rows, size, seed):
    exponents, weight, gradient = slices(rows, size, seed)
    inner, weight_sq, gradient_sq = (weight * gradient).sum(1), weight.square().sum(1), gradient.square().sum(1)
    exact = [float(ref.weighted(row, ref.floats(inner))) for row in rows]
    close(charge(kind(exponents), inner), exact)
    found = normalized_charge(kind(exponents), inner, weight_sq, gradient_sq)
    assert found.tolist() == pytest.approx(
        [ref.normalized_charge(row, weight.tolist(), gradient.tolist()) for row in rows], abs=1e-13
    )
    assert found.abs().max() <= 1


@KINDS
@PROPERTY
@given(ROWS, SIZE, SEED)
def test_quantities_and_imbalances_equal_the_exact_sums(kind, rows, size, seed):
    exponents, weight, _ = slices(rows, size, seed)
    squares = weight.square().sum(1)
    close(conserved_quantity(kind(exponents), squares), [float(ref.weighted(row, squares.tolist())) for row in rows])
    found = imbalance(kind(exponents), squares)
    close(found, [ref.imbalance(row, squares.tolist()) for row in rows])
    assert found.abs().max() <= 1


@KINDS
@PROPERTY
@given(ROWS, SIZE, SEED, st.sampled_from([SGDRule(lr=0.1, weight_decay=0.05), AdamRule(lr=0.1, betas=(0.9, 0.99))]))
def test_terms_of_slices_add_up_to_the_increment(kind, rows, size, seed, rule):
    exponents, weight, gradient = slices(rows, size, seed)
    terms = norm_increment(rule, weight, gradient)
    if isinstance(rule, SGDRule):
        after = weight - rule.lr * (gradient + rule.weight_decay * weight)
    else:
        after = weight - rule.lr * gradient / (gradient.abs() + rule.eps)  # the first step
    exact = [
        sum(s * ref.increment(w, a) for s, w, a in zip(row, weight.tolist(), after.tolist(), strict=True))
        for row in rows
    ]
    found = quantity_increment(kind(exponents), terms)
    scale = exponents.abs() @ (weight.square().sum(1) + after.square().sum(1))
    assert ((found.total - torch.tensor(exact, dtype=torch.float64)).abs() <= 1e-13 * scale).all()
    assert torch.allclose(found.quadratic, exponents @ terms.quadratic, rtol=1e-13, atol=1e-14)


def test_zeros_have_no_direction():
    zero, exponents = torch.zeros(2), torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert normalized_charge(exponents, zero, zero, zero).tolist() == [0, 0]
    assert imbalance(exponents, zero).tolist() == [0, 0]
    assert imbalance(exponents, torch.tensor([3.0, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_have_the_precision_of_the_sums(dtype):
    sums = torch.ones(2, dtype=dtype)
    for exponents in (torch.ones(1, 2), torch.ones(1, 2, dtype=torch.float64).to_sparse()):
        assert charge(exponents, sums).dtype == imbalance(exponents, sums).dtype == dtype
