"""RobustnessEvaluation: accuracy under noise and attack, inside the test loop or after fit."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks.evaluation import LoaderEvaluation
from lightning_normgeo.callbacks.loaders import batches_of, loader_of, refuse_divided, test_loaders, test_source
from lightning_normgeo.callbacks.robustness_log import folder_of, metrics_of, publish
from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.robustness.checks import check_images, undisturbed
from lightning_normgeo.robustness.inputs import input_space
from lightning_normgeo.robustness.report import RobustnessReport
from lightning_normgeo.robustness.results import AttackResult
from lightning_normgeo.robustness.settings import RobustnessSettings
from lightning_normgeo.robustness.standalone import pair
from lightning_normgeo.robustness.threat import InputSpace


class RobustnessEvaluation(QuietCallback):
    """Evaluates the model on every test batch: clean, with Gaussian noise, and under attack (BIM, PGD, torchattacks').

    Works in ``trainer.test`` and ``trainer.validate`` as it is (inference mode included) and, with ``after_fit=True``,
    at the end of ``trainer.fit`` on the last weights. Modes, weights, gradients, buffers and random numbers stay as
    they are. A run that is killed goes on after the last batch it finished when it is started again.

    ========================================  ====  ================================================================
    key                                       unit  meaning; {attack} is clean, gaussian, bim, …
    ========================================  ====  ================================================================
    ``robustness/{attack}/accuracy``          1     fraction classified correctly
    ``robustness/{attack}/accuracy_drop``     1     clean accuracy minus accuracy (Acc-Diff in the paper)
    ``robustness/{attack}/ci_low``            1     lower end of the 95 % Wilson interval
    ``robustness/{attack}/ci_high``           1     upper end
    ``robustness/{attack}/n``                 1     samples evaluated
    ========================================  ====  ================================================================

    Beside the run's record, or else in the first logger's folder, ``robustness.json`` holds settings, counts by class,
    mean losses, the largest perturbations and warnings where an attack looks broken, and ``robustness.npz`` what
    became of each sample. Loggers that can (W&B, RecordLogger) also get ``robustness/table`` and
    ``robustness/examples``; W&B gets the ``.npz`` as an artifact.

    The model is called as ``pl_module(images)`` and must return logits; a batch must be ``(images, labels)``. For
    anything else override :meth:`logits` or :meth:`unpack`.

    Cost: BIM and PGD take ``steps`` forward and backward passes per test image and radius; with ``semantics: any`` a
    few for images that are easily broken. Batch normalization is folded into convolutions meanwhile.

    Args:
        preset: ``pixel-8-255`` (eps 8/255, step 2/255, 10 steps, noise 0.05, in pixels; l2 radius 0.5),
            ``galloway2019`` (eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, box ±2, in normalized space; l2
            radius 0.03·√d) or ``galloway2019-boxed`` (the same within the box of pixels).
        eps: radius of the l∞ ball in units of the preset's space, or several, which become one row each; the preset's
            if left out, as are the next six.
        eps_l2: radius of the l2 ball, or several.
        step_size: step of one BIM or PGD iteration in l∞, for every radius; if left out it is to the radius as in the
            preset, and so it is in l2.
        steps: BIM and PGD iterations.
        noise_std: standard deviation of the Gaussian noise, or several.
        lower: lower end of the box that images stay in, one number or one per channel.
        upper: upper end.
        attacks: which of ``gaussian``, ``bim``, ``pgd``, ``bim_l2``, ``pgd_l2`` and ``torchattacks.…`` (any attack of
            torchattacks by name) to run besides ``clean``; the first two if left out.
        attack_options: for the constructors of torchattacks' attacks, by name.
        semantics: ``final``, the last iterate decides (as in the papers and torchattacks); ``any``, a sample is broken
            once any iterate breaks it, the clean image included (as AutoAttack counts), and takes part in no further
            pass.
        restarts: of PGD; a sample has to withstand all.
        mean: per-channel mean, where the data pipeline normalizes images; found in a torchvision ``Normalize`` of the
            data set's transforms if left out. Not needed where images are pixels in [0, 1] and the model normalizes
            (ResNetClassifier does).
        std: per-channel standard deviation, with ``mean``.
        max_samples: evaluate only the first so many test samples; all if left out.
        batch_size: samples per pass; if left out the loader's, doubled while memory has room for it, up to 256 on a
            CPU and 1024 on a GPU.
        fold: whether to fold batch normalization into convolutions, which leaves logits the same but for rounding.
        autocast: ``bf16`` or ``fp16`` to compute in half precision; float32 if left out.
        compile: whether to ``torch.compile`` the model for the evaluation.
        rescale: a control: evaluate once more with all scale-invariant weights so many times as long, as rows
            ``…_rescaled``: the function is the same but for ε, so their length alone changes nothing.
        num_images: how many samples to show.
        after_fit: also evaluate at the end of ``fit``, on the test loader and the last weights.
        resume: whether to keep what is done in the Trainer's ``default_root_dir`` until the evaluation has ended.
        seed: of noise and random starts.

    Raises:
        ConfigurationError: for settings out of range when constructed; for images outside [0, 1] with the first
            training batch.
    """

    def __init__(
        self,
        preset: str = "pixel-8-255",
        eps: float | list[float] | None = None,
        step_size: float | None = None,
        steps: int | None = None,
        noise_std: float | list[float] | None = None,
        attacks: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        max_samples: int | None = None,
        num_images: int = 8,
        after_fit: bool = False,
        seed: int = 0,
        eps_l2: float | list[float] | None = None,
        lower: float | list[float] | None = None,
        upper: float | list[float] | None = None,
        attack_options: dict[str, dict[str, Any]] | None = None,
        semantics: Literal["final", "any"] = "final",
        restarts: int = 1,
        batch_size: int | None = None,
        fold: bool = True,
        autocast: Literal["bf16", "fp16"] | None = None,
        compile: bool = False,  # noqa: A002 - torch's name for it
        rescale: float | None = None,
        resume: bool = True,
    ) -> None:
        super().__init__()
        self.settings = RobustnessSettings(
            preset=preset,
            eps=eps,
            eps_l2=eps_l2,
            step_size=step_size,
            steps=steps,
            noise_std=noise_std,
            lower=lower,
            upper=upper,
            attacks=attacks,
            attack_options=attack_options,
            semantics=semantics,
            restarts=restarts,
            seed=seed,
            batch_size=batch_size,
            fold=fold,
            autocast=autocast,
            compile=compile,
            max_samples=max_samples,
            rescale=rescale,
        )
        self.mean, self.std = mean, std
        if mean is not None or std is not None:
            input_space(None, None, mean, std)  # checked now
        if num_images < 0:
            raise ConfigurationError(f"num_images={num_images!r} must be at least 0.")
        self.num_images = num_images
        self.after_fit = after_fit
        self.resume = resume
        self.reports: dict[str, RobustnessReport] = {}
        self._running: dict[int, LoaderEvaluation] = {}

    @property
    def results(self) -> dict[str, AttackResult]:
        """The results of the last evaluation, by attack."""
        return {name + suffix: r for suffix, report in self.reports.items() for name, r in report.results.items()}

    def logits(self, pl_module: Any, images: Tensor) -> Tensor:
        """Return class logits ``(batch, classes)`` for images as the loader yields them. Override for other models."""
        return pl_module(images)  # type: ignore[no-any-return]

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch. Override for other batches.

        Raises:
            ConfigurationError: for a batch that is not a pair of tensors.
        """
        return pair(batch)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what an evaluation after fit will need."""
        if self.after_fit:
            refuse_divided(trainer)
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
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)
        if is_pair and batch[0].ndim == 4 and batch[0].is_floating_point():
            check_images(batch[0], self._inputs(pl_module, trainer.train_dataloader))

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
        refuse_divided(trainer)
        self._start()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch."""
        loader = loader_of(trainer.test_dataloaders, dataloader_idx)
        self._evaluate(trainer, pl_module, batch, dataloader_idx, loader, trainer.num_test_batches)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the processes together and log."""
        self._finish(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)
        pl_module.log_dict(metrics_of(self.reports), sync_dist=trainer.world_size > 1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget earlier results, in ``trainer.validate``."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch, in ``trainer.validate``; validation inside ``fit`` is left alone."""
        if trainer.state.fn == "validate":
            loader = loader_of(trainer.val_dataloaders, dataloader_idx)
            self._evaluate(trainer, pl_module, batch, dataloader_idx, loader, trainer.num_val_batches)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the processes together and log, in ``trainer.validate``."""
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)
            pl_module.log_dict(metrics_of(self.reports), sync_dist=trainer.world_size > 1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what is done for the next attempt."""
        for running in self._running.values():
            running.close()

    def _evaluate_after_fit(self, trainer: Any, module: Any) -> None:
        self._start()
        loaders = test_loaders(trainer)
        counts = [len(loader) for loader in loaders]
        with undisturbed(module):  # a loader draws a random number when it begins
            for number, loader in enumerate(loaders):
                for batch in batches_of(trainer, loader):
                    self._evaluate(trainer, module, batch, number, loader, counts)
        self._finish(trainer, module, loaders, counts)
        for logger in trainer.loggers:
            logger.log_metrics(metrics_of(self.reports), step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _start(self) -> None:
        self.reports, self._running = {}, {}

    def _inputs(self, module: Any, loader: Any) -> InputSpace:
        return input_space(module, loader, self.mean, self.std)

    def _runner(self, trainer: Any, module: Any, number: int, loader: Any, counts: Any) -> LoaderEvaluation:
        """Return the evaluation of a loader, made with its first batch."""
        if number not in self._running:
            self._running[number] = LoaderEvaluation(
                trainer,
                module,
                lambda images: self.logits(module, images),
                self._inputs(module, loader),
                self.settings,
                self.num_images if number == 0 else 0,
                self.resume,
                number,
                counts[number] if number < len(counts) else None,
            )
        return self._running[number]

    def _evaluate(self, trainer: Any, module: Any, batch: Any, number: int, loader: Any, counts: Any) -> None:
        with undisturbed(module):
            images, labels = (tensor.clone() for tensor in self.unpack(batch))
            self._runner(trainer, module, number, loader, counts).add(images, labels, loader)

    def _finish(self, trainer: Any, module: Any, loaders: Any, counts: Any) -> None:
        loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        for number, loader in enumerate(loaders):
            with undisturbed(module):  # on every rank, also one that had no sample
                report = self._runner(trainer, module, number, loader, counts).finish()
            self.reports[f"/dataloader_{number}" if len(loaders) > 1 else ""] = report
        self._running = {}
        log_dir = trainer.log_dir  # on every rank: it is told to all
        for warning in dict.fromkeys(text for report in self.reports.values() for text in report.warnings):
            warn_once(warning)
        if trainer.is_global_zero:
            publish(trainer, self.reports, folder_of(trainer, log_dir), self.num_images)
