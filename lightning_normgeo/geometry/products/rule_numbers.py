"""Numbers of an update rule that compiled loops and GPU kernels need, for weights that only such loops read."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.products.weight_pass import WeightPass
from lightning_normgeo.geometry.update_rules.elementwise import some
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule

Numbers = tuple[Scalar, ...]


def has_numbers(one: WeightPass) -> bool:
    """Whether a loop exists for the rule and the state of a pass: inner products alone, SGD, and Adam."""
    rule, states = one.rule, len(one.state)
    return rule is None or (type(rule) is SGDRule and states < 2) or (type(rule) is AdamRule and states in (0, 2))


def unscale_of(one: WeightPass) -> Scalar:
    """Return the factor that a gradient is multiplied with; 1 unless its optimizer unscales it inside its step."""
    return 1.0 if one.gradient_scale is None else one.gradient_scale.double().reciprocal()


def numbers_of(one: WeightPass) -> Numbers:
    """Return the numbers of a pass, the factor of the gradient first; device tensors stay tensors.

    SGD: u = (second) g + (third) W + (fourth) b⁻. Adam: λ of coupled decay, v̂ = (old) v⁻ + (new) g̃², ε, and the
    coefficients of g, m⁻ and W in the step.
    """
    rule, unscale = one.rule, unscale_of(one)
    if isinstance(rule, SGDRule) and one.state:
        by_gradient, by_buffer = rule.coefficients
        signed = -by_gradient if rule.maximize else by_gradient
        return unscale, unscale * signed, by_gradient * rule.weight_decay, by_buffer
    if isinstance(rule, AdamRule):
        return unscale, *adam_numbers(rule, rule.step, has_state=bool(one.state))
    return (unscale,)


def adam_numbers(rule: AdamRule, step: Scalar, has_state: bool) -> Numbers:
    """Return the numbers of Adam's loop; ``step`` may be a tensor with one step for each of several weights."""
    beta1, beta2 = rule.betas
    correction, rate = 1 - beta2**step, rule.lr / (1 - beta1**step)
    correction = correction.to(torch.float64) if isinstance(correction, Tensor) else correction  # rounded as it is
    inverse = correction.reciprocal() if isinstance(correction, Tensor) else 1 / correction
    # the optimizer's gradient is g̃ = ±g + λW (minus for maximize); the loop computes ±g̃ = g ± λW, of the same square
    sign = -1.0 if rule.maximize else 1.0
    old, new = beta2 * inverse if has_state else 0.0, (1 - beta2) * inverse
    by_gradient, by_mean = rate * (1 - beta1), rate * beta1 if has_state else 0.0
    by_decay = by_gradient * rule.coupled if some(rule.coupled) else 0.0
    signed = -by_gradient if rule.maximize else by_gradient
    return sign * rule.coupled, old, new, rule.eps, signed, by_mean, by_decay


def loop_of(one: WeightPass) -> int:
    """Return the number of the loop for a pass: 0 for inner products alone, 1 for SGD with momentum, 2 for Adam."""
    if isinstance(one.rule, AdamRule):
        return 2
    return 1 if isinstance(one.rule, SGDRule) and one.state else 0


def on_device(one: WeightPass) -> bool:
    """Whether a number of a pass is a tensor on an accelerator, whose value the host does not know."""
    rule = one.rule
    given: list[object] = [one.gradient_scale]
    if isinstance(rule, AdamRule):
        given += [rule.lr, rule.weight_decay, rule.step, *rule.betas]
    return any(isinstance(number, Tensor) and not number.is_cpu for number in given)
