"""Reader of weights: once when their update begins, and once when it has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.angles import UpdateProducts, joined_products, many_update_products
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.products.one_pass import many_weight_products, weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightProducts
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.recipe import Group
from lightning_normgeo.normalization.units import WeightUnits
from lightning_normgeo.probes.explain import ParameterReading, ReadPlan, by_rule, explain, learning_rate, plan
from lightning_normgeo.probes.weight_step import Observed, WeightStep


class WeightReader:
    """Reads weights before and after a step.

    It keeps copies of them over the step, in memory that is allocated once: fresh pages cost more than the copy.

    Attributes:
        by_output_row: what the last :meth:`read` found of weights whose units are their output rows, by id of the
            parameter. Cumulative sums use it, so that no weight is read twice in one step.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor] = {}
        self.by_output_row: dict[int, ParameterReading] = {}

    def clear(self) -> None:
        """Free the memory."""
        self._before.clear()
        self.by_output_row = {}

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
        parts = [(one.units, parameter) for one in observed for parameter in one.parameters]
        plans = [
            plan(
                parameter,
                partial(self._rows, units),
                optimizer,
                groups[id(parameter)],
                self._kept(units, parameter) if keep else None,
            )
            for units, parameter in parts
        ]
        products = many_weight_products([plan.reads for plan in plans])
        self.by_output_row = {
            id(parameter): ParameterReading(planned, found)
            for (units, parameter), planned, found in zip(parts, plans, products, strict=True)
            if self._is_by_output_row(units, parameter, found)
        }
        steps = iter(_steps([units for units, _ in parts], plans, products))
        return [self._together([next(steps) for _ in one.parameters]) for one in observed]

    def read_moved(self, observed: Sequence[Observed], groups: Mapping[int, Group]) -> list[WeightStep]:
        """Return steps of weights that were moved after they were remembered, so that no gradient is the one at W."""
        return [self._together([self._moved(one.units, p, groups[id(p)]) for p in one.parameters]) for one in observed]

    def add_updates(self, steps: Sequence[WeightStep], observed: Sequence[Observed]) -> None:
        """Measure D = W⁺ - W of weights of which a copy was kept."""
        pairs = [
            (self._rows(one.units, self._before[id(p)]), self._rows(one.units, p.detach()))
            for one in observed
            for p in one.parameters
        ]
        parts = iter(many_update_products(pairs))
        for step, one in zip(steps, observed, strict=True):
            step.update = self._joined([next(parts) for _ in one.parameters])

    def _part(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that this process has."""
        return parameter

    def _rows(self, units: WeightUnits, tensor: Tensor) -> Tensor:
        """View a tensor of a parameter's shape as a matrix with one row for each value of a step."""
        return units.rows(tensor)

    def _is_by_output_row(self, units: WeightUnits, parameter: nn.Parameter, products: WeightProducts) -> bool:
        """Whether a weight was read by its rows along dimension 0, as cumulative sums read it."""
        part = self._part(parameter)
        return part.ndim > 1 and part.numel() > 0 and units.dim == 0 and len(products.weight_sq) == part.shape[0]

    def _together(self, steps: Sequence[WeightStep]) -> WeightStep:
        """Return the step of units from the steps of their weight and, if it belongs to them, their bias."""
        return steps[0] if len(steps) == 1 else steps[0].with_bias(steps[1])

    def _joined(self, parts: Sequence[UpdateProducts]) -> UpdateProducts:
        """Return the update of units from those of their weight and bias."""
        return joined_products(*parts)

    def _kept(self, units: WeightUnits, parameter: nn.Parameter) -> Tensor | None:
        """Return the buffer for a copy of W while it is read; None if its rows are no view, and it was copied now."""
        buffer = self._buffer(parameter)
        rows = self._rows(units, buffer)
        if rows.untyped_storage()._cdata == buffer.untyped_storage()._cdata:
            return rows
        buffer.copy_(self._part(parameter))
        return None

    def _moved(self, units: WeightUnits, parameter: nn.Parameter, group: Group) -> WeightStep:
        before = self._rows(units, self._before[id(parameter)])
        found = weight_products(before, before)
        unknown = torch.full_like(found.weight_sq, torch.nan)
        return WeightStep(
            units=units,
            dtype=parameter.dtype,
            lr=learning_rate(group),
            predicted=unknown,
            weight_sq=found.weight_sq,
            inner=unknown,
            gradient_sq=unknown,
            quartic=found.quartic,
            has_gradient=False,
        )

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        buffer, part = self._before.get(id(parameter)), self._part(parameter)
        if buffer is None or buffer.shape != part.shape or buffer.device != part.device:
            buffer = self._before[id(parameter)] = torch.empty_like(part, requires_grad=False)
        return buffer


def _steps(
    units: Sequence[WeightUnits], plans: Sequence[ReadPlan], products: Sequence[WeightProducts]
) -> list[WeightStep]:
    steps: dict[int, WeightStep] = {}
    for members in by_rule(plans):
        explained = explain([plans[k] for k in members], [products[k] for k in members])
        lengths = [len(products[k].weight_sq) for k in members]
        predicted = torch.split(explained.predicted, lengths)
        terms = zip(*(torch.split(term, lengths) for term in explained.terms or ()), strict=True)
        for k, eq16 in zip(members, predicted, strict=True):
            steps[k] = WeightStep(
                units=units[k],
                dtype=plans[k].dtype,
                lr=plans[k].lr,
                predicted=eq16,
                weight_sq=products[k].weight_sq,
                inner=products[k].inner,
                gradient_sq=products[k].gradient_sq,
                quartic=products[k].quartic,
                rule=plans[k].reads.rule,
                terms=None if explained.terms is None else IncrementTerms(*next(terms)),
            )
    return [steps[k] for k in range(len(plans))]


def scale_gradient(units: WeightUnits, scales: Mapping[str, nn.Parameter], by: Tensor | None) -> Tensor | None:
    """Return ∂L/∂γ of the normalization behind a weight, unscaled, or None where it has none that fits."""
    scale = scales.get(units.scale) if units.scale is not None else None
    if scale is None or scale.grad is None or scale.numel() != units.count:
        return None
    gradient = scale.grad.detach().to(wide_dtype(scale.device))
    # a copy: a foreach optimizer may write to .grad
    return gradient.clone() if by is None else gradient.div(by)
