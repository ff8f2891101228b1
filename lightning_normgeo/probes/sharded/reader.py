"""Reading of sharded weights: every process measures its own rows, and :mod:`.all_reduce` combines the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import local_part, output_rows
from lightning_normgeo.geometry.steps.angles import UpdateProducts
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.cumulative.totals import Totals
from lightning_normgeo.probes.sharded.shards import Shards, local_rows
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import WeightStep, common_sums
from lightning_normgeo.symmetries.units.weight_units import WeightUnits

_STEPS = Totals._fields.index("steps")


class ShardedReader(WeightReader):
    """Reader of the rows that this process holds.

    Its steps have one value per row instead of per unit, since the rows of a unit may be on several processes. The
    values of a bias, one per element, follow those of the weight.
    """

    def _part(self, parameter: Tensor) -> Tensor:
        return local_part(parameter)

    def _rows(self, units: WeightUnits, tensor: Tensor) -> Tensor:
        return local_rows(tensor, units.dim)

    def _own_rows(self, units: WeightUnits, tensor: Tensor, like: nn.Parameter) -> Tensor:
        del like  # the local part of a parameter may lie in memory otherwise than the whole
        return self._rows(units, tensor)

    def _together(self, steps: Sequence[WeightStep]) -> WeightStep:
        uniform = all(steps[0].moves_like(step) for step in steps[1:])
        return replace(steps[0], sums=torch.cat(common_sums(steps), 1), uniform=uniform)

    def _finer_rows(self, units: WeightUnits, parameter: nn.Parameter) -> None:
        return None  # rows are as fine as they get

    def _values(self, units: WeightUnits, rows: int) -> int:
        return rows

    def _joined(self, parts: Sequence[UpdateProducts]) -> UpdateProducts:
        return UpdateProducts(*map(torch.cat, zip(*parts, strict=True)))


class ShardedIncrements(CumulativeIncrements):
    """Cumulative increments of the rows that this process holds; :meth:`state` returns the totals of all processes.

    :meth:`state` is a collective, which every process has to call. The totals equal those of an unsharded model, except
    for the bound on rounding in a bias, which is larger: it is the sum of the bounds of all shards.
    """

    def __init__(self, shards: Shards, look_up: Callable[[], Mapping[str, nn.Parameter]] = dict) -> None:
        super().__init__(look_up)
        self._first = shards.rank == 0
        self._counts = shards.counts
        self._device = shards.device

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the same order on all processes."""
        return self._names.all

    def table(self) -> Tensor:
        """Return the sums of this process as a table that can be added up over all processes.

        Returns:
            One row for each of :attr:`names` and one column for each field of :class:`Totals`.
        """
        table = torch.zeros(len(self.names), len(Totals._fields), dtype=self._sums.dtype, device=self._device)
        here = [(row, self._rows[name]) for row, name in enumerate(self.names) if name in self._rows]
        # in HSDP several processes hold the same rows, of which only one copy may enter the total
        if self._counts and here:
            rows, own = zip(*here, strict=True)
            table[list(rows)] = self._sums[list(own)].to(table)
        # the number of steps is the same everywhere, unlike all other fields, which add up over the rows
        if not self._first:
            table[:, _STEPS] = 0
        return table

    def whole(self, table: Tensor) -> CumulativeIncrements:
        """Return the cumulative increments of all processes.

        Args:
            table: the sum of the tables of all processes.
        """
        sums, names = CumulativeIncrements(), self.names
        known = [row for row, name in enumerate(names) if name in self._rows]
        sums._rows, sums._sums = {names[row]: place for place, row in enumerate(known)}, table[known]
        sums.unexplained, sums.unpredicted = self.unexplained, self.unpredicted
        sums.without_momentum_form, sums.members = self.without_momentum_form, self.members
        return sums

    def state(self) -> dict[str, Any]:
        """Return the totals of all processes as plain numbers, for a checkpoint.

        Cost: one collective, which every process has to take part in.
        """
        table = self.table()
        torch.distributed.all_reduce(table)
        return self.whole(table).state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from the totals in a checkpoint."""
        super().load(state)
        # the checkpoint holds totals of all processes, so only one of them may start from these
        if not self._first:
            self._sums.zero_()

    def _whole(self, tensor: Tensor, like: Tensor) -> Tensor:
        part = local_part(tensor)
        return part.reshape(output_rows(part), -1)
