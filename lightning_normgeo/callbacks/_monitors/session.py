"""Session of the monitors of one Trainer, which share one probe, one reading of the graph and one host transfer a step.

Lightning calls every hook of every callback inside a profiler context, which takes about two microseconds even for an
empty hook, and skips hooks that are None. The monitors therefore have no per-batch hooks: one driver callback has them
for all monitors, and on batches that are not measured it has only one.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_normgeo._lightning import BATCH_HOOKS, QuietCallback
from lightning_normgeo.callbacks._monitors import console_lines
from lightning_normgeo.callbacks._monitors.cadence import Cadence
from lightning_normgeo.callbacks._monitors.cumulative_state import CumulativeState
from lightning_normgeo.callbacks._monitors.measured_rows import MeasuredRows
from lightning_normgeo.callbacks._monitors.measured_step import Monitor
from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.callbacks._monitors.sharded_models import sharding_of
from lightning_normgeo.callbacks._readings.publication.publisher import Publisher
from lightning_normgeo.errors import remember_warnings, skipped_on_error, warn_once
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.exchanged_optimizers import ExchangedOptimizers
from lightning_normgeo.utilities.collector import without_collector

_MEASURED_HOOKS = ("on_before_backward", "on_after_backward", "on_train_batch_end")


class MonitorHooks(QuietCallback):
    """The driver: a callback with the per-batch hooks of a session, in the Trainer's list while monitors observe."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        # Lightning has set up its callbacks by now
        self.lend({**dict.fromkeys(BATCH_HOOKS), "on_train_batch_start": session.batch_starts})
        self.lend({"on_train_epoch_end": session.epoch_ends})

    def lend(self, hooks: dict[str, Any]) -> None:
        """Set hooks by name; Lightning skips those that are None."""
        self.__dict__.update(hooks)

    def __reduce__(self) -> tuple[type[QuietCallback], tuple[()]]:
        """Copy as a callback without hooks: a copied or pickled Trainer does not observe."""
        return QuietCallback, ()


