"""Linear and convolutional layers as linear maps, with any weight and without their bias."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_normgeo.geometry.rows import as_rows
from lightning_normgeo.geometry.spectral_norms import Operator
from lightning_normgeo.normalization.parametrizations import rows_dim
from lightning_normgeo.normalization.surgery.preceding_layers import outputs_of

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear_map(layer: nn.Module, weight: Tensor) -> Operator:
    """Return the function x ↦ Wx that a layer of torch computes besides its bias.

    Args:
        layer: a linear or convolutional layer, also a transposed one, with any stride, padding, dilation and groups.
        weight: W, of the shape of the layer's weight.
    """
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(x, weight)
    if isinstance(layer, _ConvTransposeNd):
        function = _TRANSPOSED[len(layer.kernel_size)]
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
        return lambda x: function(x, weight, **settings)
    conv = cast("nn.Conv2d", layer)
    return lambda x: conv._conv_forward(x, weight, None)


def along_channels(values: Tensor, layer: nn.Module) -> Tensor:
    """View one value for each output channel so that it fits an output of the layer."""
    return values.view(-1, *[1] * len(layer.kernel_size)) if isinstance(layer, _ConvNd) else values


def smallest_input(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an input on which a layer has the same spectral norm as on one of the given shape.

    A linear layer acts on each position alone, and so does a convolution with a kernel of one element: one is enough.

    Args:
        layer: the layer.
        shape: shape of its input, with the batch.
    """
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    conv = cast("_ConvNd", layer)
    dims = len(conv.kernel_size)
    pads = conv.padding not in ("same", "valid") and any(conv.padding)
    pointwise = not pads and not isinstance(conv, _ConvTransposeNd) and all(size == 1 for size in conv.kernel_size)
    return (1, conv.in_channels, *([1] * dims if pointwise else shape[-dims:]))


def unit_norms(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return ‖W_i‖ of each output channel, ``(channels,)``."""
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 1
    norms: Tensor = as_rows(weight, outputs_of(layer), rows_dim(layer), groups).norm(dim=1)
    return norms
