"""One measured optimizer step, and what the session asks of the callbacks that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning_normgeo._lightning import is_lightnings_own
from lightning_normgeo.callbacks.columns import Columns
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.probes.account import NormAccount
from lightning_normgeo.probes.batchnorm import BatchStatistics
from lightning_normgeo.probes.measurement import WeightStep


@dataclass(frozen=True)
class Measured:
    """One measured optimizer step as the monitors see it.

    Attributes:
        steps: every weight that moved.
        statistics: batch statistics of the forward pass, by module path.
        single_device: whether every rank would see the same batch statistics.
        single_pass: whether one backward pass made the gradients, and nothing but a common factor came over them, so
            that the epsilon identity holds.
        account: what all steps so far have added to ‖W‖², where a monitor asked for it.
    """

    steps: Sequence[WeightStep]
    statistics: dict[str, BatchStatistics]
    single_device: bool
    single_pass: bool
    account: NormAccount | None
    _columns: dict[tuple[str, ...], Columns] = field(default_factory=dict, repr=False)

    def columns(self, invariant: bool, needs: Literal["gradient", "update"]) -> Columns | None:
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
            self._columns[names] = Columns(steps)
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

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""


def scales_gradients_alike(trainer: Any) -> bool:
    """Whether W and γ get gradients with a common factor: not after clipping by value, nor in the user's own ways."""
    module = trainer.lightning_module
    by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
    return bool(
        module.automatic_optimization and is_lightnings_own(module, "configure_gradient_clipping") and not by_value
    )
