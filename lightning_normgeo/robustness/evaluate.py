"""Evaluate a model on a data loader, in any project."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from lightning_normgeo.robustness.results.journal import size_of
from lightning_normgeo.robustness.results.process_shares import ProcessShare, report_of
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.settings import OnUnsuitable, RobustnessSettings, Semantics
from lightning_normgeo.utilities.checked_values import flag, shown, whole


def evaluate_robustness(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    preset: str = "pixel-8-255",
    attacks: str | Sequence[str] | None = None,
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
    autocast: Literal["bf16", "fp16"] | None = None,
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
) -> RobustnessReport:
    """Evaluate accuracy clean, under Gaussian noise and under attack.

    The model is left as it was, bit for bit: modes, weights, gradients, buffers, random numbers.

    The arguments from ``preset`` to ``on_unsuitable`` are those of :class:`RobustnessSettings`, which says more.

    Args:
        model: a classifier; evaluated on the device where its parameters are.
        dataloader: yields batches of tensors or arrays, in the same order each time where the evaluation is to be
            resumed.
        preset: the threat model that the next nine change.
        attacks: one or several out of ``gaussian``, ``bim``, ``pgd``, ``bim_l2``, ``pgd_l2`` and ``torchattacks.…``.
        eps: radius of the l∞ ball, or several.
        eps_l2: radius of the l2 ball, or several.
        step_size: of BIM and PGD in l∞.
        steps: of BIM and PGD.
        noise_std: standard deviation of the noise, or several.
        lower: lower end of the box.
        upper: upper end.
        attack_options: for torchattacks, by name of the attack.
        semantics: ``final`` or ``any``, which iterate counts.
        restarts: of PGD.
        seed: of noise and random starts.
        batch_size: samples per pass.
        fold: whether to fold batch normalization.
        autocast: ``bf16`` or ``fp16``.
        compile: whether to compile the model.
        max_samples: how many samples are evaluated; all if left out.
        rescale: a control with weights so many times as long.
        space: ``input`` for the units of the inputs.
        on_unsuitable: ``raise``, or ``skip`` to say in the report what cannot be evaluated.
        logits: maps images, as the loader yields them, to what holds logits ``(batch, classes)``. Default: the model.
        unpack: maps a batch to images and labels. Default: they are found in pairs, dictionaries, named tuples.
        mean: per-channel mean of the input normalization, or one value. Default: found in the data pipeline, in the
            model, or by what it leaves of 8-bit images.
        std: per-channel standard deviation, with ``mean``.
        normalized_by: ``data``, the loader yields normalized images; ``model``, it yields pixels. Default: the images
            tell.
        value_range: smallest and largest value of the loader's images, which stand for black and white.
        num_images: how many samples to keep for showing.
        progress: whether to show a progress bar.
        resume_dir: keeps what is done there meanwhile, so that the same call goes on after a kill.

    Returns:
        The report; ``print`` shows its table, ``save`` writes it.

    Raises:
        ConfigurationError: for impossible settings, images, labels or outputs.

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
        raise ConfigurationError(f"resume_dir={shown(resume_dir)} must be the path of a folder.")
    declared = declared_inputs(mean, std, normalized_by, value_range)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = min((n for n in (size_of(dataloader), chosen.max_samples) if n is not None), default=None)
    bar = tqdm(total=total and total * len(chosen.rows), disable=not progress, unit="img", leave=False)
    evaluation = LoaderEvaluation(
        model,
        logits or model,
        chosen,
        declared,
        dataloader,
        num_images,
        lambda name, samples: show_progress(bar, evaluation.evaluator, name, samples),
        None if resume_dir is None else JournalPlace(Path(resume_dir)),
    )
    with bar, preserved_state(model):
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
    """Refuse what is no model, no loader of batches, or no function.

    Raises:
        ConfigurationError: with what to give instead.
    """
    check_module("evaluate_robustness(model, dataloader)", model)
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name}={shown(function)} must be a function, or left out.")
    weight = weight_of(model)
    if weight is not None and weight.is_meta:
        raise ConfigurationError("The model is on the meta device and has no weights. Load them first.")
    advice = _advice(dataloader)
    if advice:
        raise ConfigurationError(f"dataloader={shown(dataloader)} yields no batches (images, labels). {advice}")


def _advice(dataloader: Any) -> str:
    """What to give in place of something that is no loader; empty for a loader."""
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
    """Show the attack that runs, and all accuracies so far."""
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
