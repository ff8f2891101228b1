"""Readings of scale symmetries: charges, drifts, and the joint vectors of one measured step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.layer_segments import LayerSegments
from lightning_normgeo.probes.symmetries.step import SymmetryStep
from lightning_normgeo.symmetries.families import Role

RMS_CHARGE, RMS_UNCANCELED = "structure/rms_charge", "structure/rms_uncanceled"
_CHARGES: dict[Role, str] = {
    "invariant alone": "symmetry/max_charge_alone",
    "invariant jointly": "symmetry/max_charge_jointly",
    "rescaling": "symmetry/max_charge_rescaling",
}


def symmetry_readings(step: SymmetryStep) -> Iterator[Reading]:
    """Yield all readings of a step with at least one family."""
    yield from _charges(step)
    yield from _drifts(step)
    yield from _joint(step)


def _segments(step: SymmetryStep, roles: Sequence[Role]) -> tuple[LayerSegments, Tensor] | None:
    """Return the families with one of the roles, as segments, and the places of their generators; None without any."""
    chosen = [(str(family), own) for family, own in step.families if family.role in roles]
    if not chosen:
        return None
    device = step.charge.device
    places = torch.cat([torch.arange(own.start, own.stop, device=device) for _, own in chosen])
    lengths = [own.stop - own.start for _, own in chosen]
    return LayerSegments([name for name, _ in chosen], lengths, device), places


def _charges(step: SymmetryStep) -> Iterator[Reading]:
    """Yield the largest charges; a generator without weights or gradients, as of a dead unit, has none."""
    charges, defined = step.charge.abs(), ~step.charge.isnan()
    found = _segments(step, list(_CHARGES))
    if found is not None:
        layers, places = found
        yield layers.maximum_of_some("symmetry/max_charge", charges[places], defined[places])
        for key, values in ((RMS_CHARGE, charges), (RMS_UNCANCELED, step.uncanceled)):
            squares = layers.reading_of_some(key, values[places].square(), defined[places], torch.sqrt)
            yield replace(squares, total=None, internal=True)
    for role, key in _CHARGES.items():
        own = _segments(step, [role])
        if own is not None:
            largest = torch.where(defined, charges, -torch.inf)[own[1]].amax()
            yield Reading(key, largest, partial=True)
    several = _segments(step, ["invariant jointly", "rescaling"])
    if several is not None:
        layers, places = several
        yield layers.maximum_of_some("symmetry/max_uncanceled", step.uncanceled[places], defined[places])


def _drifts(step: SymmetryStep) -> Iterator[Reading]:
    """Yield the imbalance, and the changes of Q over Σ|s|‖W‖²: positive away from balance, and for growing norms."""
    found = _segments(step, ["invariant jointly", "rescaling"])
    if found is None:
        return
    layers, places = found
    size, sign = step.size[places], step.quantity[places].sign()
    rescaling = _segments(step, ["rescaling"])
    if rescaling is not None:
        own, where = rescaling
        share = (step.quantity[where] / step.size[where]).abs()
        yield own.reading_of_some("symmetry/imbalance", share, step.size[where] > 0)
    for key, values in (("increment", step.increment), ("noise", step.noise), ("decay", step.decay)):
        yield layers.reading_of_some(f"symmetry/{key}", sign * values[places] / size, size > 0)


def _joint(step: SymmetryStep) -> Iterator[Reading]:
    """Yield norm, angle and effective learning rate of blocks that are invariant as one vector."""
    if not step.angle:
        return
    names = [str(step.families[k][0]) for k in step.angle]
    norms = torch.stack([step.size[step.families[k][1].start].sqrt() for k in step.angle])
    angles, rates = torch.stack(list(step.angle.values())), torch.stack(list(step.lr.values()))
    yield Reading("symmetry/joint_norm", norms.square().sum().sqrt(), norms, names)
    yield Reading("symmetry/joint_angular_update", angles.square().mean().sqrt(), angles, names)
    yield Reading("symmetry/joint_effective_lr", rates.nanmean(), rates, names, partial=True)
