"""Robustness of a model on a data loader, without a Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_normgeo.errors import ConfigurationError, UnsuitableError, warn_once
from lightning_normgeo.normalization.user_inputs import check_module, weight_of
from lightning_normgeo.robustness.evaluator import RobustnessEvaluator
from lightning_normgeo.robustness.inputs import declared_inputs, images_and_labels, unpacked
from lightning_normgeo.robustness.loader_evaluation import JournalPlace, LoaderEvaluation
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.model.surrogate import check_surrogate, surrogate_of
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.results.samples.journal import size_of
from lightning_normgeo.robustness.results.samples.process_shares import ProcessShare, report_of
from lightning_normgeo.robustness.settings import Autocast, OnUnsuitable, RobustnessSettings, Semantics
from lightning_normgeo.utilities.checked_values import flag, short_repr, whole
from lightning_normgeo.utilities.files import user_path


def evaluate_robustness(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    preset: str = "pixel-8-255",
    attacks: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    eps: float | Sequence[float] | None = None,
    eps_l2: float | Sequence[float] | None = None,
    step_size: float | None = None,
    steps: int | None = None,
    noise_std: float | Sequence[float] | None = None,
    lower: float | Sequence[float] | None = None,
    upper: float | Sequence[float] | None = None,
    attack_options: Mapping[str, Mapping[str, Any]] | None = None,
    semantics: Semantics = "final",
    restarts: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    fold: bool = True,
    autocast: Autocast | None = None,
    compile: bool = False,  # noqa: A002 - torch's name for it
    max_samples: int | None = None,
    rescale: float | None = None,
    space: Literal["pixel", "normalized", "input"] | None = None,
    on_unsuitable: OnUnsuitable = "raise",
    logits: Callable[[Tensor], Any] | None = None,
    unpack: Callable[[Any], tuple[Any, Any]] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    normalized_by: Literal["data", "model"] | None = None,
    value_range: Sequence[float] | None = None,
    num_images: int = 0,
    progress: bool = True,
    resume_dir: str | Path | None = None,
    surrogate: nn.Module | str | Path | None = None,
) -> RobustnessReport:
    """Evaluate a classifier's accuracy on clean images, under Gaussian noise and under attack.

    The model is left unchanged, bit for bit: training modes, weights, gradients and buffers, and so are random states.

    The arguments from ``preset`` to ``on_unsuitable`` are those of :class:`RobustnessSettings`, which has the details.

    Args:
        model: the classifier; it is evaluated on the device of its parameters.
        dataloader: yields batches of tensors or arrays. To resume an evaluation, it has to yield them in the same order
            again.
        preset: Threat model: ``pixel-8-255`` (pixels in [0, 1]: eps 8/255, step 2/255, 10 steps, noise 0.05, l2 radius
            0.5), ``galloway2019`` (normalized inputs: eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, values
            clipped to ±2, l2 radius 0.03·√d for d values per image) or ``galloway2019-boxed`` (the same, clipped to
            valid pixels).
        attacks: Attacks to run besides ``clean``: one or several of ``gaussian``, ``bim``, ``pgd``, ``apgd``,
            ``square``, ``standard`` (AutoAttack's suite), ``bim_l2``, ``pgd_l2``, ``apgd_l2``, ``standard_l2`` and
            ``torchattacks.<name>``; or dictionaries with settings of their own, as ``{name: apgd, loss: dlr}``.
            Default: ``gaussian`` and ``bim``.
        eps: Radius of the l∞ ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        eps_l2: Radius of the l2 ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        step_size: Step size of BIM and PGD in l∞, in units of ``space``, for every radius; l2 attacks keep its ratio to
            ``eps``. Default: keeps the preset's step-to-radius ratio.
        steps: Number of BIM and PGD iterations; APGD has 100 of its own. Default: the preset's.
        noise_std: Standard deviation of the Gaussian noise in units of ``space``; a list adds one row per value.
            Default: the preset's.
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
        seed: Seed of the noise and of the random starts.
        batch_size: Samples per forward pass. Default: the loader's, doubled while memory allows, up to 256 on a CPU and
            1024 on a GPU.
        fold: Fold batch normalization into convolutions and store their weights in channels-last order, which is faster
            and changes logits by rounding only.
        autocast: Compute in half precision: ``bf16`` or ``fp16``; or ``bf16-verified``: attacks search in bf16, all
            decisions are made in the model's own precision. Default: the model's own precision.
        compile: Compile the model with ``torch.compile`` for the evaluation.
        max_samples: Evaluate only the first ``max_samples`` samples. Default: all.
        rescale: Control: repeat the evaluation with every scale-invariant weight multiplied by this factor (> 0), and
            with running statistics to match, as rows ``…_rescaled``. The function is the same except for ε, so weight
            norms alone change no accuracy. Default: no control.
        space: ``input`` to measure radii and noise in the inputs' own units (dB, standardized features); radii, noise,
            ``lower`` and ``upper`` are then required. Default: the preset's.
        on_unsuitable: If the model or its data cannot be evaluated, or an attack fails: ``raise`` stops, ``skip``
            continues and gives the reason in the report.
        logits: maps images, as the loader yields them, to logits ``(batch, classes)`` or an output that holds them.
            Default: the model.
        unpack: maps a batch to (images, labels). Default: found in pairs, dictionaries, named tuples and dataclasses.
        mean: mean of the input normalization, one value or one per channel. Default: found in the data pipeline, in
            the model, or from 8-bit images.
        std: standard deviation of the input normalization, one value or one per channel; goes with ``mean``.
        normalized_by: ``data`` if the loader yields normalized images, ``model`` if it yields pixels and the model
            normalizes. Default: decided from the images.
        value_range: values of a black and a white pixel in the loader's images, e.g. ``[-1, 1]``. Default: found as
            ``mean`` and ``std`` are.
        num_images: number of example images to keep in the report.
        progress: whether to show a progress bar.
        resume_dir: folder for a journal of finished samples, from which the same call resumes after a kill. Default:
            no journal.
        surrogate: another network, or the path of a checkpoint with other weights of this one, for attacks that are
            transferred from it. Default: none.

    Returns:
        The report; ``print`` shows its table, ``save`` writes it to files.

    Raises:
        ConfigurationError: for settings out of range, and for images, labels or outputs that cannot be evaluated.

    Cost: see :class:`RobustnessSettings`; BIM takes ``steps`` forward and backward passes.

    Example:
        >>> report = evaluate_robustness(model, loader, eps=[2 / 255, 4 / 255, 8 / 255], semantics="any")
        >>> print(report)
    """
    chosen = RobustnessSettings.among(locals())
    _check_given(model, dataloader, logits=logits, unpack=unpack)
    whole("num_images", num_images, 0)
    flag("progress", progress)
    if resume_dir is not None and not isinstance(resume_dir, (str, PathLike)):
        raise ConfigurationError(f"resume_dir={short_repr(resume_dir)} must be the path of a folder.")
    check_surrogate(surrogate, chosen.transfers)
    other = surrogate_of(model, surrogate)
    declared = declared_inputs(mean, std, normalized_by, value_range)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    samples = min((n for n in (size_of(dataloader), chosen.max_samples) if n is not None), default=None)
    images = None if samples is None else samples * len(chosen.rows)
    bar = tqdm(total=images, disable=not progress, unit="img", leave=False)
    evaluation = LoaderEvaluation(
        model,
        logits or model,
        chosen,
        declared,
        dataloader,
        num_images,
        lambda name, samples: show_progress(bar, evaluation.evaluator, name, samples),
        None if resume_dir is None else JournalPlace(user_path(resume_dir)),
        other,
    )
    with bar, preserved_state(model), preserved_state(other) if other is not None else nullcontext():
        try:
            for batch in dataloader:
                if evaluation.stopped:
                    break
                with preserved_state(model):
                    _evaluate(evaluation, batch, unpack or images_and_labels, device)
            part = _finished(evaluation)
        except BaseException:
            evaluation.close()
            raise
    report = report_of([part], chosen, evaluation.shown)
    evaluation.close(ended=True)
    for warning in report.warnings:
        if warning not in evaluation.told:
            warn_once(warning)
    return report


def _check_given(model: Any, dataloader: Any, **functions: Any) -> None:
    """Check the types of the model, the loader and the functions.

    Raises:
        ConfigurationError: with advice on what to give instead.
    """
    check_module("evaluate_robustness(model, dataloader)", model)
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name}={short_repr(function)} must be a function, or left out.")
    weight = weight_of(model)
    if weight is not None and weight.is_meta:
        raise ConfigurationError("The model is on the meta device and has no weights. Load them first.")
    advice = _advice(dataloader)
    if advice:
        raise ConfigurationError(f"dataloader={short_repr(dataloader)} yields no batches (images, labels). {advice}")


def _advice(dataloader: Any) -> str:
    """Return advice on what to give instead of something that is no loader; empty for a loader."""
    if hasattr(dataloader, "test_dataloader"):
        return "Give its loader: after prepare_data() and setup('test'), that of test_dataloader()."
    if isinstance(dataloader, Tensor) or hasattr(dataloader, "__array__"):
        return "Give images and labels: DataLoader(TensorDataset(images, labels), batch_size=64)."
    if isinstance(dataloader, Mapping):
        return "Give one loader at a time."
    if isinstance(dataloader, (str, bytes)) or not (
        hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
    ):
        return "Give a DataLoader, or a list of batches."
    if not isinstance(dataloader, (tuple, list)) or not dataloader:
        return ""
    if all(isinstance(entry, DataLoader) for entry in dataloader):
        return "Give one loader at a time."
    if all(isinstance(entry, Tensor) or hasattr(entry, "__array__") for entry in dataloader):
        return "Give images and labels in batches: DataLoader(TensorDataset(images, labels), batch_size=64)."
    return ""


def _evaluate(
    evaluation: LoaderEvaluation, batch: Any, unpack: Callable[[Any], tuple[Any, Any]], device: torch.device
) -> None:
    try:
        images, labels = unpacked(unpack, batch)
        evaluation.add(images.to(device), labels.to(device))
    except Exception as error:
        if evaluation.settings.on_unsuitable == "raise":
            raise
        evaluation.give_up(error)


def _finished(evaluation: LoaderEvaluation) -> ProcessShare:
    if evaluation.evaluator is None and not evaluation.stopped and evaluation.settings.on_unsuitable == "raise":
        raise UnsuitableError("The dataloader has no samples. An iterator that was used up has none: make a new one.")
    try:
        return evaluation.finish()
    except Exception as error:
        if evaluation.settings.on_unsuitable == "raise":
            raise
        evaluation.give_up(error)
        return evaluation.finish()


def show_progress(bar: Any, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
    """Display the running attack and all accuracies so far in a tqdm bar, and advance it by ``samples``."""
    if evaluator is None:
        return
    seen = evaluator.decisions.seen
    found = ", ".join(f"{key} {100 * hits / n:.1f} %" for key, (hits, n) in seen.items() if n)
    bar.set_description_str(name, refresh=False)
    bar.set_postfix_str(found, refresh=False)
    if samples:
        bar.update(samples)
    elif time.monotonic() - getattr(bar, "last_print_t", 0.0) > 0.1:
        bar.refresh()
