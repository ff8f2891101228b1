"""Equilibria of weight decay and gradient noise: closed forms against impulse responses and random walks."""

import dataclasses
import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from lightning_normgeo.geometry import (
    AdagradRule,
    AdamaxRule,
    AdamRule,
    LionRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    SGDRule,
    angular_update,
    balanced_norm,
    equilibrium_angle,
    steps_to_equilibrium,
)
from lightning_normgeo.geometry.update_rules.optimizers.lion import describe_lion
from lightning_normgeo.geometry.update_rules.registry import describe_update
from support import reference as ref
from support.described_steps import Lion
from support.tensors import PROPERTY, draw

LR, LAMBDA = st.floats(1e-5, 1), st.floats(1e-6, 0.5)
# --- closed forms -----------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    lr=LR,
    decay=LAMBDA,
    momentum=st.floats(0, 0.97),
    kind=st.one_of(st.just({"nesterov": True}), st.builds(lambda x: {"dampening": x}, st.floats(0, 0.99))),
    first=st.booleans(),
)
def test_sgd_follows_from_the_impulse_response(lr, decay, momentum, kind, first):
    flags = {"momentum": momentum} | (kind if momentum else {})
    rule = SGDRule(lr=lr, weight_decay=decay, first=first, **flags)
    assert equilibrium_angle(rule) == pytest.approx(ref.equilibrium_angle(lr, decay, **flags), rel=1e-9)
    assert steps_to_equilibrium(rule) == pytest.approx(ref.relaxation_steps(lr, decay, **flags), rel=1e-9)


@PROPERTY
@given(lr=LR, decay=LAMBDA, betas=st.tuples(st.floats(0.01, 0.97), st.floats(0, 0.999)))
def test_adamw_turns_by_the_angle_of_an_average(lr, decay, betas):
    """Decoupled decay with the direction m̂ = (1-β₁)Σβ₁ʲĝ is SGD with momentum β₁ and dampening β₁."""
    rule = AdamRule(lr=lr, betas=betas, weight_decay=decay, decoupled=True)
    expected = ref.equilibrium_angle(lr, decay, momentum=betas[0], dampening=betas[0])
    assert equilibrium_angle(rule) == pytest.approx(expected, rel=1e-9)
    assert steps_to_equilibrium(rule) == pytest.approx(1 / (2 * lr * decay))


@PROPERTY
@given(lr=LR, decay=LAMBDA, betas=st.tuples(st.floats(0, 0.95), st.floats(0, 0.95)))
def test_lion_is_within_5_percent_of_correlated_signs(lr, decay, betas):
    rule = LionRule(lr=lr, betas=betas, weight_decay=decay, decoupled=True)
    assert equilibrium_angle(rule) == pytest.approx(ref.lion_equilibrium_angle(lr, decay, betas), rel=0.05)
    assert steps_to_equilibrium(rule) == pytest.approx(1 / (2 * lr * decay))


@pytest.mark.parametrize(
    ("betas", "relative"), [((0.9, 0.99), 5e-3), ((0.95, 0.98), 0.03), ((0.0, 0.99), 1e-12), ((0.5, 0.5), 0.01)]
)
def test_lion_is_close_at_the_usual_betas_and_exact_for_signs_of_gradients(betas, relative):
    value = equilibrium_angle(LionRule(lr=1e-3, betas=betas, weight_decay=0.1, decoupled=True))
    assert value == pytest.approx(ref.lion_equilibrium_angle(1e-3, 0.1, betas), rel=relative)


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.5, 0.8), (0.0, 0.5)], ids=str)
def test_signs_of_gaussian_noise_correlate_by_the_arcsine(betas):
    """The distance that Lion moves without decay, rms over many elements, gives the sum of the correlations."""
    weight, steps = nn.Parameter(torch.zeros(20000).double()), 100
    optimizer = Lion([weight], lr=1.0, betas=betas)
    for step in range(60 + steps):
        if step == 60:  # stationary from here on
            weight.data.zero_()
        weight.grad = draw(20000, seed=step)
        optimizer.step()
    itself, *later = ref.lion_sign_correlations(betas)
    expected = steps * itself + 2 * sum(max(0, steps - k) * r for k, r in enumerate(later, 1))
    assert weight.square().mean().item() == pytest.approx(expected, rel=0.04)


