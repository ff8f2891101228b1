"""Whole-tensor rules of optimizers that scale a weight's step by norms: LAMB, LARS, MARS and torch's Adafactor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.norm_increments import Scalar, SGDRule
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.adam_family import AdamRule
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, average
from lightning_normgeo.geometry.update_rules.whole_tensor import (
    Direction,
    WholeTensorRule,
    masked,
    own_norm,
    scaled,
    zeros_if_new,
)


@dataclass(frozen=True, kw_only=True)
class LarsRule(WholeTensorRule):
    r"""LARS as in timm: SGD of r(g + λW) with r = κ‖W‖/(‖g‖ + λ‖W‖ + ε), You et al. 2017. State as for SGD.

    Args:
        sgd: the SGD that moves the weight; its η, μ, τ and Nesterov's form are used.
        trust: κ.
        eps: ε.
        clip: whether r/η is cut at one, as in LARC.
        adapts: whether r differs from one, with λ then unused; timm adapts where there is decay.
    """

    sgd: SGDRule
    trust: float = 1e-3
    eps: float = 1e-8
    clip: bool = False
    adapts: bool = True

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G, M and Λ."""
        ratio = self._ratio(own_norm(weight), own_norm(gradient)) if self.adapts else 1.0
        w, g, *buffer = (tensor.to(wide_dtype(weight.device)) for tensor in (weight, gradient, *state))
        c_g, c_m = self.sgd.coefficients
        by_gradient = self.lr * c_g * ratio
        decay = w * (by_gradient * self.weight_decay) if self.adapts else None
        return Direction(StepParts(g * by_gradient, buffer[0] * (self.lr * c_m) if buffer else None, decay))

    def _ratio(self, weight: Tensor, gradient: Tensor) -> Tensor:
        ratio = self.trust * weight / (gradient + weight * self.weight_decay + self.eps)
        ratio = torch.where((weight > 0) & (gradient > 0), ratio, 1.0)
        return (ratio / self.lr).clamp_max(1.0) if self.clip else ratio


@dataclass(frozen=True, kw_only=True)
class LambRule(WholeTensorRule, AdamRule):
    r"""LAMB as in timm: W⁺ = sW - ηr(A + λW), r = ‖sW‖/‖A + λW‖, A that of Adam, You et al. 2020. State as for Adam.

    Args:
        clip: what gradients are divided by, from the norm of all; None without.
        averaging: whether m takes (1-β₁)g, or g.
        corrected: whether m and v are corrected for their start at zero.
        trust_clip: whether r is cut at one.
        adapts: whether r differs from one; timm adapts where there is decay.
        caution: whether A is masked, see :class:`CautiousRule`.
        folded: whether the corrections come last, as in timm's foreach implementation.
    """

    clip: Tensor | None = None
    averaging: bool = True
    corrected: bool = True
    trust_clip: bool = False
    adapts: bool = True
    caution: bool = False
    folded: bool = False

    @property
    def _corrections(self) -> tuple[Scalar, Scalar]:
        beta1, beta2 = self.betas
        return (1 - beta1**self.step, 1 - beta2**self.step) if self.corrected else (1.0, 1.0)

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G, M and Λ."""
        own = gradient if self.clip is None else gradient / self.clip
        ratio: Tensor | float = self._ratio(weight, own, *state) if self.adapts else 1.0
        w, g, *states = (tensor.to(wide_dtype(weight.device)) for tensor in (weight, own, *state))
        first, second = states or (None, None)
        beta1, beta2 = self.betas
        for_mean, for_square = self._corrections
        by = ((average(second, g.square(), beta2) / for_square).sqrt() + self.eps) * for_mean
        share = 1 - beta1 if self.averaging else 1.0
        parts = StepParts(g * share / by, None if first is None else first * beta1 / by)
        parts = masked(parts, g) if self.caution else parts
        decay = w * self.coupled if self.coupled else None
        return Direction(scaled(parts._replace(weight_decay=decay), self.lr * ratio))

    def _ratio(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Tensor:
        """Return r, by the optimizer's operations in its own precision: a norm depends on the order of sums."""
        first, second = (tensor.clone() for tensor in zeros_if_new(state, weight, 2))
        beta1, beta2 = self.betas
        for_mean, for_square = self._corrections
        first = first.lerp_(gradient, 1 - beta1) if self.averaging else first.mul_(beta1).add_(gradient)
        second = second.mul_(beta2).addcmul_(gradient, gradient, value=float(1 - beta2))
        scale: Scalar = for_square**0.5 / for_mean if self.folded else 1.0
        if self.folded:
            update = first / second.sqrt().add_(self.eps * for_square**0.5)
        else:
            update = (first / for_mean).div_((second.sqrt() / for_square**0.5).add_(self.eps))
        if self.caution:
            update = masked(StepParts(update), gradient).gradient
        if self.decoupled and self.weight_decay:
            weight = weight.add(weight, alpha=float(-self.lr * self.weight_decay))
        elif self.weight_decay:
            update = update.add(weight, alpha=float(self.weight_decay / scale))
        length, size = own_norm(weight), own_norm(update) * scale
        ratio = torch.where((length > 0) & (size > 0), length / size, 1.0)
        return ratio.clamp_max(1.0) if self.trust_clip else ratio


