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

    Only some weights are compared, so that what was done to one of them is taken to be done to all.
    """
    if not any(row.internal.get(_EDITED, {}).values()):
        return measured
    steps = [replace(step, has_gradient=False, edited=None) for step in measured.steps]
    if measured.sums is not None:
        leave_unpredicted(measured.sums, (step.units.name for step in steps))
    return replace(measured, steps=steps, symmetry=None, edited=(), _columns={})
