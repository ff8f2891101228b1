"""torchvision's ResNets with any normalization, and an initialization with which each of them trains."""

from __future__ import annotations

from typing import Literal

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from lightning_normgeo.normalization.registry import find_norm
from lightning_normgeo.normalization.surgery.swap import swap_norm

Stem = Literal["cifar", "imagenet"]
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_STRIDES = {"cifar": 8, "imagenet": 32}
"""Pixels of the image per pixel of the last stage's feature maps, by stem."""


def build_resnet(
    arch: str,
    norm: str,
    stem: Stem,
    num_classes: int,
    groups: int | None = None,
    unbiased: bool = True,
    zero_init_residual: bool | None = None,
) -> nn.Module:
    """Return a ResNet with random weights and a normalization of choice.

    Each batch normalization of the original is replaced: by another layer, by a parametrization that normalizes the
    weight before it, or by both. See :class:`ResNetClassifier` for the arguments, the initialization and its reasons.
    """
    model: nn.Module = getattr(torchvision.models, arch)(weights=None, num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    chosen = find_norm(norm)
    _initialize(model)
    if norm != "bn":
        swap_norm(model, norm, groups=groups if chosen.data == "gn" else None, unbiased=unbiased)
    normalizes_data = chosen.data not in (None, "mbn")
    zero_init = not normalizes_data if zero_init_residual is None else zero_init_residual
    if zero_init:
        for block in model.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                _start_at_zero(block, normalizes_data)
    return model


def smallest_map(stem: str, height: int, width: int) -> tuple[int, int]:
    """Return height and width, in pixels, of the last stage's feature maps for images of a given size."""
    stride = _STRIDES[stem]
    return -(-height // stride), -(-width // stride)


def _initialize(model: nn.Module) -> None:
    """Initialize convolutions, also a new stem, as in He et al. 2015, and batch normalizations with γ = 1 and β = 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def _start_at_zero(block: BasicBlock | Bottleneck, normalizes_data: bool) -> None:
    """Let a residual branch start at zero by setting its last factor to zero: γ, the gain, or the weight."""
    convolution, norm = (block.conv3, block.bn3) if isinstance(block, Bottleneck) else (block.conv2, block.bn2)
    if normalizes_data:
        nn.init.zeros_(norm.weight)
        return
    factors = dict(convolution.named_parameters())
    gains = [parameter for name, parameter in factors.items() if name.endswith((".gain", ".original0"))]
    nn.init.zeros_(gains[0] if gains else factors["weight"])
