"""The sums over all steps of one training, from its start or from a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.normalization.names import bias_of, by_clean_name, named_weights
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements


class CumulativeState:
    """Holds the account of a training, and that of a checkpoint until a training goes on with it."""

    def __init__(self) -> None:
        self._account: CumulativeIncrements | None = None
        self._saved: dict[str, Any] = {}

    @property
    def sums(self) -> CumulativeIncrements | None:
        """The sums over all steps so far, or those of a checkpoint."""
        if self._account is None and self._saved:
            waiting = CumulativeIncrements()
            _load(waiting, self._saved)
            return waiting
        return self._account

    def open(self, observer: Observer, module: nn.Module) -> None:
        """Count every step from here on: all weights, and the biases that may belong to their units."""
        if self._account is not None:
            return

        def look_up() -> dict[str, nn.Parameter]:
            all_reduce = observer.all_reduce
            named = dict(module.named_parameters()) if all_reduce is None else all_reduce.parameters
            parameters = by_clean_name(named.items())
            names = [name for weight, _ in named_weights(module, frozen=True) for name in (weight, bias_of(weight))]
            return {name: parameters[name] for name in names if name in parameters}

        sums = CumulativeIncrements(look_up) if observer.all_reduce is None else observer.all_reduce.new_sums(look_up)
        _load(sums, self._saved)
        sums.follow(look_up())
        self._account = observer.probe.sums = sums

    def close(self) -> None:
        """Let go of the model; what has the account may still ask for its sums."""
        if self._account is not None:
            self._account.rest()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self._saved = state if isinstance(state, dict) else {}
        if self._account is not None:
            _load(self._account, self._saved)


@skipped_on_error
def _load(sums: CumulativeIncrements, state: dict[str, Any]) -> None:
    try:
        sums.load(state)
    except Exception as error:  # of another version, or damaged
        sums.load({})
        warn_once(f"The sums in the checkpoint cannot be gone on with ({error}): cumulative_… keys begin anew.")
