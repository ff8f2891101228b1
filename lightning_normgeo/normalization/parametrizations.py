r"""Weight normalizations as parametrizations, which replace a weight by its normalized rows wherever it is used.

Weight normalization and spectral normalization are those of torch. This module adds the other two of the paper:

=====================  ============================================================  =============================
CWN, Huang et al. 2017 :math:`(V_i - \bar V_i) / \lVert V_i - \bar V_i\rVert`        rows on the unit sphere
WS, Qiao et al. 2019   :math:`(V_i - \bar V_i) / (\sigma_{V_i} + \varepsilon)`       rows on a sphere of radius √n
=====================  ============================================================  =============================

V_i is a row of n elements. With the biased standard deviation and ε = 0, WS = √n · CWN; with the unbiased one, which
Qiao's code uses, WS = √(n-1) · CWN.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.row_scaling import Linear as Linear
from lightning_normgeo.normalization.row_scaling import scales_with_weight
from lightning_normgeo.utilities.checked_values import entry_of


class _RowParametrization(nn.Module):
    """Base of parametrizations that act on each row of a weight, the slice of one output channel along ``dim``."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"dim={self.dim}"

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter to store for an assigned weight: the weight itself, as only its direction matters."""
        return weight

    def _rest(self, weight: Tensor) -> list[int]:
        return [d for d in range(weight.ndim) if d != self.dim]


class CenteredWeightNormalization(_RowParametrization):
    r"""CWN (Huang et al. 2017; Sun et al. 2020, section 2.4): rows centered and divided by their length.

    .. math:: W_i = (V_i - \bar V_i) / \lVert V_i - \bar V_i \rVert

    The loss is invariant to the scale and to the mean of every row: ⟨V_i, ∂L/∂V_i⟩ = 0 and ⟨1, ∂L/∂V_i⟩ = 0. Both hold
    exactly for centered rows longer than 1e-12; a shorter one is divided by 1e-12. Rows need at least two elements.

    Args:
        dim: dimension of the output channels: 0, or 1 for transposed convolutions.
    """

    def forward(self, v: Tensor) -> Tensor:
        """Return the normalized weight, of the shape of ``v``."""
        rest = self._rest(v)
        centered = v - v.mean(rest, keepdim=True)
        lengths: Tensor = torch.linalg.vector_norm(centered, dim=rest, keepdim=True)
        return centered / lengths.clamp_min(1e-12)


class WeightStandardization(_RowParametrization):
    r"""WS (Qiao et al. 2019; Sun et al. 2020, section 2.4): rows centered and divided by their standard deviation.

    .. math:: W_i = (V_i - \bar V_i) / (\sigma_{V_i} + \varepsilon)

    The loss is invariant to the mean of every row, and to its scale up to ε:
    ⟨V_i, ∂L/∂V_i⟩ = ε/(σ+ε) ⟨∂L/∂W_i, W_i⟩. Rows need at least two elements.

    Args:
        dim: dimension of the output channels: 0, or 1 for transposed convolutions.
        unbiased: whether the deviation divides by n - 1, as in Qiao's code, or by n, as in the formula of the paper.
        eps: ε, added to the standard deviation; not negative.
    """

    def __init__(self, dim: int = 0, unbiased: bool = True, eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.unbiased = unbiased
        self.eps = eps

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"dim={self.dim}, unbiased={self.unbiased}, eps={self.eps}"

    def forward(self, v: Tensor) -> Tensor:
        """Return the standardized weight, of the shape of ``v``."""
        rest = self._rest(v)
        centered = v - v.mean(rest, keepdim=True)
        return centered / (v.std(rest, correction=int(self.unbiased), keepdim=True) + self.eps)


class Gain(_RowParametrization):
    """A learnable factor per row, which is the length of a normalized row (``g`` of weight normalization).

    Args:
        gain: initial factors, of shape ``(output channels,)`` or ``(1,)``.
        dim: dimension of the output channels.
    """

    def __init__(self, gain: Tensor, dim: int = 0) -> None:
        super().__init__(dim)
        self.gain = nn.Parameter(gain.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with every row multiplied by its gain."""
        return weight * self.gain.view([-1 if d == self.dim else 1 for d in range(weight.ndim)])


_PARAMETRIZATIONS: dict[type[nn.Module], str] = {
    parametrizations._WeightNorm: "weight normalization",
    parametrizations._SpectralNorm: "spectral normalization",
    CenteredWeightNormalization: "centered weight normalization",
    WeightStandardization: "weight standardization",
}


def rows_dim(layer: nn.Module) -> int:
    """Return the dimension of the output channels in a layer's weight: 1 for transposed convolutions, otherwise 0."""
    return int(isinstance(layer, nn.modules.conv._ConvTransposeNd))


def parametrizations_of(layer: nn.Module) -> list[nn.Module]:
    """Return the parametrizations of a layer's weight, in the order in which they are applied."""
    if not is_parametrized(layer, "weight"):
        return []
    return list(cast("ParametrizationList", layer.parametrizations["weight"]))  # type: ignore[index]


