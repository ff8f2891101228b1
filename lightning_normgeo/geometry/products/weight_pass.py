"""Requests and results of reading weights: :class:`WeightPass` and :class:`WeightProducts`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import UpdateRule


class WeightProducts(NamedTuple):
    """Inner products of one weight before a step, each ``(units,)`` in float64 (float32 on devices without it)."""

    weight_sq: Tensor
    """‖W‖²."""
    inner: Tensor
    """⟨W, g⟩."""
    gradient_sq: Tensor
    """‖g‖²."""
    quartic: Tensor
    """Σ W_i⁴, which bounds the effect of rounding the weights (``storage_floor``)."""
    rule: tuple[Tensor, ...]
    """The results of ``rule.products``; empty without a rule."""

    def joined(self, units: int) -> WeightProducts:
        """Return the products of ``units`` units of equally many neighboring rows, for products that are sums."""
        if len(self.weight_sq) == units:
            return self
        rows = torch.stack([*self[:4], *self.rule])
        weight_sq, inner, gradient_sq, quartic, *rule = rows.view(len(rows), units, -1).sum(2)
        return WeightProducts(weight_sq, inner, gradient_sq, quartic, tuple(rule))


class WeightPass(NamedTuple):
    """One weight to read: the arguments of :func:`weight_products`, matrices of one shape with one unit per row.

    ``known`` holds the results of ``rule.products`` where they were already computed, from whole tensors.
    """

    weight: Tensor
    gradient: Tensor
    state: tuple[Tensor, ...] = ()
    rule: UpdateRule | None = None
    gradient_scale: Tensor | None = None
    keep: Tensor | None = None
    known: tuple[Tensor, ...] = ()
