"""Angles of updates of several slices together, and their effective learning rate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.geometry import (
    angular_update,
    conserved_quantity,
    joint_effective_lr,
    joint_update_products,
    split_update,
    update_products,
)
from support import reference as ref
from support.tensors import PROPERTY, SEED, SIZE, draw

ROWS = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5, 2.0]), min_size=n, max_size=n), min_size=1, max_size=4)
)
STEP = st.sampled_from([1.0, 1e-3, 1e-6])


@pytest.mark.parametrize("kind", [lambda s: s, lambda s: s.to_sparse()], ids=["dense", "sparse"])
@PROPERTY
@given(ROWS, SIZE, SEED, STEP)
def test_angle_and_parts_are_those_of_the_scaled_concatenation(kind, rows, size, seed, step):
    exponents = torch.tensor(rows, dtype=torch.float64)
    weight, change = draw(2, exponents.shape[1], size, seed=seed)
    new = weight + step * change
    parts = split_update(joint_update_products(kind(exponents), update_products(weight, new)))
    for k, row in enumerate(rows):
        if not any(row):
            assert parts.angle[k] == parts.tangential[k] == 0
            continue
        before, after = ref.joined(row, weight.tolist()), ref.joined(row, new.tolist())
        assert parts.angle[k].item() == pytest.approx(ref.angle(before, after), rel=1e-9, abs=1e-14)
        radial, tangential = ref.split(before, after)
        assert parts.radial[k].item() == pytest.approx(radial, rel=1e-9, abs=1e-14)
        assert parts.tangential[k].item() == pytest.approx(tangential, rel=1e-9)


@PROPERTY
@given(ROWS, SIZE, SEED)
def test_joint_parts_explain_the_increment_of_the_quantity(rows, size, seed):
    exponents = torch.tensor(rows, dtype=torch.float64)
    weight, new = draw(2, exponents.shape[1], size, seed=seed)
    parts = split_update(joint_update_products(exponents, update_products(weight, new)))
    before, after = (conserved_quantity(exponents, w.square().sum(1)) for w in (weight, new))
    assert torch.allclose(before * (1 + parts.radial) ** 2 + parts.tangential**2, after, rtol=1e-11)


def test_exponents_of_one_give_the_plain_angle_at_any_scale():
    weight, new = draw(2, 3, 7)
    whole = angular_update(weight.flatten()[None], new.flatten()[None])
    for scale in (1.0, 1e-3, 20.0):
        found = split_update(joint_update_products(torch.ones(1, 3), update_products(scale * weight, scale * new)))
        assert torch.allclose(found.angle, whole, rtol=1e-12, atol=0)


def test_a_rescaling_has_no_joint_direction():
    products = joint_update_products(torch.tensor([[1.0, -1.0], [1.0, 0.0]]), update_products(*draw(2, 2, 5)))
    assert products.weight_sq.isnan().tolist() == [True, False]


def test_effective_lr_is_lr_over_the_quantity():
    exponents, squares = torch.tensor([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0]]), torch.tensor([2.0, 3.0])
    assert joint_effective_lr(exponents, 0.4, squares).tolist() == pytest.approx([0.05, 0, 0])
