"""RobustnessEvaluation: accuracy under noise and attack, inside the test loop or after fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import Tensor

from lightning_normgeo.callbacks._robustness.trainer_hooks import RobustnessHooks
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.inputs import declared_inputs, images_and_labels
from lightning_normgeo.robustness.results.attack_results import AttackResult
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.settings import OnUnsuitable, RobustnessSettings
from lightning_normgeo.utilities.checked_values import flag, shown, whole
from lightning_normgeo.utilities.notebook import one_line

_T = TypeVar("_T")


class RobustnessEvaluation(RobustnessHooks):
    """Evaluates the model on every test batch: clean, with Gaussian noise, and under attack (BIM, PGD, torchattacks).

    Works in ``trainer.test`` and ``trainer.validate`` as it is (inference mode included) and, with ``after_fit=True``,
    at the end of ``trainer.fit`` on the last weights; otherwise it does nothing in ``fit``. Modes, weights, gradients,
    buffers and random numbers stay as they are. A run that is killed goes on after the last batch it finished when it
    is started again.

    It never stops a test: what it cannot evaluate (no classifier, several inputs, no gradient) is left out with one
    warning before the first test step, and a line ``not evaluated: reason`` in table, JSON and summary. So is an attack
    that fails. See ``on_unsuitable``.

    ========================================  ====  ================================================================
    key                                       unit  meaning; {attack} is clean, gaussian, bim, …
    ========================================  ====  ================================================================
    ``robustness/{attack}/accuracy``          1     fraction classified correctly
    ``robustness/{attack}/accuracy_drop``     1     clean accuracy minus accuracy (Acc-Diff in the paper)
    ``robustness/{attack}/ci_low``            1     lower end of the 95 % Wilson interval
    ``robustness/{attack}/ci_high``           1     upper end
    ``robustness/{attack}/n``                 1     samples evaluated
    ========================================  ====  ================================================================

    With a ``name``, or several test loaders, {attack} is followed by them: ``robustness/bim/strong/dataloader_0/n``.

    In the run's own folder (its record, or the first logger's version, or a new one) ``robustness.json`` holds
    settings, counts by class, mean losses, the largest perturbations and warnings where an attack looks broken, and
    ``robustness.npz`` the results of each sample. Loggers that can (W&B, RecordLogger) also get ``robustness/table``
    and ``robustness/examples``; W&B gets the ``.npz`` as an artifact.

    The model is called as ``pl_module(images)`` and returns logits, alone or as ``.logits`` or in a tuple; batches are
    pairs, dictionaries, named tuples or dataclasses of images and labels. For anything else override :meth:`logits` or
    :meth:`unpack`. Each sample counts once, told by its image and label, however a loader orders or divides its data.

    Cost: BIM and PGD take ``steps`` forward and backward passes per test image and radius; with ``semantics: any`` a
    few for images that are easily broken. Batch normalization is folded into convolutions meanwhile.

    Args:
        preset: ``pixel-8-255`` (eps 8/255, step 2/255, 10 steps, noise 0.05, in pixels; l2 radius 0.5),
            ``galloway2019`` (eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, box ±2, in normalized space; l2
            radius 0.03·√d) or ``galloway2019-boxed`` (the same within the box of pixels).
        eps: radius of the l∞ ball in units of the space, or several, which become one row each. Default: the preset's,
            as for the next six.
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
        mean: per-channel mean of the input normalization, or one value for all channels. Default: found in the data
            pipeline, in the model, or by what it leaves of 8-bit images, which have to confirm it; where they cannot,
            the table says "unconfirmed". Not needed where images are pixels in [0, 1] and the model normalizes.
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
        name: of this evaluation, where a Trainer has several: in keys, files, tables and reports.
        normalized_by: ``data``, the loader yields normalized images; ``model``, it yields pixels and the model
            normalizes. Default: the images tell.
        value_range: smallest and largest value of images, which stand for black and white, as ``[-1, 1]`` or
            ``[0, 255]``. Default: found as ``mean`` and ``std`` are.
        space: ``input`` to measure in the units of the inputs, whatever they are (dB, standardized features): then
            radii, noise, ``lower`` and ``upper`` have to be given. Default: the preset's.
        on_unsuitable: what happens where the model or its data cannot be evaluated: ``skip`` says so and goes on,
            ``raise`` stops.

    Raises:
        ConfigurationError: for settings out of range when constructed; for two evaluations of one name when a Trainer
            starts.
    """

    def __init__(
        self,
        preset: str = "pixel-8-255",
        eps: float | list[float] | None = None,
        step_size: float | None = None,
        steps: int | None = None,
        noise_std: float | list[float] | None = None,
        attacks: list[str] | str | None = None,
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
        autocast: Literal["bf16", "fp16"] | None = None,
        compile: bool = False,  # noqa: A002 - torch's name for it
        rescale: float | None = None,
        resume: bool = True,
        name: str | None = None,
        normalized_by: Literal["data", "model"] | None = None,
        value_range: list[float] | None = None,
        space: Literal["pixel", "normalized", "input"] | None = None,
        on_unsuitable: OnUnsuitable = "skip",
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
                f"name={shown(name)} becomes part of keys and files: use letters, digits, '-' and '.'."
            )
        self.name = name
        self.num_images = whole("num_images", num_images, 0)
        self.after_fit = flag("after_fit", after_fit)
        self.resume = flag("resume", resume)

    def __repr__(self) -> str:
        settings = repr(self.settings).removeprefix("RobustnessSettings")
        return one_line(f"{type(self).__name__}{settings}")

    @property
    def results(self) -> dict[str, AttackResult]:
        """The results of the last evaluation, by attack and, where there are several, loader."""
        return {attack: r for loader, report in self._by_loader() for attack, r in _suffixed(report.results, loader)}

    @property
    def not_evaluated(self) -> dict[str, str]:
        """Why there is no result, likewise."""
        return {
            attack: why
            for loader, report in self._by_loader()
            for attack, why in _suffixed(report.not_evaluated, loader)
        }

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits ``(batch, classes)`` for images as the loader yields them. Override for other models."""
        return pl_module(images)

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch. Override for other batches.

        Raises:
            UnsuitableError: where a batch has no images and labels, or several.
        """
        return images_and_labels(batch)

    def _by_loader(self) -> list[tuple[str, RobustnessReport]]:
        own = f"/{self.name}" if self.name else ""
        return [(suffix.removeprefix(own), report) for suffix, report in self.reports.items()]


def _suffixed(found: Mapping[str, _T], loader: str) -> list[tuple[str, _T]]:
    return [(attack + loader, value) for attack, value in found.items()]
