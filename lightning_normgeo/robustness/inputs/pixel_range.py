"""Checks that images are pixels in [0, 1], without or with a normalization undone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.search.losses import at_least_float32
from lightning_normgeo.robustness.inputs.input_space import InputSpace

_ROUNDING = 1e-6
"""Largest distance outside [0, 1] that rounding explains for images that are pixels."""
_UNDONE = 1e-3
"""Largest distance outside [0, 1] after undoing a normalization whose constants have four digits."""


def are_pixels(images: Tensor) -> bool:
    """Whether images are within [0, 1] without undoing any normalization."""
    low, high = span_of(images.detach())
    return low >= -_ROUNDING and high <= 1 + _ROUNDING


def span_of(images: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest finite value; NaN and NaN if no value is finite."""
    low, high = images.amin().item(), images.amax().item()
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    found = images[images.isfinite()]
    return (found.amin().item(), found.amax().item()) if len(found) else (math.nan, math.nan)


def fits(images: Tensor, inputs: InputSpace) -> bool:
    """Whether images are within [0, 1] once they are converted to pixels."""
    try:
        check_range(images, inputs)
    except UnsuitableError:
        return False
    return True


def check_range(images: Tensor, inputs: InputSpace) -> None:
    """Check that images are within [0, 1] once they are converted to pixels.

    Args:
        images: ``(batch, channels, …)``, as the loader yields them.
        inputs: how images relate to pixels.

    Raises:
        UnsuitableError: if they are not.
    """
    loaded = images.detach()
    low, high = span_of(inputs.to_space(at_least_float32(loaded), "pixel"))
    slack = _ROUNDING
    if inputs.normalized_data:  # rounding of half precision is larger than that of the constants
        largest_value = max(map(abs, span_of(loaded)))
        largest_std = max(inputs.std or (1.0,))
        slack = max(_UNDONE, torch.finfo(images.dtype).eps * largest_value * largest_std)
    if low >= -slack and high <= 1 + slack:
        return
    if inputs.normalized_data:
        raise UnsuitableError(
            f"With the declared mean={inputs.mean} and std={inputs.std} the images are pixels in [{low:.7g}, "
            f"{high:.7g}], not in [0, 1]. Declare the mean and std that the data pipeline really uses; "
            "leave both out where images are pixels and the model normalizes."
        )
    raise UnsuitableError(
        f"Images are expected to be pixels in [0, 1] but span [{low:.7g}, {high:.7g}], and no normalization is found "
        "that explains it. If the data pipeline normalizes them, give RobustnessEvaluation the same mean=… and std=…, "
        "not those that the model applies itself; if they have a range of their own, value_range=[low, high] (0…255: "
        "divide by 255, or value_range=[0, 255]); if a resize or noise has left [0, 1], clamp them; if they are no "
        "pixels, space='input' with eps, lower and upper in their own units."
    )
