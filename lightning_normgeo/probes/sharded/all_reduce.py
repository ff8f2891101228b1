"""Combination of the measurements of a sharded model over all processes, with one collective per measured step.

Every process writes the values of its own rows into a buffer of zeros that has a place for every row of every weight.
The sum of these buffers over all processes contains all values.

A collective requires that every process calls it, with a buffer of the same size. So the layout of the buffer depends
on the parameters alone, which are the same everywhere, and never on the graph or the measurements of one process. A
weight that one process did not see, or a measurement that failed on it, leaves zeros; no process is left waiting.
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
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.products.unit_sums import BEFORE_TERMS
from lightning_normgeo.geometry.rows import is_sharded, wide_dtype
from lightning_normgeo.geometry.steps.angles import UpdateProducts, folded_products
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.cumulative.totals import Totals
from lightning_normgeo.probes.sharded.reader import ShardedIncrements
from lightning_normgeo.probes.sharded.shards import RowRange, ShardedWeight, Shards
from lightning_normgeo.probes.weight_step import MeasuredWeights, WeightStep

_TERMS, _PRODUCTS = len(IncrementTerms._fields), len(UpdateProducts._fields)
_FIELDS = BEFORE_TERMS + _TERMS + _PRODUCTS
_GROUPED = "it is a grouped transposed convolution, whose output channels are spread over its groups"
_OTHER_ROWS = "its units are along another dimension than the rows that the processes measure"
_BIAS_ALONE = "its bias, which belongs to the units, is not sharded with it"
_UNSEEN = "not every process saw it in its graph or could measure it"
_DISPUTED = "the processes found different units in it"


class _Place(NamedTuple):
    """The parts of the buffer that belong to one weight; views, so that writing to them fills the buffer."""

    weight: ShardedWeight
    block: Tensor
    """The values, with one row per measured field and one column per row of the weight (and element of its bias)."""
    head: Tensor
    """Number of processes that measured the weight, and the sums of their fingerprints and of the squares of these."""


class StepAllReduce:
    """Sums up the measurements of all processes of a sharded model.

    Args:
        shards: the sharded parameters.
        weights: all weights that can be measured, in the same order on all processes.
        skipped: number of weights that were left out, by reason; updated in place.
    """

    def __init__(self, shards: Shards, weights: Sequence[ShardedWeight], skipped: Counter[str]) -> None:
        self.shards = shards
        self.skipped = skipped
        self._weights = weights

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The sharded parameters by name, which are those that cumulative increments can count."""
        return {name: parameter for name, parameter in self.shards.parameters.items() if is_sharded(parameter)}

    def new_sums(self, look_up: Callable[[], Mapping[str, nn.Parameter]]) -> ShardedIncrements:
        """Return empty cumulative increments for the rows of this process."""
        return ShardedIncrements(self.shards, look_up)

    @torch.no_grad()
    def __call__(
        self, measurement: MeasuredWeights, cumulative: CumulativeIncrements | None
    ) -> tuple[MeasuredWeights, CumulativeIncrements | None]:
        """Combine the measurements of one step; every process has to call it for every measured step.

        Args:
            measurement: of the rows of this process.
            cumulative: of the rows of this process; None if steps are not summed up.

        Returns:
            The measurement with one value per unit, and the cumulative increments of all processes.

        Cost: one collective, and one transfer to the host of four numbers per weight.
        """
        local_sums = cumulative if isinstance(cumulative, ShardedIncrements) else None
        sent, failed, sums, places = self._layout(0 if local_sums is None else len(local_sums.names))
        if self._fill(measurement, local_sums, failed, sums, places) is None:
            # An error was reported. This process still has to take part in the collective, or the others would wait
            # forever, but without the values that it may have written before the error.
            sent.zero_()
        torch.distributed.all_reduce(sent)
        # all heads in one transfer, since each transfer waits for the device
        heads = torch.stack([place.head for place in places]).tolist() if places else []
        steps = {}
        for place, head in zip(places, heads, strict=True):
            name = place.weight.name
            # a weight that no process has measured did not move in this step, which is no reason for a warning
            if head[0] and self._is_whole(name, head, place.weight, measurement.steps.get(name)):
                steps[name] = _whole(measurement.steps[name], place)
        found = replace(measurement, steps=steps, valid=[failed.reshape(()) == 0], edited=[])
        return found, cumulative if local_sums is None else local_sums.whole(sums)

    def _layout(self, accounts: int) -> tuple[Tensor, Tensor, Tensor, list[_Place]]:
        """Return the buffer, filled with zeros, and views of its parts: failed checks, cumulative sums, weights.

        Args:
            accounts: number of parameters with cumulative sums.
        """
        # ``requires_grad`` is set on all processes alike, unlike whether a weight has a gradient in this step
        weights = [weight for weight in self._weights if weight.parameter.requires_grad]
        blocks = [_FIELDS * (w.row_range.total + (0 if w.bias is None else w.bias.total)) for w in weights]
        columns = len(Totals._fields)
        sizes = [1, accounts * columns, 4 * len(weights), *blocks]
        sent = torch.zeros(sum(sizes), dtype=wide_dtype(self.shards.device), device=self.shards.device)
        failed, sums, heads, *parts = torch.split(sent, sizes)
        rows = [part.view(_FIELDS, -1) for part in parts]
        places = [_Place(*entry) for entry in zip(weights, rows, heads.view(-1, 4), strict=True)]
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
        """Write the measurements of this process into the buffer; return None after an error."""
        for flag in measurement.valid:
            failed += (~flag).to(failed)  # a step that is invalid on one process is invalid on all
        if cumulative is not None:
            sums.copy_(cumulative.table())
        for place in places:
            step = measurement.steps.get(place.weight.name)
            if step is not None:
                # from the sums of these, every process can tell whether all have measured the same (_is_whole)
                mark = _fingerprint(step)
                for sent, number in zip(place.head.unbind(), (1.0, mark, mark**2), strict=False):
                    sent.fill_(number)  # a number is sent with its kernel; a tensor of the host would be waited for
                if step.edited is not None:  # a process may have no rows of a weight that others have edited
                    place.head[3] = step.edited
                # in HSDP several processes hold the same rows; a second copy would double the sums
                if self.shards.counts and _obstacle(step, place.weight) is None:
                    _write(step, place)
        return True

    def _is_whole(self, name: str, head: list[float], weight: ShardedWeight, step: WeightStep | None) -> bool:
        """Whether all processes have measured a weight in the same way; if not, count and report the reason."""
        count, total, squares, _ = head
        why: str | None
        if count != self.shards.processes or step is None:
            why = _UNSEEN
        # n Σm² = (Σm)² holds only if all n fingerprints m are equal (Cauchy-Schwarz)
        elif count * squares != total**2:
            why = _DISPUTED
        else:
            why = _obstacle(step, weight)
        if why is not None:
            self.skipped[why] += 1
            warn_once(f"{name} is left out: {why}.")
        return why is None


