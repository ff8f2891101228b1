"""Lemmas 2 and 3 of Sun et al. 2020: scale-invariant weights are orthogonal to their gradients.

If the loss does not change when a unit W is scaled by any α > 0, then ⟨W, ∇W⟩ = 0 (Lemma 2). With the ε of a real
normalization the inner product is not zero but known exactly, see :func:`batch_norm_epsilon_inner`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import dot, map_rows


def cosine(inner: Tensor, squared_a: Tensor, squared_b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ / (‖a‖‖b‖) from inner products, with 0 where either vector is zero.

    Args:
        inner: ⟨a, b⟩, any shape.
        squared_a: ‖a‖², same shape.
        squared_b: ‖b‖², same shape.

    Returns:
        Cosines in [-1, 1] up to rounding. A unit without gradient (a dead ReLU) counts as orthogonal.
    """
    norms = squared_a.sqrt() * squared_b.sqrt()
    return torch.where(norms > 0, inner / torch.where(norms > 0, norms, 1.0), torch.zeros_like(inner))


def weight_gradient_products(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖W‖², ⟨W, g⟩ and ‖g‖² for each unit, accumulated in float64.

    Args:
        weight: ``(units, n)``.
        gradient: ``(units, n)``.
    """
    weight_sq, inner, gradient_sq = map_rows(lambda w, g: (dot(w, w), dot(w, g), dot(g, g)), weight, gradient)
    return weight_sq, inner, gradient_sq


def weight_gradient_cosine(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return cos(W, g) for each unit; 0 for a scale-invariant unit (Lemma 2) up to ε and rounding.

    Args:
        weight: ``(units, n)``.
        gradient: ``(units, n)``.
    """
    weight_sq, inner, gradient_sq = weight_gradient_products(weight, gradient)
    return cosine(inner, weight_sq, gradient_sq)


def batch_norm_epsilon_inner(gamma: Tensor, gamma_gradient: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return the ⟨W, g⟩ that the ε of a batch normalization causes, exactly.

    .. math:: \langle W_i, g_i \rangle = \frac{\varepsilon}{\sigma_i^2 + \varepsilon}\, \gamma_i\,
              \frac{\partial L}{\partial \gamma_i}

    Derivation: scaling W by α is scaling ε by 1/α², so ⟨W, ∂L/∂W⟩ = -2ε ∂L/∂ε. Exact for one backward pass through
    one set of batch statistics; not for a sum over several (accumulated micro-batches, data parallel ranks).

    Args:
        gamma: scale γ, ``(channels,)``.
        gamma_gradient: ∂L/∂γ with the same clipping as the weight's gradient, ``(channels,)``.
        variance: biased batch variance σ² of the pre-activation, ``(channels,)``.
        eps: the layer's epsilon.
    """
    return eps / (variance + eps) * gamma * gamma_gradient
