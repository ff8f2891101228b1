"""The terms of ‖W⁺‖² - ‖W‖², and the protocol of the update rules that compute them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

Scalar = float | Tensor


class IncrementTerms(NamedTuple):
    """The terms of ‖W⁺‖² - ‖W‖², each ``(units,)`` in units of weight²."""

    gradient: Tensor
    """From ⟨W, g⟩: zero for scale-invariant weights under SGD, not under Adam."""
    momentum: Tensor
    """From the inner product of W with the momentum before the step."""
    weight_decay: Tensor
    """From weight decay, coupled or decoupled, without its part in ``quadratic``."""
    quadratic: Tensor
    """The squared length of the update, η²‖u‖²: never negative; eq 16 where it stands alone."""

    @property
    def total(self) -> Tensor:
        """The increment that the optimizer's formula explains: the sum of the terms."""
        return self.gradient + self.momentum + self.weight_decay + self.quadratic


class UpdateRule(Protocol):
    """How one optimizer moves a weight, as far as norms are concerned."""

    @property
    def is_plain_sgd(self) -> bool:
        """Whether it is what eq 16 is about: SGD without momentum and weight decay."""

    @property
    def stores(self) -> int:
        """How many times a step stores the weight, and rounds it."""

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Reduce wide ``(rows, n)`` blocks to the inner products that ``terms`` needs beyond ‖W‖², ⟨W,g⟩, ‖g‖²."""

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the terms from ‖W‖², ⟨W, g⟩, ‖g‖² and what ``products`` returned."""
