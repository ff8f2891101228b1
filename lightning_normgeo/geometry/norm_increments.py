r"""Equation 16 of Sun et al. 2020 and its exact generalisation: what one optimizer step adds to ‖W‖².

The paper's law, for scale-invariant weights and plain SGD, is :math:`\lVert W^+\rVert^2 - \lVert W\rVert^2 =
\eta^2 \lVert g \rVert^2`. For any step of SGD (momentum, dampening, Nesterov, weight decay) and of Adam or AdamW the
increment splits exactly into the four terms of :class:`IncrementTerms`; so it does for the optimizers of
:mod:`lightning_normgeo.geometry.update_rules.adam_family`. A rule is used in two movements, so that whole
weights are read once: ``products`` reduces blocks of rows to inner products, ``terms`` turns these into the terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import dot, map_rows

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


@dataclass(frozen=True)
class SGDRule:
    r"""torch.optim.SGD: d = g + λW, b = μb⁻ + (1-τ)d, u = b (Nesterov: d + μb), W⁺ = W - ηu.

    On a weight's first step torch sets b = d, without dampening. The state is the buffer b⁻ before the step, or
    nothing where there is none. With :math:`u = c_g (g + \lambda W) + c_m b^-`:

    .. math:: \Delta\lVert W\rVert^2 = -2\eta c_g\langle W,g\rangle - 2\eta c_m\langle W,b^-\rangle
              - 2\eta c_g\lambda\lVert W\rVert^2 + \eta^2\lVert u\rVert^2

    Args:
        lr: learning rate η at this step.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: as in torch.
        maximize: as in torch, g → -g.
        first: whether there is no momentum buffer yet.
    """

    lr: Scalar
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first: bool = True

    @property
    def is_plain_sgd(self) -> bool:
        """Whether it is what eq 16 is about: neither momentum nor weight decay."""
        return not self.momentum and not self.weight_decay

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: once."""
        return 1

    @property
    def coefficients(self) -> tuple[float, float]:
        """(c_g, c_m): how the step direction weighs g + λW and the buffer before the step."""
        gradient = 1.0 if self.first else 1.0 - self.dampening
        if self.nesterov:
            return 1.0 + self.momentum * gradient, 0.0 if self.first else self.momentum**2
        return gradient, 0.0 if self.first else self.momentum

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return ⟨W, b⁻⟩ and ‖u‖², or nothing where the buffer plays no part."""
        if not state:
            return ()
        direction = self._direction(weight, gradient, state[0])
        return dot(weight, state[0]), dot(direction, direction)

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the four terms of the increment."""
        c_g, c_m = self.coefficients
        inner = -inner if self.maximize else inner
        decay = self.weight_decay
        if products:
            buffer_inner, direction_sq = products
        else:
            buffer_inner = torch.zeros_like(inner)
            direction_sq = c_g**2 * (gradient_sq + 2 * decay * inner + decay**2 * weight_sq)
        return IncrementTerms(
            gradient=-2 * self.lr * c_g * inner,
            momentum=-2 * self.lr * c_m * buffer_inner,
            weight_decay=-2 * self.lr * c_g * decay * weight_sq,
            quadratic=self.lr**2 * direction_sq,
        )

    def _direction(self, weight: Tensor, gradient: Tensor, buffer: Tensor) -> Tensor:
        c_g, c_m = self.coefficients
        direction = torch.mul(gradient, -c_g if self.maximize else c_g)
        if self.weight_decay:
            direction = direction.add_(weight, alpha=c_g * self.weight_decay)
        return direction.add_(buffer, alpha=c_m)


