"""Readings of the cumulative increments of ‖W‖², over every weight that was ever measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.geometry.increments.norm_increments import measured_increment
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.cumulative.totals import SummedWeight, Totals
from lightning_normgeo.probes.weight_step import WeightStep


def cumulative_readings(
    group: str, invariant: bool, steps: Sequence[WeightStep], sums: CumulativeIncrements
) -> Iterator[Reading]:
    """Return the sums over all steps: of the weights of this step, and of those that are frozen or not due.

    Args:
        group: of the metric keys.
        invariant: whether of scale-invariant weights or of the others.
        steps: weights whose update was measured.
        sums: the cumulative increments.
    """
    moved = {step.units.name: step for step in steps if step.units.part is None}  # sums are of whole parameters
    sums.look_for(moved)
    for name, step in moved.items():
        sums.members[name] = SummedWeight(
            step.units.invariant, step.units.others, len(step.units.partners), _floor(step)
        )
        if not step.uniform:
            sums.without_momentum_form.add(name)
    members = {name: one for name, one in sums.members.items() if one.invariant is invariant}
    norms = {name: _norm_sq(step) for name, step in moved.items()} | _resting_norms(sums, members, moved)
    entries = {name: sums.entry(*one.names(name)) for name, one in members.items() if name in norms}
    found = {name: entry for name, entry in entries.items() if entry is not None}
    if found:
        yield from _readings(group, found, norms, members, sums)


def _resting_norms(
    sums: CumulativeIncrements, members: Mapping[str, SummedWeight], moved: Mapping[str, WeightStep]
) -> dict[str, Tensor]:
    """Return ‖W‖² of the weights that did not move in this step."""
    resting = {name: one.names(name) for name, one in members.items() if name not in moved}
    norms = sums.norms_sq([part for parts in resting.values() for part in parts])
    known = {name: parts for name, parts in resting.items() if all(part in norms for part in parts)}
    return {name: torch.stack([norms[part] for part in parts]).sum() for name, parts in known.items()}


def _readings(
    group: str,
    found: Mapping[str, Totals],
    norms: Mapping[str, Tensor],
    members: Mapping[str, SummedWeight],
    sums: CumulativeIncrements,
) -> Iterator[Reading]:
    entry = Totals(*map(torch.stack, zip(*found.values(), strict=True)))
    increment = torch.stack([norms[name] for name in found]) - entry.start
    values: dict[str, tuple[Tensor, set[str]]] = {
        "increment": (increment, set()),
        "predicted": (entry.predicted, sums.unpredicted),
        "predicted_momentum": (entry.predicted_momentum, sums.without_momentum_form),
        **{f"term_{name}": (value, sums.unexplained) for name, value in entry.terms._asdict().items()},
        "explained": (entry.terms.total, sums.unexplained),
        "residual": (increment - entry.terms.total, sums.unexplained),
    }
    labels = [members[name].label(name) for name in found]
    for key, (by_layer, lacking) in values.items():
        rows = [row for row, name in enumerate(found) if lacking.isdisjoint(members[name].names(name))]
        yield from _reading(f"{group}/cumulative_{key}", by_layer, rows, labels)
    parts = [members[name].floor * entry.steps[row].sqrt() for row, name in enumerate(found)]
    floor = torch.stack([torch.as_tensor(part, dtype=increment.dtype, device=increment.device) for part in parts])
    total = floor.square().sum().sqrt() + entry.rounding.sum()
    yield Reading(f"{group}/cumulative_storage_floor", total, floor + entry.rounding, labels)


def _reading(key: str, by_layer: Tensor, rows: list[int], labels: list[str]) -> Iterator[Reading]:
    """Return a reading over the weights that have the quantity, if there are any."""
    if len(rows) == len(labels):
        yield Reading(key, by_layer.sum(), by_layer, labels)
    elif rows:
        some = torch.stack([by_layer[row] for row in rows])
        yield Reading(key, some.sum(), some, [labels[row] for row in rows])


def _norm_sq(step: WeightStep) -> Tensor:
    """Return ‖W⁺‖²."""
    assert step.update is not None  # noqa: S101
    return (step.update.weight_sq + measured_increment(step.update.weight_update, step.update.update_sq)).sum()


def _floor(step: WeightStep) -> Tensor:
    """Return the random rounding error of storing W once; n steps make it √n times as large while ‖W‖ stays."""
    return step.storage_floor.square().sum().sqrt()