def parametrization_kind(layer: nn.Module | None) -> Literal["filter", "matrix"] | None:
    """Return the kind of unit of a parametrized weight; None if unknown, or if its units are not output channels."""
    for parametrization in [] if layer is None else parametrizations_of(layer):
        if isinstance(parametrization, parametrizations._SpectralNorm):
            return "matrix"
        if type(parametrization) in _PARAMETRIZATIONS and layer is not None:
            return "filter" if parametrization.dim == rows_dim(layer) else None
    return None


def parametrization_title(layer: nn.Module | None) -> str:
    """Return the name of the normalization of a layer's weight, in words."""
    found = [] if layer is None else [p for p in parametrizations_of(layer) if not isinstance(p, Gain)]
    return _PARAMETRIZATIONS.get(type(found[0]), type(found[0]).__name__) if found else "a normalization of the weight"


_KINDS = ("wn", "cwn", "ws", "sn")


def normalize_weight(layer: nn.Module, kind: str, gain: bool = True, unbiased: bool = True) -> None:
    """Normalize the weight of a linear or convolutional layer by a parametrization, in place.

    With a gain the effective weight stays the same for ``wn`` and ``sn``, and becomes the weight with centered rows
    for ``cwn`` and ``ws``. Without a gain only the direction is kept. ``wn`` always has a gain per row, as in Salimans
    & Kingma; ``sn`` has one for the whole matrix, as in Miyato et al. (appendix E).

    Args:
        layer: a linear or convolutional layer whose weight has no parametrization yet.
        kind: ``wn``, ``cwn``, ``ws`` or ``sn``.
        gain: whether ``cwn`` and ``ws`` get a learnable length per row, and ``sn`` one for the matrix.
        unbiased: whether the standard deviation of ``ws`` divides by n - 1 (as in Qiao's code) or by n.

    Raises:
        ConfigurationError: for an unknown kind, a layer without such a weight, or rows that have no direction.
    """
    entry_of("kind", kind, dict.fromkeys(_KINDS))
    why = refusal(layer, kind)
    if why is not None:
        raise ConfigurationError(f"{type(layer).__name__} cannot be parametrized by {kind!r}: {why}.")
    trained, training = cast("nn.Parameter", layer.weight).requires_grad, layer.training
    layer.eval()  # in training mode every access to the weight would take one more power iteration
    length = _normalize(layer, kind, unbiased)
    if gain and length is not None:
        lengths = Gain(length.reshape(-1), rows_dim(layer))
        lengths.requires_grad_(trained)
        register_parametrization(layer, "weight", lengths)
    layer.train(training)


def _normalize(layer: nn.Module, kind: str, unbiased: bool) -> Tensor | None:
    """Register a parametrization; return the row lengths that it removes, None for ``wn``, which keeps them."""
    dim, weight = rows_dim(layer), cast("Tensor", layer.weight).detach().clone()
    length: Tensor
    if kind == "wn":
        parametrizations.weight_norm(layer, "weight", dim=dim)
        return None
    if kind == "sn":
        parametrizations.spectral_norm(layer, "weight")
        length = weight.norm() / cast("Tensor", layer.weight).detach().norm()
        return length.reshape(1)
    rows = _centered_rows(weight, dim)
    if kind == "cwn":
        register_parametrization(layer, "weight", CenteredWeightNormalization(dim))
        length = rows.norm(dim=1)
        return length
    standardization = WeightStandardization(dim, unbiased)
    register_parametrization(layer, "weight", standardization)
    return rows.std(1, correction=int(unbiased)) + standardization.eps


def _centered_rows(weight: Tensor, dim: int) -> Tensor:
    rows = weight.movedim(dim, 0).flatten(1)
    return rows - rows.mean(1, keepdim=True)


def refusal(layer: nn.Module, kind: str) -> str | None:
    """Return the reason why a layer's weight cannot be normalized, in words; None if it can."""
    if not isinstance(layer, Linear):
        return "it is neither a linear nor a convolutional layer"
    if parametrizations_of(layer):
        return "its weight is parametrized already"
    if "weight" not in layer._parameters:
        return "its weight is no parameter but computed, as by torch.nn.utils.weight_norm or prune"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return "its output channels are spread over groups (grouped transposed convolution)"
    if not scales_with_weight(layer):
        return (
            f"{type(layer).__name__} has a forward of its own, in which its outputs do not scale with its weight (one "
            "that standardizes it undoes any other parametrization)"
        )
    weight = layer.weight
    fan_in = weight.numel() // max(1, weight.shape[rows_dim(layer)])
    if fan_in == 0:
        return "it has no inputs (zero fan-in)"
    if fan_in == 1 and kind in ("cwn", "ws"):
        return "its rows have one element each, and centering makes every row zero"
    lost = _rows_without_direction(layer, kind)
    return f"{lost} of its rows have no direction (all elements equal)" if lost else None


def _rows_without_direction(layer: nn.Module, kind: str) -> int:
    """Return the number of rows that are zero, after centering for ``cwn`` and ``ws``; ``sn`` allows some zero rows."""
    weight = cast("Tensor", layer.weight).detach()
    if weight.is_meta:
        return 0
    rows = weight.movedim(rows_dim(layer), 0).flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    kept = _centered_rows(rows, 0) if kind in ("cwn", "ws") else rows
    lost = int((kept.norm(dim=1) <= 1e-6 * rows.norm(dim=1)).sum())  # zero up to rounding
    return 0 if kind == "sn" and lost < len(rows) else lost
