"""Trainer hooks of RobustnessEvaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks._robustness.dataloaders import (
    batches_of,
    check_not_sharded,
    loaders_of,
    test_loaders,
    test_source,
    testing,
)
from lightning_normgeo.callbacks._robustness.evaluation_hooks import EvaluationHooks
from lightning_normgeo.callbacks._robustness.logging import log_evaluation, metrics_of
from lightning_normgeo.callbacks._robustness.loop_evaluation import LoopEvaluation
from lightning_normgeo.callbacks._robustness.weight_averaging import check_behind_averaging
from lightning_normgeo.errors import ConfigurationError, UnsuitableError, warn_once
from lightning_normgeo.robustness.inputs import DeclaredInputs
from lightning_normgeo.robustness.model.precision import check_verifiable, precision_of
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.settings import RobustnessSettings

_NAME = "RobustnessEvaluation"


class RobustnessHooks(EvaluationHooks):
    """Base of RobustnessEvaluation: evaluates in ``trainer.test``, ``trainer.validate`` and optionally after ``fit``.

    Attributes:
        settings: the settings of the evaluation.
        declared: the user's declaration of how images are normalized.
        name: the name of the evaluation; None if the Trainer has only this one.
        num_images: number of example images to log.
        after_fit: whether to evaluate at the end of ``fit``.
        resume: whether to keep a journal of finished samples until the evaluation has ended.
        surrogate: path of the checkpoint that attacks are transferred from; None for none.
        reports: the reports of the last evaluation, by suffix of their keys (name of the evaluation and of the loader).
    """

    settings: RobustnessSettings
    declared: DeclaredInputs
    name: str | None
    num_images: int
    after_fit: bool
    resume: bool
    surrogate: str | None

    def __init__(self) -> None:
        super().__init__()
        self.reports: dict[str, RobustnessReport] = {}
        self._run: LoopEvaluation | None = None

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits for images as the loader yields them."""
        raise NotImplementedError

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two evaluations with the same name in one Trainer, and a surrogate that does not exist.

        Raises:
            ConfigurationError: if there are several with this name, or no file for the surrogate.
        """
        super().setup(trainer, pl_module, stage)
        if self.surrogate is not None and not Path(self.surrogate).is_file():
            raise ConfigurationError(f"surrogate={self.surrogate!r} is no file. Give the path of a checkpoint.")
        names = [callback.name for callback in trainer.callbacks if isinstance(callback, RobustnessHooks)]
        if names.count(self.name) > 1:
            raise ConfigurationError(
                f"This Trainer has {names.count(self.name)} RobustnessEvaluations with name={self.name!r}, and their "
                "results would replace each other. Give each a name of its own."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the requirements of an evaluation after fit before training starts.

        Raises:
            ConfigurationError: if WeightAveraging comes after this callback.
        """
        if not self.after_fit:
            return
        check_behind_averaging(self, trainer, "RobustnessEvaluation(after_fit=True)")
        try:
            check_not_sharded(trainer)
            self._check_source(trainer, pl_module)
        except UnsuitableError as error:
            if self.settings.on_unsuitable == "raise":
                raise
            warn_once(f"Robustness is not evaluated after fit. {error}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate after fit, with ``after_fit=True``."""
        if not self.after_fit or trainer.fast_dev_run:
            return
        try:
            self._check_source(trainer, pl_module)
        except UnsuitableError:
            return  # a warning was given when training began, on every process
        with preserved_state(pl_module), testing(trainer):  # iterating a loader draws a random number
            self._run = self._evaluated_after_fit(trainer, pl_module)
        self._finish(trainer)
        metrics, step = metrics_of(self.reports), trainer.fit_loop.epoch_loop._batches_that_stepped
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        for logger in trainer.loggers:
            self._guarded(functools.partial(logger.log_metrics, metrics, step=step))

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch before the project's step; check the model and the data on the first one."""
        run = self._run
        if run is not None:
            self._guarded(lambda: run.take(batch, dataloader_idx))

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the batch."""
        run = self._run
        if run is not None:
            self._guarded(lambda: run.evaluate(batch, dataloader_idx))

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Merge the results of all processes and log them."""
        self.meet_without_batch(trainer)
        if self._run is not None:
            self._finish(trainer)
            self._guarded(lambda: pl_module.log_dict(metrics_of(self.reports), sync_dist=trainer.world_size > 1))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the journal of finished samples, from which the next attempt resumes."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _check_source(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a Trainer without test data, and to verify the decisions of a module in half precision."""
        test_source(trainer, _NAME)
        if self.settings.verified:
            check_verifiable(precision_of(torch.empty(0), pl_module))

    def _start(self, trainer: Any, module: Any, loop: Any, counts: Any) -> None:
        """Start the evaluation of a loop, and discard earlier results."""
        self.reports, self._run = {}, None

        def begin() -> None:
            self._run = LoopEvaluation(self, trainer, module, loop, loaders_of(loop), counts)

        self._guarded(begin)

    def _evaluated_after_fit(self, trainer: Any, module: Any) -> LoopEvaluation:
        """Evaluate the test loaders after fit.

        An error on this process is kept rather than raised, since the other processes wait for it in :meth:`_finish`.
        """
        self.reports = {}
        run = LoopEvaluation(self, trainer, module, None, {}, None)
        try:
            loaders = test_loaders(trainer, _NAME)
            run = LoopEvaluation(self, trainer, module, None, loaders, None)
            for number, loader in enumerate(loaders.values()):
                for batch in batches_of(trainer, loader, number):
                    run.evaluate(batch, number)
        except Exception as error:
            if self.settings.on_unsuitable == "raise":
                raise
            run.give_up(error)
        return run

    def _finish(self, trainer: Any) -> None:
        assert self._run is not None  # noqa: S101
        self.reports = self._run.finish()
        written = self._guarded(lambda: log_evaluation(trainer, self.reports, self.name, self.num_images))
        self._run.end(bool(written))
        self._run = None

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Run an action whose failure must not stop the test; warn if it fails."""
        try:
            return action()
        except Exception as error:
            if self.settings.on_unsuitable == "raise":
                raise
            warn_once(f"RobustnessEvaluation failed, and the test continues: {error!r}. Please report this.")
            return False
