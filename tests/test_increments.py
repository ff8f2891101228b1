"""Equation 16 and its generalisation, against real torch optimizers and exact differences of norms."""

import itertools

import pytest
import reference as ref
import torch
from torch import nn
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    AdamRule,
    SGDRule,
    as_rows,
    measured_increment,
    norm_increment,
    predicted_increment,
    storage_floor,
    update_products,
    weight_gradient_products,
)
from lightning_normgeo.probes.rules import describe_update
from tests.tensors import draw

UNITS, LRS = 3, [0.2, 0.2, 0.05, 0.1, 0.02]


def take_step(optimizer, parameter, gradient, lr):
    """Describe the step before it is taken, take it; return W, the terms, and the exact increments."""
    optimizer.param_groups[0]["lr"] = lr
    parameter.grad = gradient.clone()
    before = parameter.detach().clone()
    rule, state = describe_update(optimizer, optimizer.param_groups[0], optimizer.state[parameter])
    terms = norm_increment(rule, *(as_rows(tensor, UNITS) for tensor in (before, gradient, *state)))
    optimizer.step()
    old, new = as_rows(before, UNITS), as_rows(parameter, UNITS)
    exact = [ref.increment(*map(ref.floats, pair)) for pair in zip(old, new, strict=True)]
    return old, terms, torch.tensor(exact, dtype=torch.float64)


def assert_explains(terms, exact, weight):
    """To 1e-12 of the terms, and to the rounding of the stored W⁺."""
    tolerance = 1e-12 * sum(term.abs() for term in terms) + 1e-15 * weight.square().sum(1)
    assert ((terms.total - exact).abs() <= tolerance).all()


def assert_terms(terms, expected):
    for name, value, twin in zip(terms._fields, terms, zip(*expected, strict=True), strict=True):
        assert value.tolist() == pytest.approx(list(twin), rel=1e-12, abs=1e-14), name


SGD_FLAGS = [
    dict(zip(("momentum", "dampening", "weight_decay", "nesterov", "maximize"), flags, strict=True))
    for flags in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.05), (False, True), (False, True))
    if not (flags[3] and (not flags[0] or flags[1]))  # torch: Nesterov needs momentum and no dampening
]


