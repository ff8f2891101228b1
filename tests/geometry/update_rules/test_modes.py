"""Modes of optimizers: complex weights, CUDA's fused kernel, 16 bits, parts of a weight; or no formula."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo.geometry import (
    AdamRule,
    SGDRule,
    arithmetic_floor,
    as_rows,
    equilibrium_angle,
    identity_terms,
    norm_increment,
    steps_to_equilibrium,
    storage_floor,
    update_products,
)
from lightning_normgeo.geometry.update_rules import registry
from lightning_normgeo.geometry.update_rules.optimizers import adam
from lightning_normgeo.geometry.update_rules.registry import runs_fused_kernel
from lightning_normgeo.probes import explain, shrink_of
from lightning_normgeo.probes.explain import plan
from support import named_optimizers as zoo
from support.described_steps import UNITS, assert_explains, take_step
from support.named_optimizers import EXPLAINED, increments, network, residual, rows, set_gradients, take_steps
from support.tensors import PROPERTY, SEED, draw

# --- complex weights --------------------------------------------------------------------------------------------------

COMPLEX = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.9, centered=True),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, initial_accumulator_value=0.1),
    "Adadelta": lambda p, lr: torch.optim.Adadelta(p, lr=lr, weight_decay=0.1),
    "Rprop": lambda p, lr: torch.optim.Rprop(p, lr=lr),
    "ASGD": lambda p, lr: torch.optim.ASGD(p, lr=lr, weight_decay=0.1),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p, lr: torch.optim.RAdam(p, lr=lr, weight_decay=0.1),
}


def complex_network(seed=0, dtype=torch.complex128):
    real = draw(3, 4, 2, seed=seed), draw(2, 3, 2, 2, seed=seed + 1)
    return [nn.Parameter(torch.view_as_complex(part).to(dtype)) for part in real]


def set_complex_gradients(parameters, seed):
    for k, parameter in enumerate(parameters):
        gradient = torch.view_as_complex(draw(*parameter.shape, 2, seed=seed + 10 * k))
        parameter.grad = gradient.to(parameter.dtype)


@pytest.mark.parametrize("name", COMPLEX)
@settings(PROPERTY, max_examples=10)
@given(seed=SEED, lr=st.floats(1e-4, 0.5))
def test_complex_weights_are_explained_as_pairs_of_real_numbers(name, seed, lr):
    parameters = complex_network(seed)
    optimizer = COMPLEX[name](parameters, lr)
    for step in range(3):
        set_complex_gradients(parameters, seed + step)
        for found in take_steps(optimizer):
            assert residual(found) < 1e-12


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_weights_of_single_precision_stay_within_the_floors(name):
    parameters = complex_network(dtype=torch.complex64)
    optimizer = COMPLEX[name](parameters, 0.01)
    for step in range(3):
        set_complex_gradients(parameters, step)
        planned = plan(parameters[0], rows, optimizer, optimizer.param_groups[0])
        assert planned.dtype == torch.float32
        assert all(zoo.over_floors(found) < 1 for found in take_steps(optimizer))


@given(seed=SEED)
@PROPERTY
def test_rows_of_complex_tensors_are_real(seed):
    weight = torch.view_as_complex(draw(4, 3, 5, 2, seed=seed))
    gradient = torch.view_as_complex(draw(4, 3, 5, 2, seed=seed + 1))
    for dim, units in ((0, 4), (0, 2), (1, 3), (0, 1)):
        w, g = as_rows(weight, units, dim), as_rows(gradient, units, dim)
        assert w.dtype == torch.float64
        moved = weight.movedim(dim, 0).reshape(units, -1)
        torch.testing.assert_close(w.square().sum(1), moved.abs().square().sum(1))
        inner = (moved.conj() * gradient.movedim(dim, 0).reshape(units, -1)).real.sum(1)
        torch.testing.assert_close((w * g).sum(1), inner, rtol=1e-12, atol=1e-12)
    assert as_rows(weight, 4).data_ptr() == weight.data_ptr()
    conjugate = as_rows(weight.conj(), 4)
    assert torch.equal(conjugate.view(-1, 2)[:, 1], -weight.imag.reshape(-1))


# --- precision of decoupled decay -------------------------------------------------------------------------------------

FUSED_DECAYS = [(3e-4, 0.01), (3e-4, 0.05), (1e-4, 0.1), (1.1e-3, 0.1)]


def fused_cuda_decay(weight, lr, decay):
    """Return the decay as torch's CUDA kernel computes it: param -= lr * weight_decay * param, scalars in double."""
    return (weight.double() - lr * decay * weight.double()).to(weight.dtype)


