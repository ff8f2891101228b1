"""Which weights are measured as what: told from the graph of every measured step, so that it is always up to date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks.epsilon import epsilon_inner
from lightning_normgeo.callbacks.readings import Reading, Row
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.orthogonality import cosine
from lightning_normgeo.normalization.graph import Graph
from lightning_normgeo.normalization.invariance import find_units
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.probes.batchnorm import BatchStatistics
from lightning_normgeo.probes.measurement import Observed, WeightStep
from lightning_normgeo.probes.stand_ins import StandIns

_CONFIRMATION = "structure/rms_cos"
_REFUTED_ABOVE = 1e-2
"""Root mean square cosine of a layer above which its invariance is not believed: broken ones have 0.02 and more, true
ones at most a few 1e-3, under bf16 autocast."""
_INVARIANT_BELOW = 1e-6
"""And below which a layer without an established invariance looks like one, if it has enough units to tell."""
_ENOUGH_UNITS = 8
_GRAPHS = 16
"""How many different graphs are remembered; reading one anew takes ten times longer than recognizing it."""


class Structure:
    """The units of the weights behind the losses of one optimizer step.

    Args:
        parameters: by name, and ``stand_ins``, what forward passes compute with: of a model divided by fully_shard.
        stand_ins: see there.
    """

    def __init__(self, parameters: dict[str, nn.Parameter] | None = None, stand_ins: StandIns | None = None) -> None:
        self._parameters = parameters
        self._stand_ins = stand_ins
        self._found: dict[str, Observed] = {}
        self.scales: dict[str, nn.Parameter] = {}
        self._guessed = False
        self._compared = False
        self._refuted: set[str] = set()
        # with the parameters themselves: their ids in the signature stay theirs
        self._known: dict[tuple[Any, ...], tuple[dict[str, Observed], list[Tensor]]] = {}

    @property
    def weights(self) -> list[Observed]:
        """Every weight seen since :meth:`forget`, with its units."""
        return list(self._found.values())

    def forget(self) -> None:
        """Begin another step; layers may have been frozen, thawed or added."""
        self._found = {}
        if self._stand_ins is not None:
            self._stand_ins.watch()

    def rest(self) -> None:
        """Read no further steps until :meth:`forget`."""
        if self._stand_ins is not None:
            self._stand_ins.rest()

    def read(self, module: nn.Module, loss: Tensor) -> None:
        """Add the weights behind ``loss``; several backward passes of a step add up."""
        graph = Graph(loss, stand_ins=None if self._stand_ins is None else self._stand_ins.names)
        if graph.signature in self._known:
            self._found.update(self._known[graph.signature][0])
            return
        found, self._guessed = find_units(module, graph)
        parameters = self._parameters or by_clean_name(module.named_parameters())
        observed = {}
        for units in found:
            kept = units.without_invariance("refuted by the numbers") if units.name in self._refuted else units
            bias = None if kept.bias is None else parameters[kept.bias]
            observed[units.name] = Observed(kept, parameters[units.name], bias)
            if kept.scale is not None and self._parameters is None:
                self.scales[kept.scale] = parameters[kept.scale]
        self._found.update(observed)
        # not one with leaves of its own, such as an attacked image: it would be kept, and never recognized
        own = {id(parameter) for parameter in parameters.values()} | (graph.stand_ins or {}).keys()
        repeats = not self._guessed and all(id(leaf.variable) in own for leaf in graph.leaves)
        if repeats and len(self._known) < _GRAPHS:
            self._known[graph.signature] = observed, [leaf.variable for leaf in graph.leaves]
        if found and not any(observed.units.invariant for observed in self.weights):
            reasons = sorted({observed.units.reason for observed in self.weights})[:3]
            warn_once(f"None of {len(found)} weights is scale invariant; all are controls: {'; '.join(reasons)}.")

    def confirmation(
        self, steps: Sequence[WeightStep], statistics: dict[str, BatchStatistics], gradients_are_whole: bool
    ) -> list[Reading]:
        """Return what has to be looked at before structure is believed: guesses always, the graph's word once.

        Args:
            steps: the weights that moved.
            statistics: batch statistics, where ε's part of ⟨W, g⟩ can be told from them; else empty.
            gradients_are_whole: whether they moved along the gradient of the loss, not one clipped by value.
        """
        asked = [step for step in steps if step.has_gradient and (step.units.invariant or not self._guessed)]
        if not asked or not (self._guessed or (gradients_are_whole and not self._compared)):
            return []
        squares = [_mean_squared_cosine(step, epsilon_inner(step, statistics)) for step in asked]
        return [Reading(_CONFIRMATION, None, torch.stack(squares).sqrt(), [step.units.name for step in asked])]

    def confirmed(self, row: Row) -> bool:
        """Return whether to publish a row: not one whose guesses the numbers refute, which are controls from now on."""
        cosines = row.layers.pop(_CONFIRMATION, {})
        broken = {name for name, rms in cosines.items() if self._found[name].units.invariant and rms > _REFUTED_ABOVE}
        if not self._guessed:
            self._compare(broken, cosines)
            return True
        if broken:
            self._refuted |= broken
            warn_once(
                "Under torch.compile, scale invariance is guessed from the order of layers. The numbers refute it for "
                f"{', '.join(sorted(broken))}: a control from here on."
            )
        return not broken

    def _compare(self, broken: set[str], cosines: dict[str, float]) -> None:
        """Say once where the graph and the first measured gradients disagree."""
        if self._compared or not cosines:
            return
        self._compared = True
        controls = [found.units for found in self.weights if not found.units.invariant]
        hidden = [
            u.name for u in controls if u.count >= _ENOUGH_UNITS and 0 < cosines.get(u.name, 1) < _INVARIANT_BELOW
        ]
        parts = []
        if broken:
            parts.append(
                f"{', '.join(sorted(broken))} should be orthogonal to their gradients and are not (something "
                "changes the gradients, or a variance is not large against ε)"
            )
        if hidden:
            parts.append(f"{', '.join(sorted(hidden))} are, and are counted as controls (the reason is not recognized)")
        if parts:
            warn_once(f"Structure and numbers disagree at the first measured step: {'; '.join(parts)}.")


def _mean_squared_cosine(step: WeightStep, explained: Tensor | None) -> Tensor:
    inner = step.inner if explained is None else step.inner - explained
    return cosine(inner, step.weight_sq, step.gradient_sq).square().mean()
