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
    """Return for each weight whether its values were changed after the backward pass, where this was asked."""
    asked = {step.units.name: step.edited for step in measured.steps if step.edited is not None}
    if measured.edited:
        asked[_ANY] = torch.stack(list(measured.edited)).amax()
    if not asked:
        return []
    return [Reading(_EDITED, None, torch.stack(list(asked.values())), list(asked), internal=True)]


def without_edited(measured: MeasuredStep, row: HostValues) -> MeasuredStep:
    """Return the step without what needs a gradient at W, for the weights that were edited; itself if none was."""
    edited = [name for name, value in row.internal.get(_EDITED, {}).items() if value]
    if not edited:
        return measured
    steps = [
        replace(step, has_gradient=step.has_gradient and step.units.name not in edited, edited=None)
        for step in measured.steps
    ]
    if measured.sums is not None:
        leave_unpredicted(measured.sums, (name for name in edited if name != _ANY))
    return replace(measured, steps=steps, symmetry=None, edited=(), _columns={})
