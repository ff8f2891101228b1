"""Relation of a loader's images to pixels: declared or found, and confirmed by the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.robustness.attacks.search.losses import at_least_float32
from lightning_normgeo.robustness.inputs.declared_inputs import DeclaredInputs, disagreement
from lightning_normgeo.robustness.inputs.input_space import InputSpace, Space, channel_dim
from lightning_normgeo.robustness.inputs.normalization_transforms import model_normalization, pipeline_normalizations
from lightning_normgeo.robustness.inputs.pixel_lattice import confirms, fitted
from lightning_normgeo.robustness.inputs.pixel_range import are_pixels, check_range, fits, span_of

_KNOWN = {
    "0…255": ((0.0,), (1 / 255,)),
    "[-1, 1]": ((0.5,), (0.5,)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10's, as often given": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "MNIST's": ((0.1307,), (0.3081,)),
    "Fashion-MNIST's": ((0.2860,), (0.3530,)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Normalizations that are tried if none is declared or found; only images on the lattice k/255 can confirm them."""


def input_space(
    module: nn.Module | None,
    loader: Any = None,
    images: Tensor | None = None,
    declared: DeclaredInputs | None = None,
    space: Space = "pixel",
) -> InputSpace:
    """Return the relation of images to pixels, as declared or found, and confirmed by the images if they are given.

    Candidates are, in this order: the declared normalization, those found in the data pipeline, none (the images are
    pixels), that of the model applied to batches, well-known constants, and a fit. The first one that the lattice of
    8-bit images confirms is chosen. Without a lattice (images resized in floating point, synthetic data) the range of
    the images decides between the first three: images within [0, 1] are pixels, others have to be within [0, 1] once
    the normalization is undone.

    Args:
        module: the model, which may hold its normalization.
        loader: yields the images; its data pipeline is searched for normalizations.
        images: the first batch, ``(batch, channels, …)``, in floating point.
        declared: the user's declaration.
        space: the space of the threat model; ``normalized`` needs mean and std even if the model normalizes.

    Raises:
        UnsuitableError: if no candidate fits the range of the images.
    """
    declared = declared or DeclaredInputs()
    found = [] if declared.normalized_by == "model" else list(_found(loader))
    if images is None:
        candidates = [*_declared(declared), *found, _pixels()]
        chosen = candidates[0]
    else:
        candidates = [*_declared(declared), *found, _pixels(), *_applied(module), *_known(images)]
        confirmed = next((one for one in candidates if _confirmed(one, images)), None)
        chosen = _by_range(declared, found, images) if confirmed is None else replace(confirmed, confirmed=True)
        span = span_of(chosen.to_space(at_least_float32(images.detach()), "pixel"))
        chosen = replace(chosen, said=disagreement(declared, chosen, found, are_pixels(images), span))
    return chosen if chosen.normalized_data else _with_the_models(declared, chosen, found, module, space)


def _declared(declared: DeclaredInputs) -> Iterator[InputSpace]:
    """Yield the declared normalization of the loader's images, if there is one."""
    if declared.constants is not None and (declared.normalized_by != "model" or declared.value_range is not None):
        yield InputSpace(*declared.constants, normalized_data=True, source="declared")


def _found(loader: Any) -> Iterator[InputSpace]:
    """Yield the normalizations in the data pipeline."""
    for mean, std, source in pipeline_normalizations(loader):
        if max(mean) > 2:  # constants for images in 0…255
            mean, std = (tuple(value / 255 for value in part) for part in (mean, std))
        yield InputSpace(mean, std, normalized_data=True, source=f"{source} of the data pipeline")


def _applied(module: nn.Module | None) -> Iterator[InputSpace]:
    """Yield the normalization that a model holds, which it may apply in a hook before the evaluation gets a batch."""
    own = model_normalization(module)
    if own is not None:
        yield InputSpace(own.mean, own.std, normalized_data=True, source=f"{own.source}, applied to batches")


def _pixels() -> InputSpace:
    return InputSpace(None, None, normalized_data=False, source="pixels")


def _known(images: Tensor) -> Iterator[InputSpace]:
    """Yield the well-known normalizations for this number of channels, and the one fitted to the images."""
    for name, (mean, std) in _KNOWN.items():
        if channel_dim(len(mean), images.shape) is not None:
            yield InputSpace(mean, std, normalized_data=True, source=f"{name} constants, fitted")
    fit = fitted(images)
    if fit is not None:
        yield InputSpace(*fit, normalized_data=True, source="fitted to the images")


def _confirmed(candidate: InputSpace, images: Tensor) -> bool:
    """Whether images are on the lattice k/255 once the candidate's normalization is undone."""
    mean, std = candidate.normalization
    return channel_dim(len(mean), images.shape) is not None and confirms(images, mean, std) is True


def _by_range(declared: DeclaredInputs, found: Sequence[InputSpace], images: Tensor) -> InputSpace:
    """Return the relation to pixels that the range of images allows, for images on no lattice."""
    from_user = next(_declared(declared), None)
    if from_user is not None and (declared.normalized_by == "data" or declared.value_range or not are_pixels(images)):
        check_range(images, from_user)
        return from_user
    if are_pixels(images):
        return _pixels()
    within = (one for one in found if channel_dim(len(one.mean or ()), images.shape) and fits(images, one))
    chosen = next(within, _pixels())
    check_range(images, chosen)
    return chosen


def _with_the_models(
    declared: DeclaredInputs, chosen: InputSpace, found: Sequence[InputSpace], module: nn.Module | None, space: Space
) -> InputSpace:
    """Return the relation for pixels, with the model's mean and std, in which the normalized space is measured."""
    own = model_normalization(module)
    if declared.mean is not None:
        constants: Any = (declared.mean, declared.std)
    elif own is not None:
        constants = (own.mean, own.std)
    elif space == "normalized" and found:
        constants = (found[0].mean, found[0].std)
    else:
        constants = (None, None)
    return replace(chosen, mean=constants[0], std=constants[1])
