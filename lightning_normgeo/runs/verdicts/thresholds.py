"""Thresholds, the limits by which verdicts are given, with the reason for each default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import is_number, short_repr

ORIGIN = "origin"
"""Key of the reason for a default in the metadata of its field."""
_Rule = tuple[str, Callable[[float], bool]]
_POSITIVE: _Rule = ("a number above 0", lambda value: value > 0)
_ABOVE_ONE: _Rule = ("a number above 1", lambda value: value > 1)
_SHARE: _Rule = ("a number between 0 and 1", lambda value: 0 < value < 1)
_RULES: dict[str, _Rule] = {
    "min_steps": ("a whole number of at least 2", lambda value: value >= 2 and value == int(value)),
    "far": _ABOVE_ONE,
    "equilibrium_factor": _ABOVE_ONE,
    "affine_factor": _ABOVE_ONE,
    "affine_growth": ("a number of at least 1", lambda value: value >= 1),
    "accuracy_margin": _SHARE,
    "kernel_share": _SHARE,
    "removed_share": _SHARE,
    "redundant_share": _SHARE,
    "alpha": _SHARE,
}


def _default(value: Any, origin: str) -> Any:
    return field(default=value, metadata={ORIGIN: origin})


@dataclass(frozen=True)
class Thresholds:
    """Limits of verdicts. The documentation has the origin of each default.

    Attributes:
        min_steps: fewest measured steps that the number of a training is made from, for a decision, at least 2.
        cos_double: largest ``|cos(W, ∇W)|`` that counts as zero in a training in float64.
        cos_single: the same in float32.
        cos_half: the same in a training with bfloat16 or float16.
        far: how many times beyond its limit a number is far from it, so that it refutes, or is a control. Above 1.
        increment_error: largest share of all increments of ‖W‖² by which a law may miss the measured ones.
        equilibrium_factor: factor within which the angle per step is in equilibrium; beyond its square it is not.
        equilibrium_times: time constants of the way to equilibrium after which the angle is judged.
        affine_share: part of a distance of γ² and σ², or β and μ, that may be left at the end.
        affine_factor: factor within which γ²/σ² must be of 1 at the end, above 1.
        affine_growth: factor by which such a distance must grow to refute the claim, at least 1.
        accuracy_margin: largest difference of two accuracies that counts as none, as a share in (0, 1).
        logit_change: largest change of a logit of a network with rescaled weights that still is the same function.
        kernel_share: share of ‖W‖² in the kernel of Σ_X from which on weights are near it, in (0, 1).
        removed_share: smallest share of removed channels at which their cost is judged, in (0, 1).
        redundant_share: share of the pairs close in (γ, β) from which on such pairs count as redundant, in (0, 1).
        alpha: level of tests, in (0, 1).

    Raises:
        ConfigurationError: For a value out of its range.
    """

    min_steps: int = _default(10, "fewer points show no trend")
    cos_double: float = _default(1e-10, "rounding and a tiny ε leave 1e-17 to 1e-12 in float64")
    cos_single: float = _default(1e-3, "ResNets in float32 leave 1e-7 to 4e-4, the most where gradients nearly cancel")
    cos_half: float = _default(2e-2, "a ResNet-18 under bfloat16 autocast leaves 4e-3")
    far: float = _default(10.0, "a decade, so that neither rounding nor TF32 decides")
    increment_error: float = _default(
        0.01, "float32 leaves 1e-5 to 1e-3; a law of another optimizer misses by 1 or more"
    )
    equilibrium_factor: float = _default(
        1.25, "simulated optimizers meet the closed forms within 3 %, networks less well"
    )
    equilibrium_times: float = _default(3.0, "e⁻³ = 5 % of the way is left")
    affine_share: float = _default(0.1, "the paper says small, and gives no number; a tenth is small")
    affine_factor: float = _default(1.25, "γ within 12 % of σ")
    affine_growth: float = _default(1.1, "ten percent are within the scatter of batches")
    accuracy_margin: float = _default(0.03, "half of the 6 points that weight decay adds in Table 1")
    logit_change: float = _default(0.01, "float32 changes logits by 1e-4; more is the ε of a normalization")
    kernel_share: float = _default(0.9, "nine tenths of ‖W‖², which leaves a tenth that learns")
    removed_share: float = _default(0.1, "a tenth is the least that is worth removing")
    redundant_share: float = _default(0.5, "more than half of them")
    alpha: float = _default(0.05, "the usual level")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            allowed, fits = _RULES.get(one.name, _POSITIVE)
            if not is_number(value) or not math.isfinite(value) or not fits(value):
                raise ConfigurationError(
                    f"thresholds.{one.name}={short_repr(value)} must be {allowed}. Default: {one.default}."
                )
