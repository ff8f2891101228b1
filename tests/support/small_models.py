"""Small models for tests of swapped normalizations and units, and checks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.normalization import NORMS
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from lightning_normgeo.normalization.surgery.norm_layers import normalization_layers
from lightning_normgeo.normalization.surgery.preceding_layers import inputs_by_graph, inputs_in_order

DATA = [name for name, norm in NORMS.items() if norm.data not in (None, "mbn") and norm.weight is None]
WEIGHT = [name for name, norm in NORMS.items() if norm.data is None and norm.weight is not None]
PAIRS = [name for name, norm in NORMS.items() if norm.data is not None and norm.weight is not None]


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class PreActivation(nn.Module):
    """A residual block with its normalizations in front of the convolutions, as in He et al. 2016."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return y + self.shortcut(x)


def conv_bn(outputs: int = 6, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, outputs, 3, bias=bias), nn.BatchNorm2d(outputs))


def worn(net: nn.Module) -> nn.Module:
    """Change parameters and statistics randomly, as training would."""
    for layer in net.modules():
        if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, MeanOnlyBatchNorm)):
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if name == "running_var":
                    tensor.uniform_(0.3, 3)
                elif tensor.is_floating_point():
                    tensor.data.normal_(0.5, 1)
                else:
                    tensor.fill_(7)
    return net


def x2d(n: int = 3, channels: int = 4, size: int = 6) -> Tensor:
    return torch.randn(n, channels, size, size)


def feeders(net: nn.Module, batch: Any = None) -> dict[str, list[str]]:
    sources = normalization_layers(net)
    found = inputs_in_order(net, sources) if batch is None else inputs_by_graph(net, sources, batch)
    return {s.name: sorted(f.name for f in found[s.layer].preceding_layers) for s in sources if s.layer in found}
