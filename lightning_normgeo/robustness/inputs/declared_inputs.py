"""The user's declaration of how images are normalized, and warnings if the images contradict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.utilities.checked_values import numbers_of, short_repr

Normalizer = Literal["data", "model"]
_NARROW = 0.6
"""Range of pixel values, out of 1, that a batch of natural images exceeds."""
_ENDS = "the smallest and the largest value, as [0, 255]"


@dataclass(frozen=True)
class DeclaredInputs:
    """The user's declaration of how images are normalized.

    Attributes:
        mean: mean of the input normalization, one value or one per channel.
        std: standard deviation of the input normalization, one value or one per channel.
        normalized_by: ``data`` if the loader yields normalized images, ``model`` if it yields pixels and the model
            normalizes; None to decide from the images.
        value_range: values of a black and a white pixel.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalized_by: Normalizer | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the declaration, as far as that is possible without images.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        InputSpace(self.mean, self.std, normalized_data=True)
        if self.normalized_by not in ("data", "model", None):
            raise ConfigurationError(
                f"normalized_by={short_repr(self.normalized_by)} is unknown; choose 'data' or 'model'."
            )
        if self.value_range is None:
            return
        if self.mean is not None:
            raise ConfigurationError("Give mean and std, or value_range, not both: each says what a black pixel is.")
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ConfigurationError(f"value_range={list(self.value_range)} must be {_ENDS}.")

    def __str__(self) -> str:
        """Return the declaration as the user's arguments."""
        if self.value_range is not None:
            return f"value_range={list(self.value_range)}"
        return f"mean={self.mean}, std={self.std}"

    @property
    def empty(self) -> bool:
        """Whether nothing is declared."""
        return self == DeclaredInputs()

    @property
    def constants(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The declared mean and standard deviation, or those that follow from ``value_range``; None without either."""
        if self.value_range is not None:
            low, high = self.value_range
            return (-low / (high - low),), (1 / (high - low),)
        return None if self.mean is None or self.std is None else (self.mean, self.std)


def declared_inputs(
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    normalized_by: Normalizer | None = None,
    value_range: Sequence[float] | None = None,
) -> DeclaredInputs:
    """Return a declaration made from the user's arguments.

    Args:
        mean: mean of the input normalization, one value or one per channel.
        std: standard deviation of the input normalization, one value or one per channel, each > 0.
        normalized_by: ``data`` or ``model``.
        value_range: values of a black and a white pixel, the smaller one first.

    Raises:
        ConfigurationError: for values that are no finite numbers, or that contradict each other.
    """
    means = numbers_of("mean", mean, "a number, or one for each channel, as [0.5, 0.5, 0.5]")
    stds = numbers_of("std", std, "a number, or one for each channel, as [0.25, 0.25, 0.25]")
    ends = numbers_of("value_range", value_range, _ENDS)
    if ends is not None and len(ends) != 2:
        raise ConfigurationError(f"value_range={short_repr(value_range)} must be {_ENDS}.")
    return DeclaredInputs(means, stds, normalized_by, ends)


def disagreement(
    declared: DeclaredInputs,
    chosen: InputSpace,
    found: Sequence[InputSpace],
    as_pixels: bool,
    span: tuple[float, float],
) -> str:
    """Return a warning if the declaration contradicts the images or the data pipeline; empty if all agree.

    Args:
        declared: the user's declaration.
        chosen: the relation to pixels that the evaluation uses.
        found: the normalizations in the data pipeline.
        as_pixels: whether the images are within [0, 1] without undoing any normalization.
        span: smallest and largest pixel value of the images once the chosen normalization is undone.
    """
    given = declared.constants
    if declared.normalized_by == "model" and declared.value_range is None:
        return _normalized_by_data(chosen) if chosen.normalized_data else ""
    if given is None:
        return ""
    if not chosen.normalized_data:
        return _pixels_already(declared, chosen)
    if chosen.source != "declared":
        return "" if _alike(given, chosen) else _refuted(declared, chosen)
    if chosen.confirmed:
        return ""
    if as_pixels and not _alike(given, InputSpace((0.0,), (1.0,), normalized_data=True)):
        return (
            f"The declared {declared} is not confirmed: images lie within [0, 1] as they are, as pixels would. If the "
            "model normalizes, say normalized_by='model'."
        )
    if found and not _alike(given, found[0]):
        return _other_pipeline(declared, found[0])
    narrow = span[1] - span[0] < _NARROW and declared.normalized_by is None and declared.value_range is None
    return _of_little_contrast(declared, span) if narrow and not found else ""


def _normalized_by_data(chosen: InputSpace) -> str:
    return (
        "normalized_by='model' says that images are pixels, but they are 8-bit pixels after (x - mean) / std with "
        f"mean={chosen.mean}, std={chosen.std} ({chosen.source}), and are evaluated as such. Leave it out if the data "
        "pipeline normalizes."
    )


def _pixels_already(declared: DeclaredInputs, chosen: InputSpace) -> str:
    how = "are 8-bit pixels" if chosen.confirmed else "lie within [0, 1]"
    if declared.normalized_by == "data" or declared.value_range is not None:
        return f"The declared {declared} is refuted: images {how} as they are, and are evaluated as such. Leave it out."
    return (
        f"The declared {declared} was not applied to the images: they {how} as they are. It is taken for the model's "
        "own normalization; say so with normalized_by='model', or leave mean and std out."
    )


def _refuted(declared: DeclaredInputs, chosen: InputSpace) -> str:
    return (
        f"The declared {declared} is refuted by the images, which are 8-bit pixels with mean={chosen.mean}, "
        f"std={chosen.std} ({chosen.source}), and are evaluated as such. Declare these, or nothing."
    )


def _of_little_contrast(declared: DeclaredInputs, span: tuple[float, float]) -> str:
    return (
        f"The declared {declared} is not confirmed: once it is undone, the first images are pixels in [{span[0]:.2g}, "
        f"{span[1]:.2g}] alone, a narrow range. If the model applies it itself, the radius is not the one that is "
        "reported: leave it out, and clamp images to [0, 1] or give their value_range. If the data pipeline applies "
        "it, say normalized_by='data'."
    )


def _other_pipeline(declared: DeclaredInputs, found: InputSpace) -> str:
    return (
        f"The declared {declared} is not what is found in the data pipeline, mean={found.mean}, std={found.std} "
        f"({found.source}), and the images do not tell which is right. The declared ones are used; leave them out if "
        "the others are right."
    )


def _alike(given: tuple[tuple[float, ...], tuple[float, ...]], other: InputSpace) -> bool:
    """Whether two normalizations are the same up to a hundredth, as rounded constants are."""
    mean, std = given
    other_mean, other_std = other.mean or (0.0,), other.std or (1.0,)
    count = max(len(mean), len(other_mean))  # a single value holds for all channels
    means = zip(mean * (count // len(mean)), other_mean * (count // len(other_mean)), strict=False)
    stds = zip(std * (count // len(std)), other_std * (count // len(other_std)), strict=False)
    return all(abs(a - b) <= 0.01 for a, b in means) and all(abs(a - b) <= 0.01 * b for a, b in stds)
