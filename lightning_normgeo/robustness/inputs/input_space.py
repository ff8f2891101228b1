"""Affine relation of a loader's images to pixels in [0, 1], and conversions between their spaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from lightning_normgeo.robustness.attacks.search.ball import Bound, per_image

Space = Literal["pixel", "normalized", "input"]
"""The space in which perturbations are measured: pixels in [0, 1], (pixel - mean) / std, or the loader's own units."""


@dataclass(frozen=True)
class InputSpace:
    """The affine map between a loader's images and pixels, and whether the images confirm it.

    Attributes:
        mean: mean of the input normalization, one value or one per channel; None if unknown.
        std: standard deviation of the input normalization, > 0, one value or one per channel; None if unknown.
        normalized_data: True if the data pipeline normalizes the images; False if they are pixels and the model
            normalizes.
        source: the origin of mean and std, in words.
        confirmed: whether the images confirm the normalization, as undoing it gives 8-bit levels.
        said: a warning for the user; empty if there is none.

    Raises:
        ConfigurationError: if only one of mean and std is given, their lengths differ, or a std is not positive.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalized_data: bool
    source: str = ""
    confirmed: bool = False
    said: str = ""

    def __post_init__(self) -> None:
        """Check that mean and std are given together and fit together.

        Raises:
            ConfigurationError: if they do not.
        """
        if (self.mean is None) != (self.std is None) or (self.mean and self.std and len(self.mean) != len(self.std)):
            raise ConfigurationError(
                f"mean={self.mean} and std={self.std} must be given together, one value per channel."
            )
        if self.std is not None and not min(self.std, default=0) > 0:
            raise ConfigurationError(f"std={self.std} must be positive.")

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and standard deviation with which the loader's images are normalized; 0 and 1 for pixels."""
        if self.mean is None or self.std is None or not self.normalized_data:
            return (0.0,), (1.0,)
        return self.mean, self.std

    def to_space(self, images: Tensor, space: Space) -> Tensor:
        """Convert images of the loader, ``(batch, channels, …)``, to the threat model's space."""
        if self.normalized_data == self._is_normalized(space):
            return images
        return self._denormalize(images) if self.normalized_data else self._normalize(images)

    def from_space(self, images: Tensor, space: Space) -> Tensor:
        """Convert images of the threat model's space to those of the loader, which the model takes."""
        if self.normalized_data == self._is_normalized(space):
            return images
        return self._normalize(images) if self.normalized_data else self._denormalize(images)

    def to_pixels(self, images: Tensor, space: Space) -> Tensor:
        """Convert images of the threat model's space to pixels, for attacks on pixels and for pictures.

        Inputs without known bounds are scaled to [0, 1], each by its own smallest and largest value.
        """
        if not self._is_normalized(space):
            return images
        if space == "input" and self.mean is None:
            flat = images.flatten(1)
            low, high = per_image(flat.amin(1), images), per_image(flat.amax(1), images)
            return (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
        return self._denormalize(images)

    def pixels_to_space(self, pixels: Tensor, space: Space) -> Tensor:
        """Convert pixels to the threat model's space."""
        return self._normalize(pixels) if self._is_normalized(space) else pixels

    def limit(self, pixel: float, space: Space, like: Tensor) -> Bound:
        """Return the value of a pixel in a space, one number or one per channel of the images ``like``."""
        if not self._is_normalized(space):
            return pixel
        return (pixel - per_channel(self._declared(self.mean), like)) / per_channel(self._declared(self.std), like)

    def _is_normalized(self, space: Space) -> bool:
        return self.normalized_data if space == "input" else space == "normalized"

    def _normalize(self, pixels: Tensor) -> Tensor:
        mean, std = self._declared(self.mean), self._declared(self.std)
        return (pixels - per_channel(mean, pixels)) / per_channel(std, pixels)

    def _denormalize(self, images: Tensor) -> Tensor:
        mean, std = self._declared(self.mean), self._declared(self.std)
        return images * per_channel(std, images) + per_channel(mean, images)

    @staticmethod
    def _declared(values: tuple[float, ...] | None) -> tuple[float, ...]:
        if values is None:
            raise UnsuitableError(
                "The normalized space needs the input normalization: give RobustnessEvaluation(mean=…, std=…), one "
                "value per channel."
            )
        return values


def channel_dim(values: int, shape: Sequence[int]) -> int | None:
    """Return the dimension of images that per-channel values belong to.

    It is the second dimension if it has as many entries as there are values, or if there is only one value; else the
    last one that fits, else the first one that fits of the dimensions between.

    Args:
        values: number of per-channel values.
        shape: shape of the images, with the batch first.

    Returns:
        The dimension; None if none fits.
    """
    if values in (1, shape[1]):
        return 1
    others = [len(shape) - 1, *range(2, len(shape) - 1)]
    return next((dim for dim in others if shape[dim] == values), None)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Return per-channel values, or one value for all, as a tensor that can be broadcast over images.

    See :func:`channel_dim` for the dimension of the channels.

    Raises:
        UnsuitableError: if no dimension of the images has as many entries as there are values.
    """
    dim = channel_dim(len(values), like.shape)
    if dim is None:
        raise UnsuitableError(f"mean and std have {len(values)} values, images have {like.shape[1]} channels.")
    constants = torch.tensor(values, dtype=like.dtype, device=like.device)
    return constants.view([-1 if k == dim else 1 for k in range(like.ndim)])
