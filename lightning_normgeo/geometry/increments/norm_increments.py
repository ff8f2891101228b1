r"""Equation 16 of Sun et al. 2020 and its exact generalisation: what one optimizer step adds to ‖W‖².

The paper's law, for scale-invariant weights and plain SGD, is :math:`\lVert W^+\rVert^2 - \lVert W\rVert^2 =
\eta^2 \lVert g \rVert^2`. For any step of SGD (momentum, dampening, Nesterov, weight decay) and of Adam or AdamW the
increment splits exactly into the four terms of :class:`IncrementTerms`; so it does for the optimizers of
:mod:`lightning_normgeo.geometry.update_rules.adam_family`. A rule is used in two movements, so that whole
weights are read once: ``products`` reduces blocks of rows to inner products, ``terms`` turns these into the terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar, UpdateRule
from lightning_normgeo.geometry.rows import dot, map_rows


def norm_increment(rule: UpdateRule, weight: Tensor, gradient: Tensor, *state: Tensor) -> IncrementTerms:
    """Return the terms of ‖W⁺‖² - ‖W‖² for one step of ``rule``, before the step is taken.

    Args:
        rule: :class:`SGDRule`, :class:`AdamRule` or another.
        weight: W, ``(units, n)``.
        gradient: the gradient that the optimizer will use, clipped and unscaled, ``(units, n)``.
        state: the rule's optimizer state before the step, each ``(units, n)``.

    Example:
        >>> from lightning_normgeo.geometry import SGDRule
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
