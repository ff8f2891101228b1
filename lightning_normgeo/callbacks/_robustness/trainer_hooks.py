"""The hooks of RobustnessEvaluation: where in a Trainer's loops it evaluates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks._robustness.dataloaders import (
    batches_of,
    check_undivided,
    named_loaders,
    test_loaders,
    test_source,
    testing,
)
from lightning_normgeo.callbacks._robustness.logging import metrics_of, publish
from lightning_normgeo.callbacks._robustness.loop_evaluation import LoopEvaluation
from lightning_normgeo.errors import ConfigurationError, UnsuitableError, warn_once
from lightning_normgeo.robustness.inputs import DeclaredInputs
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.settings import RobustnessSettings


class RobustnessHooks(QuietCallback):
    """Evaluates in ``trainer.test``, in ``trainer.validate`` and, if asked to, after ``fit``; not for use by itself.

    Attributes:
        settings: what to evaluate.
        declared: the project's word on its images.
        name: of the evaluation, where a Trainer has several.
        num_images: how many samples to show.
        after_fit: whether to evaluate at the end of ``fit``.
        resume: whether to keep what is done until the evaluation has ended.
        reports: of the last evaluation, by what tells evaluations and loaders apart.
    """

    settings: RobustnessSettings
    declared: DeclaredInputs
    name: str | None
    num_images: int
    after_fit: bool
    resume: bool

    def __init__(self) -> None:
        super().__init__()
        self.reports: dict[str, RobustnessReport] = {}
        self._run: LoopEvaluation | None = None

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits."""
        raise NotImplementedError

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two evaluations of one name.

        Raises:
            ConfigurationError: for these.
        """
        names = [callback.name for callback in trainer.callbacks if isinstance(callback, RobustnessHooks)]
        if names.count(self.name) > 1:
            raise ConfigurationError(
                f"This Trainer has {names.count(self.name)} RobustnessEvaluations with name={self.name!r}, and their "
                "results would replace each other. Give each a name of its own."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what an evaluation after fit will need.

        Raises:
            ConfigurationError: for what cannot work.
        """
        if not self.after_fit:
            return
        behind = trainer.callbacks[trainer.callbacks.index(self) :]
        if any(kind.__name__ == "WeightAveraging" for callback in behind for kind in type(callback).__mro__):
            raise ConfigurationError(
                "RobustnessEvaluation(after_fit=True) stands before WeightAveraging in the list of callbacks and "
                "would evaluate weights that are not averaged. Put it behind."
            )
        try:
            check_undivided(trainer)
            test_source(trainer)
        except UnsuitableError as error:
            if self.settings.on_unsuitable == "raise":
                raise
            warn_once(f"Robustness is not evaluated after fit. {error}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate after fit, if asked to."""
        if not self.after_fit or trainer.fast_dev_run:
            return
        try:
            test_source(trainer)
        except UnsuitableError:
            return  # said when training began, on every process
        with preserved_state(pl_module), testing(trainer):  # a loader draws a random number when it begins
            self._run = self._evaluated_after_fit(trainer, pl_module)
        self._finish(trainer)
        metrics, step = metrics_of(self.reports), trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            self._guarded(functools.partial(logger.log_metrics, metrics, step=step))

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier results."""
        self._start(trainer, pl_module, trainer.test_loop, trainer.num_test_batches)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch as the loader gave it, and find out from the first one what can be evaluated."""
        run = self._run
        if run is not None:
            self._guarded(lambda: run.take(batch, dataloader_idx))

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch."""
        run = self._run
        if run is not None:
            self._guarded(lambda: run.evaluate(batch, dataloader_idx))

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the processes together and log."""
        if self._run is not None:
            self._finish(trainer)
            self._guarded(lambda: pl_module.log_dict(metrics_of(self.reports), sync_dist=trainer.world_size > 1))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier results, in ``trainer.validate``."""
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module, trainer.validate_loop, trainer.num_val_batches)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch, in ``trainer.validate``; validation inside ``fit`` is left alone."""
        self.on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch, in ``trainer.validate``."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the processes together and log, in ``trainer.validate``."""
        self.on_test_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what is done for the next attempt."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _start(self, trainer: Any, module: Any, loop: Any, counts: Any) -> None:
        """Begin with a loop."""
        self.reports, self._run = {}, None

        def begin() -> None:
            combined = getattr(loop, "_combined_loader", None)
            loaders = {} if combined is None else named_loaders(combined)
            self._run = LoopEvaluation(self, trainer, module, loop, loaders, counts)

        self._guarded(begin)

    def _evaluated_after_fit(self, trainer: Any, module: Any) -> LoopEvaluation:
        """Evaluate the test loaders; whatever fails, this process meets the others at the end."""
        self.reports = {}
        run = LoopEvaluation(self, trainer, module, None, {}, None)
        try:
            loaders = test_loaders(trainer)
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
        written = self._guarded(lambda: publish(trainer, self.reports, self.name, self.num_images))
        self._run.end(bool(written))
        self._run = None

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Do what must not stop a test; its failure is said."""
        try:
            return action()
        except Exception as error:
            if self.settings.on_unsuitable == "raise":
                raise
            warn_once(f"RobustnessEvaluation failed, and the test goes on: {error!r}. Please report this.")
            return False
