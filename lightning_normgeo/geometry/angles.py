"""How far a weight turns: radial and tangential parts of an update, angles, equilibria.

Scale-invariant weights have a direction only, so the angle per step is what training does to them. Angles are never
taken as acos of a cosine, which is 0 below 3e-4 in float32. Where these angles settle: :mod:`.weight_decay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.products.one_pass import fast, readable
from lightning_normgeo.geometry.rows import column_blocks, dot, map_rows


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
    return many_update_products([(weight, new_weight)])[0]


def many_update_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[UpdateProducts]:
    """Return :func:`update_products` of several weights: threads are started once for all of them."""
    chosen = {k: pair for k, pair in enumerate(pairs) if readable(pair)}
    sums = fast(
        lambda loops: loops.update_products(list(chosen.values())), sum(pair[0].numel() for pair in chosen.values())
    )
    found = {} if sums is None else dict(zip(chosen, sums, strict=True))
    return [
        _over_segments(UpdateProducts(*found[k]), pair[0].shape[0]) if k in found else _by_torch(*pair)
        for k, pair in enumerate(pairs)
    ]


def _over_segments(sums: UpdateProducts, units: int) -> UpdateProducts:
    return (
        sums
        if sums.weight_sq.numel() == units
        else folded_products(UpdateProducts(*(column.view(units, -1) for column in sums)))
    )


def _by_torch(weight: Tensor, new_weight: Tensor) -> UpdateProducts:
    def reduce(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        change = new - w
        weight_sq, weight_update = dot(w, w), dot(w, change)
        radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
        tangential = torch.addcmul(change, radial[:, None], w, value=-1)
        return weight_sq, weight_update, dot(change, change), dot(tangential, tangential)

    blocks = column_blocks(weight)
    return joined_products(
        *(UpdateProducts(*map_rows(reduce, weight[:, columns], new_weight[:, columns])) for columns in blocks)
    )


def joined_products(*parts: UpdateProducts) -> UpdateProducts:
    """Return the products of units that consist of several tensors, such as weight and bias jointly.

    With ρ_p the radial part of each and ρ that of all, ‖D_⊥‖² = Σ_p ‖D_⊥p‖² + (ρ_p - ρ)²‖W_p‖², a sum of squares, so
    nothing cancels.
    """
    if len(parts) == 1:
        return parts[0]
    return folded_products(UpdateProducts(*(torch.stack(column, -1) for column in zip(*parts, strict=True))))


def folded_products(parts: UpdateProducts) -> UpdateProducts:
    """Join the parts of units along the last dimension."""
    weight_sq, weight_update, update_sq, tangential_sq = (column.sum(-1) for column in parts)
    radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
    own = parts.weight_update / torch.where(parts.weight_sq > 0, parts.weight_sq, 1.0)
    tangential_sq = tangential_sq + ((own - radial[..., None]).square() * parts.weight_sq).sum(-1)
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
