"""Batch normalization against the batch: γ, β versus σ, μ (section 2.2 and Fig 2), rank and kernel of Σ_X (eq 11).

|γ² - σ²| is not scale free: doubling W leaves the function unchanged and multiplies σ² by 4. γ²/σ² says the same in
units of the layer's gain. Both are measurements; that they converge is the paper's claim, not a theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_gap(gamma: Tensor, variance: Tensor) -> Tensor:
    """Return |γ² - σ²| per channel, in activation² (Fig 2, left)."""
    return (gamma.square() - variance).abs()


def shift_gap(beta: Tensor, mean: Tensor) -> Tensor:
    """Return |β - μ| per channel, in units of the activation (Fig 2, right)."""
    return (beta - mean).abs()


def squared_gain(gamma: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    """Return γ² / (σ² + ε): the factor by which the layer multiplies the variance; 1 where γ² = σ² (up to ε)."""
    return gamma.square() / (variance + eps)


def covariance(x: Tensor) -> Tensor:
    """Return Σ_X, the biased covariance of the columns of ``x``.

    Args:
        x: ``(n, samples)``, one input vector per column, as in the paper.

    Returns:
        ``(n, n)``.
    """
    centered = x - x.mean(1, keepdim=True)
    return centered @ centered.mT / x.shape[1]


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


def _tolerance(x: Tensor) -> Tensor:
    """Return below which a singular value of the centered data is rounding: centering rounds relative to ``x``."""
    norm: Tensor = torch.linalg.matrix_norm(x)
    return norm * max(x.shape) * torch.finfo(x.dtype).eps