@pytest.mark.parametrize(("lr", "decay"), FUSED_DECAYS)
def test_decay_in_double_is_not_rounded_by_the_rule(lr, decay):
    weight = 0.05 * draw(1, 200_000).float()
    exact = increments(weight, fused_cuda_decay(weight, lr, decay))
    off = {}
    for dtype in (torch.float64, torch.float32):
        rule = AdamRule(lr=lr, weight_decay=decay, decoupled=True, dtype=dtype)
        terms = norm_increment(rule, weight, torch.zeros_like(weight))
        floor = storage_floor(weight.double().pow(4).sum(1), torch.float32) + arithmetic_floor(terms, torch.float32)
        off[dtype] = ((terms.total - exact).abs() / floor).item()
    assert off[torch.float64] < 1
    assert off[torch.float32] > 3 * off[torch.float64]


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ({"fused": True}, "cuda", True),
        ({"fused": True}, "cpu", False),
        ({"fused": None}, "cuda", False),
        ({"foreach": True}, "cuda", False),
        ({}, "cuda", False),
    ],
)
def test_only_the_fused_kernel_of_cuda_decays_in_double(flags, device, expected, monkeypatch):
    assert runs_fused_kernel(flags, torch.device(device)) is expected
    parameter = nn.Parameter(draw(3, 4).float())
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=3e-4, weight_decay=0.05)
    group = optimizer.param_groups[0] | flags
    monkeypatch.setattr(registry, "runs_fused_kernel", lambda group, _: runs_fused_kernel(group, torch.device(device)))
    rule = plan(parameter, rows, optimizer, group).reads.rule
    assert rule.dtype == (torch.float64 if expected else torch.float32)
    assert (rule.shrink == 1 - 3e-4 * 0.05) is expected


def fused_step(weight, gradient, state, step, betas, rounded, lr=1e-3, decay=0.01, eps=1e-8):
    """AdamW's step as the fused CUDA kernel takes it, in float32; since torch 2.11 with rounded β and βᵗ."""
    beta1, beta2 = (float(torch.tensor(beta)) for beta in betas) if rounded else betas
    corrections = [1 - (float(torch.tensor(beta**step)) if rounded else beta**step) for beta in (beta1, beta2)]
    mean, square = state
    weight = weight - (lr * decay) * weight
    mean.copy_((beta1 * mean.double() + (1 - beta1) * gradient.double()).float())
    square.copy_((beta2 * square.double() + (1 - beta2) * gradient.double().square()).float())
    root = (square.sqrt() / corrections[1] ** 0.5).float() + eps
    return weight - (lr / corrections[0]) * mean / root


@pytest.mark.parametrize("rounded", [True, False], ids=["torch 2.11", "before"])
def test_the_fused_kernel_rounds_beta(rounded, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0" if rounded else "2.10.1"))
    generator, n, off = torch.Generator().manual_seed(0), 300_000, {}
    weight, state = 0.02 * torch.randn(1, n, generator=generator), torch.zeros(2, 1, n)
    for step in range(1, 6):
        gradient = 1e-3 * torch.randn(1, n, generator=generator)
        exact = AdamRule(lr=1e-3, weight_decay=0.01, decoupled=True, step=float(step), dtype=torch.float64)
        narrow = replace(exact, step=torch.tensor(float(step))) if rounded else exact
        rules = {"kernel": adam.as_fused_kernel(narrow, torch.float32), "exact": exact}
        terms = {name: norm_increment(rule, weight, gradient, *state.clone()) for name, rule in rules.items()}
        after = fused_step(weight, gradient, state, step, exact.betas, rounded)
        found, weight = increments(weight, after), after
        floor = storage_floor(weight.double().pow(4).sum(1), torch.float32)
        floor += arithmetic_floor(terms["kernel"], torch.float32)
        off |= {
            name: max(off.get(name, 0.0), ((one.total - found).abs() / floor).item()) for name, one in terms.items()
        }
    assert off["kernel"] < 1
    assert (off["exact"] > 3) is rounded
    doubled = adam.as_fused_kernel(narrow, torch.float64)
    assert doubled.betas == exact.betas
    assert not isinstance(doubled.step, torch.Tensor) or doubled.step.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_multiplied_in_float32(dtype):
    """1 - ηλ is not rounded to the weights' dtype, in which it might become one."""
    parameter = nn.Parameter(draw(1, 10_000).to(dtype))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.3, eps=1e-3, foreach=False)
    parameter.grad = torch.zeros_like(parameter)
    rule, before = plan(parameter, rows, optimizer, optimizer.param_groups[0]).reads.rule, parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, (before.float() * rule.shrink).to(dtype))
    assert not torch.equal(parameter, (before.double() * torch.tensor(rule.shrink).to(dtype)).to(dtype))


