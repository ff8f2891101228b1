"""All weights of one step side by side: one flat tensor per quantity instead of one for each weight.

An operation on a hundred small tensors costs a hundred times what it costs on their concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.layer_segments import LayerSegments
from lightning_normgeo.geometry.angles import UpdateProducts
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.increments.norm_increments import measured_increment
from lightning_normgeo.geometry.increments.rounding_floors import systematic_floor
from lightning_normgeo.probes.weight_step import WeightStep


class StackedUnits:
    """Quantities of several weights; each is one value per unit, over all units of all weights.

    Args:
        steps: at least one.
    """

    def __init__(self, steps: Sequence[WeightStep]) -> None:
        self.steps = steps
        self.layers = LayerSegments(
            [s.units.layer for s in steps], [s.units.count for s in steps], steps[0].weight_sq.device
        )
        self._joined: dict[str, Tensor] = {}

    def column(self, name: str) -> Tensor:
        """Return a tensor of the steps, such as ``weight_sq``."""
        if name not in self._joined:
            self._joined[name] = torch.cat([getattr(step, name) for step in self.steps])
        return self._joined[name]

    def spread(self, name: str) -> Tensor:
        """Return a number of the steps, such as ``lr``, for each unit."""
        return self.layers.spread([getattr(step, name) for step in self.steps])

    @cached_property
    def update(self) -> UpdateProducts:
        """The inner products of all updates."""
        return UpdateProducts(*map(torch.cat, zip(*(step.update for step in self.steps if step.update), strict=True)))

    @cached_property
    def terms(self) -> IncrementTerms | None:
        """The terms of all increments; None if one of them has no known decomposition."""
        known = [step.terms for step in self.steps if step.terms is not None]
        return IncrementTerms(*map(torch.cat, zip(*known, strict=True))) if len(known) == len(self.steps) else None

    @cached_property
    def increment(self) -> Tensor:
        """The measured ‖W⁺‖² - ‖W‖²."""
        return measured_increment(self.update.weight_update, self.update.update_sq)

    @property
    def has_gradient(self) -> bool:
        """Whether every weight's gradient is the one at W."""
        return all(step.has_gradient for step in self.steps)

    @cached_property
    def floors(self) -> tuple[Tensor, Tensor]:
        """What rounding in storage adds at random, and what the optimizer's arithmetic adds systematically."""
        kinds = {(step.dtype, 1 if step.rule is None else step.rule.stores) for step in self.steps}
        parts = [self] if len(kinds) == 1 else [StackedUnits([step]) for step in self.steps]
        stored = [replace(part.steps[0], quartic=part.column("quartic")).storage_floor for part in parts]
        return torch.cat(stored), torch.cat([part._systematic() for part in parts])

    @cached_property
    def floor_by_layer(self) -> Tensor:
        """Both together for each weight: errors in storage are independent, the others add up as they are."""
        stored, computed = self.floors
        return self.layers.sum(stored.square()).sqrt() + self.layers.sum(computed)

    def _systematic(self) -> Tensor:
        weight_sq, dtype = self.column("weight_sq"), self.steps[0].dtype
        if self.terms is None:
            return torch.zeros_like(weight_sq)
        return systematic_floor(self.terms, weight_sq, dtype)
