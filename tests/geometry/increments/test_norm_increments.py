"""Equation 16 and its generalization, against real torch optimizers and exact differences of norms."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_normgeo.geometry import (
    IncrementTerms,
    SGDRule,
    as_rows,
    decay_floor,
    lattice_floor,
    measured_increment,
    norm_increment,
    predicted_increment,
    storage_floor,
    systematic_floor,
    update_products,
    weight_gradient_products,
)
from lightning_normgeo.geometry.update_rules.registry import describe_update
from support import reference as ref
from support.described_steps import LRS, UNITS, assert_explains, assert_terms, take_step
from support.tensors import draw

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


@pytest.mark.parametrize("flags", [{}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05, "maximize": True}])
@pytest.mark.parametrize(
    "how",
    [{"foreach": True}, {"fused": True}, {"lr": torch.tensor(1.0, dtype=torch.float64)}],
    ids=lambda how: next(iter(how)),
)
def test_sgd_is_explained_in_every_implementation(flags, how):
    parameter = nn.Parameter(draw(UNITS, 4))
    optimizer = torch.optim.SGD([parameter], **{"lr": 1.0, "foreach": False, **flags, **how})
    for step in range(10):
        weight, terms, exact = take_step(optimizer, parameter, draw(UNITS, 4, seed=step + 1), LRS[step % 5])
        assert_explains(terms, exact, weight)


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
    """With momentum alone Δ_k = η²‖b_k‖² + 2η² Σ_{j<k} μ^{k-j} ‖b_j‖², which is never negative."""
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


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_optimizers_that_scale_elements_are_not_covered_by_equation_16(make):
    """⟨W, g⟩ = 0 does not make their gradient term vanish: it can exceed the quadratic one."""
    steps = [terms for _, _, terms, _ in train("linear", make, 5, lr=0.01)]
    assert max((terms.gradient.abs() / terms.quadratic).max().item() for terms in steps) > 1
    assert min(terms.total.min().item() for terms in steps) < 0


def test_measured_increment_is_exact_for_stored_float32_weights():
    """A difference of float32 norms would not have one correct digit here."""
    before = draw(2, 200).float()
    after = before + 1e-5 * draw(2, 200, seed=1).float()
    _, inner, squared, _ = update_products(before, after)
    exact = [ref.increment(*map(ref.floats, pair)) for pair in zip(before, after, strict=True)]
    assert measured_increment(inner, squared).tolist() == pytest.approx(exact, rel=1e-12)
    naive = after.norm(dim=1).square() - before.norm(dim=1).square()
    assert naive.tolist() != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_storage_floor_bounds_what_rounding_does_to_a_norm(dtype):
    """The floor is five standard deviations: never exceeded here, and not needlessly large."""
    weight = draw(500, 64)
    stored = weight.to(dtype).double()
    moved = (stored - weight) * (stored + weight)
    floor = storage_floor(weight.pow(4).sum(1), dtype)
    share = moved.sum(1).abs() / floor
    assert share.max() < 1
    assert 0.15 < share.square().mean().sqrt() < 0.27
    both = storage_floor(weight.pow(4).sum(), dtype)
    assert moved.sum().abs() < both < floor.sum()


@pytest.mark.parametrize("ulps", [0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 10.0, 100.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["", "momentum"])
@pytest.mark.parametrize("weights", ["normal", "uniform"])
def test_decay_that_nothing_dithers_is_rounded_within_its_floor(ulps, momentum, weights):
    """Weights without a gradient have rounding errors in the same direction for every element."""
    values = draw(1, 200_000) if weights == "normal" else torch.linspace(-1, 1, 200_001, dtype=torch.float64)[None]
    parameter = nn.Parameter(0.03 * values.float())
    optimizer = torch.optim.SGD([parameter], lr=1.0, weight_decay=ulps * 2**-23, momentum=momentum)
    for _ in range(4):
        parameter.grad = torch.zeros_like(parameter)
        before = parameter.detach().clone()
        rule, state = describe_update(optimizer, optimizer.param_groups[0], optimizer.state[parameter])
        terms = norm_increment(rule, before, parameter.grad, *state)
        optimizer.step()
        update = update_products(before, parameter.detach())
        residual = measured_increment(update.weight_update, update.update_sq) - terms.total
        random = storage_floor(before.double().pow(4).sum(1), torch.float32)
        systematic = decay_floor(terms, before.double().square().sum(1), torch.float32)
        assert (residual.abs() <= random + systematic).all()
        assert (systematic <= before.double().square().sum(1) * 2**-24).all()


def test_without_decay_there_is_no_floor_of_it():
    terms = norm_increment(SGDRule(lr=0.1, momentum=0.9, first=False), *(draw(3, 9, seed=i) for i in range(3)))
    assert decay_floor(terms, torch.ones(3, dtype=torch.float64), torch.float32).tolist() == [0.0] * 3


def test_floors_of_weights_that_do_not_move_are_finite():
    """A dead unit has no gradient, an unused unit no weight."""
    weight, gradient = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    weight[0], gradient[1] = 1.0, 1.0
    terms = norm_increment(SGDRule(lr=0.1), weight, gradient)
    assert systematic_floor(terms, weight.square().sum(1), torch.float32).isfinite().all()


def test_steps_of_one_size_are_rounded_within_their_floor():
    """All weights of a binade are off by the same fraction of an ulp, which adds up to more than random rounding."""
    weight = 1.0 + torch.rand(1, 400_000, generator=torch.Generator().manual_seed(0))
    step = torch.full_like(weight, 2.3e-7)
    before, after = weight.double(), (weight - step).double()
    terms = IncrementTerms(*(torch.tensor([value], dtype=torch.float64) for value in (0.0, 0.0, 0.0, 0.0)))._replace(
        gradient=-2 * (before * step.double()).sum(1), quadratic=step.double().square().sum(1)
    )
    residual = (after.square().sum(1) - before.square().sum(1) - terms.total).abs()
    random = storage_floor(before.pow(4).sum(1), torch.float32)
    assert (residual > 5 * random).all()
    assert (residual <= random + lattice_floor(terms, before.square().sum(1), torch.float32)).all()
