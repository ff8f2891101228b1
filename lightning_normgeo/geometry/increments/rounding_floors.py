"""Bounds on what rounding adds to ‖W⁺‖² - ‖W‖², in the optimizer's arithmetic and in the storage of weights.

Eq 16 of Sun et al. 2020 and its generalization hold in exact arithmetic. A measured increment may differ from the
formula by these bounds without any other cause; u is the unit roundoff of a dtype, half of ``torch.finfo(dtype).eps``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.products import compiled


def arithmetic_floor(terms: IncrementTerms, dtype: torch.dtype) -> Tensor:
    r"""Return a bound on the change of ‖W⁺‖² by the optimizer's own rounding: :math:`4u\sum|\mathrm{term}|`.

    The optimizer computes in ``dtype`` and rounds η, μ and λ to it, in the same way for every element. These errors
    are systematic: the bounds of several units add up linearly.

    Args:
        terms: the terms of the increment, each ``(units,)``.
        dtype: the floating-point type that the optimizer computes in.

    Returns:
        The bound, ``(units,)``, in units of weight².

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, norm_increment
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> exact = norm_increment(SGDRule(lr=0.1), weight, gradient)
        >>> rounded_lr = torch.tensor(0.1, dtype=torch.float32).item()
        >>> rounded = norm_increment(SGDRule(lr=rounded_lr), weight, gradient)
        >>> bool(((rounded.total - exact.total).abs() <= arithmetic_floor(exact, torch.float32)).all())
        True
    """
    return _arithmetic(torch.stack(list(terms)).abs(), dtype)


def lattice_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Return a bound on the systematic error from storing W⁺ where all elements move by the same amount.

    Lion and the first step of Adam move every element by the same amount. Rounding then changes that amount by the
    same fraction of a unit in the last place for all W_i of one magnitude: by at most
    :math:`2u\,\mathrm{rms}(W)/\mathrm{rms}(U)` of the step U, and ‖W⁺‖² by the same fraction of 2⟨W, U⟩, which includes
    weight decay that is added to the gradient.

    Args:
        terms: the terms of the increment, each ``(units,)``.
        weight_sq: ‖W‖² before the step, ``(units,)``, in units of weight².
        dtype: the floating-point type that the weights are stored in.

    Returns:
        The bound, ``(units,)``, in units of weight²; zero for units that do not move. Bounds of several units add up
        linearly.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import LionRule, norm_increment
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.rand(1, 1000).double() + 1  # float32 values, with a spacing of 2⁻²³
        >>> terms = norm_increment(LionRule(lr=1e-6), weight, torch.ones_like(weight))
        >>> stored = (weight - 1e-6).float().double()
        >>> error = (stored.square() - (weight - 1e-6).square()).sum(1).abs()
        >>> random, weight_sq = storage_floor(weight.pow(4).sum(1), torch.float32), weight.square().sum(1)
        >>> bool(random < error <= lattice_floor(terms, weight_sq, torch.float32))
        True
    """
    return _lattice(terms, terms.weight_decay.abs(), weight_sq, dtype)


def storage_floor(weight_quartic: Tensor, dtype: torch.dtype, stores: int = 1) -> Tensor:
    r"""Return a bound on the random error of ‖W⁺‖² from storing W⁺ in ``dtype``: :math:`4u\sqrt{\sum_i W_i^4}`.

    Rounding moves W_i by about u|W_i| at random, hence ‖W‖² by about :math:`0.8\,u\sqrt{\sum_i W_i^4}` (root mean
    square). The factor 4 makes this a bound of five standard deviations. A smaller increment cannot be observed in
    stored weights.

    Args:
        weight_quartic: Σ W_i⁴, any shape, in units of weight⁴. Rounding errors are independent: the bounds of several
            units add up as squares.
        dtype: the floating-point type that the weights are stored in.
        stores: the number of times that one step stores the weights, see :class:`UpdateRule`. Default: 1.

    Returns:
        The bound, of the shape of ``weight_quartic``, in units of weight².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(5, 1000, dtype=torch.float64)
        >>> error = (weight.float().double().square() - weight.square()).sum(1)
        >>> bool((error.abs() <= storage_floor(weight.pow(4).sum(1), torch.float32)).all())
        True
    """
    return 4 * (torch.finfo(dtype).eps / 2) * (stores * weight_quartic).sqrt()


