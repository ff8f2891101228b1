"""The relation of a loader's images to pixels: what is declared or found, confirmed by the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.robustness.attacks.projected_gradient import at_least_float32
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
"""Normalizations that are looked for where none is declared or found; only the lattice makes them believed."""


def input_space(
    module: nn.Module | None,
    loader: Any = None,
    images: Tensor | None = None,
    declared: DeclaredInputs | None = None,
    space: Space = "pixel",
) -> InputSpace:
    """The relation of images to pixels: as declared or found, confirmed by images where there are any.

    Candidates are, in this order, what is declared, what is found in the data pipeline, pixels as they are, known
    constants, and a fit. The first that the lattice of 8-bit images confirms is taken. Where there is no lattice (a
    resize of floating-point images, synthetic data) the range decides between the first three: images within [0, 1] are
    pixels, and others have to be within it once the normalization is undone.

    Args:
        module: the model.
        loader: yields the images.
        images: the first batch, floating point.
        declared: the project's own word.
        space: of the threat model; the normalized one needs constants also where the model normalizes.

    Raises:
        UnsuitableError: where nothing fits.
    """
    declared = declared or DeclaredInputs()
    found = [] if declared.normalized_by == "model" else list(_found(loader))
    if images is None:
        chosen = [*_declared(declared), *found, _pixels()][0]
    else:
        candidates = [*_declared(declared), *found, _pixels(), *_applied(module), *_known(images)]
        confirmed = next((one for one in candidates if _confirmed(one, images)), None)
        chosen = _by_range(declared, found, images) if confirmed is None else replace(confirmed, confirmed=True)
        span = span_of(chosen.to_space(at_least_float32(images.detach()), "pixel"))
        chosen = replace(chosen, said=disagreement(declared, chosen, found, are_pixels(images), span))
    return chosen if chosen.normalized_data else _with_the_models(declared, chosen, found, module, space)


def _declared(declared: DeclaredInputs) -> Iterator[InputSpace]:
    if declared.constants is not None and (declared.normalized_by != "model" or declared.value_range is not None):
        yield InputSpace(*declared.constants, normalized_data=True, source="declared")


def _found(loader: Any) -> Iterator[InputSpace]:
    for mean, std, source in pipeline_normalizations(loader):
        if max(mean) > 2:  # in units of 0…255
            mean, std = (tuple(value / 255 for value in part) for part in (mean, std))
        yield InputSpace(mean, std, normalized_data=True, source=f"{source} of the data pipeline")


def _applied(module: nn.Module | None) -> Iterator[InputSpace]:
    """A normalization that the model holds and applies to batches before they are images here."""
    own = model_normalization(module)
    if own is not None:
        yield InputSpace(own.mean, own.std, normalized_data=True, source=f"{own.source}, applied to batches")


def _pixels() -> InputSpace:
    return InputSpace(None, None, normalized_data=False, source="pixels")


def _known(images: Tensor) -> Iterator[InputSpace]:
    for name, (mean, std) in _KNOWN.items():
        if channel_dim(len(mean), images.shape) is not None:
            yield InputSpace(mean, std, normalized_data=True, source=f"{name} constants, fitted")
    fit = fitted(images)
    if fit is not None:
        yield InputSpace(*fit, normalized_data=True, source="fitted to the images")


def _confirmed(candidate: InputSpace, images: Tensor) -> bool:
    mean, std = candidate.normalization
    return channel_dim(len(mean), images.shape) is not None and confirms(images, mean, std) is True


def _by_range(declared: DeclaredInputs, found: Sequence[InputSpace], images: Tensor) -> InputSpace:
    """What the range of images allows, where they are on no lattice."""
    insisted = next(_declared(declared), None)
    if insisted is not None and (declared.normalized_by == "data" or declared.value_range or not are_pixels(images)):
        check_range(images, insisted)
        return insisted
    if are_pixels(images):
        return _pixels()
    within = (one for one in found if channel_dim(len(one.mean or ()), images.shape) and fits(images, one))
    chosen = next(within, _pixels())
    check_range(images, chosen)
    return chosen


def _with_the_models(
    declared: DeclaredInputs, chosen: InputSpace, found: Sequence[InputSpace], module: nn.Module | None, space: Space
) -> InputSpace:
    """Pixels with the constants that the model normalizes by: the normalized space is measured in them."""
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
