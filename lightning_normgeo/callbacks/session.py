"""What the monitors of one Trainer share: one probe, one walk over the graph, one transfer per measured step.

Lightning calls every hook of every callback inside a profiler context, about two microseconds each even where the
hook is empty. The monitors therefore set their per-batch hooks to None, which Lightning skips; the session lends
its own to one of them, the rest of them only for the batches that are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks.readings import Reading, publish, transfer
from lightning_normgeo.errors import harmless, warn_once
from lightning_normgeo.normalization.units import (
    clean_name,
    is_compiled_graph,
    units_from_graph,
    units_from_modules,
)
from lightning_normgeo.probes.batchnorm import BatchNormProbe, BatchStatistics, affine_batch_norms
from lightning_normgeo.probes.step import StepProbe, WeightStep

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


@dataclass(frozen=True)
class Measured:
    """One measured optimizer step as the monitors see it.

    Attributes:
        steps: every weight that moved.
        statistics: batch statistics of the forward pass, by module path.
        single_device: whether every rank would see the same batch statistics.
        single_pass: whether one backward pass made the gradients, and their clipping kept their direction, so that
            the epsilon identity holds.
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


class Session:
    """The shared instrument of one Trainer; ``Session.of(trainer)`` makes it on first use."""

    _sessions: ClassVar[WeakKeyDictionary[Any, Session]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.probe = StepProbe()
        self.batch_norms: BatchNormProbe | None = None
        self.monitors: list[Any] = []
        self._cadences: tuple[int, ...] = ()
        self._due: list[Any] = []
        self._discovered = False
        self._statistics: dict[str, BatchStatistics] = {}
        self._backwards = 0

    @classmethod
    def of(cls, trainer: Any) -> Session:
        """Return the session of ``trainer``."""
        if trainer not in cls._sessions:
            cls._sessions[trainer] = cls()
        return cls._sessions[trainer]

    def join(self, monitor: Any, trainer: Any, module: nn.Module) -> None:
        """Add a monitor when training starts; the first one lends its hooks."""
        if monitor in self.monitors:
            return
        self.monitors.append(monitor)
        self._cadences = tuple(sorted({m.cadence() for m in self.monitors}))
        self.probe.gradients_are_fresh = lambda: (
            self._backwards > 0 or not trainer.lightning_module.automatic_optimization
        )
        self.probe.attach(trainer.optimizers)
        if monitor.needs_statistics and self.batch_norms is None:
            self.batch_norms = BatchNormProbe(affine_batch_norms(module), is_compiled(module))
        if monitor is self.monitors[0]:
            _lend(monitor, {"on_train_batch_start": self._batch_starts})

    def leave(self, monitor: Any, trainer: Any) -> None:
        """Remove a monitor; the last one takes the hooks, the probe and the session with it."""
        if monitor not in self.monitors:
            return
        leader = self.monitors[0]
        self.monitors.remove(monitor)
        if monitor is leader:
            _lend(leader, dict.fromkeys(BATCH_HOOKS))
            if self.monitors:
                _lend(self.monitors[0], {"on_train_batch_start": self._batch_starts})
        if not self.monitors:
            self.probe.detach()
            if self.batch_norms is not None:
                self.batch_norms.detach()
            self._sessions.pop(trainer, None)

    def _batch_starts(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        for cadence in self._cadences:
            if step % cadence == 0:
                break
        else:
            if self._discovered:
                return
        self._arm(trainer, step)

    @harmless
    def _arm(self, trainer: Any, step: int) -> None:
        self.probe.attach(trainer.optimizers)
        self._due = [monitor for monitor in self.monitors if step % monitor.cadence() == 0]
        if self._due:
            if not self.probe.armed:
                self._backwards = 0
                self.probe.arm(updates=any(monitor.needs_updates for monitor in self._due))
            if self.batch_norms is not None and any(monitor.needs_statistics for monitor in self._due):
                self.batch_norms.arm()
        hooks = {
            "on_before_backward": self._before_backward,
            "on_after_backward": self._after_backward,
            "on_train_batch_end": self._batch_ends,
        }
        _lend(self.monitors[0], hooks)

    @harmless
    def _before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        if not self._discovered:
            self._discover(module, loss)
        if self.batch_norms is not None and self._due:
            self._statistics = self.batch_norms.collect() or self._statistics

    def _after_backward(self, trainer: Any, module: nn.Module) -> None:
        self._backwards += 1

    @harmless
    def _batch_ends(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_index: int) -> None:
        _lend(self.monitors[0], dict.fromkeys(("on_before_backward", "on_after_backward", "on_train_batch_end")))
        measurement = self.probe.collect()
        statistics, self._statistics = self._statistics, {}
        if measurement is None or not self._due:
            return
        single_device = trainer.world_size == 1
        clipped = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
        single_pass = single_device and self._backwards == 1 and not clipped
        measured = Measured(list(measurement.steps.values()), statistics, single_device, single_pass)
        readings = [reading for monitor in self._due for reading in monitor.measure(measured)]
        chosen = {group: sites for monitor in self._due for group, sites in monitor.chosen().items()}
        row = transfer(readings, measurement.valid, chosen) if readings else None
        if row is None:
            return
        publish(row, trainer.loggers, trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in row.watched.items()})

    def _discover(self, module: nn.Module, loss: Tensor) -> None:
        compiled = is_compiled_graph(loss)
        found = units_from_modules(module) if compiled else units_from_graph(module, loss)
        if not found:
            return  # this loss depends on none of the weights; another backward pass may
        self._discovered = True
        parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        self.probe.weights = [(units, parameters[units.name]) for units in found]
        self.probe.scales = {units.scale: parameters[units.scale] for units in found if units.scale is not None}
        if not any(units.invariant for units in found):
            names = ", ".join(f"{units.site} ({units.reason})" for units in found[:3])
            warn_once(f"No scale-invariant weight was found among {len(found)}; all are controls: {names} …")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module, to a submodule, or to the LightningModule itself."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )


def _lend(callback: Any, hooks: dict[str, Any]) -> None:
    """Give a callback these hooks, or take them back where the value is None: its class has None, which is skipped."""
    for name, hook in hooks.items():
        if hook is None:
            callback.__dict__.pop(name, None)
        else:
            callback.__dict__[name] = hook
