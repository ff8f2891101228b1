"""Folding of a normalization's evaluation mode into the weight and bias of the preceding layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from lightning_normgeo.normalization.parametrizations import (
    Gain,
    normalize_weight,
    parametrizations_of,
    rows_dim,
)
from lightning_normgeo.normalization.row_scaling import scales_with_weight
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer
from lightning_normgeo.normalization.surgery.preceding_layers import PrecedingLayer, outputs_of


def without_place(norm_layer: NormLayer, layer: nn.Module | None) -> list[str]:
    """Return the names of the parameters and statistics of a normalization that its replacement cannot hold.

    Args:
        norm_layer: the normalization to be replaced.
        layer: the replacement.
    """
    mean, variance = norm_layer.statistics
    if isinstance(layer, MeanOnlyBatchNorm):
        return [
            title for title, there in (("γ", norm_layer.gamma), ("running variance", variance)) if there is not None
        ]
    there = {
        "γ": norm_layer.gamma,
        "β": norm_layer.beta,
        "running statistics" if variance is not None else "running mean": mean,
    }
    return [title for title, value in there.items() if value is not None]


def foldable(
    norm_layer: NormLayer, layer: nn.Module, preceding_layers: Sequence[PrecedingLayer], tied: set[int]
) -> PrecedingLayer | str | None:
    """Return the preceding layer that γ, β and the running statistics can be folded into.

    Args:
        norm_layer: the normalization to be replaced.
        layer: the replacement.
        preceding_layers: the layers that feed the normalization.
        tied: ids of the parameters that belong to several modules.

    Returns:
        The layer; if there is none, the reason in words; None if nothing needs folding.
    """
    if not without_place(norm_layer, layer):
        return None
    if len(preceding_layers) != 1:
        return "more than one weight in front" if preceding_layers else "no weight in front"
    preceding = preceding_layers[0]
    rows = norm_layer.gamma is not None or norm_layer.statistics[1] is not None
    if rows and not _scalable(preceding.layer):
        return f"the weight of {preceding.name} is parametrized without a gain for each row"
    if not preceding.direct or outputs_of(preceding.layer) != norm_layer.channels:
        return f"{preceding.name} is not directly in front of this layer alone"
    if not scales_with_weight(preceding.layer):
        kind = type(preceding.layer).__name__
        return f"{kind} has a forward of its own, in which its outputs do not scale with its weight"
    if is_parametrized(preceding.layer, "bias"):
        return f"the bias of {preceding.name} is parametrized"
    if any(id(parameter) in tied for parameter in preceding.layer.parameters()):
        return f"weight or bias of {preceding.name} is used elsewhere too"
    return preceding


def tied_parameters(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that belong to several modules."""
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def scale_and_shift(norm_layer: NormLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""Return scale a and shift b of y = ax + b, the evaluation mode of a normalization with running statistics.

    .. math:: a = \gamma / \sqrt{\sigma^2 + \varepsilon}, \quad b = \beta - a\mu

    Args:
        norm_layer: the normalization; a missing γ or σ² counts as 1, a missing β or μ as 0.
        dtype: to compute in.

    Returns:
        a and b, each of shape ``(channels,)``, on the CPU if the device has no float64.
    """
    given = (*norm_layer.statistics, norm_layer.gamma, norm_layer.beta)
    mean, variance, gamma, beta = (None if part is None else on_observing_device(part) for part in given)
    like = next(part for part in (variance, mean, gamma, beta) if part is not None)
    factors, offset = like.new_ones(norm_layer.channels, dtype=dtype), like.new_zeros(norm_layer.channels, dtype=dtype)
    if variance is not None:
        factors = torch.rsqrt(variance.to(dtype) + cast("float", norm_layer.layer.eps))
    if gamma is not None:
        factors = factors * channel_values(gamma).to(dtype)
    offset = offset if mean is None else -mean.to(dtype) * factors
    return factors, offset if beta is None else offset + channel_values(beta).to(dtype)


@torch.no_grad()
def fold(norm_layer: NormLayer, preceding: nn.Module, into: nn.Module) -> Tensor:
    r"""Fold the evaluation mode of ``norm_layer`` into the bias of the preceding layer.

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad
              b' = \beta + \gamma(b - \mu) / \sqrt{\sigma^2 + \varepsilon}

    The weight is left to the caller, who may parametrize it before scaling its rows.

    Args:
        norm_layer: the normalization to be replaced.
        preceding: the layer in front of it, changed in place.
        into: the replacement; a mean-only batch normalization keeps β, and μ in the new scale.

    Returns:
        The factors of the rows of W, of shape ``(channels,)``.
    """
    like = next(preceding.parameters())
    wide = torch.promote_types(like.dtype, torch.float32)
    factors, offset = (part.to(like.device) for part in scale_and_shift(norm_layer, wide))
    if isinstance(into, MeanOnlyBatchNorm):
        into.running_mean = (into.running_mean * factors).to(into.running_mean.dtype)
        offset = torch.zeros_like(offset)
    old = preceding._parameters.get("bias")
    if old is not None or not isinstance(into, MeanOnlyBatchNorm):
        trained = [parameter.requires_grad for parameter in (old, norm_layer.beta) if parameter is not None]
        values = offset if old is None else offset + old.to(wide) * factors
        bias = nn.Parameter(values.to(like.dtype)) if old is None else old
        bias.copy_(values)
        preceding.bias = bias.requires_grad_(any(trained or [like.requires_grad]))
    return factors


def normalize_scaled(layer: nn.Module, kind: str, gain: bool, unbiased: bool, factors: Tensor) -> None:
    """Parametrize a weight and multiply its rows by factors, so that a row with factor zero keeps its direction."""
    # sn has one gain for the whole matrix, so factors per row have to go into the matrix before it is parametrized
    first = kind == "sn" and (factors.is_meta or bool(factors.any()))
    if first:
        scale_rows(layer, factors)
    normalize_weight(layer, kind, gain, unbiased)
    if not first:
        scale_rows(layer, factors)


@torch.no_grad()
def scale_rows(layer: nn.Module, factors: Tensor) -> None:
    """Multiply the rows of a layer's weight by factors, in place: one factor per output channel."""
    gain = gain_of(layer)
    if gain is not None:
        gain.mul_(factors[: gain.numel()].view_as(gain))
    elif isinstance(layer, _ConvTransposeNd):
        inputs, outputs, *kernel = layer.weight.shape
        groups = layer.weight.view(layer.groups, inputs // layer.groups, outputs, *kernel)
        groups.mul_(factors.view(layer.groups, 1, outputs, *[1] * len(kernel)))
    elif "weight" in layer._parameters:
        weight = cast("nn.Parameter", layer.weight)
        weight.mul_(factors.view(-1, *[1] * (weight.ndim - 1)))


def gain_of(layer: nn.Module) -> nn.Parameter | None:
    """Return the learnable lengths of a normalized weight, one per row or one for the matrix; None if it has none."""
    last = next(reversed(parametrizations_of(layer)), None)
    if isinstance(last, Gain):
        return last.gain
    if isinstance(last, _WeightNorm) and last.dim == rows_dim(layer):
        return cast("nn.Parameter", layer.parametrizations["weight"].original0)  # type: ignore[index, union-attr]
    return None


def _scalable(layer: nn.Module) -> bool:
    """Whether each output channel of a layer can be scaled independently."""
    gain = gain_of(layer)
    return "weight" in layer._parameters if gain is None else gain.numel() == outputs_of(layer)


def channel_values(values: Tensor) -> Tensor:
    """Return γ or β with one value per channel, averaged over positions where it has several."""
    return values.detach() if values.ndim == 1 else values.detach().flatten(1).mean(1)
