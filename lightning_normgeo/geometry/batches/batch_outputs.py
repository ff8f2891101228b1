"""Outputs of batch normalization in one batch: the spheres they reach, collapsed channels, orthogonality of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import wide_dtype

COLLAPSED_ABOVE = 1e4
"""ε/s² above which a channel counts as collapsed: its output is β ± 1 % of |γ|."""
PAIR = 2
"""Number of values per channel at which batch normalization keeps little more than their signs (section 2.2)."""
_SMALLEST = 1e-7
"""The smallest s²/ε that is told from zero: the inverse standard deviation is stored in float32."""


def epsilon_over_variance(variance: Tensor, eps: Tensor | float) -> Tensor:
    """Return ε/s² of each channel, at most 1e7: there float32 no longer tells s² from 0.

    Args:
        variance: biased variance s² of the pre-activation, ``(channels,)``.
        eps: ε > 0 of the layer.

    Returns:
        ``(channels,)``, dimensionless.

    Example:
        >>> import torch
        >>> variance = torch.tensor([1e-5, 1e-9, 0.0], dtype=torch.float64)
        >>> [round(ratio) for ratio in epsilon_over_variance(variance, eps=1e-5).tolist()]
        [1, 10000, 10000000]
    """
    return 1 / (variance / eps).clamp_min(_SMALLEST)


def radius_reached(variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return :math:`s / \sqrt{s^2 + \varepsilon}`, the radius of a channel's output sphere over the one for ε = 0.

    The N outputs of a channel minus β are a vector of length :math:`|\gamma| \sqrt N s / \sqrt{s^2 + \varepsilon}` (eq
    10 of Sun et al. 2020 with ε, which has the radius |γ|√B).

    Args:
        variance: biased variance s² of the pre-activation, ``(channels,)``.
        eps: ε > 0 of the layer.

    Returns:
        ``(channels,)`` in [0, 1]: 1 for the whole sphere, 0 for output ≡ β.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y, gamma = torch.randn(16, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        >>> output = torch.nn.functional.batch_norm(y, None, None, gamma, training=True, eps=0.1)
        >>> reached = radius_reached(y.var(0, correction=0), eps=0.1)
        >>> torch.allclose(output.norm(dim=0), gamma.abs() * 16**0.5 * reached)
        True
    """
    return (variance / (variance + eps)).sqrt()


def orthogonality_gap(h: Tensor) -> Tensor:
    r"""Return the orthogonality gap of representations, :math:`\lVert H^T H / \lVert H\rVert_F^2 - I / B\rVert_F`.

    From Daneshmand et al. 2021, "Batch normalization orthogonalizes representations in deep random networks", where the
    columns of H are the samples. It is 0 if all samples are orthogonal and equally long, and √(1 - 1/B) if they are
    parallel.

    Args:
        h: representations, ``(B, …)``; each sample is flattened.

    Returns:
        A scalar in [0, 1], NaN for H = 0.

    Cost: B²·d multiplications for d numbers per sample.

    Example:
        >>> import torch
        >>> orthogonality_gap(torch.eye(5)).item()
        0.0
        >>> round(orthogonality_gap(torch.ones(4, 7)).item() ** 2, 6)  # 1 - 1/B
        0.75
    """
    flat = h.flatten(1)
    gram = (flat @ flat.mT).to(wide_dtype(h.device))
    share = gram / gram.trace() - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / len(gram)
    return torch.linalg.matrix_norm(share)  # type: ignore[no-any-return]
