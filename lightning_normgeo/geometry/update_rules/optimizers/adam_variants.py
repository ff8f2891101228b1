"""Descendants of Adam: AdEMAMix, ADOPT and LaProp."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, average
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.recipe import (
    Described,
    Group,
    Recipe,
    State,
    averages,
    moments,
    pair,
    recipe,
    scalar,
    scalar_dtype,
    shared,
)
from lightning_normgeo.geometry.update_rules.timm_options import (
    ADAM_STATE,
    TIMM_OPTIONS,
    with_caution,
    with_decoupled_decay,
)


@dataclass(frozen=True, kw_only=True)
class AdEMAMixRule(AdamRule):
    r"""AdEMAMix: Adam with a second, slow momentum, A = (m̂₁ + αm₂)/(√v̂ + ε) (Pagliardini et al. 2024).

    M comes from both momenta. The state is (m₁⁻, v⁻, m₂⁻), and empty before the first step.

    Args:
        alpha: α at this step.
        slow: β₃ at this step.
    """

    alpha: float = 5.0
    slow: float = 0.9999
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1, beta2 = self.betas
        first, second, late = state or (None, None, None)
        gradient, full = self.full(weight, gradient)
        by = (average(second, full.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
        correction = 1 - beta1**self.step
        rate = (1 - beta1) / correction + self.alpha * (1 - self.slow)
        parts = self.divided(weight, gradient, None, (self.lr * rate, 0.0), by)
        if first is None or late is None:
            return parts
        momenta = first * (beta1 / correction) + late * (self.alpha * self.slow)
        return parts._replace(momentum=momenta * self.lr / by)


@dataclass(frozen=True, kw_only=True)
class AdoptRule(AdamRule):
    r"""ADOPT: Adam that divides g by the v of the previous step before averaging it (Taniguchi et al. 2024).

    W⁺ = sW - ηm with m = β₁m⁻ + (1-β₁)n and n = g̃/max(√v⁻, ε), clipped to ±c. A weight's first step moves nothing, and
    applies no decoupled decay. The state is (m⁻, v⁻), and empty before the first step.

    Args:
        bound: c at this step; None without clipping. Default: None.
    """

    bound: float | None = None
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        if not state:
            return StepParts(torch.zeros_like(weight))
        beta1, (first, second) = self.betas[0], state
        gradient, full = self.full(weight, gradient)
        by = second.sqrt().clamp_min(self.eps)
        if self.bound is not None:
            by = torch.maximum(by, full.abs() / self.bound)  # |n| = c where it is clipped
        return self.divided(weight, gradient, first, (self.lr * (1 - beta1), 0.0), by)._replace(
            momentum=first * (self.lr * beta1)
        )


@dataclass(frozen=True, kw_only=True)
class LaPropRule(AdamRule):
    r"""LaProp: momentum of the scaled gradient, W⁺ = s(W - ρm), m = β₁m⁻ + η(1-β₁)g/(√v̂ + ε) (Ziyin et al. 2020).

    As in timm, decay comes last. State as for Adam.

    Args:
        size: ρ.
        correction: the number that v is divided by to get v̂.
    """

    size: Scalar = 1.0
    correction: Scalar = 1.0
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G and M."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, _ = self.full(weight, gradient)
        by = (average(second, gradient.square(), beta2) / self.correction).sqrt() + self.eps
        rate = self.size * self.shrink
        return StepParts(
            gradient * (rate * self.lr * (1 - beta1)) / by, None if first is None else first * (rate * beta1)
        )


def _adopt(group: Group, state: State, dtype: torch.dtype) -> Described:
    step, exponent = scalar(state["step"] + 1 if state else 1.0), group["clip_exp"]
    numbers = with_decoupled_decay(
        group if group["decoupled"] else {**group, "corrected_weight_decay": False}, dtype, True
    )
    rule = AdoptRule(
        **{**numbers, "decoupled": bool(group["decoupled"] and state)},
        **moments(group, state),
        bound=None if exponent is None or not state else (step - 1) ** exponent,
    )
    return with_caution(rule, group), averages(state, *ADAM_STATE)


def _laprop(group: Group, state: State, dtype: torch.dtype) -> Described:
    numbers, (beta1, beta2) = with_decoupled_decay(group, dtype, True), group["betas"]
    mean_lr = scalar(state["exp_avg_lr_1"] if state else 0.0) * beta1 + (1 - beta1) * numbers["lr"]
    start = torch.zeros((), dtype=scalar_dtype())
    rule = LaPropRule(
        **numbers,
        **moments(group, state),
        size=numbers["lr"] / mean_lr if mean_lr != 0 else 0.0,
        correction=scalar((state["exp_avg_lr_2"] if state else start) * beta2 + (1 - beta2)),
    )
    return with_caution(rule, group), averages(state, *ADAM_STATE)


def _ademamix(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if group.get("fixed_decay") and group["weight_decay"]:
        return None  # decay by 1 - λ, independent of η, which the rule does not cover
    step, warmup = group.get("step", 0) + 1, group["t_alpha_beta3"]
    (beta1, _, slow), alpha = group["betas"], group["alpha"]
    if warmup is not None:
        share, fast, late = step / warmup, math.log(beta1), math.log(slow)
        alpha = min(share * alpha, alpha)
        slow = min(math.exp(fast * late / ((1.0 - share) * late + share * fast)), slow)
    rule = AdEMAMixRule(
        **{**shared(group, dtype), "decoupled": bool(group["weight_decouple"])},
        betas=pair(group["betas"]),
        eps=group["eps"],
        step=step,
        alpha=alpha,
        slow=slow,
    )
    return rule, averages(state, *ADAM_STATE, "exp_avg_slow")


RECIPES: dict[str, Recipe] = {
    "timm.optim.adopt.Adopt": recipe(_adopt, f"{TIMM_OPTIONS} clip_exp decoupled"),
    "timm.optim.laprop.LaProp": recipe(_laprop, TIMM_OPTIONS),
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix": recipe(
        _ademamix,
        "lr betas weight_decay weight_decouple fixed_decay alpha t_alpha_beta3 eps",
        refuses="cautious stable_adamw",
        maximize=attrgetter("maximize"),
    ),
}
