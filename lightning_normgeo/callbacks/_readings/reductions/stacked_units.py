"""Per-unit quantities of all weights of one step, concatenated into one flat tensor per quantity.

An operation on a hundred small tensors costs a hundred times as much as on their concatenation. Quantities are computed
once for all weights, and scale-invariant weights and controls are slices of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.reductions.layer_segments import LayerSegments
from lightning_normgeo.geometry.increments.norm_increments import measured_increment
from lightning_normgeo.geometry.increments.rounding_floors import storage_floor, systematic_floor
from lightning_normgeo.geometry.orthogonality import cosine_of_norms
from lightning_normgeo.geometry.products.unit_sums import ExplainedSums
from lightning_normgeo.geometry.steps.angles import UpdateParts, UpdateProducts, effective_lr, split_update
from lightning_normgeo.probes.weight_step import WeightStep, common_sums

Columns = TypeVar("Columns", bound="Tensor | tuple[Tensor, ...]")


class StackedUnits(ExplainedSums):
    """Quantities of several weights, each with one value per unit, over all units of all weights.

    Args:
        steps: the steps of the weights, at least one.
        epsilon: the part of ⟨W, g⟩ that the ε of batch normalizations causes, by weight, where it is known.
        whole: quantities of more weights, of which these are neighbors. Default: none.
        first: the place of the first of these weights among those of ``whole``.

    Attributes:
        sums: those of all steps, concatenated; without terms unless the increments of all weights are explained.
    """

    def __init__(
        self,
        steps: Sequence[WeightStep],
        epsilon: Mapping[str, Tensor],
        whole: StackedUnits | None = None,
        first: int = 0,
    ) -> None:
        self.steps = steps
        self._epsilon, self._whole = epsilon, whole
        begin = 0 if whole is None else sum(step.units.count for step in whole.steps[:first])
        self._place = slice(begin, begin + sum(step.units.count for step in steps))
        explained = self._explained_whole
        self.sums = torch.cat(common_sums(steps), 1) if explained is None else explained.sums[:, self._place]

    def part(self, start: int, stop: int) -> StackedUnits:
        """Return the quantities of some neighboring weights, as slices of these."""
        every = (start, stop) == (0, len(self.steps))
        return self if every else StackedUnits(self.steps[start:stop], self._epsilon, self, start)

    def of(self, steps: Sequence[WeightStep]) -> StackedUnits:
        """Return the quantities of some of these weights: these themselves if they are all."""
        return self if len(steps) == len(self.steps) else StackedUnits(steps, self._epsilon)

    @property
    def with_known_epsilon(self) -> StackedUnits | None:
        """The weights for which it is known what ε adds to ⟨W, g⟩; None without any."""
        known = [step for step in self.steps if step.units.name in self._epsilon]
        return self.of(known) if known else None

    @cached_property
    def layers(self) -> LayerSegments:
        """The runs of units that belong to the same weight."""
        counts = [step.units.count for step in self.steps]
        return LayerSegments([step.units.layer for step in self.steps], counts, self.steps[0].sums.device)

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
    def norms(self) -> Tensor:
        """‖W‖‖g‖."""
        return self._sliced(lambda whole: whole.norms, lambda: self.weight_sq.sqrt() * self.gradient_sq.sqrt())

    @cached_property
    def cosines(self) -> Tensor:
        """cos(W, g)."""
        return self._sliced(lambda whole: whole.cosines, lambda: cosine_of_norms(self.inner, self.norms))

    @cached_property
    def corrected_cosines(self) -> Tensor:
        """cos(W, g) without the part of ⟨W, g⟩ that ε causes, as far as it is known."""
        return self._sliced(lambda whole: whole.corrected_cosines, self._corrected_cosines)

    def _corrected_cosines(self) -> Tensor:
        zero = self.sums.new_zeros(())
        by_epsilon = [self._epsilon.get(s.units.name, zero.expand(s.units.count)) for s in self.steps]
        return cosine_of_norms(self.inner - torch.cat(by_epsilon), self.norms)

    @cached_property
    def effective_lr(self) -> Tensor:
        """η/‖W‖²."""
        return self._sliced(lambda whole: whole.effective_lr, lambda: effective_lr(self.spread("lr"), self.weight_sq))

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
        if self._explained_whole is not None:
            return self._explained_whole.explained[self._place]
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
    def floors(self) -> Tensor:
        """The rounding floors per unit, ``(2, units)``: of random errors in storage, and of systematic errors."""
        if self._explained_whole is not None:
            return self._explained_whole.floors[:, self._place]
        kinds = {(step.dtype, step.arithmetic, step.stores) for step in self.steps}
        parts = [self] if len(kinds) == 1 else [self.part(k, k + 1) for k in range(len(self.steps))]
        return torch.cat([part._floors_of_one_kind() for part in parts], 1)

    @cached_property
    def floor_sums(self) -> tuple[Tensor, Tensor]:
        """The rounding floors of all weights together and of each one.

        Random errors add up as squares, systematic ones linearly.
        """
        stored, computed = self.floors
        columns = torch.stack([stored.square(), computed])
        sums = torch.cat([columns.sum(1, keepdim=True), self.layers.sum(columns)], 1)
        floors = sums[0].sqrt() + sums[1]
        return floors[0], floors[1:]

    def _floors_of_one_kind(self) -> Tensor:
        """Return the floors of weights of one dtype; systematic ones are zero without a known decomposition."""
        one, weight_sq, terms = self.steps[0], self.weight_sq, self.terms
        stored = storage_floor(self.quartic, one.dtype, one.stores)
        computed = torch.zeros_like(stored) if terms is None else systematic_floor(terms, weight_sq, one.arithmetic)
        return torch.stack([stored, computed])

    @property
    def _explained_whole(self) -> StackedUnits | None:
        """More weights that these are a part of, if the increments of all of them are explained; None otherwise."""
        return self._whole if self._whole is not None and self._whole.is_explained else None

    def _sliced(self, of_whole: Callable[[StackedUnits], Columns], compute: Callable[[], Columns]) -> Columns:
        """Return these weights' slice of a quantity of all weights; computed where these are all."""
        if self._whole is None:
            return compute()
        found = of_whole(self._whole)
        if isinstance(found, tuple):
            return type(found)(*(column[self._place] for column in found))
        return found[self._place]  # type: ignore[return-value]
