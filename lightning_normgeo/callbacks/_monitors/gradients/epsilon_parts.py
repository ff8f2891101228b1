"""The part of ⟨W, g⟩ that ε causes, followed from the backward passes of a step to the gradient that is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_normgeo.callbacks._monitors.gradients.gradient_changes import (
    compresses_gradients,
    may_change_before_backward,
    may_change_gradients,
)
from lightning_normgeo.callbacks._readings.epsilon_part import (
    GammaSums,
    epsilon_inner_by_weight,
    gamma_sums,
    with_whole_gradients,
)
from lightning_normgeo.callbacks._readings.reductions.process_sums import ProcessSums
from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.rows import observing_device
from lightning_normgeo.probes.after_backward import AfterBackward, BackwardRecord
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import Observed, WeightStep


class EpsilonParts:
    """The parts that the ε of batch normalizations cause, in a model that is not sharded.

    Args:
        trainer: about to train.
        reader: reads weights and their gradients.
    """

    def __init__(self, trainer: Any, reader: WeightReader) -> None:
        self._record = BackwardRecord(reader)
        self._agreement = ProcessSums(trainer)
        self._device = observing_device(trainer.strategy.root_device)
        self._channels: dict[str, int] = {}

    def watch(self, layers: Mapping[str, _BatchNorm]) -> None:
        """Set the layers of which processes exchange sums, now: messages must not depend on layers seen later."""
        self._channels = {name: layer.num_features for name, layer in layers.items()}

    def declare(self, cadences: Sequence[int]) -> None:
        """Tell the other processes what this one observes."""
        self._agreement.declare((tuple(cadences), sum(self._channels.values())))

    def forget(self) -> None:
        """Discard all records, at the beginning of a step."""
        self._record.forget()

    def begin(self, trainer: Any, weights: Sequence[Observed], scales: Mapping[str, nn.Parameter]) -> None:
        """Look at gradients before a backward pass adds to them."""
        added_to = any(one.weight.grad is not None for one in weights)
        if added_to and may_change_before_backward(trainer):
            self._record.give_up()
        else:
            self._or_give_up(lambda: self._record.begin(weights, scales))

    def note(self, trainer: Any, weights: Iterable[Observed], scales: Mapping[str, nn.Parameter]) -> None:
        """Record gradients right after a backward pass."""
        if compresses_gradients(trainer):
            self._record.give_up()
        else:
            self._or_give_up(lambda: self._record.note(weights, scales, thorough=may_change_gradients(trainer)))

    def apply(self, optimizer: Optimizer) -> None:
        """Keep the records of the weights that an optimizer is about to move."""
        self._or_give_up(lambda: self._record.apply(optimizer))

    def _or_give_up(self, action: Callable[[], None]) -> None:
        """Do something with the records; if it fails, nothing is known about ε in this step."""
        if not self._done(action):
            self._record.give_up()

    @skipped_on_error
    def _done(self, action: Callable[[], None]) -> bool:
        action()
        return True

    def parts(
        self,
        steps: Sequence[WeightStep],
        statistics: Mapping[str, list[BatchStatistics]],
        layers: Mapping[str, _BatchNorm],
        single_backward: bool,
    ) -> dict[str, Tensor]:
        """Return ε's part of ⟨W, g⟩ by weight; every process of a data-parallel training comes here.

        Args:
            steps: weights that optimizers have moved.
            statistics: batch statistics of each pass, by module path.
            layers: the batch normalizations that the model has now.
            single_backward: whether there was only one backward pass in the step.
        """
        applied, alone = self._record.applied, self._agreement.processes == 1
        if single_backward and alone:
            statistics = with_whole_gradients(statistics, steps, applied)
        channels = {name: layer.num_features for name, layer in layers.items()} if alone else self._channels
        sums = self._sums(statistics, channels)
        if not alone and channels:
            # a process that could not read any sends zeros
            sums = self._agreement.averaged(sums or gamma_sums({}, channels, self._device))
        return self._by_weight(steps, sums or {}, applied) or {}

    @skipped_on_error
    def _by_weight(
        self, steps: Sequence[WeightStep], sums: Mapping[str, GammaSums], applied: Mapping[str, AfterBackward]
    ) -> dict[str, Tensor]:
        return epsilon_inner_by_weight(steps, sums, applied)

    @skipped_on_error
    def _sums(
        self, statistics: Mapping[str, Sequence[BatchStatistics]], channels: Mapping[str, int]
    ) -> dict[str, GammaSums]:
        return gamma_sums(statistics, channels, self._device)
