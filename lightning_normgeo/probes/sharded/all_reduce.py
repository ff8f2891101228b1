"""One collective per measured step brings what every process has measured of its rows to all of them.

What is sent has the same layout on every process whatever it has seen: it follows from the parameters alone. A weight
that is not in the graph of one process, or a measurement that fails on one, leaves gaps and never a process waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.geometry.angles import UpdateProducts, folded_products
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.cumulative.totals import Totals
from lightning_normgeo.probes.sharded.reader import ShardedIncrements
from lightning_normgeo.probes.sharded.shards import RowRange, ShardedWeight, Shards, is_sharded
from lightning_normgeo.probes.weight_step import ADDITIVE, MeasuredWeights, WeightStep

_TERMS, _PRODUCTS = len(IncrementTerms._fields), len(UpdateProducts._fields)
_FIELDS = len(ADDITIVE) + _TERMS + _PRODUCTS
_GROUPED = "it is a grouped transposed convolution, whose rows no process has a fixed part of"
_OTHER_ROWS = "its units are along another dimension than the rows it is divided into"
_BIAS_ALONE = "its bias, which belongs to the units, is not divided with it"
_UNSEEN = "not every process saw it in its graph or could measure it"
_DISPUTED = "the processes found different units in it"


class _Place(NamedTuple):
    """Where one weight is in what is sent: one row per field, one column per lane."""

    weight: ShardedWeight
    block: Tensor
    head: Tensor


class StepAllReduce:
    """Sums up what the processes of a divided model have measured.

    Args:
        shards: the parameters.
        weights: all that can be measured, in the same order on all processes.
        skipped: counts the weights that are left out, by reason.
    """

    def __init__(self, shards: Shards, weights: Sequence[ShardedWeight], skipped: Counter[str]) -> None:
        self.shards = shards
        self.skipped = skipped
        self._weights = weights

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What cumulative sums can count: the divided parameters."""
        return {name: parameter for name, parameter in self.shards.parameters.items() if is_sharded(parameter)}

    def new_sums(self, look_up: Callable[[], Mapping[str, nn.Parameter]]) -> ShardedIncrements:
        """Return an cumulative of the rows that this process has."""
        return ShardedIncrements(self.shards, look_up)

    @torch.no_grad()
    def __call__(
        self, measurement: MeasuredWeights, cumulative: CumulativeIncrements | None
    ) -> tuple[MeasuredWeights, CumulativeIncrements | None]:
        """Return the measurement with the values of whole units, and the cumulative of all processes.

        Every process has to call it for every measured step: one collective, one transfer of a few numbers per weight.
        """
        divided = cumulative if isinstance(cumulative, ShardedIncrements) else None
        sent, failed, sums, places = self._layout(0 if divided is None else len(divided.names))
        if self._fill(measurement, divided, failed, sums, places) is None:
            sent.zero_()
        torch.distributed.all_reduce(sent)
        heads = torch.stack([place.head for place in places]).tolist() if places else []
        steps = {}
        for place, head in zip(places, heads, strict=True):
            name = place.weight.name
            if head[0] and self._is_whole(name, head, place.weight, measurement.steps.get(name)):
                steps[name] = _whole(measurement.steps[name], place)
        found = replace(measurement, steps=steps, valid=[failed.reshape(()) == 0])
        return found, cumulative if divided is None else divided.whole(sums)

    def _layout(self, accounts: int) -> tuple[Tensor, Tensor, Tensor, list[_Place]]:
        """Return what is sent, all zeros, and its parts: failed checks, sums over all steps, weights."""
        weights = [weight for weight in self._weights if weight.parameter.requires_grad]
        blocks = [_FIELDS * (w.row_range.total + (0 if w.bias is None else w.bias.total)) for w in weights]
        columns = len(Totals._fields)
        sizes = [1, accounts * columns, 3 * len(weights), *blocks]
        sent = torch.zeros(sum(sizes), dtype=wide_dtype(self.shards.device), device=self.shards.device)
        failed, sums, heads, *parts = torch.split(sent, sizes)
        rows = [part.view(_FIELDS, -1) for part in parts]
        places = [_Place(*entry) for entry in zip(weights, rows, heads.view(-1, 3), strict=True)]
        return sent, failed, sums.view(accounts, columns), places

    @skipped_on_error
    def _fill(
        self,
        measurement: MeasuredWeights,
        cumulative: ShardedIncrements | None,
        failed: Tensor,
        sums: Tensor,
        places: list[_Place],
    ) -> bool:
        """Write what this process knows."""
        for flag in measurement.valid:
            failed += (~flag).to(failed)
        if cumulative is not None:
            sums.copy_(cumulative.table())
        for place in places:
            step = measurement.steps.get(place.weight.name)
            if step is not None:
                mark = _fingerprint(step)
                place.head.copy_(torch.tensor([1.0, mark, mark**2], dtype=place.head.dtype))
                if self.shards.counts and _obstacle(step, place.weight) is None:
                    _write(step, place)
        return True

    def _is_whole(self, name: str, head: list[float], weight: ShardedWeight, step: WeightStep | None) -> bool:
        """Return whether all processes have measured the same of a weight; tells why not."""
        count, total, squares = head
        why: str | None = _UNSEEN
        if count == self.shards.processes and step is not None:
            why = _obstacle(step, weight) if count * squares == total**2 else _DISPUTED
        if why is not None:
            self.skipped[why] += 1
            warn_once(f"{name} is left out: {why}.")
        return why is None


