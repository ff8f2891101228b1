"""Per-unit quantities of all weights of one step, concatenated into one flat tensor per quantity.

An operation on a hundred small tensors costs a hundred times as much as on their concatenation.
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
    """Quantities of several weights, each with one value per unit, over all units of all weights.

    Args:
        steps: the steps of the weights, at least one.
    """

    def __init__(self, steps: Sequence[WeightStep]) -> None:
        self.steps = steps
        self.layers = LayerSegments(
            [s.units.layer for s in steps], [s.units.count for s in steps], steps[0].weight_sq.device
        )
        self._joined: dict[str, Tensor] = {}

    def column(self, name: str) -> Tensor:
        """Return a per-unit tensor of the steps, such as ``weight_sq``, concatenated over all weights."""
        if name not in self._joined:
            self._joined[name] = torch.cat([getattr(step, name) for step in self.steps])
        return self._joined[name]

    def spread(self, name: str) -> Tensor:
        """Return a number of each step, such as ``lr``, repeated for each unit of its weight."""
        return self.layers.spread([getattr(step, name) for step in self.steps])

    @cached_property
    def update(self) -> UpdateProducts:
        """The inner products of the updates of all weights."""
        return UpdateProducts(*map(torch.cat, zip(*(step.update for step in self.steps if step.update), strict=True)))

    @cached_property
    def terms(self) -> IncrementTerms | None:
        """The terms of the increments of all weights; None if one of them has no known decomposition."""
        known = [step.terms for step in self.steps if step.terms is not None]
        return IncrementTerms(*map(torch.cat, zip(*known, strict=True))) if len(known) == len(self.steps) else None

    @cached_property
    def increment(self) -> Tensor:
        """The measured increment ‖W⁺‖² - ‖W‖²."""
        return measured_increment(self.update.weight_update, self.update.update_sq)

    @cached_property
    def explained(self) -> Tensor:
        """The increment that the formulas of the optimizers explain; only where all weights have one."""
        assert self.terms is not None  # noqa: S101
        return self.terms.total

    @cached_property
    def residual(self) -> Tensor:
        """The part of the measured increment that the formulas do not explain."""
        return self.increment - self.explained

    @property
    def has_gradient(self) -> bool:
        """Whether the gradient of every weight was computed at W."""
        return all(step.has_gradient for step in self.steps)

    @cached_property
    def floors(self) -> tuple[Tensor, Tensor]:
        """The rounding floors per unit: of random errors in storage, and of systematic errors."""
        kinds = {(step.dtype, 1 if step.rule is None else step.rule.stores) for step in self.steps}
        parts = [self] if len(kinds) == 1 else [StackedUnits([step]) for step in self.steps]
        stored = [replace(part.steps[0], quartic=part.column("quartic")).storage_floor for part in parts]
        return torch.cat(stored), torch.cat([part._systematic() for part in parts])

    @cached_property
    def floor_by_layer(self) -> Tensor:
        """The rounding floor of each weight: random errors add up as squares, systematic ones linearly."""
        stored, computed = self.floors
        return self.layers.sum(stored.square()).sqrt() + self.layers.sum(computed)

    def _systematic(self) -> Tensor:
        """Return the floor of systematic errors; zero where the increment has no known decomposition."""
        weight_sq, dtype = self.column("weight_sq"), self.steps[0].dtype
        if self.terms is None:
            return torch.zeros_like(weight_sq)
        return systematic_floor(self.terms, weight_sq, dtype)
