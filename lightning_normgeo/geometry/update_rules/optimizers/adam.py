"""Adam of torch and its close relatives: AdamW, NAdam, RAdam, Adamax, and NAdamW of timm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts, arithmetic_dtype, average
from lightning_normgeo.geometry.update_rules.recipe import (
    Describe,
    Described,
    Group,
    Recipe,
    State,
    averages,
    moments,
    recipe,
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
class AdamRule(ElementwiseRule):
    r"""torch.optim.Adam and AdamW: W⁺ = sW - ηA with A = m̂ / (√v̂ + ε) (Kingma & Ba 2015, Loshchilov & Hutter 2019).

    g̃ = g + λW and s = 1 for Adam, g̃ = g and s = 1 - ηλ for AdamW (decoupled). With D = √v̂ + ε, v̂ after the step:

    .. math:: G = \frac{\eta(1-\beta_1)}{1-\beta_1^t}\frac{g}{D},\quad M = \frac{\eta\beta_1}{1-\beta_1^t}\frac{m^-}{D},
              \quad \Lambda = \frac{\eta(1-\beta_1)}{1-\beta_1^t}\frac{\lambda W}{D}

    The state is (m⁻, v⁻) before the step, with amsgrad also the running maximum of v; it is empty before the first
    step.

    Args:
        betas: (β₁, β₂). Default: (0.9, 0.999).
        eps: ε. Default: 1e-8.
        step: number t of this step, from 1. Rules that differ in it alone are equal: :meth:`terms` does not use it.
    """

    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: float = 1e-8
    step: Scalar = field(default=1.0, compare=False)
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1, beta2 = self.betas
        first, second, *maximum = state or (None, None)
        gradient, full = self.full(weight, gradient)
        second = average(second, full.square(), beta2)
        second = torch.maximum(maximum[0], second) if maximum and maximum[0] is not None else second
        by = second.div_(1 - beta2**self.step).sqrt_().add_(self.eps)
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1), rate * beta1), by)


@dataclass(frozen=True, kw_only=True)
class NAdamRule(AdamRule):
    r"""torch.optim.NAdam: Adam with Nesterov's momentum (Dozat 2016).

    :math:`\mu_t = \beta_1(1 - 0.96^{t\psi}/2)`. The gradient enters the step directly and through m. State as for Adam.

    Args:
        momentum_decay: ψ. Default: 4e-3.
        product: Π μ up to the step before this one; a tensor is multiplied in its own dtype, as in torch.
    """

    momentum_decay: float = 4e-3
    product: Scalar = 1.0
    additive: ClassVar[bool] = True

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: gradient and momentum are subtracted separately."""
        return super().stores + 1

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, full = self.full(weight, gradient)
        by = (average(second, full.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
        now, after = (beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay)) for t in (self.step, self.step + 1))
        product = self.product * now
        product = product.to(weight.dtype) if isinstance(product, Tensor) else product
        by_average = self.lr * after / (1 - product * after)
        rates = (self.lr * (1 - now) / (1 - product) + by_average * (1 - beta1), by_average * beta1)
        return self.divided(weight, gradient, first, rates, by)


@dataclass(frozen=True, kw_only=True)
class RAdamRule(AdamRule):
    r"""torch.optim.RAdam: Adam that divides by √v̂ only once its variance is tractable (Liu et al. 2020).

    :math:`\rho_t = \rho_\infty - 2t\beta_2^t/(1-\beta_2^t)`, :math:`\rho_\infty = 2/(1-\beta_2) - 1`. For
    :math:`\rho_t > 5` the step is Adam's times a rectification factor, otherwise it is ηm̂. State as for Adam.
    """

    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, full = self.full(weight, gradient)
        correction = 1 - beta2**self.step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * self.step * beta2**self.step / correction
        scale = correction**0.5 / (average(second, full.square(), beta2).sqrt() + self.eps)
        if isinstance(length, Tensor):
            rectified = torch.where(length > 5, _rectification(length, longest) * scale, 1.0)
        else:  # evaluated above 5 only: it has a pole at ρ∞ = 4, which is β₂ = 0.6
            rectified = _rectification(length, longest) * scale if length > 5 else torch.ones_like(scale)
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1), rate * beta1), 1 / rectified)


@dataclass(frozen=True, kw_only=True)
class AdamaxRule(AdamRule):
    r"""torch.optim.Adamax: Adam with D = max(β₂D⁻, |g̃| + ε) (Kingma & Ba 2015, section 7.1). The state is (m⁻, D⁻)."""

    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1, beta2 = self.betas
        first, largest = state or (None, None)
        gradient, full = self.full(weight, gradient)
        by = full.abs() + self.eps
        by = by if largest is None else torch.maximum(largest * beta2, by)
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1), rate * beta1), by)


