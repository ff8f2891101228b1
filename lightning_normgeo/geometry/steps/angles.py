"""Angular updates: radial and tangential parts of an update, and the angle by which a weight turns.

Only the direction of a scale-invariant weight matters, so the angle per step measures how fast it trains. Angles are
never taken as acos of a cosine, which is 0 for angles below 3e-4 in float32. The equilibrium of these angles under
weight decay is in :mod:`.equilibrium`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.products.compiled import loop_sums
from lightning_normgeo.geometry.products.weight_pass import SAFE_DIFFERENCE
from lightning_normgeo.geometry.rows import column_blocks, dot, map_rows, real_rows, row_blocks


class UpdateParts(NamedTuple):
    """Radial and tangential part of an update D = W⁺ - W = ρW + D_⊥, for each unit."""

    radial: Tensor
    """ρ = ⟨W, D⟩ / ‖W‖², dimensionless."""
    tangential: Tensor
    """‖D_⊥‖, in units of weight."""
    angle: Tensor
    """The angle between W and W⁺ in radians, in [0, π]."""


class UpdateProducts(NamedTuple):
    """Inner products of one update D = W⁺ - W, for each unit, in units of weight²."""

    weight_sq: Tensor
    """‖W‖²."""
    weight_update: Tensor
    """⟨W, D⟩."""
    update_sq: Tensor
    """‖D‖²."""
    tangential_sq: Tensor
    """‖D_⊥‖², of D without its component along W; ‖D‖² where W = 0."""


def update_products(weight: Tensor, new_weight: Tensor) -> UpdateProducts:
    """Return the inner products of an update D = W⁺ - W, with the difference taken in float64.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.

    Returns:
        The products, each ``(units,)`` in float64 (float32 on devices without it).

    Cost: one pass over both weights; twice over segments whose update is almost radial.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, new_weight = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> products = update_products(weight, new_weight)
        >>> norms = products.weight_sq + 2 * products.weight_update + products.update_sq  # ‖W‖² + 2⟨W, D⟩ + ‖D‖²
        >>> torch.allclose(norms, new_weight.square().sum(1))
        True
    """
    return many_update_products([(weight, new_weight)])[0]


def many_update_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[UpdateProducts]:
    """Return :func:`update_products` of several weights, with threads started once for all of them."""
    pairs = [(real_rows(weight), real_rows(new_weight)) for weight, new_weight in pairs]
    found = loop_sums("update_sums", pairs, pairs)
    return [
        _over_segments(UpdateProducts(*found[k]), pair[0].shape[0]) if k in found else _by_torch(*pair)
        for k, pair in enumerate(pairs)
    ]


def _over_segments(sums: UpdateProducts, units: int) -> UpdateProducts:
    if sums.weight_sq.numel() == units:
        return sums
    return folded_products(UpdateProducts(*(column.view(units, -1) for column in sums)))


def _by_torch(weight: Tensor, new_weight: Tensor) -> UpdateProducts:
    blocks = column_blocks(weight)
    return joined_products(*(_of_columns(weight[:, columns], new_weight[:, columns]) for columns in blocks))


def _of_columns(weight: Tensor, new_weight: Tensor) -> UpdateProducts:
    def reduce(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        change = new - w
        return dot(w, w), dot(w, change), dot(change, change)

    def tangential(rows: slice) -> Tensor:
        # looking would wait for a GPU; on a CPU it takes less time than the second reading that it may save
        if weight.is_cpu and safe.numpy()[rows].all():
            return difference[rows]
        return _tangential_sq(weight[rows], new_weight[rows], radial[rows, None])

    weight_sq, weight_update, update_sq = map_rows(reduce, weight, new_weight)
    radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
    difference = update_sq - radial * weight_update
    safe = difference >= SAFE_DIFFERENCE * update_sq  # not where it is NaN
    return UpdateProducts(weight_sq, weight_update, update_sq, torch.cat([*map(tangential, row_blocks(weight))]))


def _tangential_sq(weight: Tensor, new_weight: Tensor, radial: Tensor) -> Tensor:
    def reduce(w: Tensor, new: Tensor, rho: Tensor) -> tuple[Tensor]:
        across = torch.addcmul(new - w, rho, w, value=-1)
        return (dot(across, across),)

    return map_rows(reduce, weight, new_weight, radial)[0]


def joined_products(*parts: UpdateProducts) -> UpdateProducts:
    """Join the products of units that consist of several tensors, such as weight and bias.

    With ρ_p the radial part of each tensor and ρ that of the whole unit, ‖D_⊥‖² = Σ_p (‖D_⊥p‖² + (ρ_p - ρ)²‖W_p‖²): a
    sum of squares, in which nothing cancels.

    Args:
        parts: the products of each tensor, all of the same shape ``(units,)``.

    Returns:
        The products of the units, ``(units,)``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> (weight, new_weight), (bias, new_bias) = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 1).double()
        >>> joined = joined_products(update_products(weight, new_weight), update_products(bias, new_bias))
        >>> whole = update_products(torch.cat([weight, bias], 1), torch.cat([new_weight, new_bias], 1))
        >>> all(torch.allclose(found, expected) for found, expected in zip(joined, whole))
        True
    """
    if len(parts) == 1:
        return parts[0]
    return folded_products(UpdateProducts(*(torch.stack(column, -1) for column in zip(*parts, strict=True))))


def folded_products(parts: UpdateProducts) -> UpdateProducts:
    """Join the products of parts of a unit, which lie along the last dimension, as in :func:`joined_products`."""
    weight_sq, weight_update, update_sq, tangential_sq = (column.sum(-1) for column in parts)
    radial = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
    own = parts.weight_update / torch.where(parts.weight_sq > 0, parts.weight_sq, 1.0)
    tangential_sq = tangential_sq + ((own - radial[..., None]).square() * parts.weight_sq).sum(-1)
    return UpdateProducts(weight_sq, weight_update, update_sq, tangential_sq)


def split_update(products: UpdateProducts) -> UpdateParts:
    """Split an update into its radial and tangential part, for which ‖W⁺‖² = ‖W‖²(1+ρ)² + ‖D_⊥‖² holds exactly.

    Args:
        products: as from :func:`update_products`, each ``(units,)``.

    Returns:
        The parts, each ``(units,)``; zeros for a unit with W = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, new_weight = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> parts = split_update(update_products(weight, new_weight))
        >>> norms = weight.square().sum(1) * (1 + parts.radial) ** 2 + parts.tangential**2
        >>> torch.allclose(norms, new_weight.square().sum(1))
        True
    """
    weight_sq = products.weight_sq
    alive = weight_sq != 0
    radial = torch.where(alive, products.weight_update / torch.where(alive, weight_sq, 1.0), 0.0)
    tangential = torch.where(alive, products.tangential_sq.sqrt(), 0.0)
    return UpdateParts(radial, tangential, torch.atan2(tangential, weight_sq.sqrt() * (1 + radial)))


def angular_update(weight: Tensor, new_weight: Tensor) -> Tensor:
    """Return the angle between W and W⁺ of each unit, accurate down to 1e-12 radians.

    Args:
        weight: W, ``(units, n)``.
        new_weight: W⁺, ``(units, n)``.

    Returns:
        ``(units,)`` in radians, in [0, π]; 0 for a unit with W = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> direction, orthogonal = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64)).Q.T[:, None]
        >>> angle = torch.tensor([1e-8], dtype=torch.float64)
        >>> turned = 7 * (angle.cos() * direction + angle.sin() * orthogonal)
        >>> torch.allclose(angular_update(direction, turned), angle, atol=0.0)
        True
    """
    return split_update(update_products(weight, new_weight)).angle


def effective_lr(lr: Scalar, weight_sq: Tensor) -> Tensor:
    """Return η / ‖W‖², the learning rate that SGD applies to the direction of W (van Laarhoven 2017).

    Args:
        lr: η.
        weight_sq: ‖W‖², any shape.

    Returns:
        The effective learning rate, of the shape of ``weight_sq``, in units of η per weight²; 0 for W = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, target = torch.randn(2, 1, 8, dtype=torch.float64)
        >>> gradient = torch.func.grad(lambda w: torch.cosine_similarity(w, target).sum())
        >>> norm, unit = weight.norm(), weight / weight.norm()
        >>> step_of_direction = effective_lr(0.1, weight.square().sum(1)) * gradient(unit)
        >>> torch.allclose((weight - 0.1 * gradient(weight)) / norm, unit - step_of_direction)
        True
    """
    alive = ~(weight_sq <= 0)  # NaN where ‖W‖² is; joint quantities may be negative
    rate = lr / torch.where(alive, weight_sq, torch.ones_like(weight_sq))
    return torch.where(alive, rate, torch.zeros_like(weight_sq))
