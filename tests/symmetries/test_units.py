"""Symmetries of one layer alone are the scale-invariant units that the monitors use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_normgeo import scale_invariant_units, swap_norm
from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.symmetries import Symmetries, scale_symmetries


def swapped(norm: str) -> nn.Module:
    network = torchvision.models.resnet18()
    swap_norm(network, norm)
    return network


def by_layer(found: Symmetries) -> dict[str, int]:
    """Return the number of symmetries that scale slices of the weight of one layer, and nothing but it and its bias."""
    counts: Counter[str] = Counter()
    for family in found.families:
        names = {member.slices.parameter for member in family.members}
        layers = {layer_name(name).removesuffix(".bias") for name in names}
        weights = [member for member in family.members if len(member.slices.shape) > 1]
        if len(layers) == 1 and weights and family.role != "rescaling":
            counts[layers.pop()] += family.count
    return dict(counts)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet18, group normalization": lambda: swapped("gn"),
    "resnet18, weight standardization": lambda: swapped("ws"),
    "resnext": torchvision.models.resnext50_32x4d,
    "vgg11_bn": torchvision.models.vgg11_bn,
    "densenet121": torchvision.models.densenet121,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "mnasnet": torchvision.models.mnasnet0_5,
    "regnet": torchvision.models.regnet_y_400mf,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "swin_t": torchvision.models.swin_t,
    "alexnet": torchvision.models.alexnet,
    "repvgg": lambda: timm.create_model("repvgg_a0"),
    "dla34": lambda: timm.create_model("dla34"),
}


FAST = ("resnet18", "resnet18, group normalization", "mobilenet_v2", "shufflenet", "swin_t", "alexnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]
)
def test_symmetries_of_one_layer_are_its_units(name: str) -> None:
    network = NETWORKS[name]().train()
    x = torch.randn(2, 3, 64, 64)
    units = {own.layer: own.count for own in scale_invariant_units(network, x) if own.invariant}
    assert by_layer(scale_symmetries(network, x)) == units
