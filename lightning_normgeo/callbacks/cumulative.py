"""What all steps so far have added to ‖W‖², as readings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.geometry.increments import measured_increment
from lightning_normgeo.probes.account import Entry, NormAccount
from lightning_normgeo.probes.measurement import WeightStep


def cumulative_readings(group: str, steps: Sequence[WeightStep], account: NormAccount) -> Iterator[Reading]:
    """Return the sums over all steps for the weights of a measured one.

    Args:
        group: of the metric keys.
        steps: weights whose update was measured.
        account: what was counted.
    """
    found = [(step, entry) for step in steps if (entry := account.entry(*_names(step))) is not None]
    if not found:
        return
    entry = Entry(*map(torch.stack, zip(*(entry for _, entry in found), strict=True)))
    increment = torch.stack([_norm_sq(step) for step, _ in found]) - entry.start
    floor = torch.stack([_floor(step, entry) for step, entry in found])
    names = {name for step, _ in found for name in _names(step)}
    values = {"increment": increment}
    if names.isdisjoint(account.unpredicted):
        values["predicted"] = entry.predicted
    if names.isdisjoint(account.unexplained):
        values |= {f"term_{name}": value for name, value in entry.terms._asdict().items()}
        values |= {"explained": entry.terms.total, "residual": increment - entry.terms.total}
    sites = [step.units.site for step, _ in found]
    for name, by_site in values.items():
        yield Reading(f"{group}/cumulative_{name}", by_site.sum(), by_site, sites)
    total = floor.square().sum().sqrt() + entry.rounding.sum()
    yield Reading(f"{group}/cumulative_storage_floor", total, floor + entry.rounding, sites)


def _names(step: WeightStep) -> list[str]:
    return [step.units.name, *([] if step.units.bias is None else [step.units.bias])]


def _norm_sq(step: WeightStep) -> Tensor:
    """Return ‖W⁺‖²."""
    assert step.update is not None  # noqa: S101
    return (step.update.weight_sq + measured_increment(step.update.weight_update, step.update.update_sq)).sum()


def _floor(step: WeightStep, entry: Entry) -> Tensor:
    """Return what storing W after every step has added at random, W taken as long as it is now."""
    return (step.storage_floor.square().sum() * entry.steps).sqrt()
