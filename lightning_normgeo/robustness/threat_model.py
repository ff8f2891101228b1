"""Threat models: in which space a perturbation is measured, how large it may be, and where it has to stay."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.projected_gradient import Bound
from lightning_normgeo.robustness.inputs.input_space import InputSpace as InputSpace
from lightning_normgeo.robustness.inputs.input_space import Space as Space
from lightning_normgeo.robustness.inputs.input_space import per_channel
from lightning_normgeo.utilities.checked_values import entry_of, is_number, shown

Limit = float | tuple[float, ...] | None
"""An end of the box: for all channels, for each, or None for where black and white pixels are."""


def _pairs(lower: Limit, upper: Limit) -> list[tuple[float, float]]:
    """Return the ends that can be compared without knowing the images."""
    if lower is None or upper is None:
        return []
    lows = lower if isinstance(lower, tuple) else (lower,)
    highs = upper if isinstance(upper, tuple) else (upper,)
    count = max(len(lows), len(highs))
    return list(zip(lows * (count // len(lows)), highs * (count // len(highs)), strict=False))


_UNITS = {
    "pixel": "pixels in [0, 1], so 8/255 is 0.0314",
    "normalized": "standard deviations",
    "input": "the units of the inputs",
}


@dataclass(frozen=True)
class ThreatModel:
    """Everything that decides an accuracy under attack, in the units of ``space``.

    Attributes:
        space: ``pixel``, images in [0, 1]; ``normalized``, z = (pixel - mean) / std; ``input``, the units of the
            loader, whatever they are.
        eps: radius of the l∞ ball.
        step_size: step of one BIM iteration in l∞; in l2 it has the same ratio to the radius.
        steps: BIM iterations.
        noise_std: standard deviation of the Gaussian noise.
        lower: smallest value BIM may produce; one for each channel, or None for that of a black pixel.
        upper: largest value BIM may produce, likewise.
        clip_noise: whether noisy images are clipped to [lower, upper] too.
        eps_l2: radius of the l2 ball; None for eps·√d with d values per image, the longest vector of the l∞ ball.
        box_first: order of box and ball in l2, see :class:`~lightning_normgeo.robustness.Ball`.
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
            raise ConfigurationError(f"space={shown(self.space)} is unknown; choose 'pixel', 'normalized' or 'input'.")
        for name in ("eps", "step_size", "noise_std", "eps_l2"):
            value = getattr(self, name)
            if not ((is_number(value) and 0 <= value < math.inf) or (name == "eps_l2" and value is None)):
                hint = " Give a number, without quotes." if isinstance(value, str) else ""
                raise ConfigurationError(
                    f"{name}={shown(value)} must be at least 0 and finite, in {_UNITS[self.space]}.{hint}"
                )
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigurationError(f"steps={shown(self.steps)} must be an integer, at least 1.")
        for name in ("lower", "upper"):
            limit = getattr(self, name)
            numbers = limit if isinstance(limit, tuple) else (limit,)
            if not numbers or not (limit is None or all(is_number(number) for number in numbers)):
                raise ConfigurationError(f"{name}={shown(limit)} must be a number, or one for each channel.")
        ends = _pairs(self.lower, self.upper)
        if not all(low < high for low, high in ends):
            raise ConfigurationError(f"lower={self.lower!r} must be less than upper={self.upper!r}.")
        if self.space == "pixel" and self.eps > 1:
            raise ConfigurationError(
                f"eps={self.eps!r} is larger than the pixel range [0, 1]. "
                f"Did you mean {self.eps:g}/255 = {self.eps / 255:.4f}?"
            )

    def box(self, inputs: InputSpace, images: Tensor) -> tuple[Bound, Bound]:
        """Return both ends of the box in the threat model's space.

        Args:
            inputs: says what black and white are there.
            images: of that space.

        Raises:
            ConfigurationError: where there is not one value for each channel.
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
        if any(isinstance(end, Tensor) for end in ends):  # clamp takes two numbers or two tensors
            ends = [torch.as_tensor(end, dtype=images.dtype, device=images.device) for end in ends]
        if (self.lower is None) != (self.upper is None) and not bool(torch.as_tensor(ends[0] < ends[1]).all()):
            raise ConfigurationError(
                f"lower={self.lower!r} must be less than upper={self.upper!r}, where None is what a black or a white "
                "pixel is."
            )
        return ends[0], ends[1]

    @property
    def unit_range(self) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
        """Return the mean and standard deviation that map the box to [0, 1]; None for a box without ends."""
        lows, highs = zip(*_pairs(self.lower, self.upper) or [(-math.inf, math.inf)], strict=True)
        if not all(map(math.isfinite, (*lows, *highs))):
            return None, None
        spans = [high - low for low, high in zip(lows, highs, strict=True)]
        return tuple(-low / span for low, span in zip(lows, spans, strict=True)), tuple(1 / span for span in spans)

    def settings(self) -> dict[str, Any]:
        """Return all settings as plain values, to be stored beside every result."""
        return asdict(self)


PRESETS: dict[str, ThreatModel] = {
    # noise of the same size as Galloway's, in pixels
    "pixel-8-255": ThreatModel("pixel", 8 / 255, 2 / 255, 10, 0.05, 0.0, 1.0, clip_noise=True, eps_l2=0.5),
    # github.com/AngusG/bn-advex-zhang-fixup, cifar_eval_advertorch.py: the clip at ±2 cuts off real pixel values,
    # and the noise is not clipped
    "galloway2019": ThreatModel("normalized", 0.03, 0.003, 20, 0.25, -2.0, 2.0, clip_noise=False, box_first=True),
    # the same with the box that pixels have
    "galloway2019-boxed": ThreatModel(
        "normalized", 0.03, 0.003, 20, 0.25, None, None, clip_noise=False, box_first=True
    ),
}
INPUT_UNITS = ThreatModel("input", 1.0, 0.25, 10, 1.0, -math.inf, math.inf, clip_noise=True, eps_l2=1.0)
"""Of ``space="input"``: the ratio of step to radius, and the steps; radii and bounds have to be given."""


def threat_model(
    preset: str, space: Space | None = None, **changes: float | int | bool | tuple[float, ...] | None
) -> ThreatModel:
    """Return the threat model called ``preset`` with the given settings replaced; None keeps the preset's.

    Args:
        preset: one of :data:`PRESETS`.
        space: another space than the preset's; only ``input``, whose units no preset knows.
        **changes: fields of :class:`ThreatModel`.

    Raises:
        ConfigurationError: for an unknown preset or a setting out of range.
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
