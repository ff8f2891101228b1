"""Lemma 1 of Sun et al. 2020: what a normalization does to a vector, and the spheres it maps onto.

All functions act on the last dimension, broadcast over the others, and keep dtype and device. ``n`` is the length of
the normalized vector: the batch size for BN on features, ``B·H·W`` for BN on images, the number of features for LN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def center(v: Tensor) -> Tensor:
    r"""Return :math:`P_e v = v - \bar v`, the projection onto the hyperplane orthogonal to (1, …, 1) (Lemma 1.2)."""
    constant = (v == v[..., :1]).all(-1, keepdim=True)  # its mean may round, what is left would be standardized to ±1
    return torch.where(constant, torch.zeros_like(v), v - v.mean(-1, keepdim=True))


def standardize(v: Tensor, eps: float = 0.0) -> Tensor:
    r"""Return :math:`N(v) = (v - \bar v) / \sqrt{\sigma_v^2 + \varepsilon}` (eq 1), with the biased variance.

    For ``eps = 0`` the result has norm :math:`\sqrt n` (eq 2) and :math:`N(\alpha v + t e) = N(v)` for every
    :math:`\alpha > 0`; for :math:`\alpha < 0` the sign flips (the paper says "for all α").

    Args:
        v: ``(..., n)``.
        eps: added to the variance, as torch's normalization layers do.

    Returns:
        ``(..., n)``. A constant vector gives zeros.
    """
    centered = center(v)
    scale = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.where(scale > 0, centered / scale, torch.zeros_like(centered))


def standardize_gradient(v: Tensor, upstream: Tensor, eps: float = 0.0) -> Tensor:
    r"""Return ∂L/∂v for L that depends on v through :math:`\hat v = N(v)`, in closed form (appendix 5.4).

    .. math:: \frac{\partial L}{\partial v} = \frac{1}{\sqrt{\sigma_v^2 + \varepsilon}}
              \Bigl(P_e c - \tfrac1n \langle c, \hat v\rangle \hat v\Bigr), \qquad c = \partial L / \partial \hat v

    It is orthogonal to e always, and to v̂ for ε = 0 (with ε: :func:`preactivation_epsilon_inner`).

    Args:
        v: ``(..., n)``.
        upstream: c, ``(..., n)``.
        eps: as in :func:`standardize`.

    Returns:
        ``(..., n)``; zeros where σ² + ε = 0.
    """
    normalized, centered = standardize(v, eps), center(v)
    scale = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    tangent = center(upstream) - (upstream * normalized).mean(-1, keepdim=True) * normalized
    return torch.where(scale > 0, tangent / scale, torch.zeros_like(tangent))


def affine_decomposition(v: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return (γ, β) with :math:`v = \gamma N(v) + \beta e`, that is γ = σ_v and β = the mean (Lemma 1.5, eq 3).

    Args:
        v: ``(..., n)``.

    Returns:
        γ ≥ 0 and β, both ``(...)``.
    """
    return center(v).square().mean(-1).sqrt(), v.mean(-1)


def affine_norm(gamma: Tensor, beta: Tensor, n: int) -> Tensor:
    r"""Return :math:`\lVert \gamma N(v) + \beta e \rVert = \sqrt{n(\gamma^2 + \beta^2)}` (eq 4, eq 10 for BN)."""
    return (n * (gamma.square() + beta.square())).sqrt()


def sphere_radius(gamma: Tensor, n: int, variance: Tensor | None = None, eps: float = 0.0) -> Tensor:
    r"""Return the radius of the sphere around βe that a normalization maps onto (eq 10).

    .. math:: r = |\gamma| \sqrt n \cdot \sqrt{\sigma^2 / (\sigma^2 + \varepsilon)}

    Args:
        gamma: scale, any shape.
        n: length of the normalized vector.
        variance: biased variance of the pre-activation; leave it out for the radius at ``eps = 0``.
        eps: the layer's epsilon, which shrinks the sphere.
    """
    radius = gamma.abs() * math.sqrt(n)
    return radius if variance is None else radius * (variance / (variance + eps)).sqrt()


def effective_weight(weight: Tensor, gamma: Tensor, variance: Tensor, eps: float) -> Tensor:
    r"""Return :math:`W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}`, the weight that BN in effect applies (eq 12).

    It, and not W, decides how a perturbation of the input is amplified: scaling W leaves it unchanged (up to ε).

    Args:
        weight: ``(out, ...)``.
        gamma: ``(out,)``.
        variance: ``(out,)``, biased.
        eps: the layer's epsilon.
    """
    scale = gamma / (variance + eps).sqrt()
    return weight * scale.reshape([-1] + [1] * (weight.ndim - 1))


def effective_bias(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    r"""Return :math:`b' = \beta - \gamma W\bar X / \sqrt{\sigma^2 + \varepsilon}`, so that BN(WX) = W'X + b' (eq 12).

    Args:
        gamma: ``(out,)``.
        beta: ``(out,)``.
        mean: of WX over the batch, ``(out,)``, without the layer's own bias, which cancels.
        variance: ``(out,)``, biased.
        eps: the layer's epsilon.
    """
    return beta - gamma * mean / (variance + eps).sqrt()
