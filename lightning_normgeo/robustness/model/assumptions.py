"""Properties of a model that an evaluation relies on, tested on the first batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.normalization.user_inputs import misfit
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.inputs.advice import override
from lightning_normgeo.robustness.inputs.checks import check_labels
from lightning_normgeo.robustness.inputs.class_labels import class_logits
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.utilities.checked_values import first_line
from lightning_normgeo.utilities.tf32 import full_float32

_IMAGES = 8
"""Number of images that are tested, from the start of the batch."""
_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest, that rounding explains: kernels depend on the batch size."""


@dataclass(frozen=True)
class Assumptions:
    """Properties of a model in evaluation mode.

    Attributes:
        deterministic: whether two calls with the same images give the same logits.
        independent: whether an image's logits do not depend on the other images of its batch.
        no_gradient: the reason if there is no gradient with respect to the images; empty if there is one.
        said: warnings for the user.
    """

    deterministic: bool = True
    independent: bool = True
    no_gradient: str = ""
    said: list[str] = field(default_factory=list)


def check_assumptions(
    module: nn.Module, logits: Callable[[Tensor], Any], images: Tensor, labels: Tensor, gradients: bool
) -> Assumptions:
    """Test the properties of a model on its first batch.

    Args:
        module: the model; its buffers are restored after every pass.
        logits: maps images to the model's output, in evaluation mode.
        images: ``(batch, channels, …)``, as the loader yields them.
        labels: ``(batch,)`` class indices.
        gradients: whether an attack needs the gradient with respect to images.

    Raises:
        UnsuitableError: if the model cannot be called with images alone, or does not return class logits.

    Cost: three forward passes of at most 8 images, and one backward pass of two images.
    """
    some = images[:_IMAGES]

    def forward(batch: Tensor) -> Tensor:
        with preserved_state(module, fork_rng=False):
            return class_logits(logits(batch), len(batch))

    with torch.no_grad(), full_float32():
        first = _called(module, logits, some)
        check_labels(labels[:_IMAGES], first)
        check_labels(labels, first.new_empty(len(labels), *first.shape[1:], device="meta"))
        said = _said_of_outputs(first)
        deterministic = _unchanged(first, forward(some))
        independent = deterministic and _is_independent(forward, some, first)
    if not deterministic:
        said.append(
            "The model is random in evaluation mode: the same images have different logits each time. Accuracies "
            "depend on the seed, attacks are weaker than they could be, and batches stay as the loader gives them."
        )
    elif not independent:
        said.append(
            "The logits of an image depend on the other images of its batch (batch statistics in evaluation mode?): "
            "accuracies hold for these batches only, which stay as the loader gives them."
        )
    # the state is restored only after the backward pass, which may need a buffer that the forward pass has written
    with preserved_state(module, fork_rng=False):
        no_gradient = _no_gradient(logits, images[:2], labels[:2]) if gradients else ""
    return Assumptions(deterministic, independent, no_gradient, said)


def _called(module: nn.Module, logits: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Return the model's logits for images, after checks that its output consists of class logits."""
    try:
        with preserved_state(module, fork_rng=False):
            output = logits(images)
    except Exception as error:
        advice = misfit(module, images) or f"{override('logits')} to return its logits for images."
        raise UnsuitableError(
            f"The model cannot be called with the images of a batch alone: {type(error).__name__}: "
            f"{first_line(error)}. {advice}"
        ) from error
    scores = class_logits(output, len(images))
    if images.ndim > 2 and scores.ndim == 2 and scores.shape[1] == images[0].numel() > 2:
        raise UnsuitableError(
            f"The model returns as many numbers as an image has ({scores.shape[1]}), so it reconstructs images rather "
            f"than classifying them. {override('logits')} to return class logits."
        )
    if isinstance(output, Tensor) and output.numel() == len(images) and _is_bounded(module, logits, images, output):
        raise UnsuitableError(
            f"The model returns one number between 0 and 1 per image, which looks like a probability. "
            f"{override('logits')} to return the logit before the sigmoid, or logits (batch, 2)."
        )
    return scores


def _is_bounded(module: nn.Module, logits: Callable[[Tensor], Any], images: Tensor, output: Tensor) -> bool:
    """Whether outputs stay within [0, 1] even for images with huge values; logits would not, probabilities do."""
    outputs = [output]
    for factor in (-1e3, 1e3):
        with preserved_state(module, fork_rng=False):
            outputs.append(logits(images * factor))
    return all(bool(((found >= 0) & (found <= 1)).all()) for found in outputs)


def _said_of_outputs(scores: Tensor) -> list[str]:
    """Return a warning if the model returns probabilities instead of logits."""
    if scores.ndim == 2 and scores.shape[1] > 1 and bool((scores >= 0).all()):
        total = scores.float().sum(1)
        if bool(((total - 1).abs() <= 1e-3).all()):
            return [
                "The model returns probabilities: attacks maximize the cross entropy of logits, and are weaker on "
                f"probabilities. {override('logits')} to return what goes into the softmax."
            ]
    return []


def _is_independent(logits: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor) -> bool:
    """Whether images have the same logits in batches of other images."""
    middle = len(images) // 2
    try:
        if len(images) == 1:  # the mirrored image serves as a second image of the batch
            return _unchanged(expected, logits(torch.cat([images, images.flip(-1)]))[:1])
        parts = [logits(part) for part in (images[middle:], images[:middle])]
    except Exception:  # the model accepts only batches of one size
        return False
    return _unchanged(expected, torch.cat(parts[::-1]))


def _unchanged(expected: Tensor, found: Tensor) -> bool:
    """Whether logits are equal up to rounding; infinities and NaN have to be at the same places."""
    if expected.shape != found.shape:
        return False
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return False
    largest = expected[expected.isfinite()].abs().amax() if bool(expected.isfinite().any()) else expected.new_ones(())
    tolerance = max(_TOLERANCE, 6 * torch.finfo(expected.dtype).eps)
    change = (found - expected)[expected.isfinite()].abs()
    return bool((change <= tolerance * largest.clamp_min(1e-30)).all())


def _no_gradient(logits: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> str:
    """Return the reason if the loss has no gradient with respect to the images; empty if it has one."""
    try:
        ascent(lambda batch: class_logits(logits(batch), len(batch)), images, labels)
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        if "Inference tensors" in what:
            return f"{what} Trainer(inference_mode=False) makes tensors that have a gradient"
        return (
            "no gradient reaches the images (does forward run under torch.no_grad(), take an argmax, or checkpoint "
            f"with use_reentrant=True?); override RobustnessEvaluation.logits if it can ({what})"
        )
    return ""
