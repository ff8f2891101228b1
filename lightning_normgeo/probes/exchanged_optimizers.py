"""Watch for optimizers that a project puts into its Trainer while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_normgeo.errors import skipped_on_error


class ExchangedOptimizers:
    """Hook on all optimizers of the process that finds those of a Trainer which are new.

    A project may exchange its optimizers anywhere, also in ``training_step``, and Lightning tells no callback of it.
    The hook runs before all hooks of the optimizer itself, so that those that are registered in it see the same step.

    Args:
        trainer: the Trainer.
        found: called before the first step of an optimizer of the Trainer that :meth:`know` was not told of.

    Cost: a Python call and a look-up for each step of each optimizer.
    """

    def __init__(self, trainer: Any, found: Callable[[Any], object]) -> None:
        self._trainer = trainer
        self._found = found
        self._known: set[int] = set()
        self._handle = register_optimizer_step_pre_hook(self._step_begins)

    def know(self) -> None:
        """Take the optimizers that the Trainer has now as known."""
        self._known = set(map(id, self._trainer.optimizers))

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @skipped_on_error
    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if id(optimizer) not in self._known and any(optimizer is one for one in self._trainer.optimizers):
            self._found(self._trainer)
