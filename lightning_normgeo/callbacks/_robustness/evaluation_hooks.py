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


class EvaluationHooks(QuietCallback):
    """Base of RobustnessEvaluation and ChannelEvaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._run: Any = None

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
