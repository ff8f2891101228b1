"""RobustnessEvaluation: accuracy under Gaussian noise and BIM, inside the test loop or after fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks.examples import example_strips
from lightning_normgeo.callbacks.loaders import batches_of, indices_of, test_loaders, test_source
from lightning_normgeo.callbacks.sharding import runs_under
from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.robustness.evaluation import (
    ATTACKS,
    AttackResult,
    Perturbed,
    RobustnessEvaluator,
    check_images,
    undisturbed,
)
from lightning_normgeo.robustness.threat import InputSpace, threat_model


class RobustnessEvaluation(QuietCallback):
    """Evaluates the model on every test batch: clean, with Gaussian noise, and under BIM-l∞.

    Works in ``trainer.test`` as it is (inference mode included) and, with ``after_fit=True``, at the end of
    ``trainer.fit`` on the last weights. Modes of all modules, gradients and random numbers stay as they are.

    ========================================  ====  ================================================================
    key                                       unit  meaning; {attack} is clean, gaussian or bim
    ========================================  ====  ================================================================
    ``robustness/{attack}/accuracy``          1     fraction classified correctly
    ``robustness/{attack}/accuracy_drop``     1     clean accuracy minus accuracy (Acc-Diff in the paper)
    ``robustness/{attack}/ci_low``            1     lower end of the 95 % Wilson interval
    ``robustness/{attack}/ci_high``           1     upper end
    ``robustness/{attack}/n``                 1     samples evaluated
    ========================================  ====  ================================================================

    Loggers that can (W&B, RecordLogger) also get ``robustness/table`` and ``robustness/examples``.

    The model is called as ``pl_module(images)`` and must return logits; a batch must be ``(images, labels)``. For
    anything else override :meth:`logits` or :meth:`unpack`.

    Cost: ``steps`` forward and backward passes per test image.

    Args:
        preset: ``pixel-8-255`` (eps 8/255, step 2/255, 10 steps, noise 0.05, in pixels) or ``galloway2019`` (eps 0.03,
            step 0.003, 20 steps, noise 0.25 unclipped, box ±2, in normalized space).
        eps: radius of the l∞ ball in units of the preset's space; the preset's if left out, as are the next three.
        step_size: step of one BIM iteration.
        steps: BIM iterations.
        noise_std: standard deviation of the Gaussian noise.
        attacks: which of ``gaussian``, ``bim`` to run besides ``clean``.
        mean: per-channel mean, where the data pipeline normalizes images. Leave out where images are pixels in [0, 1]
            and the model normalizes (ResNetClassifier does).
        std: per-channel standard deviation, with ``mean``.
        max_samples: evaluate only the first so many test samples; all if left out.
        num_images: how many samples to show.
        after_fit: also evaluate at the end of ``fit``, on the test loader and the last weights.
        seed: of the noise.

    Raises:
        ConfigurationError: for settings out of range when constructed; for images outside [0, 1] with the first
            training batch.
    """

    def __init__(
        self,
        preset: str = "pixel-8-255",
        eps: float | None = None,
        step_size: float | None = None,
        steps: int | None = None,
        noise_std: float | None = None,
        attacks: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        max_samples: int | None = None,
        num_images: int = 8,
        after_fit: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.threat = threat_model(preset, eps=eps, step_size=step_size, steps=steps, noise_std=noise_std)
        self.preset = preset
        self.attacks = list(ATTACKS) if attacks is None else attacks
        self.declared = InputSpace(tuple(mean) if mean else None, tuple(std) if std else None, mean is not None)
        if max_samples is not None and max_samples < 1:
            raise ConfigurationError(f"max_samples={max_samples!r} must be at least 1; leave it out to evaluate all.")
        if num_images < 0:
            raise ConfigurationError(f"num_images={num_images!r} must be at least 0.")
        self.max_samples = max_samples
        self.num_images = num_images
        self.after_fit = after_fit
        self.seed = seed
        self.results: dict[str, AttackResult] = {}
        self._evaluators: dict[int, RobustnessEvaluator] = {}
        self._seen: dict[int, int] = {}
        self._examples: Perturbed | None = None
        self._new_evaluator(None)  # names of attacks are checked now

    def logits(self, pl_module: Any, images: Tensor) -> Tensor:
        """Return class logits ``(batch, classes)`` for images as the loader yields them. Override for other models."""
        return pl_module(images)  # type: ignore[no-any-return]

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch. Override for other batches.

        Raises:
            ConfigurationError: for a batch that is not a pair of tensors.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            return batch[0], batch[1]
        raise ConfigurationError(
            f"RobustnessEvaluation expects batches (images, labels), got {type(batch).__name__}. "
            "Override its unpack(batch)."
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what an evaluation after fit will need."""
        if self.after_fit:
            _refuse_divided(trainer)
            test_source(trainer)
            behind = trainer.callbacks[trainer.callbacks.index(self) :]
            if any(kind.__name__ == "WeightAveraging" for callback in behind for kind in type(callback).__mro__):
                raise ConfigurationError(
                    "RobustnessEvaluation(after_fit=True) stands before WeightAveraging in the list of callbacks and "
                    "would evaluate weights that are not averaged. Put it behind."
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Arrange for the first batch to be checked."""
        self.__dict__.pop("on_train_batch_start", None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the range of the first batch; there is nothing to do for the others."""
        self.__dict__["on_train_batch_start"] = None
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)
        if pair and batch[0].ndim == 4 and batch[0].is_floating_point():
            check_images(batch[0], self._inputs(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate after fit, if asked to."""
        if not self.after_fit or trainer.fast_dev_run:
            return
        try:
            self._evaluate_after_fit(trainer, pl_module)
        except Exception as error:
            warn_once(f"The robustness evaluation after fit failed: {error!r}. Run trainer.test for it.")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier results."""
        _refuse_divided(trainer)
        self._start()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch."""
        loaders = trainer.test_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
        with undisturbed(pl_module):
            self._evaluate(trainer, pl_module, batch, dataloader_idx, loader)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sum over processes and log."""
        self._finish(trainer, pl_module, len(trainer.num_test_batches))
        pl_module.log_dict(self._metrics(), sync_dist=trainer.world_size > 1)

    def _evaluate_after_fit(self, trainer: Any, module: Any) -> None:
        self._start()
        with undisturbed(module):
            loaders = test_loaders(trainer)
            for number, loader in enumerate(loaders):
                for batch in batches_of(trainer, loader):
                    self._evaluate(trainer, module, batch, number, loader)
        self._finish(trainer, module, len(loaders))
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics(), step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _start(self) -> None:
        self.results, self._evaluators, self._seen, self._examples = {}, {}, {}, None

    def _inputs(self, module: Any) -> InputSpace:
        """Return the declared input space, completed by the normalization inside the model."""
        normalization = getattr(module, "input_normalization", None)
        if self.declared.mean is None and normalization is not None:
            return InputSpace(
                tuple(normalization.mean.flatten().tolist()), tuple(normalization.std.flatten().tolist()), False
            )
        return self.declared

    def _new_evaluator(self, module: nn.Module | None) -> RobustnessEvaluator:
        return RobustnessEvaluator(self.threat, self._inputs(module), self.attacks, self.seed)

    def _evaluator(self, number: int, module: nn.Module) -> RobustnessEvaluator:
        """Return the evaluator of a loader, made with its first batch: the model's normalization is read once."""
        if number not in self._evaluators:
            self._evaluators[number] = self._new_evaluator(module)
        return self._evaluators[number]

    def _evaluate(self, trainer: Any, module: Any, batch: Any, number: int, loader: Any) -> None:
        images, labels = (tensor.clone() for tensor in self.unpack(batch))
        evaluator = self._evaluator(number, module)
        seen = self._seen.get(number, 0)
        self._seen[number] = seen + len(labels)
        limit = float("inf") if self.max_samples is None else self.max_samples
        positions = enumerate(indices_of(trainer, loader, seen, len(labels)))
        counted = {i: index for i, index in positions if index is not None and index < limit}
        if not counted:
            return
        keep, indices = list(counted), list(counted.values())
        shown = evaluator.evaluate(lambda x: self.logits(module, x), images[keep], labels[keep], indices)
        if self._examples is None and self.num_images > 0:
            self._examples = shown

    def _finish(self, trainer: Any, module: Any, loaders: int) -> None:
        for number in range(loaders):
            evaluator = self._evaluator(number, module)
            suffix = f"/dataloader_{number}" if loaders > 1 else ""
            counts = evaluator.counts.to(trainer.strategy.root_device)
            if trainer.world_size > 1:  # on every rank, also one that had no sample to count
                counts = trainer.strategy.reduce(counts, reduce_op="sum")
            self.results.update({name + suffix: result for name, result in evaluator.results(counts).items()})
        if trainer.is_global_zero and self._evaluators:
            self._publish(trainer.loggers)

    def _metrics(self) -> dict[str, float]:
        quantities = ("accuracy", "accuracy_drop", "ci_low", "ci_high", "n")
        return {f"robustness/{a}/{q}": float(getattr(r, q)) for a, r in self.results.items() for q in quantities}

    def _publish(self, loggers: Iterable[Any]) -> None:
        settings = {"preset": self.preset, **next(iter(self._evaluators.values())).settings()}
        columns = ["attack", "accuracy", "ci_low", "ci_high", "accuracy_drop", "correct", "n"]
        rows = [[name, *(getattr(result, column) for column in columns[1:])] for name, result in self.results.items()]
        images, captions = example_strips(self._examples, self.num_images)
        for logger in loggers:
            try:
                if hasattr(logger, "log_results"):
                    results = [dict(zip(columns, row, strict=True)) for row in rows]
                    logger.log_results("robustness", {"settings": settings, "results": results})
                if hasattr(logger, "log_table"):
                    logger.log_table(key="robustness/table", columns=columns, data=rows)
                if hasattr(logger, "log_image") and images:
                    logger.log_image(key="robustness/examples", images=images, caption=captions)
            except Exception as error:
                warn_once(f"{type(logger).__name__} failed to log the robustness results: {error!r}.")


def _refuse_divided(trainer: Any) -> None:
    """Refuse models whose layers every process has to run together: one that has run out of samples would not."""
    strategy = runs_under(trainer, "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")
    if strategy is not None:
        raise ConfigurationError(
            f"RobustnessEvaluation cannot run under {strategy}, where processes wait for each other in every layer. "
            "Save a checkpoint and test it on one device or with ddp."
        )