def _obstacle(step: WeightStep, weight: ShardedWeight) -> str | None:
    """Return the reason why the units of a weight cannot be combined from its rows, in words; None if they can."""
    if step.units.groups > 1:
        return _GROUPED
    if step.units.dim != weight.dim:
        return _OTHER_ROWS
    return _BIAS_ALONE if step.units.bias is not None and weight.bias is None else None


def _fingerprint(step: WeightStep) -> int:
    """Return a checksum of the properties of a step that must be the same on all processes, from 0 to 65535."""
    units = step.units
    known = (units.name, units.kind, units.count, units.dim, units.groups, units.bias)
    # not hash(), which differs between processes; 16 bits, so that sums of squares are exact in floating point
    return crc32(repr((*known, not step.is_explained, step.update is None, step.has_gradient)).encode()) & 0xFFFF


def _write(step: WeightStep, place: _Place) -> None:
    """Write the values of this process's rows into their columns."""
    # the layout has a place for terms and updates even if there are none
    values, row_range = step.sums.new_zeros(_FIELDS, step.sums.shape[1]), place.weight.row_range
    values[: len(step.sums)] = step.sums
    if step.update is not None:
        values[-_PRODUCTS:] = torch.stack(step.update)
    mine = row_range.stop - row_range.start
    place.block[:, row_range.start : row_range.stop] = values[:, :mine]
    if step.units.bias is not None and place.weight.bias is not None:
        bias, behind = place.weight.bias, row_range.total
        place.block[:, behind + bias.start : behind + bias.stop] = values[:, mine:]


def _whole(step: WeightStep, place: _Place) -> WeightStep:
    """Return the step with one value per unit, combined from the rows of all processes."""
    row_range, count = place.weight.row_range, step.units.count
    rows = _by_unit(place.block[:, : row_range.total], row_range, count)
    if step.units.bias is not None and place.weight.bias is not None:
        rows = torch.cat([rows, _by_unit(place.block[:, row_range.total :], place.weight.bias, count)], -1)
    # The products of an update do not all add up: ‖D_⊥‖² of a unit refers to the direction of the whole unit, and not
    # to those of its rows. folded_products converts them.
    sums, products = rows[:-_PRODUCTS].sum(-1), rows[-_PRODUCTS:]
    return replace(
        step,
        sums=sums[: len(step.sums)],
        edited=place.head[3],
        update=None if step.update is None else folded_products(UpdateProducts(*products)),
    )


def _by_unit(block: Tensor, row_range: RowRange, count: int) -> Tensor:
    """Return the values as ``(fields, units, parts of a unit)``; the rows of a unit are consecutive."""
    return block.reshape(_FIELDS, row_range.copies, count, -1).movedim(1, 2).flatten(2)
