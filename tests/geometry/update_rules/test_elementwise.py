"""Update rules of elementwise optimizers, against real ones in every mode and against scalar reference code."""

import dataclasses
import itertools
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from lightning_normgeo.geometry import (
    AdagradRule,
    AdamaxRule,
    AdamRule,
    LionRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    arithmetic_floor,
    norm_increment,
    storage_floor,
)
from lightning_normgeo.geometry.update_rules import registry
from support import reference as ref
from support.described_steps import LRS, UNITS, Lion, assert_explains, assert_terms, take_step
from support.tensors import PROPERTY, SEED, draw

N, STEPS = 4, 12


@pytest.fixture(autouse=True)
def _lion_is_registered(monkeypatch):
    monkeypatch.setattr(registry, "_DESCRIPTIONS", dict(registry._DESCRIPTIONS))
    registry.register_optimizer(Lion, registry.describe_lion)


FOREACH = [{"foreach": False}, {"foreach": True}]
FUSED = [*FOREACH, {"fused": True}]
DECAY, DECOUPLED = {"weight_decay": [0.0, 0.1]}, {"decoupled_weight_decay": [False, True]}
SHARED = {"eps": [1e-3], "maximize": [False, True], **DECAY}
ADAM = {"betas": [(0.8, 0.9)], "amsgrad": [False, True], **SHARED}
NADAM = {"betas": [(0.8, 0.9)], "momentum_decay": [4e-3, 0.3], **SHARED, **DECOUPLED}
RADAM = {"betas": [(0.8, 0.9), (0.9, 0.6)], **SHARED, **DECOUPLED}
RMSPROP = {"alpha": [0.8], "momentum": [0.0, 0.7], "centered": [False, True], **SHARED}
ADAGRAD = {"lr_decay": [0.0, 0.1], "initial_accumulator_value": [0.0, 0.3], **SHARED}
ADAMAX = {"betas": [(0.8, 0.9), (0.0, 0.5)], **SHARED}
LION = {"betas": [(0.9, 0.99), (0.5, 0.5)], **DECAY}
# optimizer, reference code, choices of each flag, implementations
MODES = [
    (Adam, ref.adam, ADAM | DECOUPLED, FUSED),
    (AdamW, ref.adam, ADAM, FUSED),
    (NAdam, ref.nadam, NADAM, FOREACH),
    (RAdam, ref.radam, RADAM, FOREACH),
    (RMSprop, ref.rmsprop, RMSPROP, FOREACH),
    (Adagrad, ref.adagrad, ADAGRAD, FUSED),
    (Adamax, ref.adamax, ADAMAX, FOREACH),
    (Lion, ref.lion, LION, [{}]),
]


def combinations():
    for make, twin, choices, implementations in MODES:
        for *values, how in itertools.product(*choices.values(), implementations):
            flags = dict(zip(choices, values, strict=True))
            shown = [f"{name}={value}" for name, value in (flags | how).items() if len(choices.get(name, "..")) > 1]
            yield pytest.param(make, twin, flags, how, id="-".join([make.__name__, *shown]).replace(" ", ""))


def twin_flags(make, flags):
    flags = dict(flags)
    flags["decoupled"] = flags.pop("decoupled_weight_decay", make in (AdamW, Lion))
    return flags


def gradients(shape=(UNITS, N), steps=STEPS):
    """Return shrinking gradients, so that running maxima matter; the first of each unit is zero for two steps."""
    for step in range(steps):
        gradient = draw(*shape, seed=step + 1) * 0.7**step
        gradient[:, 0] *= step > 1
        yield LRS[step % len(LRS)], gradient


@pytest.mark.parametrize(("make", "twin", "flags", "how"), [*combinations()])
def test_terms_explain_every_step_of_torch(make, twin, flags, how):
    parameter = nn.Parameter(draw(UNITS, N))
    optimizer = make([parameter], lr=1.0, **flags, **how)
    memories = [[defaultdict(float) for _ in range(N)] for _ in range(UNITS)]
    for lr, gradient in gradients():
        weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
        assert_explains(terms, exact, weight)
        twins = [
            ref.elementwise_step(twin, w, g, memory, lr, **twin_flags(make, flags))
            for w, g, memory in zip(weight.tolist(), gradient.tolist(), memories, strict=True)
        ]
        assert_terms(terms, [expected for expected, _ in twins])
        assert parameter.flatten().tolist() == pytest.approx([x for _, new in twins for x in new], rel=1e-12, abs=1e-14)


