"""Lemma 1 of Sun et al. 2020: standardized vectors, and the spheres that normalization layers map onto.

Functions of a vector ``v`` act on its last dimension and broadcast over the others. All functions keep dtype and
device. ``n`` is the length of the normalized vector: the batch size for BN on features, ``B·H·W`` for BN on images, the
number of features for LN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def center(v: Tensor) -> Tensor:
    r"""Subtract the mean of a vector: :math:`P_e v = v - \bar v`, the projection orthogonal to (1, …, 1) (Lemma 1.2).

    Args:
        v: ``(..., n)``.

    Returns:
        ``(..., n)``, with sum 0 over the last dimension up to rounding; exactly zeros for a constant vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64)
        >>> bool(center(v).sum(-1).abs().max() < 1e-12)  # orthogonal to (1, …, 1)
        True
        >>> torch.allclose(center(center(v)), center(v))  # a projection
        True
    """
    # the mean of a constant vector may round, and standardize() would blow up what remains to ±1
    constant = (v == v[..., :1]).all(-1, keepdim=True)
    return torch.where(constant, torch.zeros_like(v), v - v.mean(-1, keepdim=True))


def standardize(v: Tensor, eps: float = 0.0) -> Tensor:
    r"""Standardize a vector: :math:`N(v) = (v - \bar v) / \sqrt{\sigma_v^2 + \varepsilon}` (eq 1), σ² biased.

    For ``eps = 0`` the result has norm :math:`\sqrt n` (eq 2), and :math:`N(\alpha v + t e) = N(v)` for e = (1, …, 1),
    every shift t and every :math:`\alpha > 0` (Lemma 1.4). For :math:`\alpha < 0` the sign flips, although the paper
    states the invariance for all real α.

    Args:
        v: ``(..., n)``.
        eps: ε ≥ 0, added to the variance, as torch's normalization layers do.

    Returns:
        ``(..., n)``, dimensionless for ``eps = 0``; zeros for a constant vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64)
        >>> bool((standardize(v).norm(dim=-1) - 8**0.5).abs().max() < 1e-12)  # on the sphere of radius √n
        True
        >>> torch.allclose(standardize(3 * v + 5), standardize(v))
        True
    """
    centered = center(v)
    scale = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.where(scale != 0, centered / scale, torch.zeros_like(centered))


def standardize_gradient(v: Tensor, upstream: Tensor, eps: float = 0.0) -> Tensor:
    r"""Return ∂L/∂v in closed form, for a loss L that depends on v through :math:`\hat v = N(v)` (appendix 5.4).

    .. math:: \frac{\partial L}{\partial v} = \frac{1}{\sqrt{\sigma_v^2 + \varepsilon}}
              \Bigl(P_e c - \tfrac1n \langle c, \hat v\rangle \hat v\Bigr), \qquad c = \partial L / \partial \hat v

    It is always orthogonal to (1, …, 1), and for ε = 0 also to v̂; :func:`preactivation_epsilon_inner` is its inner
    product with v̂ for ε > 0.

    Args:
        v: ``(..., n)``.
        upstream: c, ``(..., n)``.
        eps: ε ≥ 0, as in :func:`standardize`.

    Returns:
        ``(..., n)``, in units of loss per unit of v; zeros where σ² + ε = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v, upstream = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> gradient = standardize_gradient(v, upstream)
        >>> bool((gradient * standardize(v)).sum(-1).abs().max() < 1e-12)
        True
        >>> (autograd,) = torch.autograd.grad(standardize(v.requires_grad_()), v, upstream)
        >>> torch.allclose(gradient, autograd)
        True
    """
    normalized, centered = standardize(v, eps), center(v)
    scale = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    tangent = center(upstream) - (upstream * normalized).mean(-1, keepdim=True) * normalized
    return torch.where(scale != 0, tangent / scale, torch.zeros_like(tangent))


def affine_decomposition(v: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return γ = σ_v and β = the mean of v, for which :math:`v = \gamma N(v) + \beta e` (Lemma 1.5, eq 3).

    Args:
        v: ``(..., n)``.

    Returns:
        γ ≥ 0 and β, both ``(...)``, in units of v.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64)
        >>> gamma, beta = affine_decomposition(v)
        >>> torch.allclose(gamma[:, None] * standardize(v) + beta[:, None], v)
        True
    """
    return center(v).square().mean(-1).sqrt(), v.mean(-1)


