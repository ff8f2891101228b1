"""Cumulative increments of one training: opened at its start, saved in checkpoints, restored from them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.geometry.rows import main_device
from lightning_normgeo.normalization.names import bias_of, by_clean_name, named_weights
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements


class CumulativeState:
    """Cumulative increments of a training, and those of a checkpoint until a training resumes from it."""

    def __init__(self) -> None:
        self._account: CumulativeIncrements | None = None
        self._saved: dict[str, Any] = {}

    @property
    def sums(self) -> CumulativeIncrements | None:
        """The increments summed over all steps so far, or those of a checkpoint."""
        if self._account is None and self._saved:
            waiting = CumulativeIncrements()
            _load(waiting, self._saved)
            return waiting
        return self._account

    def open(self, observer: Observer, module: nn.Module) -> None:
        """Sum up every step from now on: of all weights, and of biases that may belong to their units.

        Args:
            observer: of the training.
            module: to train.
        """
        if self._account is not None:
            return

        def look_up() -> dict[str, nn.Parameter]:
            all_reduce = observer.all_reduce
            named = dict(module.named_parameters()) if all_reduce is None else all_reduce.parameters
            parameters = by_clean_name(named.items())
            names = [name for weight, _ in named_weights(module, frozen=True) for name in (weight, bias_of(weight))]
            device = main_device(parameters.values())
            known = {name: parameters[name] for name in names if name in parameters}
            return {name: parameter for name, parameter in known.items() if parameter.device == device}

        sums = CumulativeIncrements(look_up) if observer.all_reduce is None else observer.all_reduce.new_sums(look_up)
        _load(sums, self._saved)
        sums.follow(look_up())
        self._account = observer.probe.sums = sums

    def tell_of_steps_before(self, step: int) -> None:
        """Warn of steps that the sums do not cover, before the first batch.

        Args:
            step: number of steps that the Trainer has taken before, as it counts them for loggers. Before the first
                batch Lightning has corrected it by one for a checkpoint that was saved within an epoch.
        """
        if self._account is not None and step and not self._saved:
            warn_once(
                f"The cumulative_… keys count from step {step} on: sums over the steps before are not known. They are "
                "in checkpoints of trainings with this callback; trainer.fit(…, ckpt_path=…) goes on with them."
            )

    def close(self) -> None:
        """Release the model; the sums can still be read."""
        if self._account is not None:
            self._account.rest()

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the sums of a checkpoint."""
        self._saved = state if isinstance(state, dict) else {}
        if self._account is not None:
            _load(self._account, self._saved)


@skipped_on_error
def _load(sums: CumulativeIncrements, state: dict[str, Any]) -> None:
    try:
        sums.load(state)
    except Exception as error:  # of another version, or damaged
        sums.load({})
        warn_once(f"The cumulative sums of the checkpoint cannot be used ({error}): cumulative_… keys start from zero.")
