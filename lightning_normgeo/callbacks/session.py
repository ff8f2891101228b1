"""What the monitors of one Trainer share: one probe, one walk over the graph, one transfer per measured step.

Lightning calls every hook of every callback inside a profiler context, about two microseconds each even where the
hook is empty, and skips hooks that are None. So the monitors have no per-batch hooks at all: one driver has them for
all, and but one of them on batches that are not measured.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks.layer_table import LayerTable
from lightning_normgeo.callbacks.measured import Measured, scales_gradients_alike
from lightning_normgeo.callbacks.readings import Reading, Row, publish, transfer
from lightning_normgeo.callbacks.sharding import Division, division_of
from lightning_normgeo.callbacks.structure import Structure
from lightning_normgeo.errors import harmless, remember_warnings, warn_once
from lightning_normgeo.normalization.graph import is_compiled
from lightning_normgeo.normalization.names import bias_of, by_clean_name, named_weights
from lightning_normgeo.probes.account import NormAccount
from lightning_normgeo.probes.batchnorm import BatchNormProbe, BatchStatistics, affine_batch_norms
from lightning_normgeo.probes.divided import DividedReader
from lightning_normgeo.probes.exchange import Exchange
from lightning_normgeo.probes.step import StepProbe

_MEASURED_HOOKS = ("on_before_backward", "on_after_backward", "on_train_batch_end")


class Driver(QuietCallback):
    """Stands in the Trainer's list of callbacks while monitors observe; has the hooks of the session."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.__dict__["on_train_batch_start"] = session.batch_starts

    def lend(self, hooks: dict[str, Any]) -> None:
        """Have these hooks, until others are lent; None takes one back."""
        self.__dict__.update(hooks)

    def __reduce__(self) -> tuple[type[QuietCallback], tuple[()]]:
        """A copy of a Trainer's callbacks observes nothing."""
        return QuietCallback, ()


