r"""Base class of the update rules of Adam and its relatives, which scale each element separately.

All of them move a weight by :math:`W^+ = sW - (G + M + \Lambda)`. G, M and Λ are the parts of the step that come from
the gradient, from the momentum before the step, and from weight decay added to the gradient; s is the factor of
decoupled weight decay. Hence

.. math:: \Delta\lVert W\rVert^2 = (s^2-1)\lVert W\rVert^2 - 2s\langle W, G + M + \Lambda\rangle
          + \lVert G + M + \Lambda\rVert^2

⟨W, G⟩ is not zero for scale-invariant weights, since G is not parallel to the gradient: eq 16 of Sun et al. 2020 does
not cover these optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar
from lightning_normgeo.geometry.rows import dot


class StepParts(NamedTuple):
    """Parts G, M and Λ that one step subtracts from sW, of the shape of W; None for parts that the optimizer lacks."""

    gradient: Tensor
    momentum: Tensor | None = None
    weight_decay: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ElementwiseRule(ABC):
    r"""Base of the rules :math:`W^+ = sW - (G + M + \Lambda)`. For your own optimizer, implement :meth:`parts`.

    Args:
        lr: learning rate η at this step.
        weight_decay: λ. Default: 0.
        decoupled: whether decay multiplies the weight with 1 - ηλ, as in AdamW, instead of being added to the
            gradient. Default: False.
        maximize: whether the optimizer follows +g instead of -g, as in torch. Default: False.
        dtype: type that 1 - ηλ is rounded to, in the same way for every element: the weight's, or float32 for weights
            of 16 bits, for which torch computes in float32. Default: float64, also right for optimizers that subtract
            ηλW instead of multiplying with 1 - ηλ.
    """

    lr: Scalar
    weight_decay: Scalar = 0.0
    decoupled: bool = False
    maximize: bool = False
    dtype: torch.dtype = torch.float64
    is_plain_sgd: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    """Whether products of a row are sums over its elements, so that long rows can be cut. It holds for the class that
    sets it and for no subclass, whose ``parts`` may need whole rows."""

    @abstractmethod
    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ that this step subtracts from sW, η included, each ``(rows, n)``.

        Args:
            weight: W before the step, ``(rows, n)``, in float64 (float32 on devices without it).
            gradient: g as the optimizer reads it, ``(rows, n)``.
            state: the optimizer's state before the step, as the rule's docstring describes it.
        """

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: decoupled decay is one more operation on it."""
        return 2 if self.decoupled and some(self.weight_decay) else 1

    @property
    def shrink(self) -> Scalar:
        """The factor s that decoupled weight decay multiplies W with; 1 without it."""
        if not self.decoupled:
            return 1.0
        return shrunk(1 - self.lr * self.weight_decay, self.dtype)

    @property
    def coupled(self) -> Scalar:
        """The weight decay λ that is added to the gradient; 0 where decay is decoupled."""
        return 0.0 if self.decoupled else self.weight_decay

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return ⟨W, G⟩, ⟨W, M⟩, ⟨W, Λ⟩ and ‖G + M + Λ‖²."""
        return self.reduced(weight, self.parts(weight, gradient, *state))

    def reduced(self, weight: Tensor, parts: StepParts, shrink: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the products of the rows of W with the parts, followed by ``shrink`` for each row if it is given."""
        none = weight.new_zeros(weight.shape[0])
        inner = [none if part is None else dot(weight, part) for part in parts]
        whole = sum((part for part in parts[1:] if part is not None), parts.gradient)
        own = () if shrink is None else (none + shrink,)
        return *inner, dot(whole, whole), *own

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the four terms of the increment."""
        del inner, gradient_sq
        by_gradient, by_momentum, by_decay, whole_sq, *own = products
        shrink = own[0] if own else self.shrink
        factor = -2 * shrink
        return IncrementTerms(
            gradient=factor * by_gradient,
            momentum=factor * by_momentum,
            # (s² - 1) as (s - 1)(s + 1): no cancellation where ηλ is tiny
            weight_decay=(shrink - 1) * (shrink + 1) * weight_sq + factor * by_decay,
            quadratic=whole_sq,
        )

    def full(self, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return g, negated if the optimizer maximizes, and g̃ = g + λW (g̃ = g where decay is decoupled)."""
        gradient = -gradient if self.maximize else gradient
        return gradient, gradient + self.coupled * weight if some(self.coupled) else gradient

    def divided(
        self,
        weight: Tensor,
        gradient: Tensor,
        momentum: Tensor | None,
        rates: tuple[Scalar, Scalar],
        by: Tensor | float,
    ) -> StepParts:
        """Return the parts G = r_g g/D, M = r_m m/D and Λ = r_g λW/D.

        Args:
            weight: W.
            gradient: g.
            momentum: m before the step; None where there is none yet.
            rates: (r_g, r_m).
            by: D.
        """
        by_gradient, by_momentum = rates
        return StepParts(
            (gradient * by_gradient).div_(by),
            None if momentum is None else (momentum * by_momentum).div_(by),
            (weight * (by_gradient * self.coupled)).div_(by) if some(self.coupled) else None,
        )


def average(before: Tensor | None, value: Tensor, decay: Scalar) -> Tensor:
    """Return the exponential moving average after ``value``; ``before`` is None for an average that starts at zero."""
    if before is None:
        return value * (1 - decay)
    if isinstance(decay, Tensor):  # torch.lerp would need it in the dtype of the others
        return (value * (1 - decay)).add_(before * decay)
    return torch.lerp(before, value, 1 - decay)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real type in which torch computes elementwise on tensors of ``dtype``: float32 for 16-bit types."""
    real = dtype.to_real()
    return torch.float32 if torch.finfo(real).bits < 32 else real


def shrunk(factor: Scalar, dtype: torch.dtype) -> Scalar:
    """Return the factor 1 - ηλ, rounded as torch rounds it before multiplying a tensor of ``dtype`` with it."""
    exact = arithmetic_dtype(dtype)
    if isinstance(factor, Tensor):
        return factor.to(exact).to(factor.dtype)
    return float(torch.tensor(factor, dtype=exact))


def some(value: Scalar) -> bool:
    """Whether a hyperparameter may differ from zero; True for any tensor on an accelerator."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return True  # comparing it would make the CPU wait for the device
    return bool(value != 0)
