"""The four terms of ‖W⁺‖² - ‖W‖², and the protocol of the update rules that compute them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

Scalar = float | Tensor


class IncrementTerms(NamedTuple):
    """The four terms of the increment ‖W⁺‖² - ‖W‖² of one optimizer step, each ``(units,)`` in units of weight²."""

    gradient: Tensor
    """From ⟨W, g⟩: zero for scale-invariant weights under SGD, not under Adam."""
    momentum: Tensor
    """From the inner product of W with the momentum before the step."""
    weight_decay: Tensor
    """From weight decay, coupled or decoupled, except for the contribution of coupled decay to ``quadratic``."""
    quadratic: Tensor
    """The squared length of the update, η²‖u‖², which is never negative. If it is the only term, this is eq 16."""

    @property
    def total(self) -> Tensor:
        """The sum of the four terms: the increment that the optimizer's formula explains."""
        return self.gradient + self.momentum + self.weight_decay + self.quadratic


class UpdateRule(Protocol):
    """Protocol of the update rule of one optimizer: the formula of its step, reduced to the terms of ‖W⁺‖² - ‖W‖².

    The work is in two parts, so that large tensors are read only once: ``products`` reduces blocks of rows to inner
    products, and ``terms`` combines these into the four terms.
    """

    @property
    def is_plain_sgd(self) -> bool:
        """Whether the optimizer is plain SGD, without momentum and weight decay, as eq 16 assumes."""

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight; each time rounds it."""

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the inner products that ``terms`` needs besides ‖W‖², ⟨W, g⟩ and ‖g‖², each ``(rows,)``.

        Args:
            weight: rows of W before the step, ``(rows, n)``, in float64 (float32 on devices without it).
            gradient: the same rows of g.
            state: the same rows of the optimizer's state before the step.
        """

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the terms of the increment.

        Args:
            weight_sq: ‖W‖², ``(units,)``.
            inner: ⟨W, g⟩, ``(units,)``.
            gradient_sq: ‖g‖², ``(units,)``.
            products: the values that :meth:`products` returned, each ``(units,)``.
        """
