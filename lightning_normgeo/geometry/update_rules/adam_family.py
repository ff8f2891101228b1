"""Update rules of Adam and its relatives: torch's NAdam, RAdam, RMSprop, Adagrad and Adamax, and Lion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.norm_increments import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts, average


@dataclass(frozen=True, kw_only=True)
class AdamRule(ElementwiseRule):
    r"""torch.optim.Adam and AdamW: W⁺ = sW - ηA with A = m̂ / (√v̂ + ε), Kingma & Ba 2015, Loshchilov & Hutter 2019.

    g̃ = g + λW and s = 1 for Adam, g̃ = g and s = 1 - ηλ for AdamW (decoupled). With D = √v̂ + ε, v̂ after the step:

    .. math:: G = \frac{\eta(1-\beta_1)}{1-\beta_1^t}\frac{g}{D},\quad M = \frac{\eta\beta_1}{1-\beta_1^t}\frac{m^-}{D},
              \quad \Lambda = \frac{\eta(1-\beta_1)}{1-\beta_1^t}\frac{\lambda W}{D}

    The state is (m⁻, v⁻) before the step, with amsgrad also the running maximum of v, or nothing at the first step.

    Args:
        betas: (β₁, β₂).
        eps: ε.
        step: t of this step, from 1.
    """

    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: float = 1e-8
    step: Scalar = 1.0

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        beta1, beta2 = self.betas
        first, second, *maximum = state or (None, None)
        gradient, full = self.full(weight, gradient)
        second = average(second, full.square(), beta2)
        second = torch.maximum(maximum[0], second) if maximum and maximum[0] is not None else second
        by = (second / (1 - beta2**self.step)).sqrt() + self.eps
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1), rate * beta1), by)


@dataclass(frozen=True, kw_only=True)
class NAdamRule(AdamRule):
    r"""torch.optim.NAdam: Adam with Nesterov's momentum (Dozat 2016).

    :math:`\mu_t = \beta_1(1 - 0.96^{t\psi}/2)`; the gradient enters by itself and in m. State as for Adam.

    Args:
        momentum_decay: ψ.
        product: Π μ up to the step before this one; as a tensor it is multiplied in its own dtype, as torch does.
    """

    momentum_decay: float = 4e-3
    product: Scalar = 1.0

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: gradient and momentum are taken off one after the other."""
        return super().stores + 1

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
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

    :math:`\rho_t = \rho_\infty - 2t\beta_2^t/(1-\beta_2^t)`, :math:`\rho_\infty = 2/(1-\beta_2) - 1`; above 5 the
    step is Adam's times the rectification, below it is momentum's without any division. State as for Adam.
    """

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
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
class RMSpropRule(ElementwiseRule):
    r"""torch.optim.RMSprop: G = ηg/D with D = √v + ε, centered D = √(v - ā²) + ε (Tieleman & Hinton 2012).

    With momentum μ the buffer is b = μb⁻ + g̃/D and the step ηb, so M = ημb⁻. The state is (v⁻,) before the step, then
    b⁻ with momentum and ā⁻ if centered.

    Args:
        alpha: the average's decay.
        eps: ε.
        momentum: μ.
        centered: whether the mean gradient is taken off v.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        rest = list(state)
        second = rest.pop(0) if rest else None
        buffer = rest.pop(0) if rest and self.momentum > 0 else None
        gradient, full = self.full(weight, gradient)
        variance = average(second, full.square(), self.alpha)
        if self.centered:
            variance = variance - average(rest.pop(0) if rest else None, full, self.alpha).square()
        by = variance.sqrt() + self.eps
        parts = self.divided(weight, gradient, None, (self.lr, 0.0), by)
        return parts if buffer is None else parts._replace(momentum=buffer * (self.lr * self.momentum))


@dataclass(frozen=True, kw_only=True)
class AdagradRule(ElementwiseRule):
    r"""torch.optim.Adagrad: G = ηg / ((1 + (t-1)κ)(√Σg̃² + ε)), Duchi et al. 2011. The state is (Σg̃²,) before the step.

    Args:
        lr_decay: κ.
        eps: ε.
        step: t of this step, from 1.
    """

    lr_decay: float = 0.0
    eps: float = 1e-10
    step: Scalar = 1.0

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        gradient, full = self.full(weight, gradient)
        by = (state[0] + full.square()).sqrt() + self.eps
        return self.divided(weight, gradient, None, (self.lr / (1 + (self.step - 1) * self.lr_decay), 0.0), by)


@dataclass(frozen=True, kw_only=True)
class AdamaxRule(AdamRule):
    r"""torch.optim.Adamax: Adam with D = max(β₂D⁻, |g̃| + ε), Kingma & Ba 2015, section 7.1. The state is (m⁻, D⁻)."""

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        beta1, beta2 = self.betas
        first, largest = state or (None, None)
        gradient, full = self.full(weight, gradient)
        by = full.abs() + self.eps
        by = by if largest is None else torch.maximum(largest * beta2, by)
        rate = self.lr / (1 - beta1**self.step)
        return self.divided(weight, gradient, first, (rate * (1 - beta1), rate * beta1), by)


@dataclass(frozen=True, kw_only=True)
class LionRule(ElementwiseRule):
    r"""Lion: W⁺ = sW - η sign(c), c = β₁m⁻ + (1-β₁)g (Chen et al. 2023), not in torch.

    sign(c) = c/|c| splits as c does. The state is (m⁻,) before the step, or nothing at the first.

    Args:
        betas: (β₁, β₂).
    """

    betas: tuple[Scalar, Scalar] = (0.9, 0.99)

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        beta1 = self.betas[0]
        gradient, full = self.full(weight, gradient)
        whole = full * (1 - beta1) + (state[0] * beta1 if state else 0.0)
        by = torch.where(whole == 0, torch.inf, whole.abs())
        return self.divided(weight, gradient, state[0] if state else None, (self.lr * (1 - beta1), self.lr * beta1), by)


def _rectification(length: Scalar, longest: Scalar) -> Scalar:
    """Return RAdam's variance rectification from ρ_t and ρ∞; as a tensor NaN where the variance is not tractable."""
    squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return squared**0.5
