"""Weights that were edited through ``.data`` between a backward pass and the step, which only their values tell."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.callbacks._readings.readings import HostValues, Reading
from lightning_normgeo.probes.gradient_points import leave_unpredicted

_EDITED = "structure/edited"
_ANY = ""
"""Stands for all parameters of the optimizers, also those that are no weights."""


def edited_readings(measured: MeasuredStep) -> list[Reading]:
    """Return whether values were changed after the backward pass, for the weights where this was asked."""
    asked = {step.units.name: step.edited for step in measured.steps if step.edited is not None}
    if measured.edited:
        asked[_ANY] = torch.stack(list(measured.edited)).amax()
    if not asked:
        return []
    return [Reading(_EDITED, None, torch.stack(list(asked.values())), list(asked), internal=True)]


def without_edited(measured: MeasuredStep, row: HostValues) -> MeasuredStep:
    """Return the step without what needs a gradient at W if a weight was edited, and itself if none was.

    In a large network only some weights are compared; where one of these was edited, all others count as edited too.
    """
    found = row.internal.get(_EDITED, {})
    if not any(found.values()):
        return measured
    kept = {name for name, edited in found.items() if not edited}
    steps = [
        replace(step, has_gradient=step.has_gradient and step.units.name in kept, edited=None)
        for step in measured.steps
    ]
    if measured.sums is not None:
        leave_unpredicted(measured.sums, (step.units.name for step in steps if not step.has_gradient))
    return replace(measured, steps=steps, symmetry=None, edited=(), _columns={})
