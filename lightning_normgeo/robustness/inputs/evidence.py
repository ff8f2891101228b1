"""The relation of a loader's images to pixels: what is declared or found, confirmed by the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.inputs.lattice import confirms, fitted
from lightning_normgeo.robustness.inputs.pipelines import model_normalization, pipeline_normalizations
from lightning_normgeo.robustness.inputs.ranges import are_pixels, check_range, fits
from lightning_normgeo.robustness.inputs.space import InputSpace, Space

Normalizer = Literal["data", "model"]
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


@dataclass(frozen=True)
class DeclaredInputs:
    """A project's own word on what its images are.

    Attributes:
        mean: per-channel mean of the input normalization.
        std: per-channel standard deviation.
        normalized_by: ``data``, the loader yields normalized images; ``model``, it yields pixels. None: the images
            tell.
        value_range: smallest and largest value that an image can have, which stand for black and white.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalized_by: Normalizer | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check everything that needs no image.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        InputSpace(self.mean, self.std, normalized_data=True)
        if self.normalized_by not in ("data", "model", None):
            raise ConfigurationError(f"normalized_by={self.normalized_by!r} is unknown; choose 'data' or 'model'.")
        if self.value_range is None:
            return
        if self.mean is not None:
            raise ConfigurationError("Give mean and std, or value_range, not both: each says what a black pixel is.")
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ConfigurationError(
                f"value_range={list(self.value_range)} must be the smallest and the largest value, as [0, 255]."
            )

    @property
    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The mean and standard deviation that are declared."""
        if self.value_range is not None:
            low, high = self.value_range
            return (-low / (high - low),), (1 / (high - low),)
        return None if self.mean is None or self.std is None else (self.mean, self.std)


def declared_inputs(
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalized_by: Normalizer | None = None,
    value_range: Sequence[float] | None = None,
) -> DeclaredInputs:
    """A declaration from plain values."""
    values: Any = (None if part is None else tuple(float(v) for v in part) for part in (mean, std, value_range))
    mean, std, value_range = values
    return DeclaredInputs(mean, std, normalized_by, value_range)  # type: ignore[arg-type]


def input_space(
    declared: DeclaredInputs, images: Tensor, loader: Any, module: nn.Module | None, space: Space = "pixel"
) -> tuple[InputSpace, list[str]]:
    """The relation of images to pixels, and what has to be said about it.

    Candidates are, in this order, what is declared, what is found in the data pipeline, pixels as they are, known
    constants, and a fit. The first that the lattice of 8-bit images confirms is taken. Where there is no lattice (a
    resize of floating-point images, synthetic data) the range decides between the first three: images within [0, 1] are
    pixels, and others have to be within it once the normalization is undone.

    Args:
        declared: by the project.
        images: the first batch, floating point.
        loader: yields it.
        module: the model.
        space: of the threat model; the normalized one needs constants also where the model normalizes.

    Raises:
        UnsuitableError: where nothing fits.
    """
    found = [] if declared.normalized_by == "model" else list(_found(loader))
    candidates = [*_declared(declared), *found, _pixels(), *_known(images)]
    chosen = next((one for one in candidates if _confirmed(one, images)), None)
    chosen = _by_range(declared, found, images) if chosen is None else replace(chosen, confirmed=True)
    said = _disagreement(declared, chosen, found)
    if not chosen.normalized_data:
        chosen = _with_the_models(declared, chosen, found, module, space)
    return chosen, said


def _declared(declared: DeclaredInputs) -> Iterator[InputSpace]:
    if declared.constants is not None and declared.normalized_by != "model":
        yield InputSpace(*declared.constants, normalized_data=True, source="declared")


def _found(loader: Any) -> Iterator[InputSpace]:
    for mean, std, source in pipeline_normalizations(loader):
        yield InputSpace(mean, std, normalized_data=True, source=f"{source} of the data pipeline")


def _pixels() -> InputSpace:
    return InputSpace(None, None, normalized_data=False, source="pixels")


def _known(images: Tensor) -> Iterator[InputSpace]:
    for name, (mean, std) in _KNOWN.items():
        if len(mean) in (1, images.shape[1]):
            yield InputSpace(mean, std, normalized_data=True, source=f"{name} constants, fitted")
    fit = fitted(images)
    if fit is not None:
        yield InputSpace(*fit, normalized_data=True, source="fitted to the images")


def _confirmed(candidate: InputSpace, images: Tensor) -> bool:
    mean, std = (candidate.mean or (0.0,)), (candidate.std or (1.0,))
    return len(mean) in (1, images.shape[1]) and confirms(images, mean, std) is True


def _by_range(declared: DeclaredInputs, found: Sequence[InputSpace], images: Tensor) -> InputSpace:
    """What the range of images allows, where they are on no lattice."""
    insisted = next(_declared(declared), None)
    if insisted is not None and (declared.normalized_by == "data" or declared.value_range or not are_pixels(images)):
        check_range(images, insisted)
        return insisted
    if are_pixels(images):
        return _pixels()
    within = (one for one in found if len(one.mean or ()) in (1, images.shape[1]) and fits(images, one))
    chosen = next(within, _pixels())
    check_range(images, chosen)
    return chosen


def _disagreement(declared: DeclaredInputs, chosen: InputSpace, found: Sequence[InputSpace]) -> list[str]:
    """What to tell who declared something else than the images show, or the data pipeline does."""
    given = declared.constants
    about = f"mean={given[0]}, std={given[1]}" if given and declared.value_range is None else None
    about = about or f"value_range={declared.value_range}"
    how = "are 8-bit pixels" if chosen.confirmed else "lie within [0, 1]"
    if given is not None and declared.normalized_by != "model" and not chosen.normalized_data:
        if declared.normalized_by == "data" or declared.value_range is not None:
            return [
                f"The declared {about} is refuted: images {how} as they are, and are evaluated as such. Leave it out."
            ]
        return [
            f"The declared {about} is not what images have been through: they {how} as they are. It is taken for the "
            "model's own normalization; say so with normalized_by='model', or leave mean and std out."
        ]
    if declared.normalized_by == "model" and chosen.normalized_data:
        return [
            f"normalized_by='model' says that images are pixels, but they are 8-bit pixels after (x - mean) / std with "
            f"mean={chosen.mean}, std={chosen.std} ({chosen.source}), and are evaluated as such. Leave it out if the "
            "data pipeline normalizes."
        ]
    if (
        given is not None
        and chosen.normalized_data
        and chosen.source != "declared"
        and not _alike(given, (chosen.mean, chosen.std))
    ):
        return [
            f"The declared {about} is refuted by the images, which are 8-bit pixels with mean={chosen.mean}, "
            f"std={chosen.std} ({chosen.source}), and are evaluated as such. Declare these, or nothing."
        ]
    if given is not None and chosen.source == "declared" and not chosen.confirmed and found:
        other = found[0]
        if not _alike(given, (other.mean, other.std)):
            return [
                f"The declared {about} is not what is found in the data pipeline, mean={other.mean}, std={other.std} "
                f"({other.source}), and the images do not tell which is right. The declared ones are used; leave them "
                "out if the others are right."
            ]
    return []


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


def _alike(first: Any, second: Any) -> bool:
    """Whether two normalizations differ by less than anybody would mind."""
    (mean, std), (other_mean, other_std) = first, second
    count = max(len(std), len(other_std))
    pairs = list(zip(std * (count // len(std)), other_std * (count // len(other_std)), strict=False))
    shifts = list(zip(mean * (count // len(mean)), other_mean * (count // len(other_mean)), strict=False))
    return all(abs(a - b) <= 0.01 * b for a, b in pairs) and all(abs(a - b) <= 0.01 for a, b in shifts)
