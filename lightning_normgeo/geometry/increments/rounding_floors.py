"""Bounds of what rounding adds to ‖W⁺‖² - ‖W‖²: in the optimizer's arithmetic and in storage."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms


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