def norm_increment(rule: UpdateRule, weight: Tensor, gradient: Tensor, *state: Tensor) -> IncrementTerms:
    """Return the terms of ‖W⁺‖² - ‖W‖² for one step of ``rule``, before the step is taken.

    Args:
        rule: :class:`SGDRule`, :class:`AdamRule` or another.
        weight: W, ``(units, n)``.
        gradient: the gradient that the optimizer will use, clipped and unscaled, ``(units, n)``.
        state: the rule's optimizer state before the step, each ``(units, n)``.

    Example:
        >>> w, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[-4.0, 3.0]])
        >>> norm_increment(SGDRule(lr=0.1), w, g).total
        tensor([0.2500], dtype=torch.float64)
    """

    def reduce(w: Tensor, g: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
        return dot(w, w), dot(w, g), dot(g, g), *rule.products(w, g, *s)

    return rule.terms(*map_rows(reduce, weight, gradient, *state))


def predicted_increment(lr: Scalar, gradient_sq: Tensor) -> Tensor:
    """Return η²‖g‖², the increment of eq 16: exact for scale-invariant weights under plain SGD without weight decay."""
    return lr**2 * gradient_sq


def measured_increment(weight_update: Tensor, update_sq: Tensor) -> Tensor:
    """Return ‖W⁺‖² - ‖W‖² = 2⟨W, D⟩ + ‖D‖² with D = W⁺ - W: no cancellation, unlike a difference of two norms."""
    return 2 * weight_update + update_sq


def identity_terms(weight_sq: Tensor, weight_update: Tensor, update_sq: Tensor, shrink: Scalar = 1.0) -> IncrementTerms:
    r"""Return the terms of an increment that has been measured: an identity for every optimizer, and no check of any.

    With D = W⁺ - W and W⁺ = sW - U, where s is decoupled weight decay and U all the rest of the step:

    .. math:: \langle W, U\rangle = (s-1)\lVert W\rVert^2 - \langle W, D\rangle, \quad
              \lVert U\rVert^2 = (s-1)^2\lVert W\rVert^2 - 2(s-1)\langle W, D\rangle + \lVert D\rVert^2

    ``weight_decay`` is :math:`(s^2-1)\lVert W\rVert^2`, ``gradient`` :math:`-2s\langle W, U\rangle`, ``quadratic``
    :math:`\lVert U\rVert^2`; ``momentum`` is zero, since U is not told apart, nor decay inside of it. ‖U‖² loses digits
    where decay is nearly all of the step: U is known to the rounding of W⁺ only. Units that did not move have no terms:
    neither decay nor a step has happened to them, as in the first step of SOAP.

    Args:
        weight_sq: ‖W‖².
        weight_update: ⟨W, D⟩.
        update_sq: ‖D‖².
        shrink: s = 1 - ηλ, or 1.
    """
    less = (shrink - 1) * (update_sq > 0).to(update_sq.dtype)
    inner = less * weight_sq - weight_update
    length = less * (less * weight_sq - 2 * weight_update) + update_sq
    return IncrementTerms(
        gradient=-2 * (less + 1) * inner,
        momentum=torch.zeros_like(weight_sq),
        weight_decay=less * (less + 2) * weight_sq,
        quadratic=length.clamp_min(0.0),
    )


def arithmetic_floor(terms: IncrementTerms, dtype: torch.dtype) -> Tensor:
    r"""Return how far the optimizer's own rounding can move ‖W⁺‖²: :math:`4u\sum|\mathrm{term}|`, u the unit roundoff.

    The optimizer computes in ``dtype``, and η, μ, λ are rounded to it, the same way for every element. These errors
    are systematic: floors of several units add up as they are.
    """
    return 4 * (torch.finfo(dtype).eps / 2) * torch.stack(list(terms)).abs().sum(0)


def lattice_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Return what storing W⁺ adds systematically where all elements move by the same amount: Lion, Adam's first step.

    Such a step is the same fraction of a unit in the last place off for all W_i of one magnitude, at most
    :math:`2u\,\mathrm{rms}(W)/\mathrm{rms}(U)` of the step U, and ‖W⁺‖² by as much of 2⟨W, U⟩.
    """
    along, moves = (terms.gradient + terms.momentum).abs(), terms.quadratic > 0
    ratio = torch.where(moves, weight_sq / torch.where(moves, terms.quadratic, 1.0), 0.0)
    return torch.finfo(dtype).eps * ratio.sqrt() * along


def storage_floor(weight_quartic: Tensor, dtype: torch.dtype, stores: int = 1) -> Tensor:
    r"""Return how far storing W⁺ in ``dtype`` alone can move ‖W⁺‖²: :math:`4u\sqrt{\sum_i W_i^4}`, u the unit roundoff.

    Rounding moves W_i by about u|W_i| at random, hence ‖W‖² by about 0.8 u √ΣW_i⁴ rms; the factor 4 makes a bound of
    five standard deviations. An increment below it is not observable, whoever measures it.

    Args:
        weight_quartic: Σ W_i⁴, any shape. Rounding errors are independent: floors of several units add up as squares.
        dtype: what the weights are stored in.
        stores: how many times a step stores them, see :class:`UpdateRule`.
    """
    return 4 * (torch.finfo(dtype).eps / 2) * (stores * weight_quartic).sqrt()


def decay_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Return how far the rounding of weight decay can move ‖W⁺‖²: :math:`\min(1, 4q, 1/q)\,u\lVert W\rVert^2`.

    Where nothing else moves a weight, decay by q units in the last place is rounded the same way in every step, for
    q < 1/2 back to where it was: an error that grows with the number of weights, not with its root. Momentum carries
    decay on, so q is the decay of this step for 1/q, and with momentum's part for 4q. Weights that are normally or
    uniformly distributed reach up to 0.9 of this bound. Floors of several units add up as they are.

    Args:
        terms: of the increment.
        weight_sq: ‖W‖².
        dtype: what the weights are stored in.
    """
    unit = 2 * torch.finfo(dtype).eps * weight_sq.clamp_min(torch.finfo(weight_sq.dtype).tiny)
    least = terms.weight_decay.abs() / unit
    most = torch.where(least > 0, least + terms.momentum.abs() / unit, 0.0)
    share = torch.minimum((4 * most).clamp_max(1.0), 1 / least.clamp_min(1.0))
    return share * (torch.finfo(dtype).eps / 2) * weight_sq


def systematic_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding adds in the same direction for many elements: the sum of the three floors above.

    Unlike :func:`storage_floor` it adds up as it is, over units and over steps.
    """
    floors = (
        arithmetic_floor(terms, dtype),
        decay_floor(terms, weight_sq, dtype),
        lattice_floor(terms, weight_sq, dtype),
    )
    return sum(floors[1:], floors[0])
