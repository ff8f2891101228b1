"""Probe of optimizer steps: the weights before and after, the gradients that were applied, and optimizer state.

Lightning runs forward, backward, unscaling and clipping *inside* ``optimizer.step(closure)``. Whatever is read in a
Lightning hook is therefore stale, scaled, unclipped, or belongs to another learning rate. The probe wraps the closure
on its way into the optimizer and reads between its end and the update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.rows import is_captured, main_device, on_observing_device
from lightning_normgeo.geometry.update_rules.registry import description_of
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.explain import decay_factor, groups_of, parameters_of
from lightning_normgeo.probes.gradient_points import GradientPoints, leave_unpredicted
from lightning_normgeo.probes.moved_weights import moving_weights
from lightning_normgeo.probes.step_in_progress import (
    CAPTURED,
    ELSEWHERE,
    MOVED,
    RAISED,
    SEVERAL,
    StepInProgress,
    warn_of,
)
from lightning_normgeo.probes.symmetries.probe import SymmetryProbe
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import MeasuredWeights, Observed
from lightning_normgeo.utilities.collector import without_collector


class StepProbe:
    """Hooks on the optimizers of a Trainer; costs about a microsecond per step while not armed.

    One probe serves every monitor of a Trainer. It adds no autograd node, changes no gradient, and draws no random
    numbers. A step that cannot be described exactly is left out and counted in ``skipped`` under its reason.

    Attributes:
        weights: what to measure, with its units.
        skipped: what was left out, by reason.
        sums: the sums over all steps, where a monitor asked for them.
        gradients_are_fresh: tells whether a backward pass made the gradients.
        taken: called with the optimizer at each step, measured or not.
        before_update: called with the optimizer when gradients are final and nothing has moved, in a measured step.
        symmetries: reads what scale symmetries show, where a monitor asked for it.
        points: the weights that gradients belong to.
        ended_early: the number of measured steps that an exception ended, before the last :meth:`collect`.
        unseen: called with parameters that have gradients and are not among ``weights``; what it returns is measured.
    """

    def __init__(self, reader: WeightReader | None = None) -> None:
        self.weights: list[Observed] = []
        self.skipped: Counter[str] = Counter()
        self.sums: CumulativeIncrements | None = None
        self.gradients_are_fresh: Callable[[], bool] = lambda: True
        self.taken: Callable[[Optimizer], None] = lambda optimizer: None
        self.before_update: Callable[[Optimizer], None] = lambda optimizer: None
        self.unseen: Callable[[Sequence[nn.Parameter]], list[Observed]] = lambda parameters: []
        self.symmetries: SymmetryProbe | None = None
        self.points = GradientPoints()
        self.ended_early = 0
        self.reader = reader or WeightReader()
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[Optimizer] = []
        self._measurement: MeasuredWeights | None = None
        self._due: Collection[int] | None = None
        self._updates = False
        self._weights = True
        self._pending: StepInProgress | None = None
        self._raised = 0

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook into ``optimizers``, dropping earlier hooks; nothing happens if these are the ones hooked already."""
        found = list(optimizers)
        if len(found) == len(self._optimizers) and all(a is b for a, b in zip(found, self._optimizers, strict=True)):
            return
        self._remove_hooks()  # what has been measured of this step stays
        self._optimizers = found
        for optimizer in found:
            self._handles.append(optimizer.register_step_pre_hook(self._step_begins))
            self._handles.append(optimizer.register_step_post_hook(self._step_ends))

    def detach(self) -> None:
        """Remove every hook and free the scratch memory."""
        self._remove_hooks()
        self.reader.clear()
        self.points.rest()
        self._measurement = self._pending = None

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the optimizers move."""
        return chain.from_iterable(map(parameters_of, self._optimizers))

    def arm(self, updates: bool, weights: bool = True) -> None:
        """Measure the steps that follow, until :meth:`collect`.

        Args:
            updates: also measure what the step changes, which takes a copy of the weights.
            weights: whether to read weights at all, or only to see that a step is taken.
        """
        self._weights, self._due = weights, None
        self._measurement, self._updates, self._pending = MeasuredWeights(), updates, None

    def wait_for(self, optimizers: Collection[int]) -> None:
        """Measure the steps of these optimizers alone, by id."""
        self._due = optimizers

    def reset(self) -> None:
        """Forget a step that ended in an exception."""
        self._pending, self._raised = None, 0

    def collect(self) -> MeasuredWeights | None:
        """Return the measurement since :meth:`arm` and disarm; None while no optimizer took a step.

        Steps that an exception ended are counted, and are no steps.
        """
        measurement = self._measurement
        self.ended_early = self._raised + (self._pending is not None and self._pending.measured)
        self._raised = 0
        if self.ended_early:
            self.skipped[RAISED] += self.ended_early
        if measurement is None or not measurement.optimizers:
            return None
        self.disarm()
        return measurement

    def disarm(self) -> None:
        """Measure no further steps."""
        self._measurement = self._pending = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @skipped_on_error
    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._pending is not None and self._pending.optimizer is optimizer:  # a subclass that calls super().step()
            self._pending.depth += 1
            return None
        self.taken(optimizer)
        measured = self._measurement is not None and (self._due is None or id(optimizer) in self._due)
        if not measured and self.sums is None:
            return None
        if is_captured():  # what is read now would become a part of the graph
            self.skipped[CAPTURED] += 1
            return None
        parameters = list(parameters_of(optimizer))
        versions = {id(parameter): parameter._version for parameter in parameters}
        pending = self._pending = StepInProgress(optimizer, versions, measured, outer=self._pending)
        if self.sums is not None:
            pending.follows = bool(self._open_account(optimizer, self.sums))
        if measured and self._updates and description_of(type(optimizer)) is None:
            self.reader.remember(parameters)
        watched = partial(pending.watched, final=partial(self._snapshot, optimizer, pending), raised=self._give_up)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": watched(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], watched(args[1]), *args[2:]), kwargs
        self._snapshot(optimizer, pending)
        return None

    @skipped_on_error
    def _open_account(self, optimizer: Optimizer, sums: CumulativeIncrements) -> bool:
        """Open the cumulative sums; if they fail, the step is measured all the same."""
        sums.open(optimizer)
        return True

    def _give_up(self, pending: StepInProgress) -> None:
        """Forget a step whose closure raised an exception; the project may catch it and train on."""
        if self._pending is pending:
            self._pending = pending.outer
            self._raised += pending.measured

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @skipped_on_error
    @without_collector
    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        pending = self._pending
        if pending is None or pending.optimizer is not optimizer:
            return
        if pending.depth:
            pending.depth -= 1
            return
        self._pending = pending.outer
        several = pending.closure_calls > 1
        if self.sums is not None and pending.counted:
            self._commit(pending, self.sums, explained=not (several or pending.moved))
        if self._measurement is None or not pending.measured:
            return
        self._measurement.optimizers.add(id(optimizer))
        if several:
            self.note(SEVERAL)
        steps = [step.unexplained() if several else step for step in pending.steps]
        if self._updates:
            with torch.no_grad():
                self.reader.add_updates(steps, pending.observed)
        if self.symmetries is not None:
            if several:
                self.symmetries.drop()
            self._read_symmetries(self.symmetries, None)
        self._measurement.steps.update((step.units.name, step) for step in steps)
        self._measurement.valid += pending.valid
        self._measurement.edited += pending.changes.any_edited

    @skipped_on_error
    @without_collector
    @torch.no_grad()
    def _snapshot(self, optimizer: Optimizer, pending: StepInProgress) -> None:
        """Read W, g and the optimizer's state: gradients are final, the update has not begun."""
        if description_of(type(optimizer)) is None:
            pending.moved = any(p._version != pending.versions.get(id(p)) for p in parameters_of(optimizer))
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            pending.valid.append(on_observing_device(found_inf).reshape(()) == 0)
        try:
            if pending.measured and self._measurement is not None:
                self._look(optimizer, pending)
        finally:
            if self.sums is not None and pending.follows:
                self._count(optimizer, pending, self.sums)
            self.reader.forget()

    def _look(self, optimizer: Optimizer, pending: StepInProgress) -> None:
        self.before_update(optimizer)
        if not self.gradients_are_fresh():
            self.skipped["no backward pass since the last step"] += 1
            return
        if pending.moved and (self._weights or self.symmetries is not None):
            self.note(MOVED)
        elif not pending.moved:
            pending.changes = self.points.changes(optimizer) or pending.changes
        if pending.changes.left:
            self.note(ELSEWHERE)
        if self.symmetries is not None and not (pending.moved or pending.changes.left):
            self._read_symmetries(self.symmetries, optimizer)
        if self._weights:
            self._measure(optimizer, pending)

    @skipped_on_error
    @torch.no_grad()
    def _read_symmetries(self, symmetries: SymmetryProbe, optimizer: Optimizer | None) -> None:
        """Read parameters before the update of an optimizer, or after it; a failure leaves the rest of the step."""
        if optimizer is not None:
            symmetries.before(optimizer)
        else:
            symmetries.after()

    @skipped_on_error
    def _count(self, optimizer: Optimizer, pending: StepInProgress, sums: CumulativeIncrements) -> None:
        """Add the step to the cumulative sums; what the measurement has read is not read again."""
        pending.counted = True
        sums.begin(optimizer, pending.moved, self.reader.by_output_row())
        leave_unpredicted(sums, (step.units.name for step in pending.steps if not step.has_gradient))

    @skipped_on_error
    def _commit(self, pending: StepInProgress, sums: CumulativeIncrements, explained: bool) -> None:
        """Commit the cumulative sums; if they fail, the measurement is kept."""
        sums.commit(pending.valid, explained)

    def _measure(self, optimizer: Optimizer, pending: StepInProgress) -> None:
        groups = groups_of(optimizer)
        if pending.moved and not self._updates:
            return
        device = main_device(self.parameters())
        observed = moving_weights(self.weights, self.unseen, optimizer, self.skipped, device)
        if pending.moved:
            pending.steps = self.reader.read_moved(observed, groups)
        else:
            keep = self._updates and description_of(type(optimizer)) is not None
            pending.steps = self.reader.read(observed, optimizer, groups, keep)
        pending.observed = observed
        shrinks = {id(group): decay_factor(optimizer, group) for group in optimizer.param_groups}
        for step, one in zip(pending.steps, observed, strict=True):
            step.optimizer = type(optimizer).__name__
            step.shrink = shrinks[id(groups[id(one.weight)])]
            step.has_gradient = step.has_gradient and not pending.changes.have_left(one.parameters)
            step.edited = pending.changes.edited_of(one.parameters)
        if pending.moved:
            return
        if pending.steps:
            pending.valid.append(torch.cat([step.gradient_sq for step in pending.steps]).sum().isfinite())

    def note(self, reason: str) -> None:
        """Count something that is left out, and warn of it once."""
        self.skipped[reason] += 1
        warn_of(reason, with_symmetries=self.symmetries is not None)