def test_where_torch_rounds_decay_to_16_bits_nothing_is_claimed():
    parameter = nn.Parameter(draw(1, 10).bfloat16())
    parameter.grad = torch.zeros_like(parameter)
    for decay, known in ((0.3, False), (0.0, True)):
        optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=decay, foreach=True)
        rule = plan(parameter, rows, optimizer, optimizer.param_groups[0]).reads.rule
        assert (rule is not None) is known


# --- hyperparameters as tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam"])
def test_every_hyperparameter_may_be_a_tensor(name):
    make = {
        "SGD": lambda p, t: torch.optim.SGD(p, lr=t(0.1), momentum=t(0.9), weight_decay=t(0.1), foreach=False),
        "Adam": lambda p, t: torch.optim.Adam(p, lr=t(0.1), betas=(t(0.8), t(0.9)), weight_decay=t(0.1), foreach=False),
        "AdamW": lambda p, t: torch.optim.AdamW(
            p, lr=t(0.1), betas=(t(0.8), t(0.9)), weight_decay=t(0.1), foreach=False
        ),
    }[name]
    parameters = network((3, 4))
    optimizer = make(parameters, lambda value: torch.tensor(value, dtype=torch.float64))
    for step in range(3):
        set_gradients(parameters, step)
        for found in take_steps(optimizer):
            assert residual(found) < 1e-12
        assert equilibrium_angle(found.rule) is None or float(equilibrium_angle(found.rule)) > 0


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"differentiable": True, "foreach": False}])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_implementations_are_explained(make, flags):
    if make is torch.optim.Adagrad and "fused" in flags:
        flags = {"fused": True, "foreach": False}
    parameters = network((3, 4), (2, 2, 3, 3))
    for parameter in parameters:
        parameter.requires_grad_(not flags.get("differentiable", False))  # torch then requires non-leaf tensors
    optimizer = make(parameters, lr=0.05, weight_decay=0.1, maximize=True, **flags)
    for step in range(3):
        set_gradients(parameters, step)
        for found in take_steps(optimizer):
            # Adam's numbers are then float32 tensors, which causes errors of this size, and once 6e-6
            assert residual(found) < (2e-7 if "differentiable" in flags else 1e-12)


# --- no learning rate, no equilibrium ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_without_a_learning_rate_there_is_no_equilibrium(lr, dampening):
    """For example in the first step of a warm-up, or in a group frozen by a learning rate of zero."""
    for rule in (
        SGDRule(lr=lr, weight_decay=0.1),
        SGDRule(lr=lr, weight_decay=0.1, momentum=0.9, dampening=dampening, first=False),
        AdamRule(lr=lr, weight_decay=0.1, decoupled=True),
    ):
        assert equilibrium_angle(rule) is None
        assert steps_to_equilibrium(rule) is None


def test_dampening_of_one_lets_no_gradient_in():
    rule = SGDRule(lr=0.1, weight_decay=0.1, momentum=0.9, dampening=1.0, first=False)
    assert equilibrium_angle(rule) is steps_to_equilibrium(rule) is None
    assert steps_to_equilibrium(SGDRule(lr=0.1, weight_decay=0.1, dampening=1.0)) == pytest.approx(25)