def affine_norm(gamma: Tensor, beta: Tensor, n: int) -> Tensor:
    r"""Return :math:`\lVert \gamma N(v) + \beta e \rVert = \sqrt{n(\gamma^2 + \beta^2)}` (eq 4; for BN below eq 10).

    Args:
        gamma: γ, any shape.
        beta: β, of a shape that broadcasts with that of γ.
        n: length of v, which must not be constant.

    Returns:
        The norm, of the broadcast shape, in units of γ and β.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64)
        >>> torch.allclose(affine_norm(*affine_decomposition(v), n=8), v.norm(dim=-1))
        True
    """
    return (n * (gamma.square() + beta.square())).sqrt()


def sphere_radius(gamma: Tensor, n: int, variance: Tensor | None = None, eps: float = 0.0) -> Tensor:
    r"""Return the radius of the sphere with center βe that a normalization layer maps onto (eq 10, there for ε = 0).

    .. math:: r = |\gamma| \sqrt n \cdot \sqrt{\sigma^2 / (\sigma^2 + \varepsilon)}

    Args:
        gamma: scale γ, any shape.
        n: length of the normalized vector.
        variance: biased variance σ² of the pre-activation, same shape. Default: none, for the radius at ε = 0.
        eps: ε ≥ 0 of the layer, which shrinks the sphere; not read without ``variance``.

    Returns:
        The radius, of the shape of ``gamma`` and in its units; NaN where σ² + ε = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y, (gamma, beta) = torch.randn(16, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        >>> output = torch.nn.functional.batch_norm(y, None, None, gamma, beta, training=True, eps=0.1)
        >>> radius = sphere_radius(gamma, 16, y.var(0, correction=0), eps=0.1)
        >>> torch.allclose((output - beta).norm(dim=0), radius)
        True
    """
    radius = gamma.abs() * math.sqrt(n)
    return radius if variance is None else radius * (variance / (variance + eps)).sqrt()


def effective_weight(weight: Tensor, gamma: Tensor, variance: Tensor, eps: float) -> Tensor:
    r"""Return :math:`W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}`, the effective weight of a layer before BN (eq 12).

    W' and not W decides how much a perturbation of the input is amplified: scaling W leaves W' unchanged, up to ε.

    Args:
        weight: W, ``(out, ...)``.
        gamma: γ, ``(out,)``.
        variance: biased variance σ² of WX over the batch, ``(out,)``.
        eps: ε ≥ 0 of the BN layer.

    Returns:
        W', ``(out, ...)``; infinite or NaN where σ² + ε = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(16, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        >>> gamma, variance = torch.randn(3, dtype=torch.float64), (x @ weight.T).var(0, correction=0)
        >>> scaled_variance = (x @ (7 * weight).T).var(0, correction=0)
        >>> scaled = effective_weight(7 * weight, gamma, scaled_variance, eps=0.0)
        >>> torch.allclose(scaled, effective_weight(weight, gamma, variance, eps=0.0))
        True
    """
    scale = gamma / (variance + eps).sqrt()
    return weight * scale.reshape([-1] + [1] * (weight.ndim - 1))


def effective_bias(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    r"""Return :math:`b' = \beta - \gamma W\bar X / \sqrt{\sigma^2 + \varepsilon}`, so that BN(WX) = W'X + b' (eq 12).

    Args:
        gamma: γ, ``(out,)``.
        beta: β, ``(out,)``.
        mean: :math:`W\bar X`, the mean of WX over the batch, ``(out,)``, without the layer's own bias, which cancels.
        variance: biased variance σ² of WX over the batch, ``(out,)``.
        eps: ε ≥ 0 of the BN layer.

    Returns:
        b', ``(out,)``, in units of the layer's output.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(16, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        >>> (gamma, beta), y = torch.randn(2, 3, dtype=torch.float64), x @ weight.T
        >>> bias = effective_bias(gamma, beta, y.mean(0), y.var(0, correction=0), eps=1e-5)
        >>> output = torch.nn.functional.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-5)
        >>> torch.allclose(x @ effective_weight(weight, gamma, y.var(0, correction=0), eps=1e-5).T + bias, output)
        True
    """
    return beta - gamma * mean / (variance + eps).sqrt()
