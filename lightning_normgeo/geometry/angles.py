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


class UpdateProducts(NamedTuple):
    """Inner products of one update D = W⁺ - W for each unit."""

    weight_sq: Tensor
    """‖W‖²."""
    weight_update: Tensor
    """⟨W, D⟩."""
    update_sq: Tensor
    """‖D‖²."""
    tangential_sq: Tensor
    """‖D_⊥‖², D without its part along W; ‖D‖² where W = 0."""


def update_products(weight: Tensor, new_weight: Tensor) -> UpdateProducts:
    """Return the inner products of an update, the difference taken in float64.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.
    """

    def reduce(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        change = new - w
        weight_sq, weight_update = dot(w, w), dot(w, change)
        radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
        tangential = torch.addcmul(change, radial[:, None], w, value=-1)
        return weight_sq, weight_update, dot(change, change), dot(tangential, tangential)

    return UpdateProducts(*map_rows(reduce, weight, new_weight))


def joined_products(*parts: UpdateProducts) -> UpdateProducts:
    """Return the products of units that consist of several tensors, such as weight and bias jointly.

    With ρ_p the radial part of each and ρ that of all, ‖D_⊥‖² = Σ_p ‖D_⊥p‖² + (ρ_p - ρ)²‖W_p‖², a sum of squares, so
    nothing cancels.
    """
    weight_sq, weight_update, update_sq, tangential_sq = (
        sum(column[1:], column[0]) for column in zip(*parts, strict=True)
    )
    radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
    for part in parts:
        own = part.weight_update / torch.where(part.weight_sq > 0, part.weight_sq, 1.0)
        tangential_sq = tangential_sq + (own - radial).square() * part.weight_sq
    return UpdateProducts(weight_sq, weight_update, update_sq, tangential_sq)


def split_update(products: UpdateProducts) -> UpdateParts:
    """Split an update into its radial and tangential part.

    The identity ‖W⁺‖² = ‖W‖²(1+ρ)² + ‖D_⊥‖² holds exactly.

    Returns:
        The parts; zeros for a unit with W = 0.
    """
    weight_sq = products.weight_sq
    alive = weight_sq > 0
    radial = torch.where(alive, products.weight_update / torch.where(alive, weight_sq, 1.0), 0.0)
    tangential = torch.where(alive, products.tangential_sq.sqrt(), 0.0)
    return UpdateParts(radial, tangential, torch.atan2(tangential, weight_sq.sqrt() * (1 + radial)))


def angular_update(weight: Tensor, new_weight: Tensor) -> Tensor:
    """Return the angle between W and W⁺ in radians for each unit, accurate down to 1e-12.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.
    """
    return split_update(update_products(weight, new_weight)).angle


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
