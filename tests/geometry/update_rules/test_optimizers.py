"""Rules of more optimizers against scalar reference code from the papers: every term, and the optimizer's real step."""

from collections import defaultdict
from functools import partial

import pytest
import pytorch_optimizer
import timm.optim
import torch
from timm.optim.adamw import AdamWLegacy
from timm.optim.mars import Mars
from timm.optim.nadamw import NAdamW
from torch import nn

from lightning_normgeo.geometry import MuonRule, norm_increment, storage_floor, systematic_floor
from lightning_normgeo.geometry.update_rules.registry import describe_update
from support import named_optimizers as zoo
from support import reference as ref
from support import reference_optimizers as twins
from support.described_steps import LRS, assert_terms, set_lr
from support.named_optimizers import set_gradients, take_steps
from support.tensors import draw

BETAS, EPS, DECAY = {"betas": (0.8, 0.9)}, {"eps": 1e-3}, {"weight_decay": 0.1}
ELEMENTWISE = {
    "Adadelta": (partial(torch.optim.Adadelta, rho=0.8, **EPS, **DECAY), twins.adadelta, {"rho": 0.8, **EPS}, False),
    "SGDW": (
        partial(timm.optim.SGDW, momentum=0.9, dampening=0.3, **DECAY),
        twins.sgdw,
        {"momentum": 0.9, "dampening": 0.3, "nesterov": False},
        True,
    ),
    "SGDW nesterov": (
        partial(timm.optim.SGDW, momentum=0.9, nesterov=True, **DECAY),
        twins.sgdw,
        {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
        True,
    ),
    "NAdamW": (partial(NAdamW, **BETAS, **EPS, **DECAY), twins.nadamw, {**BETAS, **EPS}, True),
    "AdEMAMix": (
        partial(pytorch_optimizer.AdEMAMix, betas=(0.8, 0.9, 0.95), alpha=2.0, weight_decouple=True, **EPS, **DECAY),
        twins.ademamix,
        {"betas": (0.8, 0.9, 0.95), "alpha": 2.0, **EPS},
        True,
    ),
    "Adopt": (
        partial(timm.optim.Adopt, clip_exp=0.1, **BETAS, **EPS, **DECAY),
        twins.adopt,
        {**BETAS, **EPS, "exponent": 0.1},
        False,
    ),
}
WHOLE = {
    "LAMB": (
        partial(timm.optim.Lamb, max_grad_norm=1.5, **BETAS, **EPS, **DECAY),
        partial(twins.lamb, limit=1.5, decay=0.1, **BETAS, **EPS),
    ),
    "LARS": (
        partial(timm.optim.Lars, momentum=0.9, trust_coeff=0.3, **DECAY),
        partial(twins.lars, momentum=0.9, decay=0.1, trust=0.3),
    ),
    "MARS": (
        partial(Mars, gamma=0.2, **BETAS, **EPS, **DECAY),
        partial(twins.mars, gamma=0.2, decay=0.1, **BETAS, **EPS),
    ),
    "cautious AdamW": (
        partial(AdamWLegacy, caution=True, **BETAS, **EPS, **DECAY),
        partial(twins.cautious_adamw, decay=0.1, **BETAS, **EPS),
    ),
    "SGDP": (
        partial(timm.optim.SGDP, momentum=0.7, delta=1.0, wd_ratio=0.3, **DECAY),
        partial(twins.sgdp, momentum=0.7, decay=0.1, delta=1.0, ratio=0.3),
    ),
    "Adafactor": (
        partial(torch.optim.Adafactor, eps=(1e-3, 1e-3), **DECAY),
        partial(twins.adafactor, decay=0.1, eps=(1e-3, 1e-3), clip=1.0),
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_terms_are_those_of_the_twin(name):
    make, twin, flags, decoupled = ELEMENTWISE[name]
    parameter = nn.Parameter(draw(3, 4))
    optimizer = make([parameter], lr=1.0)
    memories = [[defaultdict(float) for _ in range(4)] for _ in range(3)]
    for step in range(8):
        lr = LRS[step % len(LRS)]
        set_lr(optimizer, lr)
        set_gradients([parameter], step)
        before, gradient = parameter.tolist(), parameter.grad.tolist()
        (found,) = take_steps(optimizer)
        expected = [
            ref.elementwise_step(twin, w, g, memory, lr, weight_decay=0.1, decoupled=decoupled, **flags)
            for w, g, memory in zip(before, gradient, memories, strict=True)
        ]
        assert_terms(found.terms, [terms for terms, _ in expected])
        assert parameter.flatten().tolist() == pytest.approx([x for _, new in expected for x in new], rel=1e-11)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_tensor_terms_are_those_of_the_twin(name):
    make, twin = WHOLE[name]
    parameter, memory = nn.Parameter(draw(1, 9)), {}
    optimizer = make([parameter], lr=1.0)
    for step in range(8):
        lr = LRS[step % len(LRS)]
        set_lr(optimizer, lr)
        set_gradients([parameter], step)
        before, gradient = ref.floats(parameter), ref.floats(parameter.grad)
        (found,) = take_steps(optimizer)
        terms, new = twin(before, gradient, memory, lr, step + 1)
        assert_terms(found.terms, [terms])
        assert ref.floats(parameter) == pytest.approx(new, rel=1e-7)
        assert zoo.residual(found) < 1e-12


def test_rprop_moves_as_its_twin():
    parameter = nn.Parameter(draw(2, 4))
    optimizer = torch.optim.Rprop([parameter], lr=0.05, step_sizes=(1e-3, 0.08))
    memories = [[defaultdict(float) for _ in range(4)] for _ in range(2)]
    for step in range(8):
        set_gradients([parameter], step)
        before, gradient = parameter.tolist(), parameter.grad.tolist()
        (found,) = take_steps(optimizer)
        flags = {"etas": (0.5, 1.2), "sizes": (1e-3, 0.08)}
        twin, parts = partial(twins.rprop, lr=0.05), zip(before, gradient, memories, strict=True)
        assert_terms(found.terms, [ref.elementwise_step(twin, *row, 1.0, **flags)[0] for row in parts])


def test_asgd_decays_by_its_own_rate():
    """η_{t+1} = η/(1 + λ₀ηt)^α moves the weight, not η."""
    parameter = nn.Parameter(draw(2, 4))
    optimizer = torch.optim.ASGD([parameter], lr=0.1, lambd=0.5, alpha=0.75)
    for step in range(5):
        set_gradients([parameter], step)
        rate = float(torch.tensor(0.1 / (1 + 0.5 * 0.1 * step) ** 0.75, dtype=torch.float32))
        before, gradient = parameter.detach().clone(), parameter.grad.clone()
        (found,) = take_steps(optimizer)
        shrink = 1 - 0.5 * rate
        inner, length = (before * gradient).sum(1), gradient.square().sum(1)
        torch.testing.assert_close(found.terms.gradient, -2 * shrink * rate * inner, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.terms.quadratic, rate**2 * length, rtol=1e-12, atol=0)
        decay = (shrink**2 - 1) * before.square().sum(1)
        torch.testing.assert_close(found.terms.weight_decay, decay, rtol=1e-12, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
def test_asgd_rounds_its_decay_only_where_torch_does(foreach):
    """Foreach operations add λ₀W to the gradient, which rounds it element by element and not the factor 1 - λ₀η."""
    weight = nn.Parameter(draw(64, 256).float())
    optimizer = torch.optim.ASGD([weight], lr=1e-4, lambd=1e-3, foreach=foreach)
    weight.grad = torch.zeros_like(weight)
    rule, _ = describe_update(optimizer, optimizer.param_groups[0], {}, weight.dtype, weight)
    before = weight.detach().double()
    terms = norm_increment(rule, before, torch.zeros_like(before))
    optimizer.step()
    measured = weight.detach().double().square().sum() - before.square().sum()
    random = storage_floor(before.pow(4).sum(1), weight.dtype, rule.stores).square().sum().sqrt()
    systematic = systematic_floor(terms, before.square().sum(1), weight.dtype).sum()
    assert abs(measured - terms.total.sum()) <= random + systematic / 10, (
        "the factor's rounding would be ten times that"
    )


def test_lamb_clips_by_the_gradients_of_its_own_step():
    """New gradients may get the identities of those of the last step."""
    weight = nn.Parameter(draw(8, 6))
    optimizer = timm.optim.Lamb([weight], lr=0.01, max_grad_norm=1.0)
    for step in range(20):
        optimizer.zero_grad()
        ((1 + 5 * step) * weight).square().sum().backward()
        before = weight.detach().clone()
        (found,) = take_steps(optimizer)
        increment = weight.detach().square().sum(1) - before.square().sum(1)
        torch.testing.assert_close(found.terms.total, increment, rtol=1e-9, atol=1e-12)


def test_a_fused_step_takes_the_number_in_a_learning_rate_that_is_a_tensor():
    weight = nn.Parameter(draw(4, 8))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(1e-3), weight_decay=0.1, fused=True)
    for step in range(3):
        set_gradients([weight], step)
        before = weight.detach().clone()
        (found,) = take_steps(optimizer)
        increment = weight.detach().square().sum(1) - before.square().sum(1)
        torch.testing.assert_close(found.terms.total, increment, rtol=1e-10, atol=0)


@pytest.mark.skipif(not zoo.MATRICES_ONLY, reason="torch has no Muon")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_recomputed_bit_for_bit(adjust, nesterov):
    """For scale-invariant weights ⟨W, O⟩ does not vanish and ‖O‖² does not depend on g: eq 16 does not apply."""
    parameter = nn.Parameter(draw(6, 4).float())
    optimizer = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(4):
        set_gradients([parameter], step, scale=10.0**-step)
        rule, state = describe_update(
            optimizer, optimizer.param_groups[0], optimizer.state.get(parameter, {}), torch.float32, parameter
        )
        parts = rule.direction(parameter.detach(), parameter.grad, *state).parts
        turned = (parts.gradient / (rule.lr * rule.adjusted)).to(torch.bfloat16)
        expected = parameter.detach().mul(rule.shrink).add_(turned, alpha=-rule.lr * rule.adjusted)
        (found,) = take_steps(optimizer)
        assert torch.equal(parameter, expected)
        assert 1 < found.terms.quadratic.sum() / (rule.lr * rule.adjusted) ** 2 < 6


@pytest.mark.skipif(not zoo.MATRICES_ONLY, reason="torch has no Muon")
def test_the_defaults_of_muon_are_those_of_torch():
    parameter = nn.Parameter(draw(6, 4).float())
    optimizer = torch.optim.Muon([parameter])
    rule, _ = describe_update(optimizer, optimizer.param_groups[0], {}, torch.float32, parameter)
    default = MuonRule(lr=rule.lr)
    for name in ("momentum", "nesterov", "coefficients", "iterations", "eps"):
        assert getattr(rule, name) == getattr(default, name)
