"""Update rules of torch's Adadelta, Rprop and ASGD, and of relatives of Adam and SGD in other libraries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.norm_increments import Scalar
from lightning_normgeo.geometry.update_rules.adam_family import AdamRule
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts, average, shrunk


@dataclass(frozen=True, kw_only=True)
class AdadeltaRule(ElementwiseRule):
    r"""torch.optim.Adadelta: G = ηg √(a⁻+ε)/√(v+ε), Zeiler 2012. The state is (v⁻, a⁻) before the step.

    Args:
        rho: the averages' decay.
        eps: ε.
    """

    rho: Scalar = 0.9
    eps: float = 1e-6

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G and Λ."""
        second, moved = state or (None, torch.zeros_like(weight))
        gradient, full = self.full(weight, gradient)
        by = ((average(second, full.square(), self.rho) + self.eps) / (moved + self.eps)).sqrt()
        return self.divided(weight, gradient, None, (self.lr, 0.0), by)


@dataclass(frozen=True, kw_only=True)
class RpropRule(ElementwiseRule):
    r"""torch.optim.Rprop: G = sign(g) δ with a step δ of each element's own, Riedmiller & Braun 1993.

    δ = δ⁻ times η⁺ where g keeps its sign, times η⁻ where it changes, where also nothing moves; then cut to the range.
    The state is (g⁻, δ⁻) before the step; δ⁻ = η at the first.

    Args:
        etas: (η⁻, η⁺).
        sizes: the range of δ.
    """

    etas: tuple[float, float] = (0.5, 1.2)
    sizes: tuple[float, float] = (1e-6, 50.0)

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G."""
        before, size = state or (torch.zeros_like(weight), torch.ones_like(weight) * self.lr)
        gradient, _ = self.full(weight, gradient)
        agrees, shrinks, grows = gradient * before, *self.etas
        size = torch.where(agrees > 0, size * grows, torch.where(agrees < 0, size * shrinks, size))
        return StepParts(torch.where(agrees < 0, 0.0, gradient.sign()) * size.clamp(*self.sizes))


@dataclass(frozen=True, kw_only=True)
class ASGDRule(ElementwiseRule):
    r"""torch.optim.ASGD: W⁺ = (1 - λ₀η_t)W - η_t(g + λW), Polyak & Juditsky 1992; the average is not the weight.

    No state; ``lr`` is η_t, which torch keeps for each weight.

    Args:
        decay_term: λ₀, ``lambd``.
    """

    decay_term: Scalar = 1e-4

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: after the decay term and after the gradient."""
        return 2

    @property
    def shrink(self) -> Scalar:
        """What W is multiplied with: s = 1 - λ₀η_t."""
        return shrunk(1 - self.decay_term * self.lr, self.dtype)

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G and Λ."""
        del state
        return self.divided(weight, self.full(weight, gradient)[0], None, (self.lr, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class SGDWRule(ElementwiseRule):
    r"""SGD with decoupled weight decay, as in timm: W⁺ = sW - ηu, b = μb⁻ + (1-τ)g, u = b (Nesterov: g + μb).

    As in torch b = g at the first step. The state is (b⁻,), or nothing.

    Args:
        momentum: μ.
        dampening: τ.
        nesterov: as in torch.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G and M."""
        share = 1.0 - self.dampening if state and self.momentum else 1.0
        ahead = self.momentum if self.nesterov else 1.0
        by_gradient = 1.0 + ahead * share if self.nesterov else share
        rates = (self.lr * by_gradient, self.lr * ahead * self.momentum)
        return self.divided(weight, self.full(weight, gradient)[0], state[0] if state else None, rates, 1.0)


@dataclass(frozen=True, kw_only=True)
class NAdamWRule(AdamRule):
    """Adam that looks ahead by averaging g into m once more, timm's NAdamW; not torch's NAdam. State as for Adam."""

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G and M."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, full = self.full(weight, gradient)
        by = (average(second, full.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1) * (1 + beta1), rate * beta1**2), by)


@dataclass(frozen=True, kw_only=True)
class AdEMAMixRule(AdamRule):
    r"""AdEMAMix: Adam with a second, slow momentum, A = (m̂₁ + αm₂)/(√v̂ + ε), Pagliardini et al. 2024.

    M comes from both momenta. The state is (m₁⁻, v⁻, m₂⁻), or nothing at the first step.

    Args:
        alpha: α at this step.
        slow: β₃ at this step.
    """

    alpha: float = 5.0
    slow: float = 0.9999

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
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
    r"""ADOPT: Adam that divides by the v of the step before, and before the average, Taniguchi et al. 2024.

    m = β₁m⁻ + (1-β₁)n with n = g̃/max(√v⁻, ε), cut to ±c, W⁺ = sW - ηm; nothing moves at a weight's first step, where
    decay is not decoupled either. The state is (m⁻, v⁻), or nothing at the first step.

    Args:
        bound: c at this step; None where nothing is cut.
    """

    bound: float | None = None

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        if not state:
            return StepParts(torch.zeros_like(weight))
        beta1, (first, second) = self.betas[0], state
        gradient, full = self.full(weight, gradient)
        by = second.sqrt().clamp_min(self.eps)
        if self.bound is not None:
            by = torch.maximum(by, full.abs() / self.bound)  # |n| = c where it is cut
        return self.divided(weight, gradient, first, (self.lr * (1 - beta1), 0.0), by)._replace(
            momentum=first * (self.lr * beta1)
        )


@dataclass(frozen=True, kw_only=True)
class LaPropRule(AdamRule):
    r"""LaProp: momentum of the scaled gradient, W⁺ = s(W - ρm), m = β₁m⁻ + η(1-β₁)g/(√v̂ + ε), Ziyin et al. 2020.

    As in timm, decay comes last. State as for Adam.

    Args:
        size: ρ.
        correction: what v is divided by.
    """

    size: Scalar = 1.0
    correction: Scalar = 1.0

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G and M."""
        beta1, beta2 = self.betas
        first, second = state or (None, None)
        gradient, _ = self.full(weight, gradient)
        by = (average(second, gradient.square(), beta2) / self.correction).sqrt() + self.eps
        rate = self.size * self.shrink
        return StepParts(
            gradient * (rate * self.lr * (1 - beta1)) / by, None if first is None else first * (rate * beta1)
        )
