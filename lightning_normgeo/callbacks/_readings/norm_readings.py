"""Readings of the norms of weights and of their increments: measured, predicted, and explained term by term."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.stacked_units import StackedUnits
from lightning_normgeo.callbacks._readings.residual_warnings import FLOOR, NORM_SQ, RESIDUAL
from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.increments.norm_increments import identity_terms
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule


def norm_readings(group: str, columns: StackedUnits, turned: bool) -> Iterator[Reading]:
    """Yield all readings of weights whose update was measured, other than sums over all steps.

    Args:
        group: of the metric keys; of controls if it ends so.
        columns: the weights.
        turned: whether gradients are clipped by value, which changes their direction.
    """
    yield from _sums(group, columns)
    total, by_layer = columns.floor_sums
    yield Reading(f"{group}/storage_floor", total, by_layer, columns.layers.names)
    if columns.has_gradient:
        covered = not turned and all(step.is_plain_sgd and step.units.invariant for step in columns.steps)
        yield Reading(f"{group}/eq16_applies", columns.increment.new_full((), float(covered)))
    yield from _angles(group, columns)
    yield from _equilibrium(group, columns)


def _sums(group: str, columns: StackedUnits) -> Iterator[Reading]:
    """Yield norms and increments, and over the weights that have a formula what it explains."""
    values = {"weight_norm": columns.update.weight_sq, "increment": columns.increment}
    if columns.has_gradient:
        values["predicted"] = columns.predicted
    if group.endswith("_control"):
        values["rows_unmoved"] = (columns.update.update_sq == 0).to(columns.increment)
    known = [step for step in columns.steps if step.is_explained]
    coupled = [step for step in known if isinstance(step.rule, SGDRule) and step.uniform and step.has_gradient]
    if len(known) == len(columns.steps):
        values |= _explained(columns, by_momentum=len(coupled) == len(known))
    yield from _readings(group, columns, values)
    if 0 < len(known) < len(columns.steps):
        explained = columns.of(known)
        yield from _readings(group, explained, _explained(explained, by_momentum=len(coupled) == len(known)))
    if 0 < len(coupled) < len(known):
        some = columns.of(coupled)
        yield from _readings(group, some, _by_momentum(some))
    if len(known) < len(columns.steps):
        yield from _by_identity(group, columns.of([step for step in columns.steps if not step.is_explained]))


def _readings(group: str, columns: StackedUnits, values: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Yield the sums of quantities, and for the warnings of residuals those of each weight."""
    sums = {reading.key: reading for reading in columns.layers.sums(values)} if values else {}
    norm_sq, residual = sums.pop(NORM_SQ, None), sums.get("residual")
    if norm_sq is not None and residual is not None:
        names = [step.units.name for step in columns.steps]
        parts = {RESIDUAL: residual.by_layer, FLOOR: columns.floor_sums[1], NORM_SQ: norm_sq.by_layer}
        yield from (Reading(key, None, part, names, internal=True) for key, part in parts.items())
    for name, reading in sums.items():
        total, by_layer = reading.total, reading.by_layer
        if name == "weight_norm" and total is not None and by_layer is not None:
            total, by_layer = total.sqrt(), by_layer.sqrt()
        yield replace(reading, key=f"{group}/{name}", total=total, by_layer=by_layer)


def _explained(columns: StackedUnits, by_momentum: bool) -> dict[str, Tensor]:
    """Return the increments that formulas explain, per unit, by quantity."""
    assert columns.terms is not None  # noqa: S101
    terms = {f"term_{name}": column for name, column in columns.terms._asdict().items()}
    found = {"explained": columns.explained, **terms, "residual": columns.residual}
    found[NORM_SQ] = columns.weight_sq
    return found | (_by_momentum(columns) if by_momentum else {})


def _by_momentum(columns: StackedUnits) -> dict[str, Tensor]:
    """Return the increment that follows from ⟨W, g⟩ = 0 under SGD, if there is momentum or weight decay."""
    rules = [step.rule for step in columns.steps]
    if not any(isinstance(rule, SGDRule) and (rule.momentum or rule.weight_decay) for rule in rules):
        return {}
    terms = columns.terms
    assert terms is not None  # noqa: S101
    coupled = columns.layers.spread(list(map(_cross_decay, rules))) * columns.inner
    return {"predicted_momentum": terms.momentum + terms.weight_decay + terms.quadratic - coupled}


def _cross_decay(rule: UpdateRule | None) -> Scalar:
    """Return the coefficient of ⟨W, g⟩ in η²‖u‖², where ‖g + λW‖² has a mixed term."""
    assert isinstance(rule, SGDRule)  # noqa: S101
    c_g, _ = rule.coefficients
    sign = -1.0 if rule.maximize else 1.0
    return sign * 2 * rule.lr**2 * c_g**2 * rule.weight_decay


def _by_identity(group: str, columns: StackedUnits) -> Iterator[Reading]:
    """Yield the decomposition that needs no formula of the optimizer: an identity of W, W⁺ and ηλ."""
    update, shrink = columns.update, columns.spread("shrink")
    terms = identity_terms(columns.weight_sq, update.weight_update, update.update_sq, shrink)
    parts = {"direction": terms.gradient, "weight_decay": terms.weight_decay, "quadratic": terms.quadratic}
    yield from _readings(group, columns, {f"identity_{name}": values for name, values in parts.items()})
    yield Reading(f"{group}/weights_without_formula", update.weight_sq.new_full((), float(len(columns.steps))))


def _angles(group: str, columns: StackedUnits) -> Iterator[Reading]:
    """Yield the angle of the update and the learning rate of the direction."""
    layers, squared_angle = columns.layers, columns.update_parts.angle.square()
    if group.endswith("_control"):  # most rows of an embedding are in no batch of a step, and do not move
        moved = columns.update.update_sq > 0
        yield layers.reading_of_some(f"{group}/angular_update", squared_angle, moved, torch.sqrt)
    else:
        yield layers.reading(f"{group}/angular_update", squared_angle, layers.mean, torch.sqrt)
    yield layers.reading(f"{group}/effective_lr", columns.effective_lr, layers.mean)


def _equilibrium(group: str, columns: StackedUnits) -> Iterator[Reading]:
    by_rule = {id(step.rule): step for step in columns.steps if step.alike}
    of_rule = {key: (step.equilibrium, step.relaxation) for key, step in by_rule.items()}  # tensors on the device
    found = [(step, *of_rule[id(step.rule)]) for step in columns.steps if step.alike]
    settling = [(step, angle, time) for step, angle, time in found if angle is not None and time is not None]
    if settling:
        steps, angles, times = map(list, zip(*settling, strict=True))
        layers = columns.of(steps).layers
        squares = layers.spread(angles).square()
        yield layers.reading(f"{group}/equilibrium_angle", squares, layers.mean, torch.sqrt)
        yield layers.reading(f"{group}/steps_to_equilibrium", layers.spread(times), layers.mean)
