"""Totals of cumulative increments for each parameter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.symmetries.units.weight_units import label


class Totals(NamedTuple):
    """Totals of one parameter, or of several together: float64 scalars in units of weight², and a count."""

    start: Tensor
    """‖W_0‖² before the first step that was counted."""
    predicted: Tensor
    """Σ η²‖g‖² (eq 16; Arora, Li & Lyu 2018)."""
    predicted_momentum: Tensor
    """The increments that follow from ⟨W, g⟩ = 0 under SGD with momentum and weight decay, from norms alone."""
    gradient: Tensor
    momentum: Tensor
    weight_decay: Tensor
    quadratic: Tensor
    rounding: Tensor
    """Sum of the systematic rounding errors of the optimizer, see ``systematic_floor``."""
    buffer_inner: Tensor
    """⟨W, b⟩ after the last step, as it follows from ⟨W, g⟩ = 0; not summed over steps."""
    buffer_sq: Tensor
    """‖b‖² after the last step, likewise."""
    steps: Tensor
    """How many steps were counted."""

    @property
    def terms(self) -> IncrementTerms:
        """The sums of the four terms."""
        return IncrementTerms(self.gradient, self.momentum, self.weight_decay, self.quadratic)


class SummedWeight(NamedTuple):
    """A weight whose totals are logged."""

    invariant: bool
    others: tuple[str, ...] = ()
    """The other parameters that belong to its units."""
    partners: int = 0
    """How many of them are partners of joint units."""
    floor: Tensor | float = 0.0
    """Random rounding error in ‖W‖² of storing it once."""

    def names(self, weight: str) -> list[str]:
        """Return the parameters of a weight, and all others that belong to its units."""
        return [weight, *self.others]

    def label(self, weight: str) -> str:
        """Return the name of a weight in metric keys."""
        return label(weight, self.partners)
