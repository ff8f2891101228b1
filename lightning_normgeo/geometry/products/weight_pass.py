"""Requests and results of reading weights: :class:`WeightPass` and :class:`WeightProducts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import UpdateRule
from lightning_normgeo.geometry.products.unit_sums import UnitSums

SAFE_DIFFERENCE = 0.01
"""‖D_⊥‖² / ‖D‖² above which ‖D_⊥‖² may be taken as a difference of two sums: 14 digits remain."""


@dataclass(frozen=True)
class WeightProducts(UnitSums):
    """Inner products of one weight before a step, one row for each product, one column for each unit."""

    sums: Tensor
    """``(4 + products of the rule, units)`` in float64 (float32 on devices without it)."""

    @property
    def units(self) -> int:
        """The number of units."""
        return self.sums.shape[1]

    @property
    def rule(self) -> tuple[Tensor, ...]:
        """The results of ``rule.products``, each ``(units,)``; empty without a rule."""
        return self.sums[4:].unbind()

    def joined(self, units: int) -> WeightProducts:
        """Return the products of ``units`` units of equally many neighboring rows, for products that are sums."""
        return self if self.units == units else WeightProducts(self.sums.view(len(self.sums), units, -1).sum(2))


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
