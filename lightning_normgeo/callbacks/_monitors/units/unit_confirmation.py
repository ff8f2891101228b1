"""Numerical check of scale invariance: weights that are not orthogonal to their gradients become controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.callbacks._monitors.units.unit_tracker import UnitTracker
from lightning_normgeo.callbacks._readings.readings import HostValues, Reading
from lightning_normgeo.errors import warn_once
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons

_RAW, _CORRECTED, _SHARE = "structure/rms_cos", "structure/rms_cos_corrected", "structure/epsilon_share"
_REFUTED_ABOVE = 1e-2
"""Root mean square cosine of a layer above which its invariance counts as refuted: layers that are not invariant have
0.02 and more, invariant ones at most a few 1e-3, under bf16 autocast."""
_INVARIANT_BELOW = 1e-6
"""Root mean square cosine below which a control looks scale invariant, if it has enough units to tell."""
_ENOUGH_UNITS = 8
_SAID_ABOVE = 0.1
"""Root mean square cosine above which an effect of ε gets a warning: in small networks a few channels with small
variance reach 0.04."""
_SMALL_SHARE = 0.01
"""Share of ε in a variance below which ε causes no cosine that refutes an invariance."""
_EXPLAINED = 0.1
"""Share of a cosine that may remain after the correction for ε, for ε to count as its explanation."""


class Verdict(NamedTuple):
    """Result of the check of one step, for the weights that are invariant according to graphs."""

    refuted: list[str]
    """Names of weights that are not orthogonal to their gradients, for no known reason."""
    by_epsilon: dict[str, float]
    """Cosines, by name, of weights that are not orthogonal to their gradients because of their normalization's ε."""


class UnitConfirmation:
    """Checks the cosines of every measured step, in every kind of loop and precision.

    Args:
        unit_tracker: the tracker that finds invariant weights, and is told of those that are refuted.
    """

    def __init__(self, unit_tracker: UnitTracker) -> None:
        self._structure = unit_tracker
        self._compared = False

    def readings(self, measured: MeasuredStep) -> list[Reading]:
        """Return the cosines of every weight that moved, raw and corrected for the ε of batch normalizations."""
        columns = measured.all_columns("gradient")
        if columns is None:
            return []
        names = [step.units.name for step in columns.steps]
        squares = torch.stack([columns.cosines, columns.corrected_cosines]).square()
        raw, without_epsilon = columns.layers.mean(squares).sqrt()
        return [
            Reading(_RAW, None, raw, names, internal=True),
            Reading(_CORRECTED, None, without_epsilon, names, internal=True),
            *_largest_share(measured.statistics),
        ]

    def judge(self, row: HostValues, measured: MeasuredStep) -> Verdict:
        """Return the weights that the cosines refute, and warn once about cosines that ε explains."""
        raw, corrected = row.internal.get(_RAW, {}), row.internal.get(_CORRECTED, {})
        units = {step.units.name: step.units for step in measured.steps}
        broken = [name for name, cos in raw.items() if name in units and units[name].invariant and cos > _REFUTED_ABOVE]
        by_epsilon = {name: raw[name] for name in broken if corrected.get(name, raw[name]) <= _EXPLAINED * raw[name]}
        unknown: set[str] = set()
        if row.internal.get(_SHARE, {}).get("", 0.0) > _SMALL_SHARE:  # it may be ε, of which the part is not known
            known = corrected.keys() & measured.epsilon.keys()
            unknown = {name for name in broken if units[name].scale is not None and name not in known}
        refuted = [name for name in broken if name not in by_epsilon and name not in unknown]
        self._compare(raw)
        by_epsilon = {name: cos for name, cos in by_epsilon.items() if cos > _SAID_ABOVE}
        if by_epsilon:
            largest = max(by_epsilon.values())
            warn_once(
                f"The ε of the normalization behind {_listed(list(by_epsilon))} is not small against the variance: for "
                f"that reason alone the root mean square of cos(W, g) is up to {largest:.2g}. The …_corrected keys "
                "take it off; eq 16 does not apply to these weights.",
                about="ε explains cosines",
            )
        return Verdict(refuted, by_epsilon)

    def refute(self, names: Sequence[str], row: HostValues) -> None:
        """Treat weights as controls from now on, with one warning."""
        raw = row.internal.get(_RAW, {})
        largest = max(raw[name] for name in names)
        self._structure.refute(names)
        if self._structure.guessed:
            why = "Under torch.compile, scale invariance is guessed from the order of layers, and the numbers refute it"
        else:
            share = row.internal.get(_SHARE, {}).get("", 0.0)
            cause = ""
            if share > _SMALL_SHARE:
                cause = f"the ε of a batch normalization, which is up to {share:.0%} of a variance with it, or "
            why = (
                f"The graph says that they are scale invariant, and the numbers refute it. Likely reasons: {cause}"
                "something that changes gradients (a hook, clipping by value, a backward pass that was not seen), or "
                "another normalization's ε"
            )
        size = f"a root mean square of cos(W, g) of up to {largest:.2g}"
        warn_once(f"{_listed(names)}: controls from here on, with {size}. {why}.")

    def _compare(self, raw: Mapping[str, float]) -> None:
        """Warn once, at the first measured step, about controls that look invariant."""
        if self._compared or not raw or self._structure.guessed:
            return
        self._compared = True
        hidden = [
            one.units.name
            for one in self._structure.in_graphs
            if not one.units.invariant
            and one.units.count >= _ENOUGH_UNITS
            and 0 < raw.get(one.units.name, 1) < _INVARIANT_BELOW
        ]
        if hidden:
            warn_once(
                f"{_listed(hidden)}: orthogonal to their gradients at the first measured step, and controls all the "
                "same, since the graph shows no reason for it."
            )


def _largest_share(statistics: Mapping[str, Sequence[BatchStatistics]]) -> list[Reading]:
    """Return the largest ε/(σ² + ε) of all batch normalizations."""
    passes = [one for found in statistics.values() for one in found]
    if not passes:
        return []
    variance = torch.cat([one.variance for one in passes])
    eps = epsilons(passes)
    share = (eps / (variance + eps)).nan_to_num(0.0).amax()
    return [Reading(_SHARE, None, share.reshape(1), [""], internal=True)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
