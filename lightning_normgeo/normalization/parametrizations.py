r"""Weight-based normalizations as parametrizations: a weight is replaced by its normalized rows wherever it is used.

Weight normalization and spectral normalization are torch's. Those here complete the paper's list:

=====================  ============================================================  =============================
CWN, Huang et al. 2017 :math:`(V_i - \bar V_i) / \lVert V_i - \bar V_i\rVert`        rows on the unit sphere
WS, Qiao et al. 2019   :math:`(V_i - \bar V_i) / (\sigma_{V_i} + \varepsilon)`       rows on a sphere of radius √n
=====================  ============================================================  =============================

With the biased deviation and ε = 0, WS = √n · CWN; with the unbiased one, which Qiao's code uses, √(n-1) · CWN.
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
    """Acts on the rows of a weight: the slices along ``dim``, one per output channel."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"dim={self.dim}"

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to store for a weight that is assigned: the weight itself, of which the direction counts."""
        return weight

    def _rest(self, weight: Tensor) -> list[int]:
        return [d for d in range(weight.ndim) if d != self.dim]


class CenteredWeightNormalization(_RowParametrization):
    r"""CWN (Huang et al. 2017; Sun et al. 2020, section 2.4): rows centered and divided by their length.

    .. math:: W_i = (V_i - \bar V_i) / \lVert V_i - \bar V_i \rVert

    The loss is invariant to the scale and to the mean of every row: ⟨V_i, ∂L/∂V_i⟩ = 0 and ⟨1, ∂L/∂V_i⟩ = 0, exactly
    for rows longer than 1e-12 (a shorter one stays shorter than 1). Rows need at least two elements.

    Args:
        dim: the dimension of output channels; 1 for transposed convolutions.
    """

    def forward(self, v: Tensor) -> Tensor:
        """Return the normalized weight."""
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
        dim: the dimension of output channels; 1 for transposed convolutions.
        unbiased: divide by n - 1 as Qiao's code does, not by n as the paper's formula.
        eps: ε, added to the deviation.
    """

    def __init__(self, dim: int = 0, unbiased: bool = True, eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.unbiased = unbiased
        self.eps = eps

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"dim={self.dim}, unbiased={self.unbiased}, eps={self.eps}"

    def forward(self, v: Tensor) -> Tensor:
        """Return the standardized weight."""
        rest = self._rest(v)
        centered = v - v.mean(rest, keepdim=True)
        return centered / (v.std(rest, correction=int(self.unbiased), keepdim=True) + self.eps)


class Gain(_RowParametrization):
    """A learnable factor for each row, which gives a normalized weight its length (``g`` of weight normalization).

    Args:
        gain: initial factors, one per output channel, or one for all.
        dim: the dimension of output channels.
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
    """Return the dimension of a layer's weight that enumerates output channels."""
    return int(isinstance(layer, nn.modules.conv._ConvTransposeNd))


def parametrizations_of(layer: nn.Module) -> list[nn.Module]:
    """Return the parametrizations of a layer's weight, in the order in which they are applied."""
    if not is_parametrized(layer, "weight"):
        return []
    return list(cast("ParametrizationList", layer.parametrizations["weight"]))  # type: ignore[index]


def parametrization_kind(layer: nn.Module | None) -> Literal["filter", "matrix"] | None:
    """Return what a unit of a parametrized weight is; None where it is unknown, or not an output channel's slice."""
    for parametrization in [] if layer is None else parametrizations_of(layer):
        if isinstance(parametrization, parametrizations._SpectralNorm):
            return "matrix"
        if type(parametrization) in _PARAMETRIZATIONS and layer is not None:
            return "filter" if parametrization.dim == rows_dim(layer) else None
    return None


def parametrization_title(layer: nn.Module | None) -> str:
    """Return the normalization of a layer's weight in words."""
    found = [] if layer is None else [p for p in parametrizations_of(layer) if not isinstance(p, Gain)]
    return _PARAMETRIZATIONS.get(type(found[0]), type(found[0]).__name__) if found else "a normalization of the weight"


_KINDS = ("wn", "cwn", "ws", "sn")


def normalize_weight(layer: nn.Module, kind: str, gain: bool = True, unbiased: bool = True) -> None:
    """Parametrize the weight of a linear or convolutional layer, in place.

    With a gain the effective weight stays what it was for ``wn`` and ``sn``, and becomes the centered weight for
    ``cwn`` and ``ws``. Without one only the direction is kept. Salimans & Kingma give ``wn`` a gain per row, which it
    always has here; Miyato et al. give ``sn`` one for the matrix (their appendix E).

    Args:
        layer: a linear or convolutional layer whose weight has no parametrization yet.
        kind: ``wn``, ``cwn``, ``ws`` or ``sn``.
        gain: whether ``cwn`` and ``ws`` get a learnable length per row, and ``sn`` one for the matrix.
        unbiased: the deviation that ``ws`` divides by.

    Raises:
        ConfigurationError: for another kind, a layer without such a weight, or with rows that have no direction.
    """
    entry_of("kind", kind, dict.fromkeys(_KINDS))
    why = refusal(layer, kind)
    if why is not None:
        raise ConfigurationError(f"{type(layer).__name__} cannot be parametrized by {kind!r}: {why}.")
    trained, training = cast("nn.Parameter", layer.weight).requires_grad, layer.training
    layer.eval()  # in training mode spectral normalization goes on iterating
    length = _normalize(layer, kind, unbiased)
    if gain and length is not None:
        lengths = Gain(length.reshape(-1), rows_dim(layer))
        lengths.requires_grad_(trained)
        register_parametrization(layer, "weight", lengths)
    layer.train(training)


def _normalize(layer: nn.Module, kind: str, unbiased: bool) -> Tensor | None:
    """Register a parametrization and return what gives rows their length back; None for ``wn``, which keeps it."""
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
    """Return why a layer's weight cannot be normalized, or None."""
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
        return "its rows have one element each, and centering leaves nothing of it"
    lost = _rows_without_direction(layer, kind)
    return f"{lost} of its rows have no direction (all elements equal)" if lost else None


def _rows_without_direction(layer: nn.Module, kind: str) -> int:
    """Return how many rows are zero, or constant where rows are centered; for ``sn`` only a zero matrix counts."""
    weight = cast("Tensor", layer.weight).detach()
    if weight.is_meta:
        return 0
    rows = weight.movedim(rows_dim(layer), 0).flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    kept = _centered_rows(rows, 0) if kind in ("cwn", "ws") else rows
    lost = int((kept.norm(dim=1) <= 1e-6 * rows.norm(dim=1)).sum())  # zero, but for rounding
    return 0 if kind == "sn" and lost < len(rows) else lost
