"""The path norm of a network: the length of the vector of all products of weights along paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.outputs import tensors_in
from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.normalization.user_inputs import arguments
from lightning_normgeo.robustness.effective.layer_weights import channel_factors, weight_of
from lightning_normgeo.robustness.effective.linear_maps import along_channels, linear_map
from lightning_normgeo.robustness.effective.wiring import Wiring
from lightning_normgeo.robustness.model.parameter_swap import ParameterSlot, swapped_parameters

_ROUNDING = 1e-9
"""Largest relative difference of two sums in float64 that counts as rounding."""
Forward = Callable[..., Tensor]


def log10_path_norm(module: nn.Module, wiring: Wiring, example: Any, effective: bool) -> float:
    r"""Return the decimal logarithm of the l2 path norm, by forward passes through squared weights.

    .. math:: \phi = \Bigl(\sum_{\text{paths}} \prod_{w \in \text{path}} w^2\Bigr)^{1/2}

    φ² is the sum of the outputs for one sample of ones at the first layer, with squared weights and without biases
    (Neyshabur, Salakhutdinov, Srebro 2015; Jiang et al. 2020). It is defined for networks of linear layers and
    functions that are homogeneous of degree one, as ReLU and pooling, and then the outputs double with the input, which
    is tested. Pooling counts as it is.

    Args:
        module: the model, in evaluation mode.
        wiring: of the model.
        example: its input; the first layer gets ones in place of what it would get.
        effective: whether the weights are the effective ones W'; else W, and normalizations do nothing.

    Raises:
        ConfigurationError: if the path norm is not defined, with the reason.

    Cost: two forward passes in float64.
    """
    factors: dict[nn.Module, Tensor] = {}
    if effective:
        factors = {norm.layer: channel_factors(norm) for norm in wiring.unfolded}
        factors |= {layer: channel_factors(norm) for layer, norm in wiring.folded.items()}
    try:
        once, twice = (_total(module, wiring, example, factors, ones) for ones in (1.0, 2.0))
    except Exception as error:
        raise ConfigurationError(f"it cannot run with squared weights ({type(error).__name__})") from error
    if not (once > 0 and math.isfinite(once)):
        raise ConfigurationError("the sum over paths is zero or too large for float64")
    if abs(twice - 2 * once) > _ROUNDING * once:
        raise ConfigurationError("the network is not homogeneous, as one of linear layers, ReLU and pooling is")
    return 0.5 * math.log10(once)


@torch.no_grad()
def _total(module: nn.Module, wiring: Wiring, example: Any, factors: Mapping[nn.Module, Tensor], ones: float) -> float:
    """Return the sum of the outputs with squared weights, for an input of the first layer that has one value."""
    with _squared(wiring, factors, ones):
        args, kwargs = arguments(example)
        outputs = tensors_in(module(*args, **kwargs))
    return math.fsum(float(on_observing_device(output).double().sum()) for output in outputs)


@contextmanager
def _squared(wiring: Wiring, factors: Mapping[nn.Module, Tensor], ones: float) -> Iterator[None]:
    """Context in which layers compute with squared weights in float64, and normalizations with squared factors."""
    first = next(layer for layer in wiring.shapes if isinstance(layer, Linear))
    places: list[ParameterSlot] = []
    for layer in wiring.shapes:
        if isinstance(layer, Linear):
            forward = _squared_layer(layer, factors.get(layer), ones if layer is first else None)
        else:
            forward = _squared_norm(layer, factors.get(layer))
        places.append((vars(layer), "forward", forward))
    with swapped_parameters(places):
        yield


def _squared_layer(layer: nn.Module, factors: Tensor | None, ones: float | None) -> Forward:
    weight = weight_of(layer)
    apply = linear_map(layer, weight.square())

    def forward(x: Tensor, *args: Any) -> Tensor:
        x = on_observing_device(x).to(weight.dtype)
        if ones is not None:
            x = torch.zeros_like(x)
            x[:1] = ones  # one sample; without biases nothing comes of the others
        outputs = apply(x)
        return outputs if factors is None else outputs * along_channels(factors.square().to(x.device), layer)

    return forward


def _squared_norm(layer: nn.Module, factors: Tensor | None) -> Forward:
    """Return the forward of a normalization with squared factors; without factors it is the identity."""

    def forward(x: Tensor) -> Tensor:
        if factors is not None:
            x = x * factors.square().to(x.device).view(1, -1, *[1] * (x.ndim - 2))
        for follower in layer.children():  # an activation, as in timm's BatchNormAct2d
            x = follower(x)
        return x

    return forward
