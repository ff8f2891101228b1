"""What the monitors of one Trainer share: one probe, one walk over the graph, one transfer per measured step.

Lightning calls every hook of every callback inside a profiler context, about two microseconds each even where the
hook is empty, and skips hooks that are None. So the monitors have no per-batch hooks at all: one driver has them for
all, and but one of them on batches that are not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_normgeo._lightning import QuietCallback, is_lightnings_own
from lightning_normgeo.callbacks.readings import Reading, Row, publish, transfer
from lightning_normgeo.callbacks.structure import Structure
from lightning_normgeo.errors import harmless, warn_once
from lightning_normgeo.normalization.graph import is_compiled
from lightning_normgeo.probes.batchnorm import BatchNormProbe, BatchStatistics, affine_batch_norms
from lightning_normgeo.probes.measurement import WeightStep
from lightning_normgeo.probes.step import StepProbe

_MEASURED_HOOKS = ("on_before_backward", "on_after_backward", "on_train_batch_end")


@dataclass(frozen=True)
class Measured:
    """One measured optimizer step as the monitors see it.

    Attributes:
        steps: every weight that moved.
        statistics: batch statistics of the forward pass, by module path.
        single_device: whether every rank would see the same batch statistics.
        single_pass: whether one backward pass made the gradients, and nothing but a common factor came over them, so
            that the epsilon identity holds.
    """

    steps: Sequence[WeightStep]
    statistics: dict[str, BatchStatistics]
    single_device: bool
    single_pass: bool


class Monitor(Protocol):
    """What the session asks of a callback."""

    needs_updates: bool
    needs_statistics: bool

    def cadence(self) -> int:
        """Return after how many optimizer steps it measures."""

    def chosen(self) -> dict[str, frozenset[str]]:
        """Return for each group the sites that get metric keys of their own."""

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""


class Driver(QuietCallback):
    """Stands in the Trainer's list of callbacks while monitors observe; has the hooks of the session."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.__dict__["on_train_batch_start"] = session.batch_starts

    def lend(self, hooks: dict[str, Any]) -> None:
        """Have these hooks, until others are lent; None takes one back."""
        self.__dict__.update(hooks)

    def __deepcopy__(self, memo: Any) -> QuietCallback:
        """A copy of a Trainer's callbacks observes nothing."""
        return QuietCallback()