def _obstacle(step: WeightStep, weight: ShardedWeight) -> str | None:
    """Return why the units of a weight cannot be put together from its rows, or None."""
    if step.units.groups > 1:
        return _GROUPED
    if step.units.dim != weight.dim:
        return _OTHER_ROWS
    return _BIAS_ALONE if step.units.bias is not None and weight.bias is None else None


def _fingerprint(step: WeightStep) -> int:
    """Return a number of 16 bits for what must be the same everywhere: sums of its square over processes stay exact."""
    units = step.units
    known = (units.name, units.kind, units.count, units.dim, units.groups, units.bias)
    return crc32(repr((*known, step.terms is None, step.update is None, step.has_gradient)).encode()) & 0xFFFF


def _write(step: WeightStep, place: _Place) -> None:
    """Write the values of this process's rows into their columns."""
    parts = [getattr(step, name) for name in ADDITIVE]
    none = torch.zeros_like(step.weight_sq)
    parts += list(step.terms or [none] * _TERMS) + list(step.update or [none] * _PRODUCTS)
    values, row_range = torch.stack(parts), place.weight.row_range
    mine = row_range.stop - row_range.start
    place.block[:, row_range.start : row_range.stop] = values[:, :mine]
    if step.units.bias is not None and place.weight.bias is not None:
        bias, behind = place.weight.bias, row_range.total
        place.block[:, behind + bias.start : behind + bias.stop] = values[:, mine:]


def _whole(step: WeightStep, place: _Place) -> WeightStep:
    """Return the step with one value per unit, from the rows of all processes."""
    row_range, count = place.weight.row_range, step.units.count
    rows = _by_unit(place.block[:, : row_range.total], row_range, count)
    if step.units.bias is not None and place.weight.bias is not None:
        rows = torch.cat([rows, _by_unit(place.block[:, row_range.total :], place.weight.bias, count)], -1)
    sums, products = rows[:-_PRODUCTS].sum(-1), rows[-_PRODUCTS:]
    return replace(
        step,
        **dict(zip(ADDITIVE, sums, strict=False)),
        terms=None if step.terms is None else IncrementTerms(*sums[len(ADDITIVE) :]),
        update=None if step.update is None else folded_products(UpdateProducts(*products)),
        scale_gradient=None,
    )


def _by_unit(block: Tensor, row_range: RowRange, count: int) -> Tensor:
    """Return ``(fields, units, parts of a unit)``; the rows of a unit follow each other."""
    return block.reshape(_FIELDS, row_range.copies, count, -1).movedim(1, 2).flatten(2)
