"""One measured optimizer step, and the protocol of the monitors that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor, nn

from lightning_normgeo.callbacks._monitors.units.unit_tracker import REFUTED
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.stacked_units import StackedUnits
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.layer_inputs.probe import InputProbe, LayerGeometry
from lightning_normgeo.probes.symmetries.step import SymmetryStep
from lightning_normgeo.probes.weight_step import WeightStep

WandbKeys = Literal["aggregates", "all"]
"""Metric keys of a monitor that W&B gets: a few aggregates, or all."""


@dataclass(frozen=True)
class MeasuredStep:
    """One measured optimizer step, as the monitors get it.

    Attributes:
        steps: the steps of all weights that moved.
        statistics: batch statistics of every forward pass, by module path.
        single_device: whether there is only one process, so that all ranks have the same batch statistics.
        epsilon: the part of ⟨W, g⟩ that the ε of batch normalizations causes, by weight, where it is known.
        turned: whether gradients are clipped by value, which changes their direction.
        sums: the cumulative increments of ‖W‖² over all steps so far; None where no monitor needs them.
        symmetry: sums over the generators of scale symmetries; None where no monitor needs them.
        inputs: geometry of the inputs of the layers that a monitor chose, by module path.
        has_symmetries: whether graphs of the step have scale symmetries, also if none could be measured.
        edited: numbers on the device, 0 or 1, whether any parameter was changed between the backward pass and the step.
    """

    steps: Sequence[WeightStep]
    statistics: dict[str, list[BatchStatistics]]
    single_device: bool
    epsilon: dict[str, Tensor]
    turned: bool
    sums: CumulativeIncrements | None
    symmetry: SymmetryStep | None = None
    inputs: dict[str, LayerGeometry] = field(default_factory=dict)
    has_symmetries: bool = False
    edited: Sequence[Tensor] = ()
    _columns: dict[tuple[str, ...], StackedUnits] = field(default_factory=dict, repr=False)

    def without_invariance(self, names: Sequence[str]) -> MeasuredStep:
        """Return the same step with these weights as controls instead of scale-invariant weights.

        Weights whose units are not single rows are left out, since controls are measured row by row.
        """
        steps = [
            replace(step, units=step.units.without_invariance(REFUTED)) if step.units.name in names else step
            for step in self.steps
            if step.units.name not in names or step.units.kind == "filter"
        ]
        return replace(self, steps=steps, _columns={})

    def columns(self, invariant: bool, needs: Literal["gradient", "update"]) -> StackedUnits | None:
        """Return the concatenated quantities of all scale-invariant weights, or of all controls; None without any.

        Args:
            invariant: True for scale-invariant weights, False for controls.
            needs: see :meth:`all_columns`.
        """
        whole = self.all_columns(needs)
        if whole is None:
            return None
        first = sum(step.units.invariant for step in whole.steps)
        start, stop = (0, first) if invariant else (first, len(whole.steps))
        if start == stop:
            return None
        key = tuple(step.units.name for step in whole.steps[start:stop])
        if key not in self._columns:
            self._columns[key] = whole.part(start, stop)
        return self._columns[key]

    def all_columns(self, needs: Literal["gradient", "update"]) -> StackedUnits | None:
        """Return the concatenated quantities of all weights, the scale-invariant ones first; None without any.

        Args:
            needs: ``"gradient"`` for weights whose gradient is known, ``"update"`` for those whose update was measured.
        """
        have = [step for step in self.steps if (step.has_gradient if needs == "gradient" else step.update is not None)]
        names = tuple(step.units.name for step in have)
        if names and names not in self._columns:
            self._columns[names] = StackedUnits(sorted(have, key=lambda step: not step.units.invariant), self.epsilon)
        return self._columns.get(names)


class Monitor(Protocol):
    """Protocol of the callbacks that a session measures for."""

    groups: tuple[str, ...]
    layers: str | list[str] | None
    wandb_keys: WandbKeys
    needs_weights: bool
    needs_updates: bool
    needs_statistics: bool
    needs_symmetries: bool
    needs_inputs: bool
    cumulative: bool

    def input_probe(self, module: nn.Module) -> InputProbe | None:
        """Return a probe of the inputs of layers, for a monitor that needs them."""

    def cadence(self) -> int:
        """Return the number of optimizer steps between two measurements; 0 for never."""

    def chosen(self) -> dict[str, frozenset[str]]:
        """Return the layers that get metric keys of their own, by metric group."""

    def tabled(self) -> dict[str, frozenset[str]]:
        """Return the layers that are rows of the layer table, by metric group."""

    def find_layers(self, layers: Iterable[str]) -> None:
        """Apply the choice of layers to layers that were added after training started."""

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