@pytest.mark.parametrize(
    "flags", SGD_FLAGS, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items() if v) or "plain"
)
def test_sgd_terms_explain_every_step_of_torch(flags):
    parameter = nn.Parameter(draw(UNITS, 2, 2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, **flags)
    buffers = [None] * UNITS
    for step in range(30):
        gradient, lr = draw(UNITS, 2, 2, seed=step + 1), LRS[step % 5]
        weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
        assert_explains(terms, exact, weight)
        rows = list(zip(weight.tolist(), as_rows(gradient, UNITS).tolist(), buffers, strict=True))
        assert_terms(terms, [ref.sgd_terms(*row, lr, *flags.values()) for row in rows])
        buffers = [ref.sgd_direction(*row, *flags.values())[1] for row in rows]


ADAM_KINDS = {
    "adam": (torch.optim.Adam, {}, False),
    "adamw": (torch.optim.AdamW, {}, True),
    "adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}, True),
}


@pytest.mark.parametrize("kind", ADAM_KINDS)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["", "decay"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_adam_terms_explain_every_step_of_torch(kind, amsgrad, weight_decay, maximize):
    make, extra, decoupled = ADAM_KINDS[kind]
    parameter = nn.Parameter(draw(UNITS, 4))
    shared = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": weight_decay, "maximize": maximize}
    optimizer = make([parameter], lr=1.0, amsgrad=amsgrad, **shared, **extra)
    states = [{"t": 0, "m": [0.0] * 4, "v": [0.0] * 4, "top": [0.0] * 4} for _ in range(UNITS)]
    for step in range(12):  # gradients shrink, so that the running maximum of amsgrad matters
        gradient, lr = draw(UNITS, 4, seed=step + 1) * 0.5**step, LRS[step % 5]
        weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
        assert_explains(terms, exact, weight)
        flags = {**shared, "decoupled": decoupled, "amsgrad": amsgrad}
        twins = [
            ref.adam_step(w, g, state, lr, **flags)
            for w, g, state in zip(weight.tolist(), gradient.tolist(), states, strict=True)
        ]
        assert_terms(terms, [expected for expected, _ in twins])
        assert parameter.flatten().tolist() == pytest.approx([x for _, new in twins for x in new], rel=1e-12, abs=1e-14)


SHAPES = {"linear": ((12, 5), (UNITS, 5), F.linear), "conv": ((3, 2, 5, 5), (UNITS, 2, 3, 3), F.conv2d)}


def train(kind, make_optimizer, steps, lr=0.05):
    """Train weights that a batch norm with ε = 1e-60 makes scale invariant; yield (W, g, terms, exact) per step."""
    x_shape, w_shape, apply = SHAPES[kind]
    parameter = nn.Parameter(draw(*w_shape))
    optimizer = make_optimizer([parameter])
    for step in range(steps):
        y = F.batch_norm(apply(draw(*x_shape, seed=step), parameter), None, None, training=True, eps=1e-60)
        loss = ((y + 0.3).tanh() * draw(*y.shape, seed=99)).sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        yield as_rows(gradient, UNITS), *take_step(optimizer, parameter, gradient, lr)


@pytest.mark.parametrize("kind", SHAPES)
def test_equation_16_holds_per_unit_for_plain_sgd(kind):
    for gradient, weight, terms, exact in train(kind, lambda p: torch.optim.SGD(p, lr=1.0), 20):
        predicted = predicted_increment(0.05, weight_gradient_products(weight, gradient)[2])
        assert ((predicted - exact).abs() <= 1e-12 * predicted + 1e-15 * weight.square().sum(1)).all()
        assert (predicted > 1e-6).all()
        torch.testing.assert_close(terms.quadratic, predicted, rtol=1e-12, atol=0)
        assert (terms.gradient.abs() <= 1e-12 * predicted.sqrt()).all()


@pytest.mark.parametrize("kind", SHAPES)
def test_norms_only_grow_under_momentum_by_the_closed_form(kind):
    """Δ_k = η²‖b_k‖² + 2η² Σ_{j<k} μ^{k-j} ‖b_j‖² for μ alone: never negative."""
    buffer, past = 0.0, torch.zeros(UNITS).double()
    for gradient, weight, terms, exact in train(kind, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 20):
        buffer = 0.9 * buffer + gradient
        squared = buffer.square().sum(1)
        closed = 0.05**2 * (squared + 2 * past)
        past = 0.9 * (past + squared)
        assert (exact > 0).all()
        assert ((closed - terms.total).abs() <= 1e-11 * closed + 1e-14 * weight.square().sum(1)).all()


def test_weight_decay_can_shrink_norms():
    steps = train("linear", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=1.0), 20)
    assert any((exact < 0).any() for *_, exact in steps)


def test_adam_is_not_covered_by_equation_16():
    """⟨W, g⟩ = 0 does not make Adam's gradient term vanish: it can exceed the quadratic one."""
    steps = [terms for _, _, terms, _ in train("linear", torch.optim.Adam, 5, lr=0.01)]
    assert max((terms.gradient.abs() / terms.quadratic).max().item() for terms in steps) > 1
    assert min(terms.total.min().item() for terms in steps) < 0


def test_measured_increment_is_exact_for_stored_float32_weights():
    """Where a difference of float32 norms has no correct digit."""
    before = draw(2, 200).float()
    after = before + 1e-5 * draw(2, 200, seed=1).float()
    _, inner, squared, _ = update_products(before, after)
    exact = [ref.increment(*map(ref.floats, pair)) for pair in zip(before, after, strict=True)]
    assert measured_increment(inner, squared).tolist() == pytest.approx(exact, rel=1e-12)
    naive = after.norm(dim=1).square() - before.norm(dim=1).square()
    assert naive.tolist() != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_storage_floor_bounds_what_rounding_does_to_a_norm(dtype):
    """Five standard deviations: never passed here, and not needlessly far away."""
    weight = draw(500, 64)
    stored = weight.to(dtype).double()
    moved = (stored - weight) * (stored + weight)
    floor = storage_floor(weight.pow(4).sum(1), dtype)
    share = moved.sum(1).abs() / floor
    assert share.max() < 1
    assert 0.15 < share.square().mean().sqrt() < 0.27
    both = storage_floor(weight.pow(4).sum(), dtype)
    assert moved.sum().abs() < both < floor.sum()


class Renamed(torch.optim.SGD):
    """A subclass that keeps step."""


class Overridden(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "rule"),
    [(Renamed, SGDRule), (torch.optim.AdamW, AdamRule), (Overridden, None), (torch.optim.RMSprop, None),
     (torch.optim.NAdam, None), (torch.optim.RAdam, None), (torch.optim.Adamax, None), (torch.optim.LBFGS, None)],
)  # fmt: skip
def test_only_optimizers_with_a_known_step_are_described(make, rule):
    parameter = nn.Parameter(draw(3, 2))
    optimizer = make([parameter], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces optimizer.step on the instance
    described = describe_update(optimizer, optimizer.param_groups[0], optimizer.state[parameter])
    assert described is None if rule is None else isinstance(described[0], rule)
    if make is torch.optim.AdamW:
        assert described[0].decoupled
