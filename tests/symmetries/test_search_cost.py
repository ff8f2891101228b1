"""The search takes work in proportion to the number of layers, counted in calls of functions rather than seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.symmetries.units.discovery import search

_WIDTH = 8


class Deep(nn.Module):
    """Layers one after another, with as many elements in their results as in their weights."""

    def __init__(self, depth: int, layer: Callable[[], nn.Module], residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(_WIDTH, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + (x if self.residual else 0.0)
        return self.head(x.flatten(1)[:, :_WIDTH])


def normalized() -> nn.Module:
    """A linear layer behind which batch normalization removes the scale."""
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False), nn.BatchNorm1d(_WIDTH), nn.ReLU())


def by_layer_norm() -> nn.Module:
    """A linear layer behind which layer normalization removes the scale."""
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.ReLU())


def plain() -> nn.Module:
    """A linear layer without normalization."""
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False), nn.ReLU())


class Hyper(nn.Module):
    """Layers whose weights a small network makes from a vector for each layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(4, 3))
        self.maker = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, width * width))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.vectors)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1].expand(-1, self.width)
        for vector, norm in zip(self.vectors, self.norms, strict=True):
            x = norm(nn.functional.linear(x, self.maker(vector).view(self.width, self.width))).relu()
        return x


def calls_of_search(model: nn.Module) -> int:
    """Return how many functions, of Python or in C, one search calls."""
    graph = Graph(model(torch.randn(_WIDTH, _WIDTH)).sum())
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        search(model, graph)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer", [normalized, by_layer_norm, plain])
def test_each_layer_takes_as_many_calls_however_deep_the_network(
    layer: Callable[[], nn.Module], residual: bool
) -> None:
    calls_of_search(Deep(2, layer, residual))  # fills caches
    shallow, middle, deep = (calls_of_search(Deep(depth, layer, residual)) for depth in (12, 24, 48))
    assert (deep - middle) / 24 < 1.01 * (middle - shallow) / 12


def test_a_hypernetwork_takes_calls_for_its_units_not_for_each_weight_that_it_makes() -> None:
    calls_of_search(Hyper(4))  # fills caches
    some, twice = (calls_of_search(Hyper(width)) for width in (16, 32))
    assert twice < 2 * some
