"""Evaluate a model on a data loader, in any project."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_normgeo.errors import warn_once
from lightning_normgeo.robustness.checks import undisturbed
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator
from lightning_normgeo.robustness.inputs import declared_inputs, images_and_labels
from lightning_normgeo.robustness.journal import size_of
from lightning_normgeo.robustness.loader_evaluation import JournalPlace, LoaderEvaluation
from lightning_normgeo.robustness.parts import Part, report_of
from lightning_normgeo.robustness.report import RobustnessReport
from lightning_normgeo.robustness.settings import RobustnessSettings


def evaluate_robustness(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    logits: Callable[[Tensor], Tensor] | None = None,
    unpack: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalized_by: Literal["data", "model"] | None = None,
    value_range: Sequence[float] | None = None,
    num_images: int = 0,
    progress: bool = True,
    resume_dir: str | Path | None = None,
    **settings: Any,
) -> RobustnessReport:
    """Evaluate accuracy clean, under Gaussian noise and under attack.

    The model is left as it was, bit for bit: modes, weights, gradients, buffers, random numbers.

    Args:
        model: a classifier; evaluated on the device where its parameters are.
        dataloader: yields batches; in the same order each time where the evaluation is to be resumed.
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
        **settings: see :class:`RobustnessSettings`.

    Returns:
        The report; ``print`` shows its table, ``save`` writes it.

    Raises:
        ConfigurationError: for impossible settings, images, labels or outputs.

    Cost: see :class:`RobustnessSettings`; BIM takes ``steps`` forward and backward passes.

    Example:
        >>> report = evaluate_robustness(model, loader, eps=[2 / 255, 4 / 255, 8 / 255], semantics="any")
        >>> print(report)
    """
    chosen = RobustnessSettings(**settings)
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
    with bar, undisturbed(model):
        try:
            for batch in dataloader:
                if evaluation.stopped:
                    break
                with undisturbed(model):
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


def _evaluate(
    evaluation: LoaderEvaluation, batch: Any, unpack: Callable[[Any], tuple[Tensor, Tensor]], device: torch.device
) -> None:
    try:
        images, labels = (tensor.to(device).as_subclass(Tensor) for tensor in unpack(batch))
        evaluation.add(images, labels)
    except Exception as error:
        if evaluation.settings.on_unsuitable == "raise":
            raise
        evaluation.give_up(error)


def _finished(evaluation: LoaderEvaluation) -> Part:
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
