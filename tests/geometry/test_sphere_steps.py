"""Steps on spheres: they stay there, go along great circles, and turn by the angle that they should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.geometry import geodesic_step, hyperball_step

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
SEEDS = st.integers(0, 10_000)
SIZES = st.floats(1e-6, 10.0)


def drawn(seed, size):
    generator = torch.Generator().manual_seed(seed)
    weight, update = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return weight, size * update


def sums(weight, update):
    return weight @ weight, weight @ update, update @ update


@PROPERTY
@given(SEEDS, SIZES, st.floats(0.1, 10.0))
def test_geodesic_steps_follow_the_exponential_map(seed, size, radius):
    weight, update = drawn(seed, size)
    alpha, beta = geodesic_step(*sums(weight, update), torch.tensor(radius, dtype=torch.float64))
    found = alpha * weight + beta * update
    unit = weight / weight.norm()
    tangential = update - (unit @ update) * unit
    angle = tangential.norm() / weight.norm()
    expected = radius * (math.cos(angle) * unit + math.sin(angle) * tangential / tangential.norm())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * radius)
    assert float(found.norm()) == pytest.approx(radius, rel=1e-10)


@PROPERTY
@given(SEEDS, SIZES)
def test_a_geodesic_is_the_same_in_one_step_as_in_two(seed, size):
    weight, update = drawn(seed, size)
    r = weight.norm()
    tangent = update - (weight @ update) / r**2 * weight

    def moved(start, velocity):
        alpha, beta = geodesic_step(*sums(start, velocity), r)
        return alpha * start + beta * velocity

    middle = moved(weight, tangent / 2)
    angle = tangent.norm() / 2 / r
    carried = angle.cos() * tangent / 2 - angle.sin() * tangent.norm() / 2 * weight / r  # parallel transport
    torch.testing.assert_close(moved(middle, carried), moved(weight, tangent), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(SEEDS, SIZES, st.floats(1e-4, 0.5), st.floats(0.1, 10.0))
def test_hyperball_steps_do_not_depend_on_the_size_of_the_update(seed, size, rate, radius):
    weight, direction = drawn(seed, size)
    update = -rate * direction
    alpha, beta = hyperball_step(
        *sums(weight, update), direction @ direction, torch.tensor(radius, dtype=torch.float64)
    )
    start = radius * weight / weight.norm()
    moved = start - rate * radius * direction / direction.norm()
    torch.testing.assert_close(alpha * weight + beta * update, radius * moved / moved.norm(), rtol=1e-10, atol=1e-11)


def test_blocks_that_do_not_move_stay():
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for step in (
        geodesic_step(*sums(weight, 0 * weight), weight.norm()),
        hyperball_step(*sums(weight, 0 * weight), torch.tensor(0.0).double(), weight.norm()),
    ):
        assert float(step[0]) == 1
        assert torch.isfinite(step[1])
