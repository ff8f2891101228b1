"""RobustnessEvaluation: accuracy under noise and attack, inside the test loop or after fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import Tensor

from lightning_normgeo.callbacks._robustness.trainer_hooks import RobustnessHooks
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.inputs import declared_inputs, images_and_labels
from lightning_normgeo.robustness.model.surrogate import check_surrogate
from lightning_normgeo.robustness.results.attack_results import AttackResult
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.settings import Autocast, OnUnsuitable, RobustnessSettings
from lightning_normgeo.utilities.checked_values import flag, short_repr, whole
from lightning_normgeo.utilities.notebook import one_line

_T = TypeVar("_T")


class RobustnessEvaluation(RobustnessHooks):
    """Evaluates the model on every test batch: clean, with Gaussian noise, and under attack (BIM, PGD, torchattacks).

    Runs in ``trainer.test`` and ``trainer.validate``, also in inference mode. With ``after_fit=True`` it also runs at
    the end of ``trainer.fit``, on the last weights; otherwise it does nothing in ``fit``. Training modes, weights,
    gradients, buffers and random states are left unchanged. A run that was killed and is started again resumes after
    the last batch it finished.

    It never stops a test. A model or data that it cannot evaluate (no classifier, several inputs, no gradient) is
    skipped with one warning before the first test step, and with a line ``not evaluated: reason`` in the table, the
    JSON file and the summary. The same holds for an attack that fails. See ``on_unsuitable``.

    ========================================  ====  ================================================================
    key                                       unit  meaning; {attack} is clean, gaussian, bim, …
    ========================================  ====  ================================================================
    ``robustness/{attack}/accuracy``          1     fraction classified correctly
    ``robustness/{attack}/accuracy_drop``     1     clean accuracy minus accuracy (Acc-Diff in the paper)
    ``robustness/{attack}/ci_low``            1     lower end of the 95 % Wilson interval
    ``robustness/{attack}/ci_high``           1     upper end
    ``robustness/{attack}/n``                 1     samples evaluated
    ========================================  ====  ================================================================

    If the evaluation has a ``name``, or if there are several test loaders, these names follow {attack} in the key:
    ``robustness/bim/strong/dataloader_0/n``.

    Two files are written to the run's folder (the folder of its record, else the version folder of the first logger,
    else a new one). ``robustness.json`` holds the settings, counts per class, mean losses, the largest perturbations,
    and warnings if an attack looks broken. ``robustness.npz`` holds the per-sample results. Loggers with tables and
    images (W&B, RecordLogger) also get ``robustness/results``, ``robustness/examples`` and ``about/robustness``, its
    verdicts; W&B gets the ``.npz`` file as an artifact.

    The model is called as ``pl_module(images)`` and has to return logits: as a tensor, as the attribute ``.logits``, or
    in a tuple. Batches have to be pairs, dictionaries, named tuples or dataclasses of images and labels. For anything
    else override :meth:`logits` or :meth:`unpack`. A sample is identified by its image and label and counts once, in
    whatever order the loader yields it and however the data set is split over processes.

    Cost: BIM and PGD take ``steps`` forward and backward passes per test image and radius; with ``semantics: any`` only
    a few for images that are misclassified early. During the evaluation batch normalization is folded into
    convolutions.

    Args:
        preset: Threat model: ``pixel-8-255`` (pixels in [0, 1]: eps 8/255, step 2/255, 10 steps, noise 0.05, l2 radius
            0.5), ``galloway2019`` (normalized inputs: eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, values
            clipped to ±2, l2 radius 0.03·√d for d values per image) or ``galloway2019-boxed`` (the same, clipped to
            valid pixels).
        eps: Radius of the l∞ ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        step_size: Step size of BIM and PGD in l∞, in units of ``space``, for every radius; l2 attacks keep its ratio to
            ``eps``. Default: keeps the preset's step-to-radius ratio.
        steps: Number of BIM and PGD iterations; APGD has 100 of its own. Default: the preset's.
        noise_std: Standard deviation of the Gaussian noise in units of ``space``; a list adds one row per value.
            Default: the preset's.
        attacks: Attacks to run besides ``clean``: one or several of ``gaussian``, ``bim``, ``pgd``, ``apgd``,
            ``square``, ``standard`` (AutoAttack's suite), ``bim_l2``, ``pgd_l2``, ``apgd_l2``, ``standard_l2`` and
            ``torchattacks.<name>``; or dictionaries with settings of their own, as ``{name: apgd, loss: dlr}``.
            Default: ``gaussian`` and ``bim``.
        mean: Mean of the input normalization, one value or one per channel. Default: found in the data pipeline, in
            the model, or from 8-bit images; the table says "unconfirmed" if the images cannot confirm it. Not needed
            for pixels in [0, 1] that the model normalizes.
        std: Standard deviation of the input normalization, one value or one per channel; goes with ``mean``. Default:
            found as ``mean`` is.
        max_samples: Evaluate only the first ``max_samples`` samples. Default: all.
        num_images: Number of example images to log.
        after_fit: Also evaluate at the end of ``fit``, on the test loader with the last weights.
        seed: Seed of the noise and of the random starts.
        eps_l2: Radius of the l2 ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        lower: Smallest value an attacked image may have, in units of ``space``, one number or one per channel. Default:
            the preset's.
        upper: Largest value an attacked image may have, in units of ``space``, one number or one per channel. Default:
            the preset's.
        attack_options: Constructor arguments of torchattacks' attacks, as a dictionary for each attack's name, e.g.
            ``{torchattacks.Square: {n_queries: 100}}``. In a pixel-space threat model, l∞ attacks take eps, step size
            and steps from it unless given here.
        semantics: Points of BIM and PGD that count: ``final``, the last one (as in the papers and torchattacks), or
            ``any``, the first misclassified one, the clean image included (as in AutoAttack), after which the sample is
            attacked no further.
        restarts: Number of random starts of PGD; a sample is robust only if it withstands all.
        batch_size: Samples per forward pass. Default: the loader's, doubled while memory allows, up to 256 on a CPU and
            1024 on a GPU.
        fold: Fold batch normalization into convolutions and store their weights in channels-last order, which is faster
            and changes logits by rounding only.
        autocast: Compute in half precision: ``bf16`` or ``fp16``; or ``bf16-verified``: attacks search in bf16, all
            decisions are made in the model's own precision. Default: the model's own precision.
        compile: Compile the model with ``torch.compile`` for the evaluation.
        rescale: Control: repeat the evaluation with every scale-invariant weight multiplied by this factor (> 0), and
            with running statistics to match, as rows ``…_rescaled``. The function is the same except for ε, so weight
            norms alone change no accuracy. Default: no control.
        resume: Keep a journal of finished samples in the Trainer's ``default_root_dir`` until the evaluation ends, so
            that a killed one resumes.
        name: Name of this evaluation in keys, files, tables and reports; needed if a Trainer has several. Default:
            none.
        normalized_by: ``data`` if the loader yields normalized images, ``model`` if it yields pixels and the model
            normalizes. Default: decided from the images.
        value_range: Values of a black and a white pixel, e.g. ``[-1, 1]`` or ``[0, 255]``. Default: found as ``mean``
            and ``std`` are.
        space: ``input`` to measure radii and noise in the inputs' own units (dB, standardized features); radii, noise,
            ``lower`` and ``upper`` are then required. Default: the preset's.
        on_unsuitable: If the model or its data cannot be evaluated, or an attack fails: ``raise`` stops, ``skip``
            continues and gives the reason in the report.
        surrogate: Path of a checkpoint with other weights of the same module, for attacks that are transferred from it
            (``transfer``). Default: none.

    Raises:
        ConfigurationError: for settings out of range, on construction; for two evaluations with the same name, when a
            Trainer starts.
    """

    def __init__(
        self,
        preset: str = "pixel-8-255",
        eps: float | list[float] | None = None,
        step_size: float | None = None,
        steps: int | None = None,
        noise_std: float | list[float] | None = None,
        attacks: list[str | dict[str, Any]] | dict[str, Any] | str | None = None,
        mean: list[float] | float | None = None,
        std: list[float] | float | None = None,
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
        autocast: Autocast | None = None,
        compile: bool = False,  # noqa: A002 - torch's name for it
        rescale: float | None = None,
        resume: bool = True,
        name: str | None = None,
        normalized_by: Literal["data", "model"] | None = None,
        value_range: list[float] | None = None,
        space: Literal["pixel", "normalized", "input"] | None = None,
        on_unsuitable: OnUnsuitable = "skip",
        surrogate: str | None = None,
    ) -> None:
        super().__init__()
        self.settings = RobustnessSettings.among(locals())
        self.declared = declared_inputs(mean, std, normalized_by, value_range)
        if self.settings.threat.space == "input" and self.declared != declared_inputs():
            raise ConfigurationError(
                "space='input' measures in the inputs' own units: mean, std, normalized_by and value_range have no "
                "part in it. Leave them out."
            )
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9.-]+", name)):
            raise ConfigurationError(
                f"name={short_repr(name)} becomes part of keys and files: use letters, digits, '-' and '.'."
            )
        self.name = name
        check_surrogate(surrogate, self.settings.transfers)
        self.surrogate = surrogate
        self.num_images = whole("num_images", num_images, 0)
        self.after_fit = flag("after_fit", after_fit)
        self.resume = flag("resume", resume)

    def __repr__(self) -> str:
        settings = repr(self.settings).removeprefix("RobustnessSettings")
        return one_line(f"{type(self).__name__}{settings}")

    @property
    def results(self) -> dict[str, AttackResult]:
        """The results of the last evaluation, by attack, or by attack and loader if there are several loaders."""
        return {attack: r for loader, report in self._by_loader() for attack, r in _suffixed(report.results, loader)}

    @property
    def not_evaluated(self) -> dict[str, str]:
        """The reason for each missing result, with the same keys as :attr:`results`."""
        return {
            attack: why
            for loader, report in self._by_loader()
            for attack, why in _suffixed(report.not_evaluated, loader)
        }

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits ``(batch, classes)`` for images as the loader yields them. Override for other models.

        Args:
            pl_module: the LightningModule, in evaluation mode.
            images: ``(batch, channels, …)``, on the module's device.

        Returns:
            A tensor, an object with ``.logits`` or ``["logits"]``, or a tuple with one tensor. One logit per image
            stands for two classes.
        """
        return pl_module(images)

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch. Override for other batches.

        Args:
            batch: as the test loader yields it, on the module's device.

        Returns:
            Images ``(batch, channels, …)`` and labels ``(batch,)`` (class indices) or ``(batch, classes)`` (one-hot).

        Raises:
            UnsuitableError: if no images and labels are found in the batch, or several that could be meant.
        """
        return images_and_labels(batch)

    def _by_loader(self) -> list[tuple[str, RobustnessReport]]:
        own = f"/{self.name}" if self.name else ""
        return [(suffix.removeprefix(own), report) for suffix, report in self.reports.items()]


def _suffixed(found: Mapping[str, _T], loader: str) -> list[tuple[str, _T]]:
    return [(attack + loader, value) for attack, value in found.items()]
