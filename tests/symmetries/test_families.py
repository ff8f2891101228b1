"""Families are simple: of one sign where that is possible, with few slices, and with a role."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from lightning_normgeo.symmetries import Symmetries, scale_symmetries
from support.symmetry_parts import transformer


def texts(found: Symmetries) -> list[str]:
    return [f"{family.role}: {family}" for family in found.families]


def test_streams_of_convnext_are_invariant_jointly() -> None:
    found = scale_symmetries(torchvision.models.convnext_tiny(), torch.randn(2, 3, 64, 64))
    jointly = [family for family in found.families if family.role == "invariant jointly"]
    assert sum(family.count for family in jointly) >= 4
    assert 0.03 < found.shares["invariant jointly"] < 0.6


def test_heads_of_a_transformer() -> None:
    found = texts(scale_symmetries(transformer(), torch.randint(0, 5, (3, 4))))
    path = "blocks.0.body.1"
    assert any(text.startswith("invariant jointly: 1× 6 parameters (positions, embedding.weight,") for text in found)
    assert f"without effect: 4× {path}.key.bias[i]" in found
    assert f"rescaling: 4× {path}.query.weight[i], {path}.query.bias[i] against {path}.key.weight[i]" in found
    assert f"rescaling: 4× {path}.value.weight[i], {path}.value.bias[i] against {path}.output.weight[:, i]" in found


class Beside(nn.Module):
    """A depthwise and a pointwise convolution that read the same normalized channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.point = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.norms[0](self.depth(x)) + self.norms[1](self.point(x)).sigmoid()


def test_filters_behind_a_shared_input_are_invariant_alone() -> None:
    found = texts(scale_symmetries(Beside(), torch.randn(4, 4, 6, 6)))
    assert "invariant alone: 4× depth.weight[i]" in found
    assert "invariant alone: 4× point.weight[i]" in found