@dataclass(frozen=True, kw_only=True)
class MarsRule(WholeTensorRule, AdamRule):
    r"""MARS as in timm: Adam or Lion of c = g + γβ₁/(1-β₁)(g - g⁻), at most of length one, Yuan et al. 2024.

    W⁺ = W - η(λW + A) with A = m̂/(√v̂ + ε) or sign(m). G is what comes from c. The state is (m⁻, v⁻, g⁻), or nothing at
    the first step, where c = g.

    Args:
        gamma: γ; None where c = g of any length, as for vectors.
        sign: whether A is that of Lion.
        caution: whether m is masked, see :class:`CautiousRule`.
    """

    gamma: float | None = 0.025
    sign: bool = False
    caution: bool = False

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: once, with its decay."""
        return 1

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G and M."""
        wide, (beta1, beta2) = wide_dtype(weight.device), self.betas
        change, g = self._change(gradient, *state).to(wide), gradient.to(wide)
        first, second = (tensor.to(wide) for tensor in state[:2]) if state else (None, None)
        parts = StepParts(change * (1 - beta1), None if first is None else first * beta1)
        whole = parts.gradient if parts.momentum is None else parts.gradient + parts.momentum
        if self.sign:
            moves = whole * g > 0 if self.caution else whole != 0
            by = torch.where(moves, whole.abs(), torch.inf)
        else:
            parts = masked(parts, g) if self.caution else parts
            by = (average(second, change.square(), beta2) / (1 - beta2**self.step)).sqrt() + self.eps
            by = by * (1 - beta1**self.step)
        return Direction(scaled(parts, self.lr / by))

    def _change(self, gradient: Tensor, *state: Tensor) -> Tensor:
        """Return c, in the precision of the optimizer."""
        if self.gamma is None:
            return gradient
        beta1 = self.betas[0]
        change: Tensor = gradient
        if state:
            change = (gradient - state[2]).mul_(self.gamma * (beta1 / (1.0 - beta1))).add_(gradient)
        length: Tensor = torch.norm(change)
        return change / length.clamp_(min=1.0)


@dataclass(frozen=True, kw_only=True)
class AdafactorRule(WholeTensorRule):
    r"""torch.optim.Adafactor: a step of the length of the weight, with a v of rank one, Shazeer & Stern 2018.

    G = α g/√v̂ / max(1, rms(g/√v̂)/d), α = max(ε₂, rms(W)) min(η, 1/√t). The state is (r⁻, c⁻) of a matrix, (v⁻,) of a
    vector, or nothing at the first step.

    Args:
        decay: the exponent of t that gives 1 - β₂.
        eps: (ε₁, ε₂).
        clip: d.
        step: t of this step, from 1.
    """

    decay: float = -0.8
    eps: tuple[float, float] = (1e-8, 1e-3)
    clip: float = 1.0
    step: Scalar = 1.0

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G, by torch's operations in its own precision."""
        gradient = -gradient if self.maximize else gradient
        size = weight.numel() ** 0.5
        update = self._estimate(gradient, *state).clamp_(min=self.eps[0] ** 2).rsqrt_().mul_(gradient)
        rate = _least(self.lr, 1 / self.step**0.5) * (own_norm(weight) / size).clamp_min(self.eps[1])
        by = (own_norm(update) / (size * self.clip)).clamp_min(1.0)
        return Direction(StepParts(update.to(wide_dtype(weight.device)) * (rate / by)))

    def _estimate(self, gradient: Tensor, *state: Tensor) -> Tensor:
        share = self.step**self.decay
        if gradient.dim() < 2:
            before = state[0] if state else torch.zeros_like(gradient)
            return before.lerp(gradient * gradient, share)
        row, column = (
            torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.size(dim))
            for dim in (-1, -2)
        )
        rows, columns = state or (torch.zeros_like(row), torch.zeros_like(column))
        rows, columns = rows.lerp(row, share), columns.lerp(column, share)
        return (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=self.eps[0]))


def _least(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)
