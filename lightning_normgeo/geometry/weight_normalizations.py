r"""Weight-based normalizations, and the weight that layer normalization sees (sections 2.3 and 2.4; eq 13-15).

=======  =============================================================  ======================================
WN       :math:`W_i = g_i V_i / \lVert V_i\rVert` (eq 14)               sphere of radius \|g_i\|
CWN      :math:`P V_i / \lVert P V_i\rVert`                             unit sphere, orthogonal to (1, …, 1)
WS       :math:`P V_i / \sigma_{V_i}`                                   sphere of radius √n, orthogonal to (1, …, 1)
SN       :math:`W / \sigma_{\max}(W)`                                   the whole matrix: spectral norm 1
LN       :math:`W - \bar W`, :math:`\bar W` the mean row (eq 13)        every *column* sums to 0
=======  =============================================================  ======================================

A row is the weight of one output channel, flattened. These functions are the maps themselves; the parametrizations that
train are in :mod:`lightning_normgeo.normalization.parametrizations`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_normgeo.geometry.sphere import center


def weight_normalization(v: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    r"""Return :math:`W = g V / \lVert V\rVert` of each row (WN, eq 14; Salimans & Kingma 2016).

    ‖W_i‖ = |g_i|; the result is the same for αV with every α > 0, and changes its sign for α < 0.

    Args:
        v: V, ``(..., n)``.
        gain: g, ``(...)`` or one number for all rows.

    Returns:
        ``(..., n)``, in units of the gain; zeros for a row of zeros, which has no direction.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v, gain = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        >>> torch.allclose(weight_normalization(v, gain).norm(dim=-1), gain.abs())
        True
        >>> torch.allclose(weight_normalization(7 * v, gain), weight_normalization(v, gain))
        True
    """
    return torch.as_tensor(gain, dtype=v.dtype, device=v.device)[..., None] * _divide(v, _length(v))


def centered_weight_normalization(v: Tensor) -> Tensor:
    r"""Return :math:`(V - \bar V) / \lVert V - \bar V\rVert` of each row (CWN, section 2.4; Huang et al. 2017).

    Args:
        v: V, ``(..., n)``.

    Returns:
        ``(..., n)``: unit vectors with sum 0; zeros for a constant row.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> w = centered_weight_normalization(torch.randn(3, 8, dtype=torch.float64))
        >>> torch.allclose(w.norm(dim=-1), torch.ones(3, dtype=torch.float64))
        True
        >>> bool(w.sum(-1).abs().max() < 1e-12)
        True
    """
    centered = center(v)
    return _divide(centered, _length(centered))


def weight_standardization(v: Tensor, unbiased: bool = False, eps: float = 0.0) -> Tensor:
    r"""Return :math:`(V - \bar V) / (\sigma_V + \varepsilon)` of each row (WS, section 2.4; Qiao et al. 2019).

    With ε = 0 it is √n · CWN for the biased deviation, as in the paper, and √(n-1) · CWN for the unbiased one, which
    the code of Qiao et al. uses (with ε = 1e-5).

    Args:
        v: V, ``(..., n)``.
        unbiased: whether the variance divides by n - 1 instead of n.
        eps: ε ≥ 0, added to the deviation, not to the variance.

    Returns:
        ``(..., n)`` with sum 0 over the last dimension; zeros for a constant row.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64)
        >>> torch.allclose(weight_standardization(v), 8**0.5 * centered_weight_normalization(v))
        True
        >>> torch.allclose(weight_standardization(v, unbiased=True), 7**0.5 * centered_weight_normalization(v))
        True
    """
    centered = center(v)
    return _divide(centered, _length(centered) / math.sqrt(max(1, v.shape[-1] - unbiased)) + eps)


def spectral_normalization(weight: Tensor) -> Tensor:
    r"""Return :math:`W / \sigma_{\max}(W)`, with the exact largest singular value (SN, eq 15; Miyato et al. 2018).

    The whole matrix is one unit: its scale cancels, that of a single row does not. A convolution's weight is flattened
    to ``(out, n)``, as torch does.

    Args:
        weight: W, ``(out, ...)``.

    Returns:
        ``(out, ...)``, with spectral norm 1 when flattened; zeros for a weight of zeros.

    Cost: one singular value decomposition.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        >>> normalized = spectral_normalization(weight)
        >>> bool((torch.linalg.matrix_norm(normalized.flatten(1), 2) - 1).abs() < 1e-12)
        True
        >>> torch.allclose(spectral_normalization(7 * weight), normalized)
        True
    """
    largest: Tensor = torch.linalg.matrix_norm(weight.flatten(1), 2)
    return _divide(weight, largest)


def subtract_mean_row(weight: Tensor) -> Tensor:
    r"""Return :math:`W - \bar W`, the weight that layer normalization sees (eq 13).

    .. math:: LN(Wx) = \sqrt m\,(W - \bar W)x / \lVert (W - \bar W)x\rVert

    :math:`\bar W` repeats the mean *row*, so every column of the result sums to 0 (rows need not), and
    :math:`W + e c^T` gives the same function for every vector c. This holds where the layer normalizes over all output
    channels at one position; not for statistics that span positions, as of group normalization and LN over
    ``[C, H, W]`` after a convolution.

    Args:
        weight: W, ``(m, ...)``, one row per output channel.

    Returns:
        ``(m, ...)``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(16, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        >>> y, reduced = x @ weight.T, x @ subtract_mean_row(weight).T
        >>> layer_norm = torch.nn.functional.layer_norm
        >>> torch.allclose(layer_norm(y, (3,)), layer_norm(reduced, (3,)))
        True
        >>> torch.allclose(layer_norm(y, (3,), eps=0.0), 3**0.5 * reduced / reduced.norm(dim=1, keepdim=True))
        True
    """
    return center(weight.movedim(0, -1)).movedim(-1, 0)


def _length(v: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return length


def _divide(v: Tensor, scale: Tensor) -> Tensor:
    """Return v / scale, and v itself, which is then 0, where the scale is 0: so gradients stay finite as well."""
    return v / torch.where(scale != 0, scale, torch.ones_like(scale))
