"""Projected gradient in l2 and l∞ balls: closed forms, an explicit reference, invariants, and random starts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from lightning_normgeo.robustness import Ball, projected_gradient
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import RADII, STARTS
from lightning_normgeo.robustness.attacks.search.ball import lengths
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from support import random_twin
from support import reference as ref
from support.small_classifiers import conv_net, draw, pixels, two_classes

NORMS = ["linf", "l2"]
BOXES = {
    "pixels": (0.0, 1.0),
    "wide": (-9.0, 9.0),
    "inside": (0.3, 0.6),  # most originals are outside of it
    "channels": (torch.tensor([-0.2, 0.1, 0.4]).view(1, 3, 1, 1), torch.tensor([0.5, 1.2, 0.7]).view(1, 3, 1, 1)),
}


def box_of(name, dtype):
    return tuple(end.to(dtype) if isinstance(end, torch.Tensor) else end for end in BOXES[name])


def per_pixel(box, image):
    return tuple(ref.floats(torch.as_tensor(end, dtype=image.dtype).expand(1, *image.shape)) for end in box)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(("eps", "step", "steps"), [(0.1, 0.03, 3), (0.1, 0.03, 4), (0.1, 0.03, 9), (0.1, 5.0, 1)])
def test_l2_goes_along_the_weight_of_a_linear_model_and_ends_at_eps(eps, step, steps, label):
    w, x = draw(12), 0.4 + 0.2 * pixels(5, 3, 2, 2)
    along = (w / w.norm()).reshape(3, 2, 2) * (1 if label == 0 else -1)
    ball = Ball("l2", eps, 0.0, 1.0)
    found = projected_gradient(two_classes(w), x, torch.full((5,), label), ball, step, steps)
    torch.testing.assert_close(found, x + along * min(eps, step * steps), rtol=0, atol=1e-15)


def test_l2_from_anywhere_ends_at_the_same_point_of_a_linear_model():
    """The component orthogonal to w shrinks by a constant factor in every step."""
    w, x, ball = draw(12), torch.full((4, 3, 2, 2), 0.5, dtype=torch.float64), Ball("l2", 0.1, 0.0, 1.0)
    start = ball.sample(x, 3, range(4))
    found = projected_gradient(two_classes(w), x, torch.zeros(4).long(), ball, 0.05, 100, start)
    torch.testing.assert_close(found, x + 0.1 * (w / w.norm()).reshape(3, 2, 2), rtol=0, atol=1e-15)


def test_l2_stops_at_the_box_and_goes_on_beside_it():
    w = torch.tensor([3.0, 4.0], dtype=torch.float64)
    x = torch.tensor([[0.5, 0.99]], dtype=torch.float64)
    found = projected_gradient(two_classes(w), x, torch.tensor([0]), Ball("l2", 0.3, 0.0, 1.0), 0.1, 3)
    assert found[0].tolist() == pytest.approx([0.5 + 3 * 0.06, 1.0], rel=1e-14)


# --- the twin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", ["pixels", "inside", "channels"])
@pytest.mark.parametrize("from_random", [False, True], ids=["from the image", "from a random point"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.4)])
def test_projected_gradient_equals_an_explicit_loop(norm, eps, from_random, box):
    net, x, labels = conv_net(dtype=torch.float64), pixels(3, 3, 8, 8), torch.tensor([0, 4, 2])
    ball = Ball(norm, eps, *box_of(box, x.dtype))
    start = ball.sample(x, 0, range(3)) if from_random else None
    found = projected_gradient(net, x, labels, ball, eps / 4, 6, start)
    limits = per_pixel((ball.lower, ball.upper), x[0])
    starts = [None] * 3 if start is None else start
    rows = zip(x, labels, starts, strict=True)
    expected = [ref.attacked(net, a, y, norm, eps, eps / 4, 6, limits, begin) for a, y, begin in rows]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-13)
    assert (found - projected_gradient(net, x, labels, ball, eps / 4, 5, start)).abs().max() > 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_known_saves_one_pass_and_changes_nothing(norm):
    net, x, labels, calls = conv_net(), pixels(3, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 4, 2]), []

    def logits(images):
        calls.append(images)
        return net(images)

    ball = Ball(norm, 0.1, 0.0, 1.0)
    expected = projected_gradient(logits, x, labels, ball, 0.03, 4)
    gradient = ascent(net, x, labels)[2]
    assert torch.equal(projected_gradient(logits, x, labels, ball, 0.03, 4, None, gradient), expected)
    assert len(calls) == 4 + 3


# --- never ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    box=st.sampled_from(sorted(BOXES)),
    seed=st.integers(0, 10**6),
    eps=st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 0.7, 3.0, 100.0]),
    step=st.floats(0, 2),
    slope=st.sampled_from([1.0, 1e-30, 1e-42, 0.0]),
    random=st.booleans(),
)
@example(norm="l2", dtype=torch.float32, box="pixels", seed=0, eps=0.1, step=0.1, slope=1e-30, random=False)
def test_nothing_leaves_the_box_nor_the_ball_inside_it(norm, dtype, box, seed, eps, step, slope, random):
    x, w = 3 * pixels(3, 3, 2, 2, seed=seed, dtype=dtype) - 1, draw(12, 3, seed=seed, dtype=dtype)
    lower, upper = (torch.as_tensor(end, dtype=dtype) for end in box_of(box, dtype))
    ball = Ball(norm, eps, *box_of(box, dtype))
    start = ball.sample(x, seed, range(3)) if random else None
    found = projected_gradient(lambda z: slope * (z.flatten(1) @ w).tanh(), x, torch.arange(3), ball, step, 4, start)
    assert found.dtype == dtype
    assert ((lower <= found) & (found <= upper)).all(), "or NaN"
    distance = lengths((found - x.clamp(lower, upper)).double(), norm)  # the box may be the tighter bound
    ulp = torch.finfo(dtype).eps
    # 8 ulps of the radius for the norm, plus one of the image in each pixel for the rounding of the sum
    allowed = eps * (1 + 8 * ulp) + 2 * ulp * (math.sqrt(12) if norm == "l2" else 1)
    assert (distance <= allowed).all()


@pytest.mark.parametrize("slope", [1.0, 1e-30, 1e-37])
def test_l2_makes_full_steps_however_small_the_gradient(slope):
    w = draw(12, dtype=torch.float32)
    found = projected_gradient(
        lambda x: slope * two_classes(w)(x), torch.zeros(1, 12), torch.tensor([0]), Ball("l2", 9.0, -9.0, 9.0), 1.0, 2
    )
    torch.testing.assert_close(found[0], 2 * w / w.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random", [False, True])
def test_without_a_radius_nothing_moves(norm, random):
    net, x, ball = conv_net(), pixels(3, 3, 8, 8, dtype=torch.float32), Ball(norm, 0.0, 0.0, 1.0)
    start = ball.sample(x, 0, range(3)) if random else None
    assert torch.equal(projected_gradient(net, x, torch.tensor([0, 1, 2]), ball, 0.1, 3, start), x)


# --- random starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_depends_on_seed_sample_and_restart_alone(norm):
    x, ball = torch.full((6, 3, 4, 4), 0.5), Ball(norm, 0.3, 0.0, 1.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = ball.sample(x, 3, range(6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    order = [4, 0, 5]
    assert torch.equal(ball.sample(x[order], 3, order), whole[order])
    others = [ball.sample(x, 4, range(6)), ball.sample(x, 3, range(6), 1), ball.sample(x, 3, range(1, 7))]
    assert all(((other - whole).abs().flatten(1).amax(1) > 0.01).all() for other in others)
    assert ball.sample(x[:0], 3, []).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("surface", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_start_has_the_bits_that_every_device_gives_it(norm, surface, dtype):
    """The expected numbers are of numpy, made one by one of Philox's words."""
    found = Ball(norm, 0.75, -9.0, 9.0).sample(torch.zeros(2, 3, 5, dtype=dtype), 3, [7, -2], 2, surface)
    for point, sample in zip(found, (7, -2), strict=True):
        words = random_twin.words(3, sample, STARTS + 2, 15)
        if norm == "linf":
            offset = 2 * random_twin.uniforms(words) - 1
            offset = offset / np.abs(offset).max() if surface else offset
        else:
            normals = random_twin.normals(words)
            radius = random_twin.uniforms(random_twin.words(3, sample, RADII + 2, 1))
            offset = normals / random_twin.length(normals) * (1 if surface else radius)
        offset = offset.astype(point.numpy().dtype) * point.numpy().dtype.type(0.75)
        if norm == "l2":
            one, radius = offset.dtype.type(1), offset.dtype.type(0.75)
            offset = offset * min(one / random_twin.length(offset) * radius, one)  # as torch divides a number
        assert np.array_equal(point.flatten().numpy(), offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_start_has_the_type_and_the_memory_layout_of_the_images(norm, dtype):
    x = pixels(4, 3, 8, 8).to(dtype, memory_format=torch.channels_last)
    found = Ball(norm, 0.25, 0.0, 1.0).sample(x, 3, range(4))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, Ball(norm, 0.25, 0.0, 1.0).sample(x.contiguous(), 3, range(4)))
    moved = lengths((found - x).double(), norm)
    assert bool((moved > 0.01).all())
    assert bool((moved <= 0.25 * (1 + 4 * torch.finfo(dtype).eps)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_samples_of_one_batch_may_be_at_different_starts(norm):
    x, ball = pixels(4, 3, 4, 4, dtype=torch.float32), Ball(norm, 0.3, 0.0, 1.0)
    together = ball.sample(x, 3, torch.arange(4), torch.tensor([2, 0, 5, 2]))
    for k, restart in enumerate((2, 0, 5, 2)):
        assert torch.equal(ball.sample(x[k : k + 1], 3, [k], restart), together[k : k + 1])


def test_starts_are_uniform_in_the_cube():
    x = torch.full((300, 100), 0.5, dtype=torch.float64)
    offsets = (Ball("linf", 0.2, 0.0, 1.0).sample(x, 0, range(300)) - 0.5) / 0.2
    assert kstest(offsets.flatten(), "uniform", (-1, 2)).pvalue > 0.01
    correlation = torch.corrcoef(offsets).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(100)


def test_starts_in_the_ball_have_uniform_radius_and_direction():
    """Every coordinate of a uniform direction in three dimensions is uniform (Archimedes)."""
    offsets = Ball("l2", 0.2, -1.0, 1.0).sample(torch.zeros(3000, 3, dtype=torch.float64), 1, range(3000))
    radius = lengths(offsets)
    assert kstest(radius / 0.2, "uniform").pvalue > 0.01
    for k in range(3):
        assert kstest(offsets[:, k] / radius, "uniform", (-1, 2)).pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([radius, offsets[:, 0] / radius]))[0, 1]) < 4 / math.sqrt(3000)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_stay_in_the_box(norm):
    x = pixels(50, 3, 4, 4, dtype=torch.float32)
    found = Ball(norm, 2.0, 0.0, 1.0).sample(x, 0, range(50))
    assert found.min() == 0
    assert found.max() == 1
