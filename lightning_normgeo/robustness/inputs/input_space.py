"""How the images that a loader yields relate to pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from lightning_normgeo.robustness.attacks.projected_gradient import Bound, per_image

Space = Literal["pixel", "normalized", "input"]
"""Where perturbations are measured: pixels in [0, 1], (pixel - mean) / std, or the loader's own units."""


@dataclass(frozen=True)
class InputSpace:
    """The affine map between what a loader yields and pixels, and how far it is confirmed.

    Attributes:
        mean: per-channel mean of the input normalization, or one value for all.
        std: per-channel standard deviation, likewise.
        normalized_data: whether the loader yields normalized images (projects that normalize in their data
            pipeline); False where images are pixels and the model normalizes.
        source: where this is known from.
        confirmed: whether the images themselves confirm it: they are 8-bit levels with it, and not without it.
        said: what to tell the user about it.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalized_data: bool
    source: str = ""
    confirmed: bool = False
    said: str = ""

    def __post_init__(self) -> None:
        """Check that both or neither are given and fit together.

        Raises:
            ConfigurationError: otherwise.
        """
        if (self.mean is None) != (self.std is None) or (self.mean and self.std and len(self.mean) != len(self.std)):
            raise ConfigurationError(
                f"mean={self.mean} and std={self.std} must be given together, one value per channel."
            )
        if self.std is not None and not min(self.std, default=0) > 0:
            raise ConfigurationError(f"std={self.std} must be positive.")

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and standard deviation that the loader's images have been through; 0 and 1 for pixels."""
        if self.mean is None or self.std is None or not self.normalized_data:
            return (0.0,), (1.0,)
        return self.mean, self.std

    def to_space(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the loader's form into the threat model's space."""
        if self.normalized_data == self._is_normalized(space):
            return images
        return self._denormalize(images) if self.normalized_data else self._normalize(images)

    def from_space(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the threat model's space into the form the model takes."""
        if self.normalized_data == self._is_normalized(space):
            return images
        return self._normalize(images) if self.normalized_data else self._denormalize(images)

    def to_pixels(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the threat model's space to pixels, for showing.

        Inputs without bounds are spread over [0, 1], each from its least value to its largest.
        """
        if not self._is_normalized(space):
            return images
        if space == "input" and self.mean is None:
            flat = images.flatten(1)
            low, high = per_image(flat.amin(1), images), per_image(flat.amax(1), images)
            return (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
        return self._denormalize(images)

    def pixels_to_space(self, pixels: Tensor, space: Space) -> Tensor:
        """Bring pixels into the threat model's space."""
        return self._normalize(pixels) if self._is_normalized(space) else pixels

    def limit(self, pixel: float, space: Space, like: Tensor) -> Bound:
        """Return what a pixel value is in a space, for each channel of ``like``."""
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
    """The dimension of images that as many values are for: the second, else the last, else another that has as many.

    Returns:
        None where none has.
    """
    if values in (1, shape[1]):
        return 1
    others = [len(shape) - 1, *range(2, len(shape) - 1)]
    return next((dim for dim in others if shape[dim] == values), None)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Values of channels in a tensor that can be broadcast over images; see :func:`channel_dim`. One is for all.

    Raises:
        UnsuitableError: for another number of values.
    """
    dim = channel_dim(len(values), like.shape)
    if dim is None:
        raise UnsuitableError(f"mean and std have {len(values)} values, images have {like.shape[1]} channels.")
    constants = torch.tensor(values, dtype=like.dtype, device=like.device)
    return constants.view([-1 if k == dim else 1 for k in range(like.ndim)])