class Session:
    """The shared instrument of one Trainer; ``Session.of(trainer)`` makes it on first use."""

    _sessions: ClassVar[WeakKeyDictionary[Any, Session]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.probe = StepProbe()
        self.structure = Structure()
        self.table = LayerTable()
        self.batch_norms: BatchNormProbe | None = None
        self.monitors: list[Any] = []
        self.driver = Driver(self)
        self._cadences: tuple[int, ...] = ()
        self._due: list[Any] = []
        self._armed_at = -1
        self._statistics: dict[str, BatchStatistics] = {}
        self._backwards = 0
        self._reads_weights = True
        self._saved_account: dict[str, Any] = {}
        self.left_out: Counter[str] = self.probe.skipped
        self.exchange: Exchange | None = None

    @classmethod
    def of(cls, trainer: Any) -> Session:
        """Return the session of ``trainer``."""
        return cls._sessions.setdefault(trainer, cls())

    def join(self, monitor: Any, trainer: Any, module: nn.Module) -> None:
        """Add a monitor when training starts."""
        if any(monitor is other for other in self.monitors):
            return
        if not self.monitors:
            remember_warnings(while_training=True)
            self._divide(division_of(trainer))
        self.monitors.append(monitor)
        monitor.left_out = self.left_out
        self._cadences = tuple(sorted({m.cadence() for m in self.monitors}))
        automatic = trainer.lightning_module.automatic_optimization
        self.probe.gradients_are_fresh = lambda: self._backwards > 0 or not automatic
        self.probe.attach(trainer.optimizers)
        if monitor.cumulative and self.probe.account is None:
            self._open_account(module)
        if monitor.needs_statistics and self.batch_norms is None:
            self.batch_norms = BatchNormProbe(affine_batch_norms(module), is_compiled(module), bool(self.exchange))
        if self.driver not in trainer.callbacks:
            # a new list: Lightning is going through the old one; first, so that others see this step's numbers
            trainer.callbacks = [self.driver, *trainer.callbacks]

    def leave(self, monitor: Any, trainer: Any) -> None:
        """Remove a monitor; the last one takes the hooks, the probe and the session with it."""
        self.monitors = [other for other in self.monitors if other is not monitor]
        if self.monitors or trainer not in self._sessions:
            return
        if self._armed_at >= 0:
            self._missed()
        self.probe.detach()
        self.structure.rest()
        if self.batch_norms is not None:
            self.batch_norms.detach()
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self.driver]
        self._sessions.pop(trainer, None)
        remember_warnings(while_training=False)
        self.table.publish(trainer.loggers)

    @property
    def account(self) -> NormAccount | None:
        """The sums over all steps so far, or those of a checkpoint."""
        account = self.probe.account
        if account is None and self._saved_account:
            account = NormAccount()
            account.load(self._saved_account)
        return account

    def restore_account(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self._saved_account = state
        if self.probe.account is not None:
            self.probe.account.load(state)

    def _open_account(self, module: nn.Module) -> None:
        """Count every step from here on: all weights, and the biases that may belong to their units."""
        account = self.probe.account = NormAccount() if self.exchange is None else self.exchange.new_account()
        account.load(self._saved_account)
        parameters = by_clean_name(module.named_parameters()) if self.exchange is None else self.exchange.parameters
        names = [name for weight, _ in named_weights(module, frozen=True) for name in (weight, bias_of(weight))]
        account.follow({name: parameters[name] for name in names if name in parameters})

    def _divide(self, division: Division | None) -> None:
        """Read the weights of a model of which this process has a part; nothing changes for others."""
        if division is None:
            return
        self.probe = StepProbe(DividedReader())
        self.left_out = self.probe.skipped
        self.structure = Structure(division.shards.parameters, division.stand_ins)
        self.exchange = Exchange(division.shards, division.weights, self.left_out)

    def batch_starts(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        """Decide whether the optimizer step that this batch belongs to is measured."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if self.probe.account is not None and self._armed_at != step:
            self.probe.reset()
            self.probe.attach(trainer.optimizers)
        for cadence in self._cadences:
            if step % cadence == 0:
                self._arm(trainer, step)
                return
        if self._armed_at >= 0:
            self._missed()
            self._disarm()

    @harmless
    def _arm(self, trainer: Any, step: int) -> None:
        self.probe.attach(trainer.optimizers)
        if self._armed_at >= 0 and self._armed_at != step:
            self._missed()
        if self._armed_at != step:  # else another micro-batch of the same step
            self._armed_at, self._backwards = step, 0
            self._due = [monitor for monitor in self.monitors if step % monitor.cadence() == 0]
            self.structure.forget()
            self._reads_weights = any(monitor.needs_weights for monitor in self._due)
            self.probe.arm(any(monitor.needs_updates for monitor in self._due), self._reads_weights)
        if self.batch_norms is not None and any(monitor.needs_statistics for monitor in self._due):
            self.batch_norms.arm()
        hooks = (self._before_backward, self._after_backward, self._batch_ends)
        self.driver.lend(dict(zip(_MEASURED_HOOKS, hooks, strict=True)))

    def _missed(self) -> None:
        """The step that was waited for did not happen: the gradient scaler skipped it, or the user."""
        self.left_out["no optimizer took a step"] += 1

    def _disarm(self) -> None:
        self._armed_at = -1
        self.probe.disarm()
        self.structure.rest()
        if self.batch_norms is not None:
            self.batch_norms.disarm()
        self.driver.lend(dict.fromkeys(_MEASURED_HOOKS))

    @harmless
    def _before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        if self._reads_weights:
            self.structure.read(module, loss)
            self.probe.weights, self.probe.scales = self.structure.weights, self.structure.scales
        if self.batch_norms is not None:
            self._statistics = self.batch_norms.collect() or self._statistics

    def _after_backward(self, trainer: Any, module: nn.Module) -> None:
        self._backwards += 1

    @harmless
    def _batch_ends(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_index: int) -> None:
        measurement = self.probe.collect()
        if measurement is None:  # a micro-batch, or a step that was skipped
            return
        account = self.probe.account
        if self.exchange is not None and self._reads_weights:  # before anything can fail on one process: all wait
            measurement, account = self.exchange(measurement, account)
        statistics, self._statistics = self._statistics, {}
        self._disarm()
        if not self.probe.gradients_are_fresh():  # a batch without a loss, which the probe has counted
            return
        self._explain_missing(statistics, measurement.unknown)
        one_device = trainer.world_size == 1
        whole = scales_gradients_alike(trainer)
        single_pass = one_device and self._backwards == 1 and whole
        steps = list(measurement.steps.values())
        measured = Measured(steps, statistics, one_device, single_pass, account)
        readings = [reading for monitor in self._due for reading in _readings(monitor, measured) or ()]
        readings += self.structure.confirmation(measured.steps, statistics if single_pass else {}, whole)
        row = transfer(readings, measurement.valid, self._chosen()) if readings else None
        if row is None and readings:
            self.left_out["its gradients are not finite"] += 1
        elif row is not None and self.structure.confirmed(row):
            self._publish(row, trainer)

    def _publish(self, row: Row, trainer: Any) -> None:
        if row.dropped:
            warn_once("Values that are not finite are left out of the logs.")
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        publish(row, trainer.loggers, step)
        self.table.add(step, row.layers, [monitor.tabled() for monitor in self._due])
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
