"""Base of the callbacks that evaluate batches of the Trainer's test and validation loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning_normgeo._lightning import QuietCallback


class BatchEvaluation(ABC):
    """Base of the evaluations of the batches of one loop.

    Attributes:
        has_begun: whether this process has taken part in what all processes exchange at their first batch.
    """

    has_begun = False

    @abstractmethod
    def take_none(self) -> None:
        """Take part in what all processes exchange at their first batch, without one."""


class EvaluationHooks(QuietCallback, ABC):
    """Base of RobustnessEvaluation and ChannelEvaluation.

    ``trainer.validate`` is evaluated by the hooks for ``trainer.test``; validation inside ``fit`` starts no evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run: Any = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Start an evaluation, and discard the results of the last one."""
        self._start(trainer, pl_module, trainer.test_loop, trainer.num_test_batches)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Start an evaluation in ``trainer.validate``, and discard the results of the last one."""
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module, trainer.validate_loop, trainer.num_val_batches)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take a batch of ``trainer.validate``."""
        self.on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Finish a batch of ``trainer.validate``."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Merge the results of all processes and log them in ``trainer.validate``."""
        self.on_test_epoch_end(trainer, pl_module)

    @abstractmethod
    def _start(self, trainer: Any, module: Any, loop: Any, counts: Any) -> None:
        """Start an evaluation of a loop, with its number of batches for each loader."""

    @staticmethod
    def meet_without_batch(trainer: Any) -> None:
        """Let all evaluations of a Trainer begin on a process that got no batch.

        At their first batch all processes exchange something for the first evaluation, then for the second one, and so
        on. A process without a batch comes here first at the end of its loop, and has to do so in the same order.
        """
        if trainer.world_size > 1:
            for callback in trainer.callbacks:
                run: BatchEvaluation | None = callback._run if isinstance(callback, EvaluationHooks) else None
                if run is not None and not run.has_begun:
                    run.take_none()
