"""Weight decay of scale-invariant weights: the equilibrium norm, and the equivalent learning-rate schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import ExponentialSchedule, balanced_norm
from support import reference as ref
from support.tensors import draw, readout

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
SEED = st.integers(0, 10**6)


@pytest.mark.parametrize(("lr", "decay", "gradient"), [(0.1, 5e-4, 3.0), (1.0, 0.5, 0.1), (1.5, 1.0, 20.0)])
def test_the_balanced_norm_equals_its_twin(lr, decay, gradient):
    assert balanced_norm(lr, decay, gradient) == pytest.approx(ref.balanced_norm(lr, decay, gradient), rel=1e-12)


def follow(seed, steps, rates, momentum, decay, buffer=None):
    """Train a toy loss that depends only on the direction, from a point and a momentum buffer; return its path."""
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
    """θ_k = α^k θ̃_k at every step, up to and including the double root of the momentum's characteristic equation."""
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
