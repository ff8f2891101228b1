"""How far a weight turns: radial and tangential parts of an update, angles, equilibria.

Scale-invariant weights have a direction only, so the angle per step is what training does to them. Angles are never
taken as acos of a cosine, which is 0 below 3e-4 in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments import AdamRule, Scalar, SGDRule, UpdateRule
from lightning_normgeo.geometry.rows import dot, map_rows


class UpdateParts(NamedTuple):
    """An update D = W⁺ - W = ρW + D_⊥ for each unit."""

    radial: Tensor
    """ρ = ⟨W, D⟩ / ‖W‖², dimensionless."""
    tangential: Tensor
    """‖D_⊥‖, in units of weight."""
    angle: Tensor
    """The angle between W and W⁺ in radians, in [0, π]."""


def update_products(weight: Tensor, new_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖W‖², ⟨W, D⟩ and ‖D‖² for D = W⁺ - W, the difference taken in float64.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.
    """

    def reduce(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        change = new - w
        return dot(w, w), dot(w, change), dot(change, change)

    weight_sq, weight_update, update_sq = map_rows(reduce, weight, new_weight)
    return weight_sq, weight_update, update_sq


def split_update(weight_sq: Tensor, weight_update: Tensor, update_sq: Tensor) -> UpdateParts:
    """Split an update into its radial and tangential part, from the inner products of :func:`update_products`.

    The identity ‖W⁺‖² = ‖W‖²(1+ρ)² + ‖D_⊥‖² holds exactly.

    Returns:
        The parts; zeros for a unit with W = 0.
    """
    alive = weight_sq > 0
    safe_sq = torch.where(alive, weight_sq, torch.ones_like(weight_sq))
    radial = torch.where(alive, weight_update / safe_sq, torch.zeros_like(weight_sq))
    tangential = (update_sq - radial * weight_update).clamp_min(0).sqrt()
    tangential = torch.where(alive, tangential, torch.zeros_like(tangential))
    return UpdateParts(radial, tangential, torch.atan2(tangential, weight_sq.sqrt() * (1 + radial)))


def angular_update(weight: Tensor, new_weight: Tensor) -> Tensor:
    """Return the angle between W and W⁺ in radians for each unit, accurate down to 1e-12.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.
    """
    return split_update(*update_products(weight, new_weight)).angle


def effective_lr(lr: Scalar, weight_sq: Tensor) -> Tensor:
    """Return η / ‖W‖² (van Laarhoven 2017), the learning rate that SGD applies to the direction of W; 0 for W = 0."""
    alive = weight_sq > 0
    return torch.where(
        alive, lr / torch.where(alive, weight_sq, torch.ones_like(weight_sq)), torch.zeros_like(weight_sq)
    )


def equilibrium_angle(rule: UpdateRule) -> Scalar | None:
    r"""Return the angular update at which weight decay and gradient noise balance, in radians.

    ====================  ==================================================  ==============================
    SGD, momentum μ       :math:`\sqrt{2\eta(1-\tau)\lambda/(1+\mu)}`          Wan et al. 2021 (τ = dampening)
    Nesterov              :math:`\sqrt{2\eta\lambda(1+2\mu-2\mu^3)/(1+\mu)}`   the same model, derived here
    AdamW                 :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`   Kosson et al. 2024
    ====================  ==================================================  ==============================

    Returns:
        The angle (root mean square over units and steps), or None where no closed form is known: without weight
        decay, and for Adam with coupled weight decay.
    """
    if isinstance(rule, SGDRule) and rule.weight_decay > 0:
        mu = rule.momentum
        factor = 1 + 2 * mu - 2 * mu**3 if rule.nesterov else 1 - (rule.dampening if mu else 0.0)
        return (2 * rule.lr * rule.weight_decay * factor / (1 + mu)) ** 0.5
    if isinstance(rule, AdamRule) and rule.decoupled and rule.weight_decay > 0:
        beta1 = rule.betas[0]
        return (2 * rule.lr * rule.weight_decay * (1 - beta1) / (1 + beta1)) ** 0.5
    return None
