"""Observer of one training: its probe, its units and its batch statistics, put together as measured steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.callbacks._monitors.gradients.epsilon_parts import EpsilonParts
from lightning_normgeo.callbacks._monitors.gradients.gradient_changes import clips_by_value, may_change_weights
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, Monitor
from lightning_normgeo.callbacks._monitors.sharded_models import Sharding
from lightning_normgeo.callbacks._monitors.units.unit_confirmation import UnitConfirmation
from lightning_normgeo.callbacks._monitors.units.unit_tracker import UnitTracker
from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.normalization.autograd.compiled_modules import runs_compiled_code
from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics
from lightning_normgeo.probes.batch_norm.layers import readable_batch_norms
from lightning_normgeo.probes.batch_norm.probe import BatchNormProbe
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.layer_inputs.probe import InputProbe
from lightning_normgeo.probes.sharded.all_reduce import StepAllReduce
from lightning_normgeo.probes.sharded.reader import ShardedReader
from lightning_normgeo.probes.step_probe import StepProbe
from lightning_normgeo.probes.symmetries.probe import SymmetryProbe
from lightning_normgeo.probes.weight_step import MeasuredWeights, Observed, WeightStep


class Observer:
    """Probe, units and batch statistics of one training.

    Args:
        trainer: about to train.
        module: the model.
        sharding: how the model is sharded over processes; None if it is not.
        left_out: counts what is not measured, by reason.

    Attributes:
        backwards_seen: how many backward passes were seen in armed batches.
        without_formula: the classes of optimizers that weights were measured under without a formula.
    """

    def __init__(self, trainer: Any, module: nn.Module, sharding: Sharding | None, left_out: Counter[str]) -> None:
        self.probe = StepProbe() if sharding is None else StepProbe(ShardedReader())
        self.epsilon = EpsilonParts(trainer, self.probe.reader) if sharding is None else None
        self.unit_tracker = (
            UnitTracker() if sharding is None else UnitTracker(sharding.shards.parameters, sharding.unsharded)
        )
        self.all_reduce = None if sharding is None else StepAllReduce(sharding.shards, sharding.weights, left_out)
        self.confirmation = UnitConfirmation(self.unit_tracker)
        self.batch_norms: BatchNormProbe | None = None
        self.symmetries: SymmetryProbe | None = None
        self.inputs = InputProbe({})
        self.backwards_seen = 0
        self.without_formula: set[str] = set()
        self.optimizers: Any = None
        self.probe.skipped = left_out
        self._left_out = left_out
        self._automatic: bool = trainer.lightning_module.automatic_optimization
        self._compiled = runs_compiled_code(module)  # its code would be compiled again under a mode
        self._backwards = 0
        self._carries = False
        self._searched = 0
        self._reads_weights = self._reads_statistics = self._reads_symmetries = True
        self._reads_inputs = False
        self.probe.gradients_are_fresh = lambda: self._backwards > 0 or not self._automatic
        self.probe.before_update = self._before_update
        self.probe.unseen = lambda parameters: self._unseen(module, parameters)

    def declare(self, cadences: Sequence[int]) -> None:
        """Tell the other processes what this one observes."""
        if self.epsilon is not None:
            self.epsilon.declare(cadences)

    def watch_batch_norms(self, module: nn.Module) -> None:
        """Also read batch statistics."""
        if self.batch_norms is None:
            layers = readable_batch_norms(module)
            self.batch_norms = BatchNormProbe(layers, self._compiled, self.all_reduce is not None)
            if self.epsilon is not None:
                self.epsilon.watch(layers)

    def watch_symmetries(self) -> None:
        """Also read what scale symmetries show."""
        if self.symmetries is None:
            self.symmetries = SymmetryProbe()

    def watch_inputs(self, inputs: InputProbe | None) -> None:
        """Also read the inputs of layers; a second probe is not used, nor any in a compiled model."""
        if inputs is not None and self._compiled:
            warn_once(
                "BatchGeometryMonitor reads no inputs of layers under torch.compile, so that nothing is known about "
                "Σ_X. Statistics of batch normalizations are logged."
            )
        elif inputs is not None and not self.inputs.layers:
            self.inputs, inputs.skipped = inputs, self.probe.skipped

    @skipped_on_error
    def attach(self, optimizers: Sequence[Any]) -> None:
        """Hook into the optimizers that the Trainer has now."""
        self.optimizers = optimizers
        self.probe.attach(optimizers)

    @skipped_on_error
    def detach(self) -> None:
        """Remove every hook."""
        self.unit_tracker.leave_constants()
        self.probe.detach()
        self.unit_tracker.rest()
        if self.batch_norms is not None:
            self.batch_norms.detach()
        self.inputs.disarm()

    def arm(self, monitors: Sequence[Monitor], cadences: Collection[int], trainer: Any) -> None:
        """Start to read, until :meth:`disarm`.

        Args:
            monitors: all monitors of the training.
            cadences: those that are due. Inputs, which take long to read, are read only for these.
            trainer: in training.
        """
        if not self._carries:
            self.probe.points.forget()
            self.unit_tracker.forget()
            if self.epsilon is not None:
                self.epsilon.forget()
            if self.symmetries is not None:
                self.symmetries.forget()
        self._reads_symmetries = self.symmetries is not None and any(monitor.needs_symmetries for monitor in monitors)
        self.probe.symmetries = self.symmetries if self._reads_symmetries else None
        self._backwards = 0
        self._reads_weights = any(monitor.needs_weights for monitor in monitors)
        self._watch_constants()
        self._reads_statistics = any(monitor.needs_statistics for monitor in monitors)
        self.probe.arm(any(monitor.needs_updates for monitor in monitors), self._reads_weights)
        self._watch_gradients(trainer)
        if self.batch_norms is not None:
            self.batch_norms.arm(gradients=self._reads_weights and self.all_reduce is None)
        self._reads_inputs = any(monitor.needs_inputs and monitor.cadence() in cadences for monitor in monitors)
        if self._reads_inputs:
            self.inputs.arm()

    @skipped_on_error
    def _watch_gradients(self, trainer: Any) -> None:
        """Note the states of the weights that the gradients to come belong to."""
        if self._reads_weights or self._reads_symmetries:
            hooks = not self._compiled and self.all_reduce is None
            self.probe.points.watch(self.probe.parameters(), hooks, sampled=may_change_weights(trainer))

    def _watch_constants(self) -> None:
        """Watch the constants of the forward passes to come, if the units or symmetries may depend on them.

        In the first measured step numbers are watched, such as an ε. Tensors are read only once it is known that
        something depends on them; for symmetries that is nearly always so.
        """
        if self._compiled or not (self._reads_weights or self._reads_symmetries):
            return
        first = not self.unit_tracker.searched
        asks = self.unit_tracker.asks_for_constants or (first and self._reads_symmetries)
        if asks or first:
            self.unit_tracker.watch_constants(reads=asks)

    def pause(self) -> None:
        """Leave no hooks on the model between two batches of one step."""
        self.unit_tracker.leave_constants()
        self.probe.points.rest()
        if self.batch_norms is not None:
            self.batch_norms.pause()
        self.inputs.pause()

    def resume(self, trainer: Any) -> None:
        """Resume with another batch of the same step."""
        self._watch_gradients(trainer)
        if self.batch_norms is not None:
            self.batch_norms.resume()
        if self._reads_inputs:
            self.inputs.resume()

    def disarm(self, waits: bool = False) -> None:
        """Stop reading; with ``waits`` the graphs of gradients that are not yet applied are kept."""
        self._carries = waits
        self.unit_tracker.leave_constants()
        self.probe.points.rest()
        self.probe.disarm()
        self.unit_tracker.rest()
        if self.batch_norms is not None:
            self.batch_norms.disarm()
        self.inputs.disarm()

    def before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        """Read the graph behind a loss, and the inputs and batch statistics of its forward passes."""
        self.probe.points.note_others()
        if self._reads_weights or self._reads_symmetries:
            self.unit_tracker.read(module, loss)
            self._note_symmetries(module)
            self.probe.weights = self.unit_tracker.weights
        if self.batch_norms is not None:
            if self.epsilon is not None and self._reads_weights:
                self.epsilon.begin(trainer, self.unit_tracker.weights, self.unit_tracker.scales)
            self.batch_norms.close()
            self.batch_norms.begin_gradients()
            if self._searched != self.unit_tracker.searched:  # another graph: layers may have been added or replaced
                self._searched = self.unit_tracker.searched
                self.batch_norms.follow(readable_batch_norms(module))
        self._close_inputs()

    @skipped_on_error
    def _close_inputs(self) -> None:
        self.inputs.close()

    @skipped_on_error
    def _note_symmetries(self, module: nn.Module) -> None:
        found = self.unit_tracker.symmetries
        if self._reads_symmetries and self.symmetries is not None and found is not None:
            self.symmetries.read(module, found)

    def after_backward(self, trainer: Any, module: nn.Module) -> None:
        """Count a backward pass."""
        self._backwards += 1
        self.backwards_seen += 1
        if self.epsilon is not None and self.batch_norms is not None and self._reads_weights:
            self.epsilon.note(trainer, self.unit_tracker.weights, self.unit_tracker.scales)

    def normalizations_behind(self) -> dict[str, str]:
        """Return the batch normalization behind each weight that has one, both by the names of their layers."""
        all_units = [one.units for one in self.unit_tracker.weights]
        return {units.layer: layer_name(units.scale) for units in all_units if units.scale is not None}

    def measured(
        self, trainer: Any, measurement: MeasuredWeights, sums: CumulativeIncrements | None
    ) -> tuple[MeasuredStep, list[Tensor]] | None:
        """Return the measured step and the conditions under which it is valid; None if no gradient was fresh."""
        self.unit_tracker.leave_constants()  # of the model, not of what follows
        if self.all_reduce is not None and self._reads_weights:  # before anything can fail on one process: all wait
            measurement, sums = self.all_reduce(measurement, sums)
        statistics = (None if self.batch_norms is None else self._collect(self.batch_norms)) or {}
        steps = list(measurement.steps.values())
        turned = clips_by_value(trainer)
        epsilon = {} if turned else self._parts(steps, statistics)
        if not self.probe.gradients_are_fresh():
            return None
        self._explain_missing(statistics)
        if self._reads_weights:
            self.unit_tracker.report_none()
        self.without_formula |= {step.optimizer for step in steps if step.has_gradient and step.rule is None}
        one_device = trainer.world_size == 1
        symmetry = self.symmetries.collect() if self._reads_symmetries and self.symmetries is not None else None
        valid = measurement.valid if symmetry is None else [*measurement.valid, symmetry.noise.sum().isfinite()]
        found = self.symmetries is not None and self.symmetries.has_symmetries
        inputs = self.inputs.collect()
        edited = measurement.edited
        return MeasuredStep(
            steps, statistics, one_device, epsilon, turned, sums, symmetry, inputs, found, edited
        ), valid

    @skipped_on_error
    def _collect(self, batch_norms: BatchNormProbe) -> dict[str, list[BatchStatistics]]:
        found = batch_norms.collect()
        for reason in batch_norms.left_out() if self._reads_statistics else ():
            self._left_out[f"batch statistics of some layers: {reason}"] += 1
        return found

    def _parts(self, steps: Sequence[WeightStep], statistics: dict[str, list[BatchStatistics]]) -> dict[str, Tensor]:
        """Return ε's part of ⟨W, g⟩ by weight, where it is known."""
        if self.batch_norms is None or self.epsilon is None or not self._reads_weights:
            return {}
        return self.epsilon.parts(steps, statistics, self.batch_norms.layers, self._backwards == 1)

    @skipped_on_error
    def _before_update(self, optimizer: Optimizer) -> None:
        """Read forward passes inside the backward pass (reentrant checkpoints) before the optimizer changes their γ."""
        if self.batch_norms is not None:
            self.batch_norms.close()
            if self.epsilon is not None:
                self.epsilon.apply(optimizer)
        self.inputs.close()

    def _unseen(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Observed]:
        """Measure weights that no graph contained as controls, and warn once with the reason."""
        if self.unit_tracker.sharded:
            return []
        if not self._automatic and not self._backwards:
            why = "no backward pass of Lightning's was seen (in manual optimization call self.manual_backward(loss))"
        else:
            why = "their gradients are from no loss that a backward pass of Lightning's started at"
        found = self.unit_tracker.unseen(module, parameters, why)
        if found:
            names = ", ".join(one.units.name for one in found[:3]) + (" …" if len(found) > 3 else "")
            warn_once(f"{len(found)} weights are controls, whether or not they are invariant: {why}: {names}.")
        return found

    def _explain_missing(self, statistics: dict[str, list[BatchStatistics]]) -> None:
        if self.batch_norms is None or not self.batch_norms.layers or statistics or not self._reads_statistics:
            return
        reasons = ", ".join(self.batch_norms.skipped) or "no layer ran in training mode under its hooks"
        warn_once(f"No batch statistics could be read ({reasons}); affine/* and *_corrected are left out.")