def test_radam_is_followed_across_its_switch():
    """At β₂ = 0.9 RAdam divides from step 6 on, at 0.6 never: both cases are in the runs above."""
    assert [t for t in range(1, STEPS + 1) if ref.radam_length(0.9, t)[1] > 5] == list(range(6, STEPS + 1))
    assert max(ref.radam_length(0.6, t)[1] for t in range(1, 1000)) < 5


# one of each kind of rule, and those with special state
KINDS = [
    (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.1}),
    (NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (RAdam, {"betas": (0.9, 0.9), "weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    (Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    (Adamax, {"weight_decay": 0.1}),
    (Lion, {"weight_decay": 0.1}),
]
each_kind = pytest.mark.parametrize(("make", "flags"), KINDS, ids=[make.__name__ for make, _ in KINDS])


@each_kind
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_a_learning_rate_may_be_a_tensor(make, flags, dtype, relative):
    """Torch computes with a float32 learning rate in float32, 1 - ηλ included."""
    if make in (Adam, AdamW):
        flags = flags | {"foreach": False}
    parameter = nn.Parameter(draw(UNITS, N))
    optimizer = make([parameter], lr=torch.tensor(1.0, dtype=dtype), **flags)
    for lr, gradient in gradients():
        weight, terms, exact = take_step(optimizer, parameter, gradient, 1e-3 * lr)
        assert_explains(terms, exact, weight, relative)


def test_betas_may_be_tensors():
    parameter = nn.Parameter(draw(UNITS, N))
    optimizer = Adam([parameter], betas=(torch.tensor(0.8).double(), torch.tensor(0.9).double()), foreach=False)
    for lr, gradient in gradients():
        weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
        assert_explains(terms, exact, weight)


def test_nadam_keeps_its_product_in_the_default_dtype():
    parameter, default = nn.Parameter(draw(UNITS, N)), torch.get_default_dtype()
    optimizer = NAdam([parameter])
    torch.set_default_dtype(torch.float64)
    try:
        for lr, gradient in gradients():
            weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
            assert_explains(terms, exact, weight)
    finally:
        torch.set_default_dtype(default)
    assert optimizer.state[parameter]["mu_product"].dtype == torch.float64


@each_kind
def test_a_restored_optimizer_is_explained_from_its_first_step(make, flags):
    parameter = nn.Parameter(draw(UNITS, N))
    first, second = (make([parameter], lr=1.0, **flags) for _ in range(2))
    for step, (lr, gradient) in enumerate(gradients()):
        weight, terms, exact = take_step(first if step < 7 else second, parameter, gradient, lr)
        assert_explains(terms, exact, weight)
        if step == 6:
            second.load_state_dict(first.state_dict())


@each_kind
def test_float32_weights_are_explained_up_to_the_floors(make, flags):
    parameter = nn.Parameter(draw(UNITS, 400).float())
    optimizer, shares = make([parameter], lr=1.0, **flags), []
    decoupled = twin_flags(make, flags)["decoupled"]
    stores = 1 + decoupled + (make is NAdam)  # number of times that a step rounds W
    for lr, gradient in gradients((UNITS, 400), 20):
        weight, terms, exact = take_step(optimizer, parameter, gradient.float(), 0.1 * lr)
        floor = storage_floor(weight.double().pow(4).sum(1), torch.float32, stores)
        shares.append((terms.total - exact).abs() / (floor + arithmetic_floor(terms, torch.float32)))
    assert 0.05 < torch.stack(shares).max() < 1


@pytest.mark.parametrize("lr", [torch.tensor(1.1e-3), 1.1e-3], ids=["tensor", "float"])
def test_decoupled_decay_is_rounded_as_the_weights_are(lr):
    """All elements are rounded alike: with 1 - ηλ unrounded the result would be off by more than the floors."""
    parameter = nn.Parameter(draw(2, 2000).float())
    optimizer = AdamW([parameter], lr=lr, weight_decay=0.1, foreach=False)
    weight, terms, exact = take_step(optimizer, parameter, torch.zeros(2, 2000), 1.1e-3, units=2)
    floor = storage_floor(weight.double().pow(4).sum(1), torch.float32) + arithmetic_floor(terms, torch.float32)
    assert ((terms.total - exact).abs() < floor).all()
    unrounded = (1 - 1.1e-4) ** 2 - 1
    assert ((unrounded * weight.double().square().sum(1) - exact).abs() > floor).all()


@PROPERTY
@given(
    kind=st.sampled_from(KINDS),
    seed=SEED,
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    lr=st.floats(1e-6, 1),
    decay=st.floats(0, 1),
    scale=st.floats(1e-3, 1e3),
)
def test_any_hyperparameters_are_explained(kind, seed, betas, lr, decay, scale):
    make, flags = kind
    flags = flags | {"weight_decay": decay} | ({"betas": betas} if make not in (RMSprop, Adagrad) else {})
    parameter = nn.Parameter(draw(UNITS, N, seed=seed))
    optimizer = make([parameter], lr=lr, **flags)
    for step in range(5):
        weight, terms, exact = take_step(optimizer, parameter, scale * draw(UNITS, N, seed=seed + step + 1), lr)
        assert_explains(terms, exact, weight, 1e-11)


@pytest.mark.parametrize(
    "rule",
    [
        AdamRule(lr=0.1, step=3.0, betas=(0.8, 0.9), weight_decay=0.1, decoupled=True, dtype=torch.float32),
        NAdamRule(lr=0.1, step=3.0, betas=(0.8, 0.9), weight_decay=0.1, product=0.25),
        RAdamRule(lr=0.1, step=5.0, betas=(0.8, 0.9), weight_decay=0.1),
        RAdamRule(lr=0.1, step=9.0, betas=(0.8, 0.9), weight_decay=0.1, decoupled=True),
        RAdamRule(lr=0.1, step=9.0, betas=(0.8, 0.6)),
        AdamaxRule(lr=0.1, step=3.0, betas=(0.8, 0.9), maximize=True),
        RMSpropRule(lr=0.1, momentum=0.9),
        AdagradRule(lr=0.1, step=3.0, lr_decay=0.1),
        LionRule(lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, decoupled=True),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_numbers_may_be_tensors_as_on_a_device(rule):
    """If reading the numbers would wait for the device, the rule computes with tensors."""
    state = [draw(UNITS, N, seed=2), draw(UNITS, N, seed=3).abs()]
    state = {LionRule: state[:1], AdagradRule: state[1:], RMSpropRule: state[::-1]}.get(type(rule), state)

    def wide(value):
        return torch.tensor(value, dtype=torch.float64)

    names = {field.name for field in dataclasses.fields(rule)} & {"lr", "step", "product"}
    tensors = {name: wide(getattr(rule, name)) for name in names}
    if "betas" in {field.name for field in dataclasses.fields(rule)}:
        tensors["betas"] = tuple(map(wide, rule.betas))
    same = dataclasses.replace(rule, **tensors)
    one, other = (norm_increment(r, draw(UNITS, N), draw(UNITS, N, seed=1), *state) for r in (rule, same))
    for plain, value in zip(one, other, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-13, atol=0)
    assert torch.as_tensor(same.shrink).item() == rule.shrink


def test_lion_may_have_decay_in_the_gradient():
    rule = LionRule(lr=0.1, betas=(0.6, 0.9), weight_decay=0.5)
    weight, gradient, momentum = (draw(UNITS, N, seed=seed) for seed in range(3))
    memories = [[{"m": m, "t": 0} for m in row] for row in momentum.tolist()]
    flags = {"betas": (0.6, 0.9), "weight_decay": 0.5}
    rows = zip(weight.tolist(), gradient.tolist(), memories, strict=True)
    twins = [ref.elementwise_step(ref.lion, *row, 0.1, **flags) for row in rows]
    assert_terms(norm_increment(rule, weight, gradient, momentum), [expected for expected, _ in twins])


def test_the_tiniest_decay_keeps_its_digits():
    """s² - 1 would have 7 correct digits here."""
    rule, weight = AdamRule(lr=1e-6, weight_decay=1e-3, decoupled=True), draw(UNITS, N)
    exact = [float((Fraction(rule.shrink) ** 2 - 1) * ref.exact_dot(w, w)) for w in weight.tolist()]
    decay = norm_increment(rule, weight, torch.zeros_like(weight)).weight_decay
    assert decay.tolist() == pytest.approx(exact, rel=1e-14, abs=0)


@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "decay"])
def test_lion_does_not_move_where_gradient_and_momentum_cancel(decay):
    """sign(0) = 0: such an element contributes nothing, not even to single terms."""
    rule = LionRule(lr=0.1, betas=(0.5, 0.9), weight_decay=decay, decoupled=True)
    weight, gradient, momentum = torch.tensor([[3.0, -4, 5], [-1, 0, 2], [1, 0, -2]]).double().split(1)
    assert all((part == 0).all() for part in rule.parts(weight, gradient, momentum) if part is not None)
    terms = norm_increment(rule, weight, gradient, momentum)
    assert [terms.gradient.item(), terms.momentum.item(), terms.quadratic.item()] == [0, 0, 0]
    assert terms.weight_decay.item() == pytest.approx((0.99**2 - 1) * 50 if decay else 0.0)
