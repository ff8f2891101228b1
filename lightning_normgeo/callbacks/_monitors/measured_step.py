"""One measured optimizer step, and what the session asks of the callbacks that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from lightning_normgeo._lightning import is_lightnings_own
from lightning_normgeo.callbacks._monitors.unit_tracker import REFUTED
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.stacked_units import StackedUnits
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.weight_step import WeightStep


@dataclass(frozen=True)
class MeasuredStep:
    """One measured optimizer step as the monitors see it.

    Attributes:
        steps: every weight that moved.
        statistics: batch statistics of every forward pass, by module path.
        single_device: whether every rank would see the same batch statistics.
        epsilon: the ⟨W, g⟩ that the ε of batch normalizations causes, by weight, where it is known.
        turned: whether gradients are clipped by value, which turns them.
        sums: what all steps so far have added to ‖W‖², where a monitor asked for it.
    """

    steps: Sequence[WeightStep]
    statistics: dict[str, list[BatchStatistics]]
    single_device: bool
    epsilon: dict[str, Tensor]
    turned: bool
    sums: CumulativeIncrements | None
    _columns: dict[tuple[str, ...], StackedUnits] = field(default_factory=dict, repr=False)

    def without_invariance(self, names: Sequence[str]) -> MeasuredStep:
        """Return the same step with these weights as controls.

        Those whose units are no single rows are left out: a control is looked at row by row.
        """
        steps = [
            replace(step, units=step.units.without_invariance(REFUTED)) if step.units.name in names else step
            for step in self.steps
            if step.units.name not in names or step.units.kind == "filter"
        ]
        return replace(self, steps=steps, _columns={})

    def columns(self, invariant: bool, needs: Literal["gradient", "update"]) -> StackedUnits | None:
        """Return the weights that are scale invariant, or those that are not, side by side.

        Args:
            invariant: which.
            needs: ``"gradient"`` for those whose gradient is known, ``"update"`` for those whose update was measured.
        """
        steps = [
            step
            for step in self.steps
            if step.units.invariant is invariant
            and (step.has_gradient if needs == "gradient" else step.update is not None)
        ]
        names = tuple(step.units.name for step in steps)
        if names and names not in self._columns:
            self._columns[names] = StackedUnits(steps)
        return self._columns.get(names)


class Monitor(Protocol):
    """What the session asks of a callback."""

    needs_weights: bool
    needs_updates: bool
    needs_statistics: bool
    cumulative: bool

    def cadence(self) -> int:
        """Return after how many optimizer steps it measures."""

    def chosen(self) -> dict[str, frozenset[str]]:
        """Return for each group the sites that get metric keys of their own."""

    def tabled(self) -> dict[str, frozenset[str]]:
        """Return for each group the sites that are rows of the layer table."""

    def find_layers(self, layers: Iterable[str]) -> None:
        """Choose from layers that were not there when training started."""

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""


def clips_by_value(trainer: Any) -> bool:
    """Whether Lightning clips each element of the gradients by itself."""
    return bool(trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value")


def scales_gradients_alike(trainer: Any) -> bool:
    """Whether W and γ may have gradients with a common factor: not after clipping by value or by one's own method."""
    module = trainer.lightning_module
    return bool(is_lightnings_own(module, "configure_gradient_clipping") and not clips_by_value(trainer))
