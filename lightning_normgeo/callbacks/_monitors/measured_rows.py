"""Rows of measured steps: the readings of all monitors, their transfer to the host, their checks, their publication.

On a CUDA device the host does not wait for the values. A row is published when the second batch after it begins, as
work of one batch at least is queued on the device then; earlier if the next step to measure begins, if training ends,
or if another callback watches one of its keys, which sees the values in the batch that they belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_normgeo.callbacks._monitors.gradients.edited_weights import edited_readings, without_edited
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, Monitor
from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.callbacks._readings.publication.publisher import Publisher
from lightning_normgeo.callbacks._readings.publication.transfer import Transfer
from lightning_normgeo.callbacks._readings.readings import HostValues, Reading
from lightning_normgeo.callbacks._readings.symmetry_readings import RMS_CHARGE, RMS_UNCANCELED
from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.probes.step_in_progress import ELSEWHERE

_BATCHES = 2
"""Batches that begin before a row is published."""


@dataclass
class _Row:
    """A measured step whose values are on their way to the host.

    Attributes:
        step: the step number as loggers count it.
        begun: the number of batches that began since.
    """

    measured: MeasuredStep
    monitors: list[Monitor]
    observer: Observer
    trainer: Any
    step: int
    valid: list[Tensor]
    transfer: Transfer
    begun: int = 0


class MeasuredRows:
    """Makes a row of every measured step, in order.

    Args:
        publisher: sends rows to the loggers.
        left_out: counts what is not measured, by reason.
    """

    def __init__(self, publisher: Publisher, left_out: Counter[str]) -> None:
        self._publisher, self._left_out = publisher, left_out
        self._pending: _Row | None = None

    def add(
        self,
        measured: MeasuredStep,
        valid: list[Tensor],
        monitors: list[Monitor],
        observer: Observer,
        trainer: Any,
        step: int,
    ) -> None:
        """Start the transfer of a step's readings, and publish them once they are on the host.

        Args:
            measured: the step.
            valid: the conditions under which it is valid, on the device.
            monitors: those that are due.
            observer: has measured the step.
            trainer: whose loggers get the row.
            step: the step number as loggers count it.
        """
        self.finish()
        for monitor in monitors:
            monitor.find_layers(one.units.layer for one in measured.steps)
        transfer = _sent(measured, valid, monitors, observer)
        if transfer is not None:
            self._pending = _Row(measured, monitors, observer, trainer, step, valid, transfer)
            if not transfer.asynchronous or _is_watched(transfer.readings, trainer):
                self.finish()

    def batch_starts(self) -> None:
        """Count a batch, and publish a row that has waited for two."""
        if self._pending is not None:
            self._pending.begun += 1
            if self._pending.begun >= _BATCHES:
                self.finish()

    @skipped_on_error
    def finish(self) -> None:
        """Publish the row that is on its way, if there is one; waits for its values."""
        one, self._pending = self._pending, None
        if one is None:
            return
        row = one.transfer.row(_chosen(one.monitors))
        self._publisher.witness(row is not None, one.step)
        if row is None:
            self._left_out["its gradients are not finite"] += 1
            return
        row = self._checked(one, row)
        if row is not None:
            self._publisher.publish(row, one.trainer, one.step, one.monitors)

    def _checked(self, one: _Row, row: HostValues) -> HostValues | None:
        """Return the row; read again, with new controls, if its numbers refute the invariance of weights."""
        confirmation = one.observer.confirmation
        unedited = without_edited(one.measured, row)
        if unedited is not one.measured:
            one.observer.probe.note(ELSEWHERE)
            one.measured = unedited
            without = _read_again(one)
            if without is None:
                return None
            row = without
        verdict = None if one.measured.turned else confirmation.judge(row, one.measured)
        if verdict is not None and verdict.refuted:
            confirmation.refute(verdict.refuted, row)
            one.measured = one.measured.without_invariance(verdict.refuted)
            again = _read_again(one)
            if again is None:
                return None
            row = again
        checked = self._without_refuted_symmetries(one, row)
        if checked is not None:
            self._publisher.check(checked, one.measured, verdict)
        return checked

    def _without_refuted_symmetries(self, one: _Row, row: HostValues) -> HostValues | None:
        """Return the row, read again without families of symmetries that its charges refute."""
        probe, symmetry = one.observer.symmetries, one.measured.symmetry
        if probe is None or symmetry is None or one.measured.turned:
            return row
        refuted = probe.refute(row.internal.get(RMS_CHARGE, {}), row.internal.get(RMS_UNCANCELED, {}))
        if not refuted:
            return row
        one.measured = replace(one.measured, symmetry=symmetry.without(refuted))
        return _read_again(one)


def _read_again(one: _Row) -> HostValues | None:
    """Return the row of a step that was changed; without sums over all steps if others have been added since."""
    if one.begun:
        one.measured = replace(one.measured, sums=None)
    transfer = _sent(one.measured, one.valid, one.monitors, one.observer)
    return None if transfer is None else transfer.row(_chosen(one.monitors))


def _sent(
    measured: MeasuredStep, valid: Sequence[Tensor], monitors: Sequence[Monitor], observer: Observer
) -> Transfer | None:
    """Return the readings of all monitors on their way to the host; None if there are none."""
    readings = [reading for monitor in monitors for reading in _readings(monitor, measured) or ()]
    readings += observer.confirmation.readings(measured) + edited_readings(measured)
    return Transfer(readings, valid) if readings else None


@skipped_on_error
def _readings(monitor: Any, measured: MeasuredStep) -> list[Reading]:
    return list(monitor.measure(measured))


def _chosen(monitors: Sequence[Monitor]) -> dict[str, frozenset[str]]:
    """Return the layers that get metric keys of their own, by metric group."""
    chosen: dict[str, frozenset[str]] = {}
    for monitor in monitors:
        for group, layers in monitor.chosen().items():
            chosen[group] = chosen.get(group, frozenset()) | layers
    return chosen


def _is_watched(readings: Sequence[Reading], trainer: Any) -> bool:
    """Whether a callback or a learning-rate scheduler watches an aggregate, as EarlyStopping does."""
    keys = {reading.key for reading in readings if reading.total is not None}
    schedulers = getattr(trainer, "lr_scheduler_configs", ())
    return any(getattr(one, "monitor", None) in keys for one in (*trainer.callbacks, *schedulers))
