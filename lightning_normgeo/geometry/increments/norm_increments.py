r"""Equation 16 of Sun et al. 2020 and its exact generalization: the increment of ‖W‖² from one optimizer step.

For scale-invariant weights ⟨W, g⟩ = 0 (Lemma 3, eq 15), so that a step W⁺ = W - ηg of plain SGD satisfies eq 16:
:math:`\lVert W^+\rVert^2 - \lVert W\rVert^2 = \eta^2 \lVert g \rVert^2`. The increment of any step of SGD (momentum,
dampening, Nesterov, weight decay), of Adam and AdamW, and of the other optimizers in
:mod:`lightning_normgeo.geometry.update_rules` is exactly the sum of the four terms of :class:`IncrementTerms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar, UpdateRule
from lightning_normgeo.geometry.rows import dot, map_rows


def norm_increment(rule: UpdateRule, weight: Tensor, gradient: Tensor, *state: Tensor) -> IncrementTerms:
    """Return the terms of ‖W⁺‖² - ‖W‖² for one step of ``rule``, computed before the step is taken.

    The terms are exact for any weight, scale invariant or not, up to the rounding that
    :mod:`lightning_normgeo.geometry.increments.rounding_floors` bounds. Eq 16 is the special case of plain SGD with
    ⟨W, g⟩ = 0, where only ``quadratic`` = η²‖g‖² is not zero.

    Args:
        rule: the optimizer's formula with its hyperparameters at this step, such as :class:`SGDRule` or
            :class:`AdamRule`. Not for rules that need a weight in its original shape (LARS, Muon): the monitors
            handle these.
        weight: W before the step, one unit per row, ``(units, n)``.
        gradient: g as the optimizer reads it, that is after clipping and unscaling, ``(units, n)``.
        state: the optimizer state that the rule reads, before the step, each ``(units, n)``; the rule's docstring
            names it.

    Returns:
        Four terms, each ``(units,)`` in float64 (float32 on devices without it), in units of weight².

    Cost: one pass over ``weight``, ``gradient`` and ``state``, in blocks of rows.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> rule = SGDRule(lr=0.1, weight_decay=0.01)
        >>> after = weight - rule.lr * (gradient + rule.weight_decay * weight)
        >>> increment = after.square().sum(1) - weight.square().sum(1)
        >>> torch.allclose(norm_increment(rule, weight, gradient).total, increment)
        True
    """

    def reduce(w: Tensor, g: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
        return dot(w, w), dot(w, g), dot(g, g), *rule.products(w, g, *s)

    return rule.terms(*map_rows(reduce, weight, gradient, *state))


def predicted_increment(lr: Scalar, gradient_sq: Tensor) -> Tensor:
    r"""Return the increment of ‖W‖² that eq 16 predicts: :math:`\eta^2\lVert g\rVert^2`.

    Exact for scale-invariant weights (⟨W, g⟩ = 0, eq 15) under SGD without momentum and weight decay.

    Args:
        lr: learning rate η of the step.
        gradient_sq: ‖g‖², any shape, in units of (loss per weight)².

    Returns:
        η²‖g‖², of the shape of ``gradient_sq``, in units of weight².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, target = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> loss = torch.cosine_similarity(weight.requires_grad_(), target).sum()  # invariant to the scale of each row
        >>> (gradient,) = torch.autograd.grad(loss, weight)
        >>> increment = (weight - 0.1 * gradient).square().sum(1) - weight.square().sum(1)
        >>> torch.allclose(predicted_increment(0.1, gradient.square().sum(1)), increment)
        True
    """
    return lr**2 * gradient_sq


def measured_increment(weight_update: Tensor, update_sq: Tensor) -> Tensor:
    """Return ‖W⁺‖² - ‖W‖², the left-hand side of eq 16, as 2⟨W, D⟩ + ‖D‖² with D = W⁺ - W.

    Unlike the difference of two large norms, this form loses no digits where the step is small.

    Args:
        weight_update: ⟨W, D⟩, any shape, in units of weight².
        update_sq: ‖D‖², of the same shape, in units of weight².

    Returns:
        The increment, of the same shape, in units of weight².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, update = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> increment = (weight + update).square().sum(1) - weight.square().sum(1)
        >>> torch.allclose(measured_increment((weight * update).sum(1), update.square().sum(1)), increment)
        True
    """
    return 2 * weight_update + update_sq


def identity_terms(weight_sq: Tensor, weight_update: Tensor, update_sq: Tensor, shrink: Scalar = 1.0) -> IncrementTerms:
    r"""Return the terms of a measured increment, for an optimizer whose formula is not known.

    The terms follow from W and W⁺ alone. Their sum is the measured increment whatever the optimizer did, so they
    describe a step but do not test any formula. With D = W⁺ - W and W⁺ = sW - U, where s is the factor of decoupled
    weight decay and U the rest of the step:

    .. math:: \langle W, U\rangle = (s-1)\lVert W\rVert^2 - \langle W, D\rangle, \quad
              \lVert U\rVert^2 = (s-1)^2\lVert W\rVert^2 - 2(s-1)\langle W, D\rangle + \lVert D\rVert^2

    ``weight_decay`` is :math:`(s^2-1)\lVert W\rVert^2`, ``gradient`` :math:`-2s\langle W, U\rangle`, ``quadratic``
    :math:`\lVert U\rVert^2`. ``momentum`` is zero: the momentum inside U, and coupled weight decay inside U, cannot be
    separated from the gradient. ‖U‖² loses digits where nearly all of the step is decay, since U is known only to the
    rounding of W⁺. All terms are zero for units that did not move (D = 0): they were not decayed either, as in the
    first step of SOAP.

    Args:
        weight_sq: ‖W‖² before the step, ``(units,)``, in units of weight².
        weight_update: ⟨W, D⟩, ``(units,)``, in units of weight².
        update_sq: ‖D‖², ``(units,)``, in units of weight².
        shrink: s = 1 - ηλ in (0, 1], or a tensor of such values. Default: 1, no decoupled weight decay.

    Returns:
        Four terms, each ``(units,)``, in units of weight².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, step = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> after = 0.9 * weight - step
        >>> change = after - weight
        >>> products = weight.square().sum(1), (weight * change).sum(1), change.square().sum(1)
        >>> terms = identity_terms(*products, shrink=0.9)
        >>> torch.allclose(terms.total, after.square().sum(1) - weight.square().sum(1))
        True
        >>> torch.allclose(terms.quadratic, step.square().sum(1))
        True
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
