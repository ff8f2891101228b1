"""Check of the order of callbacks that read the weights at the end of fit and those that average them."""

from __future__ import annotations

from typing import Any

from lightning_normgeo.errors import ConfigurationError


def check_behind_averaging(callback: Any, trainer: Any, name: str) -> None:
    """Check that a callback that reads the weights at the end of fit comes after WeightAveraging.

    The place of a callback that another one holds is not known, and nothing is checked.

    Args:
        callback: the callback.
        trainer: its Trainer.
        name: of the callback, for the message.

    Raises:
        ConfigurationError: if WeightAveraging comes after it.
    """
    places = [place for place, other in enumerate(trainer.callbacks) if other is callback]
    behind = trainer.callbacks[places[0] :] if places else []
    if any(kind.__name__ == "WeightAveraging" for other in behind for kind in type(other).__mro__):
        raise ConfigurationError(
            f"{name} comes before WeightAveraging in the list of callbacks and would evaluate weights that are not "
            "averaged. Put it after WeightAveraging."
        )