def decay_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Return a bound on the change of ‖W⁺‖² by rounding weight decay: :math:`\min(1, 4q, 1/q)\,u\lVert W\rVert^2`.

    Where only weight decay moves a weight, by q units in the last place, every step rounds it in the same way; for
    q < 1/2 back to the value it had. The error therefore grows with the number of elements, not with its square root.
    Momentum continues the decay of earlier steps, so q is the decay of this step in 1/q, and includes the momentum
    term in 4q. Normally or uniformly distributed weights reach up to 0.9 of this bound.

    Args:
        terms: the terms of the increment, each ``(units,)``.
        weight_sq: ‖W‖² before the step, ``(units,)``, in units of weight².
        dtype: the floating-point type that the weights are stored in.

    Returns:
        The bound, ``(units,)``, in units of weight². Bounds of several units add up linearly.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, norm_increment
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(3, 8).double()  # float32 values
        >>> terms = norm_increment(SGDRule(lr=0.1, weight_decay=1e-7), weight, torch.zeros_like(weight))
        >>> torch.equal((weight - 1e-8 * weight).float().double(), weight)  # the whole decay is rounded away
        True
        >>> bool((terms.total.abs() <= decay_floor(terms, weight.square().sum(1), torch.float32)).all())
        True
    """
    return _decay(terms.weight_decay.abs(), terms.momentum.abs(), weight_sq, dtype)


def systematic_floor(terms: IncrementTerms, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bound on the rounding errors with the same sign for many elements: the sum of the three such floors.

    These are :func:`arithmetic_floor`, :func:`decay_floor` and :func:`lattice_floor`. Unlike :func:`storage_floor`,
    the bound adds up linearly over units and over steps.

    Args:
        terms: the terms of the increment, each ``(units,)``.
        weight_sq: ‖W‖² before the step, ``(units,)``, in units of weight².
        dtype: the floating-point type that the weights are stored in and that the optimizer computes in.

    Returns:
        The bound, ``(units,)``, in units of weight².

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, norm_increment
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 1000).double()  # float32 values
        >>> terms = norm_increment(SGDRule(lr=0.1), weight, gradient)
        >>> stored = (weight.float() - 0.1 * gradient.float()).double()
        >>> residual = (stored.square() - weight.square()).sum(1) - terms.total
        >>> random, weight_sq = storage_floor(weight.pow(4).sum(1), torch.float32), weight.square().sum(1)
        >>> bool((residual.abs() <= random + systematic_floor(terms, weight_sq, torch.float32)).all())
        True
    """
    if weight_sq.is_cuda and compiled.readable([weight_sq]):
        found: Tensor | None = compiled.fast_if_used(
            lambda kernels: kernels.rounding_bounds(terms, weight_sq, dtype), "triton_launches"
        )
        if found is not None:
            return found
    sizes = torch.stack(list(terms)).abs()
    _, momentum, decay, _ = sizes
    floor = _arithmetic(sizes, dtype) + _decay(decay, momentum, weight_sq, dtype)
    return floor + _lattice(terms, decay, weight_sq, dtype)


def _arithmetic(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return :func:`arithmetic_floor` from the absolute values of the four terms, ``(4, units)``."""
    return 4 * (torch.finfo(dtype).eps / 2) * sizes.sum(0)


def _decay(decay: Tensor, momentum: Tensor, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return :func:`decay_floor` from absolute values of terms, with q = decay / (4u‖W‖²) inserted into its formula."""
    whole = torch.finfo(dtype).eps / 2 * weight_sq
    below = torch.addcmul(decay, momentum, decay.sign())
    above = whole * (4 * whole / decay.clamp_min(torch.finfo(decay.dtype).tiny))
    return torch.minimum(torch.minimum(whole, below), above)


def _lattice(terms: IncrementTerms, decay: Tensor, weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return :func:`lattice_floor`; ``decay`` is the absolute value of the term of weight decay."""
    # the larger of |a| and |a + d|, since weight decay d may be decoupled, or added to the gradient
    middle = (terms.gradient + terms.momentum).add(terms.weight_decay, alpha=0.5)
    along = middle.abs().add(decay, alpha=0.5)
    ratio = (weight_sq / terms.quadratic).nan_to_num(0.0, posinf=0.0)  # where U = 0
    return torch.finfo(dtype).eps * ratio.sqrt() * along
