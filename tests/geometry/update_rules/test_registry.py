"""The registry of optimizers: described classes, their subclasses, and optimizers of users."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

from lightning_normgeo import geometry
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry import (
    AdadeltaRule,
    AdafactorRule,
    AdagradRule,
    AdamaxRule,
    AdamRule,
    ASGDRule,
    ElementwiseRule,
    LionRule,
    MuonRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    RpropRule,
    SGDRule,
    StepParts,
)
from lightning_normgeo.geometry.products import one_pass
from lightning_normgeo.geometry.update_rules import registry
from lightning_normgeo.geometry.update_rules.optimizers.lion import describe_lion
from lightning_normgeo.geometry.update_rules.registry import describe_update, register_optimizer
from support.described_steps import LRS, UNITS, Lion, assert_explains, take_step
from support.tensors import draw

DESCRIBED = {
    SGD: SGDRule,
    Adam: AdamRule,
    AdamW: AdamRule,
    NAdam: NAdamRule,
    RAdam: RAdamRule,
    RMSprop: RMSpropRule,
    Adagrad: AdagradRule,
    Adamax: AdamaxRule,
    Adadelta: AdadeltaRule,
    Rprop: RpropRule,
    ASGD: ASGDRule,
}
NEWER = {"Adafactor": AdafactorRule, "Muon": MuonRule}  # torch 2.4 has neither of them, 2.5 has one
DESCRIBED |= {getattr(torch.optim, name): rule for name, rule in NEWER.items() if hasattr(torch.optim, name)}
ELEMENTWISE = [make for make in DESCRIBED if make.__name__ not in NEWER]
IN_TORCH = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


@pytest.fixture(autouse=True)
def _registry_is_restored(monkeypatch):
    monkeypatch.setattr(registry, "_DESCRIPTIONS", dict(registry._DESCRIPTIONS))


def rule_of(make, **flags):
    """Return the rule of the first step, or None."""
    parameter = nn.Parameter(draw(3, 2))
    optimizer = make([parameter], lr=0.1, **flags)
    described = describe_update(
        optimizer, optimizer.param_groups[0], optimizer.state.get(parameter, {}), parameter=parameter
    )
    return None if described is None else described[0]


def assert_explains_run(optimizer, parameter):
    for step in range(10):
        lr, gradient = LRS[step % len(LRS)], draw(*parameter.shape, seed=step + 1)
        weight, terms, exact = take_step(optimizer, parameter, gradient, lr)
        assert_explains(terms, exact, weight)
    assert (terms.total != 0).all()


# --- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", IN_TORCH, ids=lambda make: make.__name__)
def test_optimizers_of_torch_are_described_or_unknown(make):
    assert type(rule_of(make)) is DESCRIBED.get(make, type(None))


def test_all_that_are_described_are_in_torch():
    assert set(DESCRIBED) <= set(IN_TORCH)
    assert {make.__name__ for make in set(IN_TORCH) - set(DESCRIBED)} == {"LBFGS", "SparseAdam"}


def test_adamw_is_decoupled_and_adam_is_not():
    assert rule_of(AdamW, weight_decay=0.1).decoupled
    assert not rule_of(Adam, weight_decay=0.1).decoupled
    assert rule_of(Adam, weight_decay=0.1, decoupled_weight_decay=True).decoupled


def test_an_adamw_group_without_the_flag_is_decoupled():
    """As in older versions of torch, in which AdamW was a class of its own."""
    optimizer = AdamW([nn.Parameter(draw(3, 2))], lr=0.1, weight_decay=0.1)
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "decoupled_weight_decay"}
    assert describe_update(optimizer, group, {})[0].decoupled


def test_hyperparameters_are_read_now():
    parameter = nn.Parameter(draw(3, 2))
    optimizer = AdamW([{"params": [parameter], "lr": torch.tensor(0.5)}], maximize=True, foreach=False)
    rule, state = describe_update(optimizer, optimizer.param_groups[0], {})
    optimizer.param_groups[0]["lr"].fill_(0.1)
    assert (rule.lr, rule.maximize, rule.step, state) == (0.5, True, 1.0, ())


@pytest.mark.parametrize("make", ELEMENTWISE, ids=lambda make: make.__name__)
def test_the_state_is_read_before_the_step_and_kept(make):
    """Torch writes in place: numbers of the rule are copied, tensors are read before the step."""
    parameter = nn.Parameter(draw(3, 2))
    optimizer = make([parameter], lr=0.1)
    rules_seen = []
    for _ in range(3):
        parameter.grad = draw(3, 2, seed=1)
        group, state = optimizer.param_groups[0], optimizer.state.get(parameter, {})
        rules_seen.append(describe_update(optimizer, group, state, parameter=parameter)[0])
        optimizer.step()
    if make not in (SGD, RMSprop, Adadelta, Rprop, ASGD):
        assert [float(rule.step) for rule in rules_seen] == [1, 2, 3]
    if make is NAdam:
        products = [float(rule.product) for rule in rules_seen]
        assert products[0] == 1
        assert products[1] > products[2]


# --- subclasses and decorations ---------------------------------------------------------------------------------------


class Renamed(SGD):
    """A subclass that keeps the step of its parent."""


class Overridden(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Mixin:
    def step(self, closure=None):
        return None


class Mixed(Mixin, Adam):
    """A subclass whose inherited step is overridden by another base class."""


class Wrapped(RMSprop):
    @functools.wraps(RMSprop.step)
    def step(self, closure=None):
        return RMSprop.step(self, closure)


@pytest.mark.parametrize(
    ("make", "rule"), [(Renamed, SGDRule), (Overridden, None), (Mixed, None), (Wrapped, RMSpropRule)]
)
def test_a_subclass_is_described_where_it_keeps_step(make, rule):
    assert type(rule_of(make)) is (rule or type(None))


@pytest.mark.parametrize("make", ELEMENTWISE, ids=lambda make: make.__name__)
def test_a_decorated_step_is_the_same(make):
    """Schedulers replace optimizer.step on the instance; hooks and profilers wrap it on the class."""
    parameter = nn.Parameter(draw(UNITS, 4))
    optimizer = make([parameter], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert "step" in vars(optimizer)
    optimizer.register_step_post_hook(lambda *args: None)
    assert_explains_run(optimizer, parameter)


# --- one's own --------------------------------------------------------------------------------------------------------


def no_rule(group, state, dtype):
    return None


def test_lion_is_unknown_until_it_is_registered():
    assert rule_of(Lion) is None
    register_optimizer(Lion, describe_lion)
    rule = rule_of(Lion, weight_decay=0.1)
    assert type(rule) is LionRule
    assert (rule.decoupled, rule.weight_decay, rule.betas) == (True, 0.1, (0.9, 0.99))


def test_registering_again_replaces():
    register_optimizer(Lion, describe_lion)
    register_optimizer(Lion, no_rule)
    assert rule_of(Lion) is None
    register_optimizer(SGD, no_rule)
    assert rule_of(SGD) is None
    assert rule_of(Renamed) is None


class LateLion(Lion):
    """A subclass that keeps the step of its parent."""


class OtherLion(Lion):
    def step(self, closure=None):
        return super().step(closure)


def test_subclasses_of_a_registered_class_inherit_with_step():
    register_optimizer(Lion, describe_lion)
    assert type(rule_of(LateLion)) is LionRule
    assert rule_of(OtherLion) is None
    register_optimizer(OtherLion, describe_lion)
    assert type(rule_of(OtherLion)) is LionRule


def test_the_nearest_registered_class_counts():
    register_optimizer(Lion, describe_lion)
    register_optimizer(LateLion, no_rule)
    assert rule_of(LateLion) is None
    assert type(rule_of(Lion)) is LionRule


def test_a_subclass_of_a_known_one_may_be_registered():
    assert rule_of(Overridden) is None
    register_optimizer(Overridden, registry.RECIPES["torch.optim.adamw.AdamW"])
    assert rule_of(Overridden).decoupled


@pytest.mark.parametrize(
    "wrong",
    [SGD([nn.Parameter(draw(1))]), nn.Linear, "Adam", SGD.step],
    ids=["an instance", "a module", "a name", "a step"],
)
def test_only_classes_of_optimizers_can_be_registered(wrong):
    before = dict(registry._DESCRIPTIONS)
    with pytest.raises(ConfigurationError, match=r"(?s)^register_optimizer\(.*\): give the class, derived from"):
        register_optimizer(wrong, describe_lion)
    assert before == registry._DESCRIPTIONS


class AdaBelief(torch.optim.Optimizer):
    """Zhuang et al. 2020, with decoupled decay: Adam that divides by the deviation of g from its average."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                state = self.state[parameter]
                t = state["t"] = state.get("t", 0) + 1
                m = state.setdefault("m", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - beta1)
                s = state.setdefault("s", torch.zeros_like(parameter)).lerp_((parameter.grad - m).square(), 1 - beta2)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(lr * m / (1 - beta1**t) / ((s / (1 - beta2**t)).sqrt() + group["eps"]))


