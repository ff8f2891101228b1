"""Batch normalization against the batch: γ, β versus σ, μ (section 2.2 and Fig 2), Σ_X and its rank (eq 11, 12).

|γ² - σ²| is not scale free: doubling W leaves the function unchanged and multiplies σ² by 4. γ²/σ² says the same in
units of the layer's gain. Both are measurements; that they converge is the paper's claim, not a theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.rows import dot


def scale_gap(gamma: Tensor, variance: Tensor) -> Tensor:
    """Return |γ² - σ²| per channel, in activation² (Fig 2, left)."""
    return (gamma.square() - variance).abs()


def shift_gap(beta: Tensor, mean: Tensor) -> Tensor:
    """Return |β - μ| per channel, in units of the activation (Fig 2, right)."""
    return (beta - mean).abs()


def squared_gain(gamma: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    """Return γ² / (σ² + ε): the factor by which the layer multiplies the variance; 1 where γ² = σ² (up to ε)."""
    return gamma.square() / (variance + eps)


def patch_columns(
    x: Tensor, kernel_size: tuple[int, int], stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Return the patches that a 2d convolution sees as columns: what the functions below take as the inputs.

    Batch normalization behind a convolution has its statistics over positions as well: n = C·k·k, and B·H'·W' samples.
    For a grouped convolution give the channels of one group.

    Args:
        x: ``(B, C, H, W)``.
        kernel_size: of the convolution, as its other arguments.
        stride: number of pixels.
        padding: number of pixels.
        dilation: number of pixels.

    Returns:
        ``(C·k·k, B·H'·W')``, so that ``weight.flatten(1)`` times it are the pre-activations.
    """
    return F.unfold(x, kernel_size, dilation, padding, stride).movedim(1, 0).flatten(1)


def covariance(x: Tensor) -> Tensor:
    """Return Σ_X, the biased covariance of the columns of ``x``.

    Args:
        x: ``(n, samples)``, one input vector per column, as in the paper.

    Returns:
        ``(n, n)``.
    """
    centered = x - x.mean(1, keepdim=True)
    return centered @ centered.mT / x.shape[1]


def preactivation_variance(weight: Tensor, sigma: Tensor) -> Tensor:
    r"""Return :math:`W_i \Sigma_X W_i^T` for each row: σ² of the pre-activation, the denominator of eq 11.

    For the effective weight W' of eq 12 it is γ²σ²/(σ²+ε), γ² for ε = 0: W' lies on an ellipsoid, which is compact only
    where Σ_X has full rank, and a cylinder otherwise (the paper calls it compact always).

    Args:
        weight: ``(units, n)``.
        sigma: Σ_X, ``(n, n)``.

    Returns:
        ``(units,)``, in activation².
    """
    return dot(weight @ sigma, weight)


def covariance_rank(x: Tensor) -> int:
    """Return the numerical rank of Σ_X; at most min(n, samples - 1), as centering costs one (the paper omits the -1).

    Args:
        x: ``(n, samples)``.
    """
    return int((torch.linalg.svdvals(x - x.mean(1, keepdim=True)) > _tolerance(x)).sum())


def kernel_fraction(weight: Tensor, x: Tensor) -> Tensor:
    """Return ‖W_ker‖² / ‖W‖² for each row: how much of W lies in the kernel of Σ_X, where it has no effect.

    A generic W has (n - rank) / n of its energy there. The paper's "near the kernel with very high probability" is
    a claim about this number.

    Args:
        weight: ``(units, n)``.
        x: ``(n, samples)``.

    Returns:
        ``(units,)`` in [0, 1]; 0 for W = 0.
    """
    centered = x - x.mean(1, keepdim=True)
    left, singular, _ = torch.linalg.svd(centered, full_matrices=False)
    seen = (weight @ (left * (singular > _tolerance(x)))).square().sum(1)
    total = weight.square().sum(1)
    return torch.where(total > 0, 1 - seen / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0).clamp(0, 1)


def pair_standardize(y: Tensor, eps: float) -> Tensor:
    r"""Return what BN makes of a batch of two single values: (1, -1) or (-1, 1) times |d|/√(d²+ε), d = (y₁-y₂)/2.

    Whatever the two inputs are, for ε = 0 the output has one bit (section 2.2, "in the extreme case where B = 2").

    Args:
        y: ``(..., 2)``.
        eps: the layer's epsilon.

    Returns:
        ``(..., 2)``; zeros for two equal values.
    """
    half = (y[..., 0] - y[..., 1]) / 2
    first = torch.where(half != 0, half / (half.square() + eps).sqrt(), torch.zeros_like(half))
    return torch.stack([first, -first], -1)


def pair_gradient(y: Tensor, upstream: Tensor, eps: float) -> Tensor:
    r"""Return ∂L/∂y through the BN of a batch of two single values, exactly.

    .. math:: \frac{\partial L}{\partial y_1} = -\frac{\partial L}{\partial y_2}
              = \frac{c_1 - c_2}{2} \cdot \frac{\varepsilon}{(d^2 + \varepsilon)^{3/2}}, \qquad d = \frac{y_1 - y_2}{2}

    It vanishes as ε/|d|³: only ε lets such a layer learn at all.

    Args:
        y: ``(..., 2)``.
        upstream: c = ∂L/∂ŷ, ``(..., 2)``.
        eps: the layer's epsilon, > 0.

    Returns:
        ``(..., 2)``.
    """
    squared = ((y[..., 0] - y[..., 1]) / 2).square() + eps
    first = (upstream[..., 0] - upstream[..., 1]) / 2 * eps / squared.pow(1.5)
    return torch.stack([first, -first], -1)


def _tolerance(x: Tensor) -> Tensor:
    """Return below which a singular value of the centered data is rounding: centering rounds relative to ``x``."""
    norm: Tensor = torch.linalg.matrix_norm(x)
    return norm * max(x.shape) * torch.finfo(x.dtype).eps
