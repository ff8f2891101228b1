"""Parameters of batch normalization compared with the batch: γ and β with σ and μ, the covariance Σ_X and its rank.

From section 2.2 of Sun et al. 2020 (Fig 2, eq 11 and 12). The paper's |γ² - σ²| is not scale free: doubling W leaves
the function unchanged and multiplies σ² by 4. γ²/σ² compares the same two numbers by the factor with which the layer
multiplies the variance. Both are measurements; that γ² converges to σ² is the paper's claim, not a theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.rows import dot


def scale_gap(gamma: Tensor, variance: Tensor) -> Tensor:
    """Return |γ² - σ²| of each channel (section 3.1; Fig 2, left).

    Args:
        gamma: scale γ, ``(channels,)``.
        variance: variance σ² of the pre-activation, ``(channels,)``.

    Returns:
        ``(channels,)``, ≥ 0, in units of activation².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> gamma, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
        >>> torch.allclose(scale_gap(2 * gamma, 4 * variance), 4 * scale_gap(gamma, variance))  # not scale free
        True
        >>> bool(scale_gap(variance.sqrt(), variance).max() < 1e-12)
        True
    """
    return (gamma.square() - variance).abs()


def shift_gap(beta: Tensor, mean: Tensor) -> Tensor:
    """Return |β - μ| of each channel (section 3.1; Fig 2, right).

    Args:
        beta: shift β, ``(channels,)``.
        mean: mean μ of the pre-activation, ``(channels,)``.

    Returns:
        ``(channels,)``, ≥ 0, in units of activation.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y, beta = torch.randn(16, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        >>> output = torch.nn.functional.batch_norm(y, None, None, bias=beta, training=True)
        >>> torch.allclose(shift_gap(beta, y.mean(0)), (output.mean(0) - y.mean(0)).abs())  # how far BN moves the mean
        True
    """
    return (beta - mean).abs()


def squared_gain(gamma: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    """Return γ² / (σ² + ε) of each channel, the factor by which the layer multiplies the variance; 1 where γ² = σ² + ε.

    Args:
        gamma: scale γ, ``(channels,)``.
        variance: biased variance σ² of the pre-activation, ``(channels,)``.
        eps: ε ≥ 0 of the layer.

    Returns:
        ``(channels,)``, ≥ 0, dimensionless; infinite or NaN where σ² + ε = 0.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y, gamma = torch.randn(16, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        >>> before = y.var(0, correction=0)
        >>> after = torch.nn.functional.batch_norm(y, None, None, gamma, training=True, eps=0.1).var(0, correction=0)
        >>> torch.allclose(after, squared_gain(gamma, before, eps=0.1) * before)
        True
    """
    return gamma.square() / (variance + eps)


def patch_columns(
    x: Tensor, kernel_size: tuple[int, int], stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Return the patches that a 2d convolution reads, as columns: the matrix X of eq 11 for a convolution.

    Batch normalization after a convolution takes its statistics over positions as well (appendix 5.1): the input
    vectors of :func:`covariance` and the functions below have length n = C·k·k, and there are B·H'·W' samples. For a
    grouped convolution give the channels of one group.

    Args:
        x: ``(B, C, H, W)``.
        kernel_size: height and width of the kernel, in pixels.
        stride: in pixels, as in the convolution; so are the others.
        padding: in pixels, with zeros.
        dilation: in pixels.

    Returns:
        ``(C·k·k, B·H'·W')``; ``weight.flatten(1) @ patch_columns(x, …)`` are the pre-activations.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
        >>> y = torch.nn.functional.conv2d(x, weight, stride=2, padding=1)
        >>> columns = patch_columns(x, (3, 3), stride=2, padding=1)
        >>> torch.allclose(weight.flatten(1) @ columns, y.movedim(1, 0).flatten(1))
        True
    """
    return F.unfold(x, kernel_size, dilation, padding, stride).movedim(1, 0).flatten(1)


def covariance(x: Tensor) -> Tensor:
    r"""Return the biased covariance of the input, :math:`\Sigma_X = (X - \bar X)(X - \bar X)^T / B` (below eq 11).

    Args:
        x: X, ``(n, samples)``: one input vector per column, as in the paper.

    Returns:
        Σ_X, ``(n, n)``, in units of x².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(5, 16, dtype=torch.float64)
        >>> torch.allclose(covariance(x), torch.cov(x, correction=0))
        True
    """
    centered = x - x.mean(1, keepdim=True)
    return centered @ centered.mT / x.shape[1]


def preactivation_variance(weight: Tensor, sigma: Tensor) -> Tensor:
    r"""Return :math:`\sigma^2 = W_i \Sigma_X W_i^T`, the variance of each pre-activation (under the root of eq 11).

    For the effective weight W' of eq 12 it is γ²σ²/(σ²+ε), which is γ² for ε = 0: W' lies on an ellipsoid if Σ_X has
    full rank, and on an unbounded cylinder otherwise (the paper calls the set compact without that condition).

    Args:
        weight: W, ``(units, n)``.
        sigma: Σ_X, ``(n, n)``, as from :func:`covariance`.

    Returns:
        ``(units,)``, in units of activation².

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        >>> torch.allclose(preactivation_variance(weight, covariance(x)), (weight @ x).var(1, correction=0))
        True
    """
    return dot(weight @ sigma, weight)


def covariance_rank(x: Tensor) -> int:
    """Return the numerical rank of Σ_X, at most min(n, samples - 1).

    Centering costs one dimension; the paper's bound (below eq 11) is min(n, samples).

    Args:
        x: X, ``(n, samples)``.

    Returns:
        The number of singular values of the centered X above rounding.

    Cost: one singular value decomposition, and a transfer to the host on a GPU.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> n, samples = 10, 4
        >>> covariance_rank(torch.randn(n, samples, dtype=torch.float64)) == min(n, samples - 1)
        True
    """
    return int((torch.linalg.svdvals(x - x.mean(1, keepdim=True)) > _tolerance(x)).sum())


def kernel_fraction(weight: Tensor, x: Tensor) -> Tensor:
    """Return ‖W_ker‖² / ‖W‖² of each row, the share of W in the kernel of Σ_X, where it has no effect.

    A random W has (n - rank) / n of its squared norm there on average. The paper's statement that W lies "in or very
    close to" the kernel "with very high probability" for small batches (section 2.2) is a claim about this number.

    Args:
        weight: W, ``(units, n)``.
        x: X, ``(n, samples)``.

    Returns:
        ``(units,)`` in [0, 1]; 0 for W = 0.

    Cost: one singular value decomposition of X.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(10, 4, dtype=torch.float64), torch.randn(5000, 10, dtype=torch.float64)
        >>> abs(kernel_fraction(weight, x).mean().item() - (10 - covariance_rank(x)) / 10) < 0.01
        True
        >>> bool(kernel_fraction((x - x.mean(1, keepdim=True)).T, x).max() < 1e-12)  # rows orthogonal to the kernel
        True
    """
    centered = x - x.mean(1, keepdim=True)
    left, singular, _ = torch.linalg.svd(centered, full_matrices=False)
    seen = (weight @ (left * (singular > _tolerance(x)))).square().sum(1)
    total = weight.square().sum(1)
    return torch.where(total != 0, 1 - seen / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0).clamp(0, 1)


def pair_standardize(y: Tensor, eps: float) -> Tensor:
    r"""Standardize batches of two values: (1, -1) or (-1, 1) times |d|/√(d²+ε), with d = (y₁-y₂)/2.

    For ε = 0 the output of BN carries one bit, whatever the two inputs are (section 2.2, "in the extreme case where
    B = 2").

    Args:
        y: ``(..., 2)``.
        eps: ε ≥ 0 of the layer.

    Returns:
        ``(..., 2)``; zeros for two equal values.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import standardize
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(3, 2, dtype=torch.float64)
        >>> torch.allclose(pair_standardize(y, eps=0.1), standardize(y, eps=0.1))
        True
        >>> torch.allclose(pair_standardize(y, eps=0.0).abs(), torch.ones_like(y))
        True
    """
    half = (y[..., 0] - y[..., 1]) / 2
    first = torch.where(half != 0, half / (half.square() + eps).sqrt(), torch.zeros_like(half))
    return torch.stack([first, -first], -1)


def pair_gradient(y: Tensor, upstream: Tensor, eps: float) -> Tensor:
    r"""Return the exact ∂L/∂y through the BN of batches of two values (appendix 5.1: "the gradient will vanish").

    .. math:: \frac{\partial L}{\partial y_1} = -\frac{\partial L}{\partial y_2}
              = \frac{c_1 - c_2}{2} \cdot \frac{\varepsilon}{(d^2 + \varepsilon)^{3/2}}, \qquad d = \frac{y_1 - y_2}{2}

    It vanishes as ε/|d|³: only ε lets such a layer learn at all.

    Args:
        y: ``(..., 2)``.
        upstream: c = ∂L/∂ŷ, ``(..., 2)``.
        eps: ε > 0 of the layer.

    Returns:
        ``(..., 2)``, in units of loss per unit of y.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y, upstream = torch.randn(2, 3, 2, dtype=torch.float64)
        >>> (autograd,) = torch.autograd.grad(pair_standardize(y.requires_grad_(), eps=0.1), y, upstream)
        >>> torch.allclose(pair_gradient(y, upstream, eps=0.1), autograd)
        True
    """
    squared = ((y[..., 0] - y[..., 1]) / 2).square() + eps
    first = (upstream[..., 0] - upstream[..., 1]) / 2 * eps / squared.pow(1.5)
    return torch.stack([first, -first], -1)


def _tolerance(x: Tensor) -> Tensor:
    """Return the bound below which a singular value of the centered X is rounding, which is relative to X itself."""
    norm: Tensor = torch.linalg.matrix_norm(x)
    return norm * max(x.shape) * torch.finfo(x.dtype).eps
