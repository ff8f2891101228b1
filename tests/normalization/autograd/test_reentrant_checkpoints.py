"""Units behind reentrant activation checkpoints equal those of the network without checkpoints; no state changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, scale_invariant_units
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import opened
from lightning_normgeo.symmetries import units_from_graph
from support.projects import Project, images, trainer

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Segments(nn.Module):
    """A stem, a segment with a nested segment, and a head; a call changes buffers, random numbers and attributes."""

    def __init__(self, checkpoints: bool, nested: bool = True) -> None:
        super().__init__()
        self.checkpoints, self.nested = checkpoints, nested
        self.calls: list[str] = []
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.outer = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3), nn.Dropout(0.2))
        self.inner = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False))
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def segment(self, x: Tensor, scale: float) -> tuple[Tensor, float]:
        self.calls.append("segment")
        self.last = random.random()
        return self.run(self.inner, self.outer(scale * x), self.nested), scale

    def run(self, function: Any, x: Any, checkpoints: bool) -> Any:
        return checkpoint(function, x, use_reentrant=True) if checkpoints and self.checkpoints else function(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y, _ = checkpoint(self.segment, y, 2.0, use_reentrant=True) if self.checkpoints else self.segment(y, 2.0)
        return self.head(self.norm(y).relu().mean((2, 3)))


def net(checkpoints: bool, nested: bool = True) -> Segments:
    torch.manual_seed(0)
    return Segments(checkpoints, nested)


def batch() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_units_are_those_without_checkpoints(nested: bool) -> None:
    expected, found = [
        units_from_graph(m := net(checkpoints, nested), m(batch()).square().sum()) for checkpoints in (False, True)
    ]
    assert found == expected
    assert [u.kind for u in found] == ["filter", "filter", "filter", "none"]
    assert scale_invariant_units(net(True, nested), batch()) == scale_invariant_units(net(False, nested), batch())


def test_nothing_is_disturbed() -> None:
    module = net(True)
    loss = module(batch()).square().sum()
    states = torch.get_rng_state(), random.getstate()
    buffers = {name: (buffer, buffer.clone(), buffer._version) for name, buffer in module.named_buffers()}
    calls, last = list(module.calls), module.last
    graph = opened(Graph(loss), module)
    assert not graph.hides_reentrant
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    for name, buffer in module.named_buffers():
        same, content, version = buffers[name]
        assert buffer is same
        assert torch.equal(buffer, content)
        assert buffer._version == version
    assert (module.calls, module.last) == (calls, last)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_signature_is_that_of_the_graph_before_it_was_opened() -> None:
    module = net(True)
    graph = Graph(module(batch()).square().sum())
    assert opened(graph, module) is not graph
    assert graph.signature == Graph(module(batch()).square().sum()).signature
    assert graph.hides_reentrant


def test_nothing_is_stored_for_a_backward_pass() -> None:
    module = net(True)
    graph = Graph(module(batch()).square().sum())
    inside = opened(graph, module).order.keys() - graph.order.keys()
    stored = [node._raw_saved_weight.data for node in inside if node.name() == "ConvolutionBackward0"]
    assert stored == ["not stored"] * 2


class Once(Segments):
    """Network whose segment raises when it runs again with gradients."""

    def segment(self, x: Tensor, scale: float) -> tuple[Tensor, float]:
        if torch.is_grad_enabled():
            raise RuntimeError("out of turn")
        return super().segment(x, scale)


def test_what_cannot_be_run_again_is_named() -> None:
    torch.manual_seed(0)
    module = Once(True)
    loss = module(batch()).square().sum()
    reasons = {u.name: u.reason for u in units_from_graph(module, loss)}
    assert reasons["outer.2.weight"] == reasons["inner.2.weight"] == "inside a reentrant activation checkpoint"
    assert reasons["stem.weight"] == "a reentrant activation checkpoint is in its way"
    assert opened(Graph(loss), module).hides_reentrant


class Logged(Project):
    """Project that logs in a checkpointed function; Lightning refuses self.log outside of its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        def function(y: Tensor) -> Tensor:
            self.log("inside", y.mean().detach(), on_step=True, on_epoch=False)
            return self.net(y)

        return checkpoint(function, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("log", [False, True], ids=["", "logs"])
def test_training_is_the_same_with_and_without_monitors(log: bool) -> None:
    finals, keys = [], []
    for monitors in ([], [OrthogonalityMonitor(), NormGrowthMonitor()]):
        torch.manual_seed(3)
        project = (Logged if log else Project)(net=net(checkpoints=True))
        fit = trainer(*monitors, steps=5)
        fit.fit(project, images())
        keys.append({key for key in fit.callback_metrics if key.startswith("orthogonality/")})
        finals.append([*project.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *finals))
    assert keys[1]
