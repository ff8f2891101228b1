"""Evaluate a model on a data loader, in any project."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.robustness.checks import undisturbed
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator
from lightning_normgeo.robustness.inputs import input_space
from lightning_normgeo.robustness.journal import Journal, size_of
from lightning_normgeo.robustness.report import RobustnessReport, report_of
from lightning_normgeo.robustness.settings import RobustnessSettings


def evaluate_robustness(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    logits: Callable[[Tensor], Tensor] | None = None,
    unpack: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
        logits: maps images, as the loader yields them, to logits ``(batch, classes)``; the model itself if left out.
        unpack: maps a batch to images and labels; a batch is a pair of tensors if left out.
        mean: per-channel mean, where the data pipeline normalizes images; found in a torchvision ``Normalize`` of the
            data set's transforms if left out.
        std: per-channel standard deviation, with ``mean``.
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
    inputs = input_space(model, dataloader, mean, std)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = min((n for n in (size_of(dataloader), chosen.max_samples) if n is not None), default=None)
    bar = tqdm(total=total and total * len(chosen.rows), disable=not progress, unit="img", leave=False)
    with bar, undisturbed(model), ExitStack() as stack:
        evaluator = RobustnessEvaluator(
            logits or model,
            inputs,
            chosen,
            model,
            num_images,
            lambda name, samples: show_progress(bar, evaluator, name, samples),
        )
        seen = 0
        for batch in dataloader:
            images, labels = (tensor.to(device) for tensor in (unpack or pair)(batch))
            if seen == 0 and resume_dir is not None:
                stack.callback(evaluator.resume(Path(resume_dir), images, dataloader, model).close)
            count = len(labels) if chosen.max_samples is None else min(len(labels), chosen.max_samples - seen)
            evaluator.put(images[:count], labels[:count], range(seen, seen + count))
            seen += count
            if seen == chosen.max_samples:
                break
        decisions = evaluator.finish()
    if isinstance(decisions, Journal):
        decisions.close(ended=True)
    report = report_of(decisions, evaluator)
    for warning in report.warnings:
        warn_once(warning)
    return report


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return a batch that is a pair of images and labels.

    Raises:
        ConfigurationError: for another one.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise ConfigurationError(
        f"RobustnessEvaluation expects batches (images, labels), got {type(batch).__name__}. Override its "
        "unpack(batch), or give evaluate_robustness(unpack=…)."
    )


def show_progress(bar: Any, evaluator: RobustnessEvaluator, name: str, samples: int) -> None:
    """Show the attack that runs, and all accuracies so far."""
    seen = evaluator.decisions.seen
    found = ", ".join(f"{key} {100 * hits / n:.1f} %" for key, (hits, n) in seen.items() if n)
    bar.set_description_str(name, refresh=False)
    bar.set_postfix_str(found, refresh=False)
    if samples:
        bar.update(samples)
    elif time.monotonic() - getattr(bar, "last_print_t", 0.0) > 0.1:
        bar.refresh()