# --- parts of a weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm LAMB", "timm AdamW cautious", "Adafactor", "timm SGDP"])
def test_a_part_of_a_divided_weight_has_no_formula_of_a_whole_one(name, monkeypatch):
    parameters = network((4, 6))
    optimizer = EXPLAINED[name](parameters, lr=0.01)
    set_gradients(parameters, 0)
    assert plan(parameters[0], rows, optimizer, optimizer.param_groups[0]).reads.known
    monkeypatch.setattr(explain, "is_sharded", lambda tensor: True)
    reads = plan(parameters[0], rows, optimizer, optimizer.param_groups[0]).reads
    assert reads.rule is None
    assert reads.known == ()
    adamw = torch.optim.AdamW(parameters, lr=0.01)
    assert plan(parameters[0], rows, adamw, adamw.param_groups[0]).reads.rule is not None


# --- the identity that needs no formula -------------------------------------------------------------------------------


@PROPERTY
@given(seed=SEED, lr=st.floats(0, 0.5), decay=st.floats(0, 1), size=st.floats(1e-6, 10))
def test_the_identity_splits_every_step_as_the_rule_of_adamw_does(seed, lr, decay, size):
    parameter = nn.Parameter(draw(UNITS, 4, seed=seed))
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=decay)
    shrink = shrink_of(optimizer, optimizer.param_groups[0])
    weight, terms, exact = take_step(optimizer, parameter, size * draw(UNITS, 4, seed=seed + 1), lr)
    products = update_products(weight, as_rows(parameter, UNITS))
    found = identity_terms(products.weight_sq, products.weight_update, products.update_sq, shrink)
    assert_explains(found, exact, weight)
    for name in ("gradient", "weight_decay", "quadratic"):
        slack = 1e-14 * weight.square().sum(1)  # the part of the step lost in storing W⁺
        assert ((getattr(found, name) - getattr(terms, name)).abs() <= slack + 1e-12 * terms.quadratic).all()
    assert (found.momentum == 0).all()
    assert (found.quadratic >= 0).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), 0.95),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5), 1.0),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True), 0.95),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), 1.0),
        (lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.5), 1.0),
        (lambda p: torch.optim.LBFGS(p, lr=0.1), 1.0),
        (lambda p: zoo.pytorch_optimizer.SOAP(p, lr=0.1, weight_decay=0.5), 0.95),
        (lambda p: zoo.pytorch_optimizer.Lamb(p, lr=0.1, weight_decay=0.5, weight_decouple=True), 0.95),
        (lambda p: zoo.pytorch_optimizer.Lamb(p, lr=0.1, weight_decay=0.5, weight_decouple=False), 1.0),
        (lambda p: zoo.pytorch_optimizer.Lion(p, lr=0.1, weight_decay=0.5, fixed_decay=True), 0.5),
        (lambda p: zoo.pytorch_optimizer.Prodigy(p, lr=0.1, weight_decay=0.5, weight_decouple=True), 1.0),
        (lambda p: zoo.timm.optim.Lion(p, lr=0.1, weight_decay=0.5, corrected_weight_decay=True), 0.95),
    ],
)
def test_what_decay_shrinks_is_known_from_groups_and_classes(make, expected):
    optimizer = make(network((3, 4)))
    assert shrink_of(optimizer, optimizer.param_groups[0]) == pytest.approx(expected)


@pytest.mark.parametrize("make", [zoo.pytorch_optimizer.SOAP, zoo.timm.optim.Adan, zoo.timm.optim.RMSpropTF])
def test_the_identity_holds_for_optimizers_without_a_formula(make):
    parameters = network((3, 4))
    optimizer = make(parameters, lr=0.05, weight_decay=0.1)
    for step in range(4):
        set_gradients(parameters, step)
        before = rows(parameters[0].detach().clone())
        shrink = shrink_of(optimizer, optimizer.param_groups[0])
        optimizer.step()
        products = update_products(before, rows(parameters[0]))
        found = identity_terms(products.weight_sq, products.weight_update, products.update_sq, shrink)
        assert_explains(found, increments(before, rows(parameters[0])), before)
        assert (found.weight_decay != 0).any() == (shrink != 1 and bool((products.update_sq > 0).all()))


def test_corrected_decay_follows_the_square_of_the_learning_rate():
    optimizer = zoo.timm.optim.Lion(network((3, 4)), lr=0.1, weight_decay=0.5, corrected_weight_decay=True)
    optimizer.param_groups[0]["lr"] = 0.05
    assert math.isclose(shrink_of(optimizer, optimizer.param_groups[0]), 1 - 0.05**2 / 0.1 * 0.5)
