"""Trainer hooks of ChannelEvaluation."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks._channels.logging import log_report, metrics_of
from lightning_normgeo.callbacks._channels.loop_evaluation import NAME, ChannelLoop
from lightning_normgeo.callbacks._robustness.dataloaders import (
    batch_count,
    batches_of,
    check_not_sharded,
    loaders_of,
    named_loaders,
    test_loaders,
    testing,
)
from lightning_normgeo.callbacks._robustness.evaluation_hooks import EvaluationHooks
from lightning_normgeo.channels.report import MaskingReport
from lightning_normgeo.channels.settings import MaskingSettings
from lightning_normgeo.errors import ConfigurationError, UnsuitableError, skipped_on_error, warn_once
from lightning_normgeo.robustness.model.preserved_state import preserved_state


class ChannelHooks(EvaluationHooks):
    """Base of ChannelEvaluation: evaluates in ``trainer.test``, ``trainer.validate`` and optionally after ``fit``.

    Attributes:
        settings: the settings of the evaluation.
        limit_batches: largest number of batches; None for all.
        after_fit: whether to evaluate at the end of ``fit``.
    """

    settings: MaskingSettings
    limit_batches: int | None
    after_fit: bool

    def __init__(self) -> None:
        super().__init__()
        self._report: MaskingReport | None = None
        self._run: ChannelLoop | None = None

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits for images as the loader yields them."""
        raise NotImplementedError

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two evaluations in one Trainer.

        Raises:
            ConfigurationError: if there are several.
        """
        super().setup(trainer, pl_module, stage)
        if sum(isinstance(callback, ChannelHooks) for callback in trainer.callbacks) > 1:
            raise ConfigurationError(
                f"This Trainer has several {NAME}s, and their results would replace each other. Give one all criteria "
                "and ratios."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say before training starts if nothing can be evaluated after it."""
        if not self.after_fit:
            return
        try:
            check_not_sharded(trainer, NAME)
        except UnsuitableError as error:
            warn_once(f"Channels are not evaluated after fit. {error}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate after fit, with ``after_fit=True``: the test data, else the validation data."""
        if self.after_fit and not trainer.fast_dev_run:
            self._evaluate_after_fit(trainer, pl_module)

    @skipped_on_error
    def _evaluate_after_fit(self, trainer: Any, module: Any) -> None:
        """Evaluate after fit; whatever fails on this process, the others wait for it in :meth:`_finish`."""
        with preserved_state(module), ExitStack() as stack:  # iterating a loader draws a random number
            self._run = ChannelLoop(self, trainer, module, None, "test", in_loop=False)
            try:
                loader, data = self._loader_after_fit(trainer, stack)
                count = batch_count(trainer, loader, data)
                self._run = ChannelLoop(self, trainer, module, loader, data, count, in_loop=False)
                for batch in islice(batches_of(trainer, loader, 0, data), self.limit_batches):
                    self._run.take(batch)
            except Exception as error:
                self._run.give_up(error)
        self._finish(trainer)
        if self._report is not None:
            metrics, step = metrics_of(self._report), trainer.fit_loop.epoch_loop._batches_that_stepped
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def _loader_after_fit(self, trainer: Any, stack: ExitStack) -> tuple[Any, str]:
        """Return the first test loader, else the first validation loader, and which of both it is."""
        try:
            with ExitStack() as until_found:
                until_found.enter_context(testing(trainer))
                loaders = test_loaders(trainer, NAME)
                stack.enter_context(until_found.pop_all())
            return next(iter(loaders.values())), "test"
        except UnsuitableError:
            if not trainer.val_dataloaders:
                raise
        return next(iter(named_loaders(trainer.val_dataloaders).values())), "validation"

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate a copy of the batch before the project's step."""
        if self._run is not None:
            self._run.take(batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Merge the results of all processes and log them."""
        self.meet_without_batch(trainer)
        if self._run is None:
            return
        self._finish(trainer)
        if self._report is not None:
            pl_module.log_dict(metrics_of(self._report), sync_dist=trainer.world_size > 1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Discard an evaluation that was interrupted."""
        self._run = None

    @skipped_on_error
    def _start(self, trainer: Any, module: Any, loop: Any, counts: Any) -> None:
        self._report, self._run = None, None
        loader = next(iter(loaders_of(loop).values()), None)
        data = "validation" if loop is trainer.validate_loop else "test"
        self._run = ChannelLoop(self, trainer, module, loader, data, next(iter(counts), None))

    @skipped_on_error
    def _finish(self, trainer: Any) -> None:
        run, self._run = self._run, None
        assert run is not None  # noqa: S101
        self._report = run.finish()
        log_report(trainer, self._report)
