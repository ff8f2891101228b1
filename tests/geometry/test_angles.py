"""Angles and parts of an update, down to angles that acos cannot resolve."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    angular_update,
    effective_lr,
    split_update,
    update_products,
)
from support import reference as ref
from support.tensors import draw

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
NUMBER = st.floats(-10, 10, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-3 else 0.0)


def turned(theta, radial=0.0, n=50):
    """Return a weight, and the same rotated by about ``theta`` and scaled by 1 + ``radial``."""
    weight, other = draw(1, n), draw(1, n, seed=1)
    across = other - (other @ weight.T) / (weight @ weight.T) * weight
    across *= weight.norm() / across.norm()
    return weight, (1 + radial) * (math.cos(theta) * weight + math.sin(theta) * across)


@pytest.mark.parametrize(
    "theta", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 1.0, math.pi / 2, 3.0, math.pi - 1e-6], ids="{:.7g}".format
)
def test_angle_equals_kahans_on_the_stored_weights(theta):
    weight, new = turned(theta)
    exact = ref.angle(ref.floats(weight), ref.floats(new))
    assert exact == pytest.approx(theta, rel=1e-6)
    assert angular_update(weight, new).item() == pytest.approx(exact, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("theta", "dtype"), [(1e-9, torch.float64), (1e-5, torch.float32)], ids=str)
def test_acos_of_the_cosine_sees_nothing_where_the_angle_is_right(theta, dtype):
    weight, new = (w.to(dtype) for w in turned(theta))
    assert torch.acos(F.cosine_similarity(weight, new).clamp(-1, 1)).item() in (0, pytest.approx(2e-8, rel=0.5))
    exact = ref.angle(ref.floats(weight), ref.floats(new))
    assert exact == pytest.approx(theta, rel=0.05)
    assert angular_update(weight, new).item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("radial", [1e-6, -1e-4, 1e-3, 0.1, -0.5, 1.0])
@pytest.mark.parametrize("theta", [0.0, 1e-9, 1e-6, 1e-3])
def test_angle_is_accurate_to_1e_12_beside_a_radial_part(theta, radial):
    weight, new = turned(theta, radial)
    exact = ref.angle(ref.floats(weight), ref.floats(new))
    assert angular_update(weight, new).item() == pytest.approx(exact, rel=1e-9, abs=1e-12)


@PROPERTY
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=2, max_size=10))
def test_parts_equal_the_exact_split(pairs):
    weight, new = (torch.tensor([column], dtype=torch.float64) for column in zip(*pairs, strict=True))
    parts = split_update(update_products(weight, new))
    if not weight.any():
        assert [part.item() for part in parts] == [0, 0, 0]
        return
    radial, tangential = ref.split(ref.floats(weight), ref.floats(new))
    scale = ((new - weight).norm() / weight.norm()).item()
    assert parts.radial.item() == pytest.approx(radial, rel=1e-12, abs=1e-14 * scale)
    assert parts.tangential.item() == pytest.approx(tangential, rel=1e-6, abs=1e-7 * scale * weight.norm().item())
    pythagoras = weight.square().sum() * (1 + parts.radial) ** 2 + parts.tangential**2
    assert pythagoras.item() == pytest.approx(ref.dot(*[ref.floats(new)] * 2), rel=1e-11, abs=1e-12 * scale**2)


def test_conventions_for_zero_weights_and_straight_updates():
    weight = torch.tensor([[0.0, 0], [3, 4], [3, 4], [3, 4]])
    new = torch.tensor([[1.0, 2], [0, 0], [-3, -4], [3, 4]])
    parts = split_update(update_products(weight, new))
    assert parts.radial.tolist() == [0, -1, -2, 0]
    assert parts.tangential.tolist() == [0, 0, 0, 0]
    assert parts.angle.tolist() == [0, 0, math.pi, 0]


def test_units_that_do_not_move_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As dead filters, whose gradients are zero."""
    weight, new = draw(4, 50), draw(4, 50, seed=1)
    new[1] = weight[1]
    second = []
    monkeypatch.setattr(torch, "addcmul", lambda *args, **kwargs: second.append(args))
    assert update_products(weight, new).tangential_sq[1] == 0
    assert not second


def test_effective_lr_is_lr_over_the_squared_norm():
    squared = torch.tensor([4.0, 0.0, 0.25])
    assert effective_lr(0.1, squared).tolist() == pytest.approx([0.025, 0, 0.4], rel=1e-6)
    assert effective_lr(torch.tensor(0.5), squared).tolist() == [0.125, 0, 2]


def test_parameters_are_taken_as_they_are() -> None:
    weight, new_weight = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = update_products(weight, new_weight)
    found = update_products(weight.clone().requires_grad_(), torch.nn.Parameter(new_weight))
    assert all(torch.equal(a.detach(), b) for a, b in zip(found, expected, strict=True))
