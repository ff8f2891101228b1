"""Threat models: in which space a perturbation is measured, how large it may be, and where it has to stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError, closest

Space = Literal["pixel", "normalized"]


@dataclass(frozen=True)
class ThreatModel:
    """Everything that decides an accuracy under attack, in the units of ``space``.

    Attributes:
        space: ``pixel``, images in [0, 1]; ``normalized``, z = (pixel - mean) / std.
        eps: radius of the l∞ ball.
        step_size: step of one BIM iteration.
        steps: BIM iterations.
        noise_std: standard deviation of the Gaussian noise.
        lower: smallest value BIM may produce.
        upper: largest value BIM may produce.
        clip_noise: whether noisy images are clipped to [lower, upper] too.
    """

    space: Space
    eps: float
    step_size: float
    steps: int
    noise_std: float
    lower: float
    upper: float
    clip_noise: bool

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        if self.space not in ("pixel", "normalized"):
            raise ConfigurationError(f"space={self.space!r} is unknown; choose 'pixel' or 'normalized'.")
        for name in ("eps", "step_size", "noise_std"):
            if not getattr(self, name) >= 0:
                unit = "pixels in [0, 1], so 8/255 is 0.0314" if self.space == "pixel" else "standard deviations"
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be at least 0, in {unit}.")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigurationError(f"steps={self.steps!r} must be an integer, at least 1.")
        if not self.lower < self.upper:
            raise ConfigurationError(f"lower={self.lower!r} must be less than upper={self.upper!r}.")
        if self.space == "pixel" and self.eps > 1:
            raise ConfigurationError(
                f"eps={self.eps!r} is larger than the pixel range [0, 1]. "
                f"Did you mean {self.eps:g}/255 = {self.eps / 255:.4f}?"
            )

    def settings(self) -> dict[str, Any]:
        """Return all settings as plain values, to be stored beside every result."""
        return asdict(self)


PRESETS: dict[str, ThreatModel] = {
    # noise of the same size as Galloway's, in pixels
    "pixel-8-255": ThreatModel("pixel", 8 / 255, 2 / 255, 10, 0.05, 0.0, 1.0, clip_noise=True),
    # github.com/AngusG/bn-advex-zhang-fixup, cifar_eval_advertorch.py: the clip at ±2 cuts off real pixel values,
    # and the noise is not clipped
    "galloway2019": ThreatModel("normalized", 0.03, 0.003, 20, 0.25, -2.0, 2.0, clip_noise=False),
}


def threat_model(preset: str, **changes: float | int | bool | None) -> ThreatModel:
    """Return the threat model called ``preset`` with the given settings replaced; None keeps the preset's.

    Raises:
        ConfigurationError: for an unknown preset or a setting out of range.
    """
    if preset not in PRESETS:
        raise ConfigurationError(f"preset={preset!r} is unknown; choose one of: {closest(preset, PRESETS)}.")
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class InputSpace:
    """How the images that a loader yields relate to pixels in [0, 1].

    Attributes:
        mean: per-channel mean of the input normalization.
        std: per-channel standard deviation.
        normalized_data: whether the loader yields normalized images (projects that normalize in their data
            pipeline); False where images are pixels and the model normalizes.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalized_data: bool

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

    def to_space(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the loader's form into the threat model's space."""
        if self.normalized_data == (space == "normalized"):
            return images
        return self._normalize(images) if space == "normalized" else self._denormalize(images)

    def from_space(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the threat model's space into the form the model takes."""
        if self.normalized_data == (space == "normalized"):
            return images
        return self._denormalize(images) if space == "normalized" else self._normalize(images)

    def to_pixels(self, images: Tensor, space: Space) -> Tensor:
        """Bring images from the threat model's space to pixels, for showing."""
        return images if space == "pixel" else self._denormalize(images)

    def _normalize(self, pixels: Tensor) -> Tensor:
        return (pixels - self._channels(self.mean, pixels)) / self._channels(self.std, pixels)

    def _denormalize(self, images: Tensor) -> Tensor:
        return images * self._channels(self.std, images) + self._channels(self.mean, images)

    @staticmethod
    def _channels(values: Sequence[float] | None, like: Tensor) -> Tensor:
        if values is None:
            raise ConfigurationError(
                "The normalized space needs the input normalization: give RobustnessEvaluation(mean=…, std=…), one "
                "value per channel."
            )
        if len(values) != like.shape[1]:
            raise ConfigurationError(f"mean and std have {len(values)} values, images have {like.shape[1]} channels.")
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, *[1] * (like.ndim - 2))
