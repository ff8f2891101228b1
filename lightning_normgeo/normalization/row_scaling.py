"""Test of whether a layer is linear in its weight, so that factors on its rows are factors on its output channels."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.func import functional_call

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.surgery.norm_layers import overrides

Linear = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose weight can be normalized."""


@torch.no_grad()
def scales_with_weight(layer: nn.Module) -> bool:
    r"""Whether scaling the rows of weight and bias scales the output channels, and adding to the bias adds to them.

    .. math:: f(x; aW, ab + c) = a f(x; W, b) + c

    This holds for torch's own layers. A subclass that overrides the forward is tested on random numbers. The result is
    False for one that standardizes its weight before using it, and for one that cannot be run.
    """
    if not overrides(layer, "forward", "_conv_forward"):
        return True
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or "weight" not in layer._parameters:
        return False
    modes = [(child, child.training) for child in layer.modules()]
    try:
        for child, _ in modes:  # flag by flag, since a subclass may override ``eval``
            child.training = False
        return _is_linear_in_rows(layer)
    except Exception:
        return False
    finally:
        for child, mode in modes:
            child.training = mode


def _is_linear_in_rows(layer: nn.Module) -> bool:
    held = (*layer.named_parameters(), *layer.named_buffers())
    state = {name: on_observing_device(t.detach()).double() for name, t in held if t.is_floating_point()}
    weight, bias = state["weight"], state.get("bias")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_input_shape(layer), generator=generator, dtype=weight.dtype).to(weight.device)
    factors = torch.linspace(0.5, 2, len(weight), dtype=weight.dtype, device=weight.device)
    factors[::2] *= -1  # γ may be negative, and a layer that computes with |W| passes the test for positive factors
    changed = {**state, "weight": weight * factors.view(-1, *[1] * (weight.ndim - 1))}
    offset = torch.zeros_like(factors)
    if bias is not None:
        offset = factors.flip(0)
        changed["bias"] = bias * factors + offset
    channels = -1 if isinstance(layer, nn.Linear) else 1
    shape = [1 if d != channels % x.ndim else -1 for d in range(x.ndim)]
    before, after = functional_call(layer, state, (x,)), functional_call(layer, changed, (x,))
    return bool(torch.allclose(after, before * factors.view(shape) + offset.view(shape), rtol=1e-9, atol=1e-9))


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return 2, layer.in_features
    conv = cast("nn.modules.conv._ConvNd", layer)
    # the dilated kernel spans 1 + dilation * (size - 1) positions; one more gives a second output position at stride 1
    reach = [2 + dilation * (size - 1) for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    return 2, conv.in_channels, *reach