class Session:
    """The measurements shared by all monitors of one Trainer; ``Session.of(trainer)`` creates it on first use.

    An exception in any of its hooks becomes one warning, and the training is not interrupted.
    """

    _sessions: ClassVar[WeakKeyDictionary[Any, Session]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.monitors: list[Monitor] = []
        self.driver = MonitorHooks(self)
        self.cadence = Cadence()
        self.left_out: Counter[str] = Counter()
        self.observer: Observer | None = None
        self.exchanged: ExchangedOptimizers | None = None
        self.publisher = Publisher()
        self.rows = MeasuredRows(self.publisher, self.left_out)
        self.counted = CumulativeState()
        self._cadences: tuple[int, ...] = ()
        self._armed = False
        self._opened = False
        self._joined = False

    @classmethod
    def of(cls, trainer: Any) -> Session:
        """Return the session of ``trainer``, created on first use."""
        return cls._sessions.setdefault(trainer, cls())

    @property
    def sums(self) -> CumulativeIncrements | None:
        """The cumulative increments over all steps so far, with those of a checkpoint; None if unused."""
        return self.counted.sums

    @skipped_on_error
    def join(self, monitor: Any, trainer: Any, module: nn.Module) -> None:
        """Add a monitor when training starts; the first one creates the observer and its hooks."""
        if any(monitor is other for other in self.monitors):
            return
        if not self._joined:
            self._joined = True
            remember_warnings(while_training=True)
        if self.observer is None:
            self.observer = Observer(trainer, module, sharding_of(trainer), self.left_out)
            self.observer.probe.taken = self.cadence.take
            self.exchanged = ExchangedOptimizers(trainer, self._follow_optimizers)
            self._follow_optimizers(trainer)
        self.monitors.append(monitor)
        monitor.left_out = self.left_out
        self._cadences = tuple(sorted({m.cadence() for m in self.monitors}))
        if monitor.needs_statistics:
            self.observer.watch_batch_norms(module)
        if monitor.needs_symmetries:
            self.observer.watch_symmetries()
        if monitor.needs_inputs:
            self.observer.watch_inputs(monitor.input_probe(module))
        if self.driver not in trainer.callbacks:
            # a new list, since Lightning is iterating over the old one; the driver comes first, so that other callbacks
            # see the numbers of this step
            trainer.callbacks = [self.driver, *trainer.callbacks]
        if monitor.cumulative:
            self.counted.open(self.observer, module)

    def leave(self, monitor: Any, trainer: Any) -> None:
        """Remove a monitor; after the last one all hooks, the probe and the session are removed."""
        self.monitors = [other for other in self.monitors if other is not monitor]
        if self.monitors or trainer not in self._sessions:
            return
        self._sessions.pop(trainer, None)
        with ExitStack() as at_last:  # all of it, from the last line to the first, whatever fails
            at_last.callback(self.publisher.finish, trainer)
            at_last.callback(remember_warnings, while_training=False)
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self.driver]
            at_last.callback(self.counted.close)
            if self.observer is not None:
                at_last.callback(self.observer.detach)
            if self.exchanged is not None:
                at_last.callback(self.exchanged.remove)
            self._close(trainer)

    @skipped_on_error
    def restore_sums(self, state: dict[str, Any]) -> None:
        """Resume from the cumulative increments in a checkpoint."""
        self.counted.restore(state)

    @skipped_on_error
    def batch_starts(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        """Decide whether the optimizer step that this batch belongs to is measured."""
        if self.observer is None:
            return
        if not self._opened:
            self._open(trainer, module)
        self.rows.batch_starts()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if step != self.cadence.step:
            self.observer.probe.reset()
            if self.sums is not None or trainer.optimizers is not self.observer.optimizers:
                self._follow_optimizers(trainer)
            self.cadence.advance(step, self._cadences, trainer.optimizers)
        expected = self.cadence.expected() if self.cadence.waits else set()
        if expected:
            self._arm(trainer, expected)
        elif self._armed:
            self._disarm()

    def _follow_optimizers(self, trainer: Any) -> None:
        """Hook into the optimizers that the Trainer has now; those that are new are measured where others were due."""
        if self.observer is None or self.exchanged is None:
            return
        self.observer.attach(trainer.optimizers)
        self.exchanged.know()
        self.cadence.exchange(trainer.optimizers)
        if self._armed:
            self.observer.probe.wait_for(self.cadence.expected())

    @skipped_on_error
    def epoch_ends(self, trainer: Any, module: Any) -> None:
        """Publish a row that is on its way, before others read the numbers of the epoch."""
        self.rows.finish()

    def _open(self, trainer: Any, module: nn.Module) -> None:
        """Print the opening console line, before the first batch."""
        self._opened = True
        self.counted.tell_of_steps_before(trainer.fit_loop.epoch_loop._batches_that_stepped)
        if self.observer is not None:
            self.observer.declare(self._cadences)
        norms = self.observer.batch_norms if self.observer is not None else None
        rank_zero_info(
            console_lines.opening(self.monitors, trainer, module, None if norms is None else len(norms.layers))
        )

    @skipped_on_error
    def _close(self, trainer: Any) -> None:
        """Print the closing console line, and send the summary to the loggers that keep one."""
        self.rows.finish()
        self.cadence.finish()
        if self.cadence.missed:
            self.left_out["no optimizer took a step"] += self.cadence.missed
        if self.observer is None or not self._opened:
            return
        rows, formulas = self.publisher.rows, self.observer.without_formula
        line = console_lines.closing(self.cadence, trainer, rows, self.left_out, formulas)
        rank_zero_info(line)
        observation = {
            "summary": line,
            "left_out": dict(self.left_out),
            "optimizers": console_lines.optimizers_of(trainer),
            "precision": str(trainer.precision),
            **(self._described(trainer) or {}),
        }
        self.publisher.note(trainer.loggers, observation)
        every = min((abs(steps) for steps in self._cadences if steps), default=0)
        nothing = console_lines.nothing_measured(self.cadence, trainer, self.observer.backwards_seen, every)
        if nothing is not None and any(self._cadences) and not trainer.fast_dev_run:
            warn_once(nothing)

    @skipped_on_error
    def _described(self, trainer: Any) -> dict[str, Any]:
        """Return the names of the network and the data, the normalizations behind layers, and the trained γ and β."""
        assert self.observer is not None  # noqa: S101
        norms = self.observer.batch_norms
        return {
            "network": console_lines.network_of(trainer.lightning_module),
            "data": console_lines.data_of(trainer),
            "normalizations": self.observer.normalizations_behind(),
            **({} if norms is None else {"trained_affine": norms.trained()}),
        }

    def _arm(self, trainer: Any, expected: set[int]) -> None:
        """Set the hooks that measure a step of the expected optimizers."""
        assert self.observer is not None  # noqa: S101
        if not self._armed:
            self._armed = True
            self.rows.finish()  # what it refutes is not measured again
            due = [monitor for monitor in self.monitors if monitor.cadence()]
            self.observer.arm(due, self.cadence.due, trainer)
            hooks = (self._before_backward, self._after_backward, self._batch_ends)
            self.driver.lend(dict(zip(_MEASURED_HOOKS, hooks, strict=True)))
        else:
            self.observer.resume(trainer)
        self.observer.probe.wait_for(expected)

    def _disarm(self) -> None:
        """Remove the hooks that only measured batches need."""
        self._armed = False
        if self.observer is not None:
            self.observer.disarm(waits=self.cadence.waits)
        self.driver.lend(dict.fromkeys(_MEASURED_HOOKS))

    @skipped_on_error
    @without_collector
    def _before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        if self.observer is not None:
            self.observer.before_backward(trainer, module, loss)

    @skipped_on_error
    def _after_backward(self, trainer: Any, module: nn.Module) -> None:
        if self.observer is not None:
            self.observer.after_backward(trainer, module)

    @skipped_on_error
    @without_collector
    def _batch_ends(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_index: int) -> None:
        observer = self.observer
        measurement = None if observer is None else observer.probe.collect()
        if observer is None:
            return
        if measurement is None and observer.probe.ended_early:  # what was read belongs to a step that was not taken
            self.cadence.give_up()
            self._disarm()
            return
        if measurement is None:  # a micro-batch, or a step that was skipped
            observer.pause()
            return
        cadences = self.cadence.fulfil(measurement.optimizers)
        monitors = [monitor for monitor in self.monitors if monitor.cadence() in cadences]
        try:
            found = observer.measured(trainer, measurement, self.sums)
        finally:  # the next step is measured from its beginning, on every process
            self._disarm()
        if found is None:  # a batch without a loss, which the probe has counted
            return
        measured, valid = found
        self.rows.add(measured, valid, monitors, observer, trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)
