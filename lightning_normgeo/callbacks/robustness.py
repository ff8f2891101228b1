"""RobustnessEvaluation: accuracy under Gaussian noise and BIM, inside the test loop or after fit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from lightning_normgeo._lightning import Callback
from lightning_normgeo.callbacks.examples import example_strips
from lightning_normgeo.callbacks.session import BATCH_HOOKS
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


class RobustnessEvaluation(Callback):
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
        self.max_samples = max_samples
        self.num_images = num_images
        self.after_fit = after_fit
        self.seed = seed
        self.results: dict[str, AttackResult] = {}
        self._evaluators: dict[int, RobustnessEvaluator] = {}
        self._seen: dict[int, int] = {}
        self._examples: Perturbed | None = None
        self._evaluator(None)  # names of attacks are checked now

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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Arrange for the first batch to be checked."""
        if self.after_fit:
            _test_source(trainer)
        self.__dict__["on_train_batch_start"] = self._check_first_batch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate after fit, if asked to."""
        self.__dict__.pop("on_train_batch_start", None)
        if self.after_fit and not trainer.fast_dev_run:
            self._start()
            with undisturbed(pl_module):
                for batch in _test_batches(trainer):
                    self._evaluate(trainer, pl_module, batch, 0)
            self._finish(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics(), step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier results."""
        self._start()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch."""
        with undisturbed(pl_module):
            self._evaluate(trainer, pl_module, batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sum over processes and log."""
        self._finish(trainer)
        pl_module.log_dict(self._metrics(), sync_dist=trainer.world_size > 1)

    def _check_first_batch(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.__dict__.pop("on_train_batch_start", None)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)
        if pair and batch[0].ndim == 4 and batch[0].is_floating_point():
            check_images(batch[0], self._inputs(pl_module))

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

    def _evaluator(self, module: nn.Module | None) -> RobustnessEvaluator:
        return RobustnessEvaluator(self.threat, self._inputs(module), self.attacks, self.seed)

    def _evaluate(self, trainer: Any, module: Any, batch: Any, loader: int) -> None:
        images, labels = (tensor.clone() for tensor in self.unpack(batch))
        evaluator = self._evaluators.setdefault(loader, self._evaluator(module))
        seen = self._seen.get(loader, 0)
        self._seen[loader] = seen + len(labels)
        indices = [trainer.global_rank + trainer.world_size * (seen + i) for i in range(len(labels))]
        keep = [i for i, index in enumerate(indices) if index < self._limit(trainer, loader)]
        if not keep:
            return
        images, labels, indices = images[keep], labels[keep], [indices[i] for i in keep]
        shown = evaluator.evaluate(lambda x: self.logits(module, x), images, labels, indices)
        if self._examples is None and self.num_images > 0:
            self._examples = shown

    def _limit(self, trainer: Any, loader: int) -> float:
        """Return how many samples count: a distributed sampler repeats some to fill the last batch."""
        limit = float("inf") if self.max_samples is None else self.max_samples
        loaders = trainer.test_dataloaders
        chosen = loaders[loader] if isinstance(loaders, (list, tuple)) else loaders
        dataset: Any = getattr(chosen, "dataset", None)
        return min(limit, len(dataset)) if trainer.world_size > 1 and hasattr(dataset, "__len__") else limit

    def _finish(self, trainer: Any) -> None:
        for loader, evaluator in sorted(self._evaluators.items()):
            suffix = f"/dataloader_{loader}" if len(self._evaluators) > 1 else ""
            counts = evaluator.counts
            if counts is not None and trainer.world_size > 1:
                counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
            self.results.update({name + suffix: result for name, result in evaluator.results(counts).items()})
        if trainer.is_global_zero and self._evaluators:
            self._publish(trainer.loggers, trainer.current_epoch)

    def _metrics(self) -> dict[str, float]:
        quantities = ("accuracy", "accuracy_drop", "ci_low", "ci_high", "n")
        return {f"robustness/{a}/{q}": float(getattr(r, q)) for a, r in self.results.items() for q in quantities}

    def _publish(self, loggers: Iterable[Any], epoch: int) -> None:
        settings = {"preset": self.preset, "epoch": epoch, **next(iter(self._evaluators.values())).settings()}
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


def _test_source(trainer: Any) -> Any:
    """Return the object whose ``test_dataloader`` was written by the user.

    Raises:
        ConfigurationError: if there is none.
    """
    for source in (trainer.datamodule, trainer.lightning_module):
        method = getattr(type(source), "test_dataloader", None)
        if method is not None and not method.__module__.startswith(("pytorch_lightning.", "lightning.pytorch.")):
            return source
    raise ConfigurationError(
        "RobustnessEvaluation(after_fit=True) needs a test_dataloader in the data module or in the LightningModule. "
        "Add one, or call trainer.test(model, dataloader) with after_fit=False."
    )


def _test_batches(trainer: Any) -> Iterable[Any]:
    """Yield the test batches on the device, after fit, with a progress bar."""
    source = _test_source(trainer)
    if source is trainer.datamodule:
        source.setup("test")
    loader = source.test_dataloader()
    if trainer.world_size > 1:
        stage = type(trainer.state.stage).TESTING
        loader = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=stage)
    limit = trainer.limit_test_batches
    batches = len(loader) if limit is None else int(limit if isinstance(limit, int) else limit * len(loader))
    batches = min(batches, len(loader))
    bar = track(
        islice(loader, batches), "robustness", total=batches, disable=not trainer.is_global_zero, transient=True
    )
    for batch in bar:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)


for _hook in BATCH_HOOKS:
    # nothing to do per training batch, so nothing to call: see GeometryMonitor
    setattr(RobustnessEvaluation, _hook, None)