@dataclass(frozen=True, kw_only=True)
class NAdamWRule(AdamRule):
    """timm's NAdamW: Adam whose step averages g into m once more. It differs from torch's NAdam. State as for Adam."""

    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G and M."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, full = self.full(weight, gradient)
        by = (average(second, full.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1) * (1 + beta1), rate * beta1**2), by)


def as_fused_kernel(rule: AdamRule, dtype: torch.dtype) -> AdamRule:
    """Return a rule as torch's fused CUDA kernel computes it.

    The kernel decays W as W - ηλW; everywhere else torch multiplies W with 1 - ηλ, rounded to the precision of W. From
    torch 2.11 on it rounds β₁, β₂ and βᵗ to the precision of its arithmetic. As 1 - β₂ = 0.001 is small, this changes
    1 - β₂ᵗ by up to 2e-5 of it, and the step by half of that.

    Args:
        rule: of Adam or AdamW.
        dtype: the type that the weight is stored in.
    """
    exact = arithmetic_dtype(dtype)
    if torch.__version__ < "2.11":
        return replace(rule, dtype=torch.float64)
    if exact == torch.float64:
        wide = rule.step.to(torch.float64) if isinstance(rule.step, Tensor) else rule.step
        return replace(rule, dtype=torch.float64, step=wide)
    beta1, beta2 = (
        beta.to(exact).to(beta.dtype) if isinstance(beta, Tensor) else float(torch.tensor(beta, dtype=exact))
        for beta in rule.betas
    )
    return replace(rule, dtype=torch.float64, betas=(beta1, beta2))


def _rectification(length: Scalar, longest: Scalar) -> Scalar:
    """Return RAdam's rectification factor from ρ_t and ρ∞; for tensors NaN where the variance is not tractable."""
    squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return squared**0.5


def _adam(group: Group, state: State, dtype: torch.dtype) -> Described:
    names = ["exp_avg", "exp_avg_sq"]
    if group["amsgrad"]:
        names.append("max_exp_avg_sq")
    return AdamRule(**shared(group, dtype), **moments(group, state)), averages(state, *names)


def _adamw(group: Group, state: State, dtype: torch.dtype) -> Described:
    return _adam({"decoupled_weight_decay": True, **group}, state, dtype)


def _nadam(group: Group, state: State, dtype: torch.dtype) -> Described:
    # torch keeps Π μ in float32, even for float64 weights
    product = state["mu_product"].clone() if state else torch.ones((), dtype=scalar_dtype())
    rule = NAdamRule(
        **shared(group, dtype), **moments(group, state), momentum_decay=group["momentum_decay"], product=product
    )
    return rule, averages(state, "exp_avg", "exp_avg_sq")


def _radam(group: Group, state: State, dtype: torch.dtype) -> Described:
    return RAdamRule(**shared(group, dtype), **moments(group, state)), averages(state, "exp_avg", "exp_avg_sq")


def _adamax(group: Group, state: State, dtype: torch.dtype) -> Described:
    return AdamaxRule(**shared(group, dtype), **moments(group, state)), averages(state, "exp_avg", "exp_inf")


def _decoupled_adam(rule: type[AdamRule]) -> Describe:
    def describe(group: Group, state: State, dtype: torch.dtype) -> Described:
        names = list(ADAM_STATE)
        if group.get("amsgrad"):
            names.append("max_exp_avg_sq")
        described = rule(**with_decoupled_decay(group, dtype), **moments(group, state))
        return with_caution(described, group), averages(state, *names)

    return describe


_ADAM_OPTIONS = "lr betas eps weight_decay amsgrad maximize decoupled_weight_decay"
_OPTIONS = "lr betas eps weight_decay maximize decoupled_weight_decay"
RECIPES: dict[str, Recipe] = {
    "torch.optim.adam.Adam": recipe(_adam, _ADAM_OPTIONS),
    "torch.optim.adamw.AdamW": recipe(_adamw, _ADAM_OPTIONS, always_decoupled=True),
    "torch.optim.nadam.NAdam": recipe(_nadam, f"{_OPTIONS} momentum_decay"),
    "torch.optim.radam.RAdam": recipe(_radam, _OPTIONS),
    "torch.optim.adamax.Adamax": recipe(_adamax, _OPTIONS),
    "timm.optim.adamw.AdamWLegacy": recipe(_decoupled_adam(AdamRule), f"{TIMM_OPTIONS} amsgrad", always_decoupled=True),
    "timm.optim.nadamw.NAdamW": recipe(_decoupled_adam(NAdamWRule), TIMM_OPTIONS, always_decoupled=True),
}
