"""Threat models: the space, the size and the bounds of perturbations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.search.ball import Bound
from lightning_normgeo.robustness.inputs.input_space import InputSpace as InputSpace
from lightning_normgeo.robustness.inputs.input_space import Space as Space
from lightning_normgeo.robustness.inputs.input_space import per_channel
from lightning_normgeo.utilities.checked_values import entry_of, is_number, short_repr

Limit = float | tuple[float, ...] | None
"""A bound on image values: one number, one per channel, or None for the value of a black or white pixel."""


def _pairs(lower: Limit, upper: Limit) -> list[tuple[float, float]]:
    """Return the lower and upper bound of each channel; none if one of them depends on the images."""
    if lower is None or upper is None:
        return []
    lows = lower if isinstance(lower, tuple) else (lower,)
    highs = upper if isinstance(upper, tuple) else (upper,)
    count = max(len(lows), len(highs))
    # a single number holds for all channels
    return list(zip(lows * (count // len(lows)), highs * (count // len(highs)), strict=False))


_UNITS = {
    "pixel": "pixels in [0, 1], so 8/255 is 0.0314",
    "normalized": "standard deviations",
    "input": "the units of the inputs",
}


@dataclass(frozen=True)
class ThreatModel:
    """Size and bounds of perturbations, in the units of ``space``.

    Attributes:
        space: ``pixel``, images in [0, 1]; ``normalized``, z = (pixel - mean) / std; ``input``, the loader's own units.
        eps: radius of the l∞ ball, at least 0; in pixels at most 1.
        step_size: step size of BIM and PGD in l∞, above 0 unless ``eps`` is 0; in l2 its ratio to the radius is the
            same.
        steps: number of BIM and PGD iterations, at least 1.
        noise_std: standard deviation of the Gaussian noise, at least 0.
        lower: smallest value an attacked image may have; one per channel, or None for the value of a black pixel.
        upper: largest value an attacked image may have; one per channel, or None for the value of a white pixel.
        clip_noise: whether noisy images are clipped to [lower, upper] too.
        eps_l2: radius of the l2 ball, at least 0; None for eps·√d with d values per image, the l2 norm of the longest
            vector in the l∞ ball.
        box_first: order of the projections in l2, see :class:`~lightning_normgeo.robustness.Ball`.

    Raises:
        ConfigurationError: naming the setting, its value and what is allowed.
    """

    space: Space
    eps: float
    step_size: float
    steps: int
    noise_std: float
    lower: Limit
    upper: Limit
    clip_noise: bool
    eps_l2: float | None = None
    box_first: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        if self.space not in _UNITS:
            raise ConfigurationError(
                f"space={short_repr(self.space)} is unknown; choose 'pixel', 'normalized' or 'input'."
            )
        for name in ("eps", "step_size", "noise_std", "eps_l2"):
            value = getattr(self, name)
            if not ((is_number(value) and 0 <= value < math.inf) or (name == "eps_l2" and value is None)):
                hint = " Give a number, without quotes." if isinstance(value, str) else ""
                raise ConfigurationError(
                    f"{name}={short_repr(value)} must be at least 0 and finite, in {_UNITS[self.space]}.{hint}"
                )
        if self.step_size == 0 < self.eps:
            raise ConfigurationError(
                f"step_size={self.step_size!r} must be above 0: steps of that size leave the image where it is. Leave "
                "it out for the preset's share of eps."
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigurationError(f"steps={short_repr(self.steps)} must be an integer, at least 1.")
        for name in ("lower", "upper"):
            limit = getattr(self, name)
            numbers = limit if isinstance(limit, tuple) else (limit,)
            if not numbers or not (limit is None or all(is_number(number) for number in numbers)):
                raise ConfigurationError(f"{name}={short_repr(limit)} must be a number, or one for each channel.")
        ends = _pairs(self.lower, self.upper)
        if not all(low < high for low, high in ends):
            raise ConfigurationError(f"lower={self.lower!r} must be less than upper={self.upper!r}.")
        if self.space == "pixel" and self.eps > 1:
            raise ConfigurationError(
                f"eps={self.eps!r} is larger than the pixel range [0, 1]. "
                f"Did you mean {self.eps:g}/255 = {self.eps / 255:.4f}?"
            )

    def box(self, inputs: InputSpace, images: Tensor) -> tuple[Bound, Bound]:
        """Return the lower and upper bound of image values in the threat model's space.

        Args:
            inputs: how images relate to pixels, which gives the values of black and white pixels.
            images: ``(batch, channels, …)`` in the threat model's space.

        Returns:
            Two numbers, or two tensors that can be broadcast over ``images``.

        Raises:
            ConfigurationError: if the number of values is not the number of channels, or ``lower`` is not less than
                ``upper``.
        """
        ends: list[Bound] = []
        for name, limit, pixel in (("lower", self.lower, 0.0), ("upper", self.upper, 1.0)):
            if limit is None:
                ends.append(inputs.limit(pixel, self.space, images))
            elif isinstance(limit, tuple):
                if len(limit) != images.shape[1]:
                    raise ConfigurationError(
                        f"{name}={limit} has {len(limit)} values, images have {images.shape[1]} channels."
                    )
                ends.append(per_channel(limit, images))
            else:
                ends.append(limit)
        if any(isinstance(end, Tensor) for end in ends):  # clamp takes two numbers or two tensors, not one of each
            ends = [torch.as_tensor(end, dtype=images.dtype, device=images.device) for end in ends]
        if (self.lower is None) != (self.upper is None) and not bool(torch.as_tensor(ends[0] < ends[1]).all()):
            raise ConfigurationError(
                f"lower={self.lower!r} must be less than upper={self.upper!r}, where None is the value of a black "
                "pixel (lower) or of a white one (upper)."
            )
        return ends[0], ends[1]

    @property
    def unit_range(self) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
        """The mean and standard deviation of the normalization that maps [lower, upper] to [0, 1].

        None and None if a bound is infinite, or depends on the images.
        """
        lows, highs = zip(*_pairs(self.lower, self.upper) or [(-math.inf, math.inf)], strict=True)
        if not all(map(math.isfinite, (*lows, *highs))):
            return None, None
        spans = [high - low for low, high in zip(lows, highs, strict=True)]
        return tuple(-low / span for low, span in zip(lows, spans, strict=True)), tuple(1 / span for span in spans)

    def settings(self) -> dict[str, Any]:
        """Return all settings as plain values, to be stored with the results."""
        return asdict(self)


PRESETS: dict[str, ThreatModel] = {
    # the noise of Galloway et al., 0.25 in units of the standard deviation of pixels, is about 0.05 in pixels
    "pixel-8-255": ThreatModel("pixel", 8 / 255, 2 / 255, 10, 0.05, 0.0, 1.0, clip_noise=True, eps_l2=0.5),
    # as in github.com/AngusG/bn-advex-zhang-fixup, cifar_eval_advertorch.py: clipping to ±2 changes pixel values that
    # occur in clean images, and the noise is not clipped
    "galloway2019": ThreatModel("normalized", 0.03, 0.003, 20, 0.25, -2.0, 2.0, clip_noise=False, box_first=True),
    # the same, clipped to the values of black and white pixels
    "galloway2019-boxed": ThreatModel(
        "normalized", 0.03, 0.003, 20, 0.25, None, None, clip_noise=False, box_first=True
    ),
}
"""Threat models by name. Their units are those of their spaces: pixels in [0, 1], or standard deviations."""
INPUT_UNITS = ThreatModel("input", 1.0, 0.25, 10, 1.0, -math.inf, math.inf, clip_noise=True, eps_l2=1.0)
"""Threat model of ``space="input"``: only the step-to-radius ratio and the steps are used, the rest has to be given."""


def threat_model(
    preset: str, space: Space | None = None, **changes: float | int | bool | tuple[float, ...] | None
) -> ThreatModel:
    """Return the threat model of a preset, with some of its settings replaced.

    Args:
        preset: a name of :data:`PRESETS`.
        space: ``input`` for the inputs' own units, or the preset's space. Default: the preset's.
        **changes: fields of :class:`ThreatModel` to replace; None keeps the preset's value.

    Raises:
        ConfigurationError: for an unknown preset, a space that does not go with it, or a setting out of range.
    """
    start = entry_of("preset", preset, PRESETS)
    if space not in (None, start.space):
        if space != "input":
            raise ConfigurationError(
                f"space={space!r} does not go with preset={preset!r}, which is measured in {start.space!r}. Leave it "
                "out, or choose 'input' for the units of the inputs."
            )
        start = INPUT_UNITS
    return replace(start, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
