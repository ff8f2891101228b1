"""Per-unit quantities of all weights of one step, concatenated into one flat tensor per quantity.

An operation on a hundred small tensors costs a hundred times as much as on their concatenation. Quantities are computed
once for all weights, and scale-invariant weights and controls are slices of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.layer_segments import LayerSegments
from lightning_normgeo.geometry.angles import UpdateParts, UpdateProducts, effective_lr, split_update
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.increments.norm_increments import measured_increment
from lightning_normgeo.geometry.increments.rounding_floors import systematic_floor
from lightning_normgeo.geometry.orthogonality import cosine
from lightning_normgeo.probes.weight_step import WeightStep

Columns = TypeVar("Columns", bound="Tensor | tuple[Tensor, ...]")


class StackedUnits:
    """Quantities of several weights, each with one value per unit, over all units of all weights.

    Args:
        steps: the steps of the weights, at least one.
        whole: quantities of more weights, of which these are neighbors. Default: none.
        first: the place of the first of these weights among those of ``whole``.
    """

    def __init__(self, steps: Sequence[WeightStep], whole: StackedUnits | None = None, first: int = 0) -> None:
        self.steps = steps
        self._whole = whole
        begin = 0 if whole is None else sum(step.units.count for step in whole.steps[:first])
        self._place = slice(begin, begin + sum(step.units.count for step in steps))
        self._joined: dict[str, Tensor] = {}

    def part(self, start: int, stop: int) -> StackedUnits:
        """Return the quantities of some neighboring weights, as slices of these."""
        return self if (start, stop) == (0, len(self.steps)) else StackedUnits(self.steps[start:stop], self, start)

    def of(self, steps: Sequence[WeightStep]) -> StackedUnits:
        """Return the quantities of some of these weights: these themselves if they are all."""
        return self if len(steps) == len(self.steps) else StackedUnits(steps)

    @cached_property
    def layers(self) -> LayerSegments:
        """The runs of units that belong to the same weight."""
        counts = [step.units.count for step in self.steps]
        return LayerSegments([step.units.layer for step in self.steps], counts, self.steps[0].weight_sq.device)

    def column(self, name: str) -> Tensor:
        """Return a per-unit tensor of the steps, such as ``weight_sq``, concatenated over all weights."""
        if name not in self._joined:
            self._joined[name] = self._sliced(
                lambda whole: whole.column(name), lambda: torch.cat([getattr(step, name) for step in self.steps])
            )
        return self._joined[name]

    def spread(self, name: str) -> Tensor:
        """Return a number of each step, such as ``lr``, repeated for each unit of its weight."""
        return self.layers.spread([getattr(step, name) for step in self.steps])

    @cached_property
    def update(self) -> UpdateProducts:
        """The inner products of the updates of all weights."""
        return self._sliced(
            lambda whole: whole.update,
            lambda: UpdateProducts(*map(torch.cat, zip(*(s.update for s in self.steps if s.update), strict=True))),
        )

    @cached_property
    def update_parts(self) -> UpdateParts:
        """The radial and tangential parts of the updates, and their angles."""
        return self._sliced(lambda whole: whole.update_parts, lambda: split_update(self.update))

    @cached_property
    def cosines(self) -> Tensor:
        """cos(W, g)."""
        columns = ("inner", "weight_sq", "gradient_sq")
        return self._sliced(lambda whole: whole.cosines, lambda: cosine(*map(self.column, columns)))

    @cached_property
    def effective_lr(self) -> Tensor:
        """η/‖W‖²."""
        return self._sliced(
            lambda whole: whole.effective_lr, lambda: effective_lr(self.spread("lr"), self.column("weight_sq"))
        )

    @cached_property
    def terms(self) -> IncrementTerms | None:
        """The terms of the increments of all weights; None if one of them has no known decomposition."""
        if self._whole is not None and self._whole.terms is not None:
            return IncrementTerms(*(column[self._place] for column in self._whole.terms))
        known = [step.terms for step in self.steps if step.terms is not None]
        return IncrementTerms(*map(torch.cat, zip(*known, strict=True))) if len(known) == len(self.steps) else None

    @cached_property
    def increment(self) -> Tensor:
        """The measured increment ‖W⁺‖² - ‖W‖²."""
        return self._sliced(
            lambda whole: whole.increment,
            lambda: measured_increment(self.update.weight_update, self.update.update_sq),
        )

    @cached_property
    def explained(self) -> Tensor:
        """The increment that the formulas of the optimizers explain; only where all weights have one."""
        if self._whole is not None and self._whole.terms is not None:
            return self._whole.explained[self._place]
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
        if self._whole is not None and self._whole.terms is not None:
            return tuple(column[self._place] for column in self._whole.floors)  # type: ignore[return-value]
        kinds = {(step.dtype, 1 if step.rule is None else step.rule.stores) for step in self.steps}
        parts = [self] if len(kinds) == 1 else [self.part(k, k + 1) for k in range(len(self.steps))]
        stored = [replace(part.steps[0], quartic=part.column("quartic")).storage_floor for part in parts]
        return torch.cat(stored), torch.cat([part._systematic() for part in parts])

    @cached_property
    def floor_sums(self) -> tuple[Tensor, Tensor]:
        """The rounding floors of all weights together and of each one.

        Random errors add up as squares, systematic ones linearly.
        """
        stored, computed = self.floors
        columns = torch.stack([stored.square(), computed], 1)
        sums = torch.cat([columns.sum(0, keepdim=True), self.layers.sum(columns)])
        floors = sums[:, 0].sqrt() + sums[:, 1]
        return floors[0], floors[1:]

    def _systematic(self) -> Tensor:
        """Return the floor of systematic errors; zero where the increment has no known decomposition."""
        weight_sq, dtype = self.column("weight_sq"), self.steps[0].dtype
        if self.terms is None:
            return torch.zeros_like(weight_sq)
        return systematic_floor(self.terms, weight_sq, dtype)

    def _sliced(self, of_whole: Callable[[StackedUnits], Columns], compute: Callable[[], Columns]) -> Columns:
        """Return these weights' slice of a quantity of all weights; computed where these are all."""
        if self._whole is None:
            return compute()
        found = of_whole(self._whole)
        if isinstance(found, tuple):
            return type(found)(*(column[self._place] for column in found))
        return found[self._place]  # type: ignore[return-value]
