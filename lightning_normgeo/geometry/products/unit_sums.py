"""Names for the rows of matrices of sums over the elements of units, one column for each unit."""

from __future__ import annotations

from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms

BEFORE_TERMS = 5
"""Number of rows of :class:`ExplainedSums` before those of the terms."""


class UnitSums:
    """Base of what has inner products of weights, their gradients and themselves as the first rows of ``sums``."""

    sums: Tensor

    @property
    def weight_sq(self) -> Tensor:
        """‖W‖² before the step, ``(units,)``."""
        return self.sums[0]

    @property
    def inner(self) -> Tensor:
        """⟨W, g⟩, ``(units,)``."""
        return self.sums[1]

    @property
    def gradient_sq(self) -> Tensor:
        """‖g‖², ``(units,)``."""
        return self.sums[2]

    @property
    def quartic(self) -> Tensor:
        """Σ W_i⁴, ``(units,)``, which bounds the effect of rounding the weights (``storage_floor``)."""
        return self.sums[3]


class ExplainedSums(UnitSums):
    """Base of what also has η²‖g‖² as a row, and those of the terms of the increment where these are known."""

    @property
    def predicted(self) -> Tensor:
        """η²‖g‖² of eq 16, ``(units,)``, in units of weight²."""
        return self.sums[4]

    @property
    def is_explained(self) -> bool:
        """Whether the terms that the optimizer's formula adds to ‖W‖² are known."""
        return len(self.sums) > BEFORE_TERMS

    @property
    def terms(self) -> IncrementTerms | None:
        """The terms that the optimizer's formula adds to ‖W‖²; None where they are not known."""
        return IncrementTerms(*self.sums[BEFORE_TERMS:]) if self.is_explained else None
