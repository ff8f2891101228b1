r"""What normalizations of weights, and layer normalization, do to the rows of a weight (section 2.3, 2.4; eq 13-15).

=======  =============================================================  ======================================
WN       :math:`W_i = g_i V_i / \lVert V_i\rVert` (eq 14)               sphere of radius \|g_i\|
CWN      :math:`P V_i / \lVert P V_i\rVert`                             unit sphere, orthogonal to (1, …, 1)
WS       :math:`P V_i / \sigma_{V_i}`                                   sphere of radius √n, orthogonal to (1, …, 1)
SN       :math:`W / \sigma_{\max}(W)`                                   the whole matrix: spectral norm 1
LN       :math:`W - \bar W`, :math:`\bar W` the mean row (eq 13)        every *column* sums to 0
=======  =============================================================  ======================================

A row is what one output channel sees, flattened. The parametrizations that train are in
:mod:`lightning_normgeo.normalization.parametrizations`; these are the maps themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_normgeo.geometry.sphere import center


def weight_normalization(v: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    r"""Return :math:`W = g V / \lVert V\rVert` for each row (eq 14; Salimans & Kingma 2016).

    ‖W_i‖ = |g_i|; the result is the same for αV with every α > 0, and changes its sign for α < 0.

    Args:
        v: V, ``(..., n)``.
        gain: g, ``(...)`` or one number for all rows.

    Returns:
        ``(..., n)``; zeros for a row of zeros, which has no direction.
    """
    return torch.as_tensor(gain, dtype=v.dtype, device=v.device)[..., None] * _divide(v, _length(v))


def centered_weight_normalization(v: Tensor) -> Tensor:
    r"""Return :math:`(V - \bar V) / \lVert V - \bar V\rVert` for each row (CWN; Huang et al. 2017).

    Args:
        v: V, ``(..., n)``.

    Returns:
        ``(..., n)``: unit vectors with sum 0; zeros for a constant row.
    """
    centered = center(v)
    return _divide(centered, _length(centered))


def weight_standardization(v: Tensor, unbiased: bool = False, eps: float = 0.0) -> Tensor:
    r"""Return :math:`(V - \bar V) / (\sigma_V + \varepsilon)` for each row (WS; Qiao et al. 2019).

    With ε = 0 it is √n · CWN, as the paper has it, for the biased deviation, and √(n-1) · CWN for the unbiased one,
    which Qiao's code uses (with ε = 1e-5).

    Args:
        v: V, ``(..., n)``.
        unbiased: divide by n - 1 in the variance, not by n.
        eps: ε, added to the deviation, not to the variance.

    Returns:
        ``(..., n)`` with sum 0 along the last dimension; zeros for a constant row.
    """
    centered = center(v)
    return _divide(centered, _length(centered) / math.sqrt(max(1, v.shape[-1] - unbiased)) + eps)


def spectral_normalization(weight: Tensor) -> Tensor:
    r"""Return :math:`W / \sigma_{\max}(W)` (SN; Miyato et al. 2018), with the exact largest singular value.

    One unit: the whole matrix is invariant to its scale, no single row is. A convolution's weight is flattened to
    ``(out, n)``, as torch does.

    Args:
        weight: ``(out, ...)``.

    Returns:
        ``(out, ...)``; zeros for a weight of zeros.
    """
    largest: Tensor = torch.linalg.matrix_norm(weight.flatten(1), 2)
    return _divide(weight, largest)


def subtract_mean_row(weight: Tensor) -> Tensor:
    r"""Return :math:`W - \bar W`, the weight that layer normalization sees (eq 13).

    .. math:: LN(Wx) = \sqrt m\,(W - \bar W)x / \lVert (W - \bar W)x\rVert

    :math:`\bar W` repeats the mean *row*, so every column of the result sums to 0 (rows need not): :math:`W + e c^T`
    gives the same function. It holds where the layer normalizes over all output channels at one position; not for
    statistics that span positions, as of group normalization and LN over ``[C, H, W]`` behind a convolution.

    Args:
        weight: ``(m, ...)``, one row per output channel.

    Returns:
        ``(m, ...)``.
    """
    return center(weight.movedim(0, -1)).movedim(-1, 0)


def _length(v: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return length


def _divide(v: Tensor, scale: Tensor) -> Tensor:
    """Return v / scale, and v, which is 0 then, where the scale is 0; so gradients stay finite as well."""
    return v / torch.where(scale > 0, scale, torch.ones_like(scale))