NO_EQUILIBRIUM = {
    "sgd without decay": SGDRule(lr=0.1, momentum=0.9),
    "adamw without decay": AdamRule(lr=0.1, decoupled=True),
    "lion without decay": LionRule(lr=0.1, decoupled=True),
    "adam": AdamRule(lr=0.1, weight_decay=0.1),
    "lion with decay in the gradient": LionRule(lr=0.1, weight_decay=0.1),
    "nadam": NAdamRule(lr=0.1, weight_decay=0.1, decoupled=True),
    "radam": RAdamRule(lr=0.1, weight_decay=0.1, decoupled=True),
    "adamax": AdamaxRule(lr=0.1, weight_decay=0.1),
    "rmsprop": RMSpropRule(lr=0.1, weight_decay=0.1),
    "adagrad": AdagradRule(lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("rule", NO_EQUILIBRIUM.values(), ids=NO_EQUILIBRIUM)
def test_there_is_none_without_a_closed_form(rule):
    assert equilibrium_angle(rule) is None
    assert steps_to_equilibrium(rule) is None


def test_dampening_without_momentum_has_no_effect():
    """Torch ignores dampening in that case."""
    plain, damped = (SGDRule(lr=0.1, weight_decay=0.1, dampening=t) for t in (0.0, 0.5))
    assert equilibrium_angle(plain) == equilibrium_angle(damped) == pytest.approx(math.sqrt(0.02))
    assert steps_to_equilibrium(plain) == steps_to_equilibrium(damped) == pytest.approx(25)


@pytest.mark.parametrize(
    "rule",
    [
        SGDRule(lr=0.1, weight_decay=0.1, momentum=0.9),
        AdamRule(lr=0.1, weight_decay=0.1, decoupled=True),
        LionRule(lr=0.1, weight_decay=0.1, decoupled=True),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_learning_rate_on_a_device_stays_there(rule):
    same = dataclasses.replace(rule, lr=torch.tensor(0.1).double())
    for function in (equilibrium_angle, steps_to_equilibrium):
        assert isinstance(function(same), torch.Tensor)
        assert function(same).item() == pytest.approx(function(rule))


def test_plain_sgd_agrees_with_the_norm_of_balance():
    """θ = ηG/‖W‖² at the norm that a step leaves unchanged, up to O(ηλ)."""
    lr, decay, gradient = 0.1, 0.01, 3.0
    angle = lr * gradient / balanced_norm(lr, decay, gradient) ** 2
    assert equilibrium_angle(SGDRule(lr=lr, weight_decay=decay)) == pytest.approx(angle, rel=lr * decay)


# --- random walks -----------------------------------------------------------------------------------------------------

UNITS, N = 64, 200
# optimizer, the power of ‖W‖ that relaxes exponentially, length of the run in time constants
WALKS = {
    "sgd": (SGD, {"lr": 0.05, "weight_decay": 0.04}, 4, 8),
    "momentum": (SGD, {"lr": 0.05, "weight_decay": 0.004, "momentum": 0.9}, 4, 8),
    "dampening": (SGD, {"lr": 0.05, "weight_decay": 0.006, "momentum": 0.9, "dampening": 0.5}, 4, 8),
    "nesterov": (SGD, {"lr": 0.05, "weight_decay": 0.004, "momentum": 0.9, "nesterov": True}, 4, 8),
    "adamw": (AdamW, {"lr": 1e-3, "weight_decay": 1.0, "betas": (0.9, 0.99)}, 2, 6),
    "lion": (Lion, {"lr": 1e-3, "weight_decay": 1.0, "betas": (0.9, 0.95)}, 2, 6),
    "lion with a long memory": (Lion, {"lr": 1e-3, "weight_decay": 0.4, "betas": (0.9, 0.99)}, 2, 2),
    "lion without memory": (Lion, {"lr": 1e-3, "weight_decay": 1.0, "betas": (0.0, 0.99)}, 2, 4),
}
LONG = [name for name, (*_, times) in WALKS.items() if times > 4]


class Walk(NamedTuple):
    rule: object
    angle: float
    """Angle per step, root mean square over units and the second half of the steps."""
    norms: torch.Tensor
    """Mean ‖W‖² over units for each step."""


def starting_norm(rule) -> float:
    """Return about the equilibrium norm: ‖W‖⁴ = ηG²Σh/(2λ) for SGD, else update length over angle."""
    if isinstance(rule, SGDRule):
        return (rule.lr * (N - 1) * (1 - rule.dampening) / (2 * rule.weight_decay * (1 - rule.momentum))) ** 0.25
    beta1 = rule.betas[0]
    length = rule.lr * math.sqrt(N if isinstance(rule, LionRule) else N * (1 - beta1) / (1 + beta1))
    return length / equilibrium_angle(rule)


def noise(weight, generator):
    """Return isotropic noise orthogonal to W and ∝ 1/‖W‖, like the gradient of a scale-invariant loss."""
    gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    squared = weight.square().sum(1, keepdim=True)
    radial = (gradient * weight).sum(1, keepdim=True) / squared
    return gradient.addcmul_(radial, weight, value=-1).div_(squared.sqrt())


@cache
def walk(name) -> Walk:
    """Start 25 % above equilibrium, or at equilibrium if the walk is too short to relax."""
    make, flags, _, times = WALKS[name]
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(UNITS, N, generator=generator, dtype=torch.float64))
    optimizer = make([weight], **flags)
    describe = describe_lion if make is Lion else lambda *args: describe_update(optimizer, *args)
    rule, _ = describe(optimizer.param_groups[0], {}, weight.dtype)
    steps = round(times * steps_to_equilibrium(rule))
    above = 1.25 if name in LONG else 1.0
    weight.data *= above * starting_norm(rule) / weight.data.norm(dim=1, keepdim=True)
    norms, squares = [], []
    for step in range(steps):
        before = weight.detach().clone()
        norms.append(before.square().sum(1).mean())
        weight.grad = noise(before, generator)
        optimizer.step()
        if 2 * step >= steps and step % 2:
            squares.append(angular_update(before, weight).square().mean())
    return Walk(rule, torch.stack(squares).mean().sqrt().item(), torch.stack(norms))


@pytest.mark.parametrize("name", WALKS)
def test_a_random_walk_on_the_sphere_turns_by_the_equilibrium_angle(name):
    ratio = walk(name).angle / equilibrium_angle(walk(name).rule)
    print(f"{name}: measured angle / predicted = {ratio:.4f}")
    assert ratio == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", LONG)
def test_norms_approach_equilibrium_at_the_predicted_rate(name):
    expected, norms = steps_to_equilibrium(walk(name).rule), walk(name).norms
    powers = norms ** (WALKS[name][2] / 2)
    apart = powers / powers[len(powers) // 2 :].mean() - 1
    start, end = round(0.2 * expected), round(1.2 * expected)  # after the momentum buffer has filled up
    measured = (end - start) / math.log(apart[start] / apart[end])
    print(f"{name}: measured steps / predicted = {measured / expected:.3f}")
    assert measured == pytest.approx(expected, rel=0.1)