@dataclass(frozen=True, kw_only=True)
class AdaBeliefRule(ElementwiseRule):
    betas: tuple[float, float]
    eps: float
    step: int

    def parts(self, weight, gradient, *state):
        (beta1, beta2), t = self.betas, self.step
        first, second = state or (torch.zeros_like(weight), torch.zeros_like(weight))
        apart = gradient - (beta1 * first + (1 - beta1) * gradient)
        second = beta2 * second + (1 - beta2) * apart.square()
        rate = self.lr / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + self.eps)
        return StepParts(rate * (1 - beta1) * gradient, rate * beta1 * first)


def describe_adabelief(group, state, dtype):
    numbers = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
    rule = AdaBeliefRule(decoupled=True, dtype=dtype, step=state.get("t", 0) + 1, **numbers)
    return rule, (state["m"], state["s"]) if state else ()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["", "decay"])
def test_a_rule_of_ones_own_explains_every_step(weight_decay):
    register_optimizer(AdaBelief, describe_adabelief)
    parameter = nn.Parameter(draw(UNITS, 4))
    assert_explains_run(AdaBelief([parameter], betas=(0.8, 0.9), weight_decay=weight_decay), parameter)


@pytest.mark.parametrize(
    ("make", "flags", "stores"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, 1),
        (torch.optim.Adam, {"weight_decay": 0.1}, 1),
        (torch.optim.AdamW, {"weight_decay": 0.1}, 2),
        (torch.optim.AdamW, {"weight_decay": 0.0}, 1),
        (torch.optim.NAdam, {}, 2),
        (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 3),
    ],
)
def test_rules_know_how_often_a_step_rounds_the_weight(make, flags, stores):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make([parameter], lr=0.1, **flags)
    rule, _ = describe_update(optimizer, optimizer.param_groups[0], {})
    assert rule.stores == stores


def test_rules_of_known_optimizers_say_whether_rows_can_be_cut():
    """A rule that looks at whole rows must not say so; that of a subclass, which may, does not inherit it."""
    rules = {value for value in vars(geometry).values() if isinstance(value, type) and value.__name__.endswith("Rule")}
    bases = {geometry.UpdateRule, geometry.ElementwiseRule}
    whole = {rule for rule in rules if issubclass(rule, geometry.WholeTensorRule)}
    assert {rule for rule in rules if vars(rule).get("additive")} == rules - bases - whole
    assert not one_pass.is_additive(type("Mine", (geometry.AdamRule,), {})(lr=0.1))
    assert one_pass.is_additive(geometry.AdamRule(lr=0.1))