class Session:
    """The shared instrument of one Trainer; ``Session.of(trainer)`` makes it on first use."""

    _sessions: ClassVar[WeakKeyDictionary[Any, Session]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.probe = StepProbe()
        self.structure = Structure()
        self.batch_norms: BatchNormProbe | None = None
        self.monitors: list[Any] = []
        self.driver = Driver(self)
        self._cadences: tuple[int, ...] = ()
        self._due: list[Any] = []
        self._armed_at = -1
        self._statistics: dict[str, BatchStatistics] = {}
        self._backwards = 0

    @classmethod
    def of(cls, trainer: Any) -> Session:
        """Return the session of ``trainer``."""
        return cls._sessions.setdefault(trainer, cls())

    def join(self, monitor: Any, trainer: Any, module: nn.Module) -> None:
        """Add a monitor when training starts."""
        if any(monitor is other for other in self.monitors):
            return
        self.monitors.append(monitor)
        self._cadences = tuple(sorted({m.cadence() for m in self.monitors}))
        automatic = trainer.lightning_module.automatic_optimization
        self.probe.gradients_are_fresh = lambda: self._backwards > 0 or not automatic
        self.probe.attach(trainer.optimizers)
        if monitor.needs_statistics and self.batch_norms is None:
            self.batch_norms = BatchNormProbe(affine_batch_norms(module), is_compiled(module))
        if self.driver not in trainer.callbacks:
            # a new list: Lightning is going through the old one; first, so that others see this step's numbers
            trainer.callbacks = [self.driver, *trainer.callbacks]

    def leave(self, monitor: Any, trainer: Any) -> None:
        """Remove a monitor; the last one takes the hooks, the probe and the session with it."""
        self.monitors = [other for other in self.monitors if other is not monitor]
        if self.monitors or trainer not in self._sessions:
            return
        self.probe.detach()
        if self.batch_norms is not None:
            self.batch_norms.detach()
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self.driver]
        self._sessions.pop(trainer, None)

    def batch_starts(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        """Decide whether the optimizer step that this batch belongs to is measured."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        for cadence in self._cadences:
            if step % cadence == 0:
                self._arm(trainer, step)
                return
        if self._armed_at >= 0:  # the step that was waited for did not happen
            self._disarm()

    @harmless
    def _arm(self, trainer: Any, step: int) -> None:
        self.probe.attach(trainer.optimizers)
        if self._armed_at != step:  # else another micro-batch of the same step
            self._armed_at, self._backwards = step, 0
            self._due = [monitor for monitor in self.monitors if step % monitor.cadence() == 0]
            self.structure.forget()
            self.probe.arm(updates=any(monitor.needs_updates for monitor in self._due))
        if self.batch_norms is not None and any(monitor.needs_statistics for monitor in self._due):
            self.batch_norms.arm()
        hooks = (self._before_backward, self._after_backward, self._batch_ends)
        self.driver.lend(dict(zip(_MEASURED_HOOKS, hooks, strict=True)))

    def _disarm(self) -> None:
        self._armed_at = -1
        self.probe.disarm()
        if self.batch_norms is not None:
            self.batch_norms.disarm()
        self.driver.lend(dict.fromkeys(_MEASURED_HOOKS))

    @harmless
    def _before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        self.structure.read(module, loss)
        self.probe.weights, self.probe.scales = self.structure.weights, self.structure.scales
        if self.batch_norms is not None:
            self._statistics = self.batch_norms.collect() or self._statistics

    def _after_backward(self, trainer: Any, module: nn.Module) -> None:
        self._backwards += 1

    @harmless
    def _batch_ends(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_index: int) -> None:
        measurement = self.probe.collect()
        if measurement is None:  # a micro-batch, or a step the gradient scaler skipped
            return
        statistics, self._statistics = self._statistics, {}
        self._disarm()
        self._explain_missing(statistics, measurement.unknown)
        one_device = trainer.world_size == 1
        whole = _scales_gradients_alike(trainer)
        single_pass = one_device and self._backwards == 1 and whole
        measured = Measured(list(measurement.steps.values()), statistics, one_device, single_pass)
        readings = [reading for monitor in self._due for reading in _readings(monitor, measured) or ()]
        readings += self.structure.confirmation(measured.steps, statistics if single_pass else {}, whole)
        row = transfer(readings, measurement.valid, self._chosen()) if readings else None
        if row is not None and self.structure.confirmed(row):
            self._publish(row, trainer)

    def _publish(self, row: Row, trainer: Any) -> None:
        if row.dropped:
            warn_once("Values that are not finite are left out of the logs.")
        publish(row, trainer.loggers, trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in row.watched.items()})

    def _chosen(self) -> dict[str, frozenset[str]]:
        chosen: dict[str, frozenset[str]] = {}
        for monitor in self._due:
            for group, sites in monitor.chosen().items():
                chosen[group] = chosen.get(group, frozenset()) | sites
        return chosen

    def _explain_missing(self, statistics: dict[str, BatchStatistics], unknown: int) -> None:
        if unknown:
            warn_once(
                f"{unknown} weights moved that no backward pass of Lightning's was seen for; they are left out. "
                "In manual optimization call self.manual_backward(loss)."
            )
        expected = self.batch_norms is not None and self.batch_norms.layers and not statistics
        if expected and any(monitor.needs_statistics for monitor in self._due):
            reasons = ", ".join(self.batch_norms.skipped) if self.batch_norms is not None else ""
            reasons = reasons or "no layer ran in training mode under its hooks"
            warn_once(f"No batch statistics could be read ({reasons}); affine/* and *_corrected are left out.")


@harmless
def _readings(monitor: Any, measured: Measured) -> list[Reading]:
    return list(monitor.measure(measured))


def _scales_gradients_alike(trainer: Any) -> bool:
    """Whether W and γ get gradients with a common factor: not after clipping by value, nor in the user's own ways."""
    module = trainer.lightning_module
    by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
    return bool(
        module.automatic_optimization and is_lightnings_own(module, "configure_gradient_clipping") and not by_value
    )
