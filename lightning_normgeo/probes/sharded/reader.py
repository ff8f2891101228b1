"""What is read from divided weights: every process reads the rows it has; :mod:`.all_reduce` brings them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.angles import UpdateProducts
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.normalization.units import WeightUnits
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.cumulative.totals import Totals
from lightning_normgeo.probes.sharded.shards import Shards, local_part, local_rows
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import ADDITIVE, WeightStep

_STEPS = Totals._fields.index("steps")


class ShardedReader(WeightReader):
    """Reads the rows that this process has.

    Its steps hold one value per row and not per unit, those of a bias behind those of the weight.
    """

    def _part(self, parameter: Tensor) -> Tensor:
        return local_part(parameter)

    def _rows(self, units: WeightUnits, tensor: Tensor) -> Tensor:
        return local_rows(tensor, units.dim)

    def _together(self, steps: Sequence[WeightStep]) -> WeightStep:
        columns: dict[str, Any] = {name: torch.cat([getattr(step, name) for step in steps]) for name in ADDITIVE}
        terms = [step.terms for step in steps if step.terms is not None]
        known = IncrementTerms(*map(torch.cat, zip(*terms, strict=True))) if len(terms) == len(steps) else None
        uniform = all(steps[0].moves_like(step) for step in steps[1:])
        return replace(steps[0], terms=known, uniform=uniform, **columns)

    def _joined(self, parts: Sequence[UpdateProducts]) -> UpdateProducts:
        return UpdateProducts(*map(torch.cat, zip(*parts, strict=True)))


class ShardedIncrements(CumulativeIncrements):
    """The sums over the rows that this process has; those that leave it are over all processes.

    Every process has to ask for them. Only what rounding can add to a bias is not what it would be in one process, but
    a larger bound: the sum of those of all parts.
    """

    def __init__(self, shards: Shards, look_up: Callable[[], Mapping[str, nn.Parameter]] = dict) -> None:
        super().__init__(look_up)
        self._first = shards.rank == 0
        self._counts = shards.counts
        self._device = shards.device

    @property
    def names(self) -> list[str]:
        """The parameters, in the same order on all processes."""
        return list(dict.fromkeys(name for name, _ in self._names.values() if name))

    def table(self) -> Tensor:
        """Return the sums of this process, one row for each parameter; adding up the tables of all gives the whole."""
        table = torch.zeros(len(self.names), len(Totals._fields), dtype=self._sums.dtype, device=self._device)
        here = [(row, self._rows[name]) for row, name in enumerate(self.names) if name in self._rows]
        if self._counts and here:
            rows, own = zip(*here, strict=True)
            table[list(rows)] = self._sums[list(own)].to(table)
        if not self._first:
            table[:, _STEPS] = 0
        return table

    def whole(self, table: Tensor) -> CumulativeIncrements:
        """Return the account over all processes from the sum of all tables."""
        sums, names = CumulativeIncrements(), self.names
        known = [row for row, name in enumerate(names) if name in self._rows]
        sums._rows, sums._sums = {names[row]: place for place, row in enumerate(known)}, table[known]
        sums.unexplained, sums.unpredicted = self.unexplained, self.unpredicted
        sums.without_momentum_form, sums.members = self.without_momentum_form, self.members
        return sums

    def state(self) -> dict[str, Any]:
        """Return the sums over all processes as plain numbers; one collective."""
        table = self.table()
        torch.distributed.all_reduce(table)
        return self.whole(table).state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one process takes what all have added up."""
        super().load(state)
        if not self._first:
            self._sums.zero_()

    def _whole(self, tensor: Tensor) -> Tensor:
        part = local_part(tensor)
        return part.reshape(part.shape[0], -1) if part.ndim > 1 and part.numel() else part.reshape(1, -1)
