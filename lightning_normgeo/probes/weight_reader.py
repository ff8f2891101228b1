"""Reader of weights: once when their update begins, and once when it has ended."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.columns import run_sums
from lightning_normgeo.geometry.products.one_pass import is_additive, many_weight_products, weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass
from lightning_normgeo.geometry.rows import (
    as_rows,
    in_memory_order,
    observing_device,
    on_observing_device,
    output_rows,
)
from lightning_normgeo.geometry.steps.angles import UpdateProducts, joined_products, many_update_products
from lightning_normgeo.geometry.update_rules.device_scalars import copied_together
from lightning_normgeo.geometry.update_rules.recipe import Group
from lightning_normgeo.probes.explain import ParameterReading, by_rule, explain, learning_rate, plan
from lightning_normgeo.probes.weight_step import Observed, WeightStep
from lightning_normgeo.symmetries.units.weight_units import WeightUnits


class WeightReader:
    """Reads weights before and after a step.

    It keeps copies of them over the step: on a CPU in memory that is allocated once, since fresh pages cost more than
    the copy; on other devices the memory is free between measured steps.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[weakref.ref[nn.Parameter], Tensor]] = {}
        self._last: list[tuple[WeightUnits, nn.Parameter, ParameterReading]] = []

    def clear(self) -> None:
        """Free the memory."""
        self._before.clear()
        self.forget()

    def forget(self) -> None:
        """Release what the last :meth:`read` found."""
        self._last = []

    def by_output_row(self) -> dict[int, ParameterReading]:
        """Return the readings of the last :meth:`read`, by id of the parameter and by rows along its dimension 0.

        It lacks weights whose units are counted along another dimension, and rules whose products are no sums.
        Cumulative sums use it, so that no weight is read twice in one step.
        """
        return {
            id(parameter): reading._replace(products=reading.products.joined(output_rows(self._part(parameter))))
            for units, parameter, reading in self._last
            if self._adds_up_to_output_rows(units, parameter, reading)
        }

    def remember(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy W now, for an optimizer that may move it before the gradient is final."""
        for parameter in parameters:
            self._buffer(parameter).copy_(self._part(parameter))

    def read(
        self, observed: Sequence[Observed], optimizer: Optimizer, groups: Mapping[int, Group], keep: bool
    ) -> list[WeightStep]:
        """Read weights before their update.

        Args:
            observed: weights of ``optimizer`` with gradients.
            optimizer: about to move them.
            groups: of ``optimizer``, see :func:`groups_of`.
            keep: whether to keep a copy of W for :meth:`add_updates`.
        """
        parts = [part for one in observed for part in one.parts]
        with copied_together(optimizer):
            plans = [
                plan(
                    parameter,
                    partial(self._own_rows, units, like=parameter),
                    optimizer,
                    groups[id(parameter)],
                    self._kept(units, parameter) if keep else None,
                    self._finer_rows(units, parameter),
                )
                for units, parameter in parts
            ]
        products = many_weight_products([plan.reads for plan in plans])
        readings = list(map(ParameterReading, plans, products))
        self._last = [(*part, reading) for part, reading in zip(parts, readings, strict=True)]
        steps = iter(self._steps([units for units, _ in parts], readings))
        return [self._together([next(steps) for _ in one.parameters]) for one in observed]

    def products(self, observed: Sequence[Observed]) -> list[Tensor]:
        """Return ‖W‖², ⟨W, g⟩, ‖g‖² and ΣW⁴ of weights as they are now, ``(4, units)`` each; all need a gradient."""
        passes = [
            WeightPass(
                self._own_rows(units, on_observing_device(p), like=p),
                self._own_rows(units, on_observing_device(p.grad), like=p),
            )
            for one in observed
            for units, p in one.parts
            if p.grad is not None
        ]
        sums = iter([found.sums for found in many_weight_products(passes)])
        return [sum((next(sums) for _ in one.parts[1:]), next(sums)) for one in observed]

    def read_moved(self, observed: Sequence[Observed], groups: Mapping[int, Group]) -> list[WeightStep]:
        """Return steps of weights that were moved after they were remembered, so that no gradient is the one at W."""
        return [self._together([self._moved(units, p, groups[id(p)]) for units, p in one.parts]) for one in observed]

    def add_updates(self, steps: Sequence[WeightStep], observed: Sequence[Observed]) -> None:
        """Measure D = W⁺ - W of weights of which a copy was kept."""
        pairs = [
            (
                self._own_rows(units, self._buffer(p), like=p),
                self._own_rows(units, on_observing_device(p.detach()), like=p),
            )
            for one in observed
            for units, p in one.parts
        ]
        parts = iter(many_update_products(pairs))
        for step, one in zip(steps, observed, strict=True):
            step.update = self._joined([next(parts) for _ in one.parameters])
        # an accelerator's allocator has the memory at hand for the next time, and training needs it in between
        self._before = {k: one for k, one in self._before.items() if one[1].is_cpu and one[0]() is not None}

    def _part(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that this process has."""
        return parameter

    def _rows(self, units: WeightUnits, tensor: Tensor) -> Tensor:
        """View a tensor of a parameter's shape as a matrix with one row for each value of a step."""
        return units.rows(tensor)

    def _own_rows(self, units: WeightUnits, tensor: Tensor, like: nn.Parameter) -> Tensor:
        """View a tensor of a parameter's shape as :meth:`_rows` does, rows in the order of the parameter's memory."""
        return self._rows(units, in_memory_order(tensor, like) if units.dim == 0 else tensor)

    def _finer_rows(self, units: WeightUnits, parameter: nn.Parameter) -> Callable[[Tensor], Tensor] | None:
        """Return a view by output row, for units of several output rows; None for other units."""
        first, last = units.part or (0, output_rows(parameter))
        rows = last - first
        several = units.dim == 0 and rows > units.count and rows % units.count == 0
        if not several:
            return None
        return lambda tensor: as_rows(in_memory_order(tensor, parameter)[first:last], rows)

    def _values(self, units: WeightUnits, rows: int) -> int:
        """Return the number of values that a step has for a parameter that was read as ``rows`` rows."""
        del rows
        return units.count

    def _adds_up_to_output_rows(self, units: WeightUnits, parameter: nn.Parameter, reading: ParameterReading) -> bool:
        rows, wanted = reading.products.units, output_rows(self._part(parameter))
        along = units.part is None and (parameter.ndim == 1 or units.dim == 0)
        return along and (rows == wanted or (rows % wanted == 0 and is_additive(reading.plan.reads.rule)))

    def _steps(self, units: Sequence[WeightUnits], readings: Sequence[ParameterReading]) -> list[WeightStep]:
        """Explain the steps of all parameters, those of one rule at once."""
        steps: dict[int, WeightStep] = {}
        for members in by_rule([reading.plan for reading in readings]):
            some = [readings[k] for k in members]
            rule = some[0].plan.reads.rule  # one object for all, by which steps of joint units are compared
            *sums, terms, _ = explain([one.plan for one in some], [one.products for one in some])
            lengths = [one.products.units for one in some]
            by_row = torch.split(torch.stack([*sums, *(terms or ())]), lengths, dim=1)
            counts = [self._values(units[k], length) for k, length in zip(members, lengths, strict=True)]
            for k, one, values in zip(members, some, _by_unit(by_row, counts), strict=True):
                steps[k] = WeightStep(units[k], one.plan.dtype, one.plan.lr, values, rule)
        return [steps[k] for k in range(len(readings))]

    def _together(self, steps: Sequence[WeightStep]) -> WeightStep:
        """Return the step of units from the steps of all parameters that belong to them."""
        return steps[0] if len(steps) == 1 else steps[0].together(steps[1:])

    def _joined(self, parts: Sequence[UpdateProducts]) -> UpdateProducts:
        """Return the update of units from those of all parameters that belong to them."""
        return joined_products(*parts)

    def _kept(self, units: WeightUnits, parameter: nn.Parameter) -> Tensor | None:
        """Return the buffer for a copy of W while it is read; None if its rows are no view, and it was copied now."""
        buffer = self._buffer(parameter)
        rows = self._own_rows(units, buffer, like=parameter)
        if rows.untyped_storage()._cdata == buffer.untyped_storage()._cdata:
            return rows
        buffer.copy_(self._part(parameter))
        return None

    def _moved(self, units: WeightUnits, parameter: nn.Parameter, group: Group) -> WeightStep:
        before = self._rows(units, self._buffer(parameter))
        found = weight_products(before, before)
        unknown = torch.full_like(found.weight_sq, torch.nan)
        return WeightStep(
            units=units,
            dtype=parameter.dtype,
            lr=learning_rate(group),
            sums=torch.stack([found.weight_sq, unknown, unknown, found.quartic, unknown]),
            has_gradient=False,
        )

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        held, part = self._before.get(id(parameter)), self._part(parameter)
        buffer = held[1] if held is not None and held[0]() is parameter else None
        device = observing_device(part.device)
        if buffer is None or buffer.shape != part.shape or buffer.device != device:
            buffer = torch.empty_like(part, requires_grad=False, device=device)
            self._before[id(parameter)] = weakref.ref(parameter), buffer
        return buffer


def _by_unit(by_row: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return sums over the rows of each unit, of weights that were read by finer rows; all of them at once.

    Args:
        by_row: ``(sums, rows)`` of each weight.
        counts: the number of its units, each of equally many neighboring rows.
    """
    found = list(by_row)
    finer = [k for k, count in enumerate(counts) if count != by_row[k].shape[1]]
    if finer:
        lengths = [by_row[k].shape[1] // counts[k] for k in finer for _ in range(counts[k])]
        sums = run_sums(torch.cat([by_row[k] for k in finer], 1), lengths)
        for k, part in zip(finer, torch.split(sums, [counts[k] for k in finer], dim=1), strict=True):
            found[k] = part
    return found
