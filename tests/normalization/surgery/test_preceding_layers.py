"""swap_norm finds the layer in front of a normalization, by the order of registration or the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import swap_norm
from support.projects import ConvNet
from support.small_models import Net, PreActivation, feeders, worn, x2d


def test_order_and_graph_agree_on_a_chain() -> None:
    net = ConvNet()
    assert feeders(net) == feeders(net, torch.rand(4, 3, 8, 8)) == {"1": ["0"], "4": ["3"]}


def test_pre_activation_blocks_are_fed_by_all_blocks_before() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), PreActivation(4, 4), PreActivation(4, 6), PreActivation(6, 6))
    assert feeders(net) == {
        "1.bn1": ["0"],
        "1.bn2": ["1.conv1"],
        "2.bn1": ["1.conv2"],
        "2.bn2": ["2.conv1"],
        "3.bn1": ["2.shortcut"],
        "3.bn2": ["3.conv1"],
    }
    assert feeders(net, torch.rand(2, 3, 8, 8)) == {
        "1.bn1": ["0"],
        "1.bn2": ["1.conv1"],
        "2.bn1": ["0", "1.conv2"],
        "2.bn2": ["2.conv1"],
        "3.bn1": ["2.conv2", "2.shortcut"],
        "3.bn2": ["3.conv1"],
    }


def test_two_convolutions_added_before_one_normalization() -> None:
    net = Net(lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(4, 6, 1), bn=nn.BatchNorm2d(6))
    assert feeders(net) == {"bn": ["b"]}
    assert feeders(net, x2d()) == {"bn": ["a", "b"]}
    guessed, seen = copy.deepcopy(net), net
    made_up = swap_norm(guessed, "cwn")
    assert sorted(made_up.changes[0].weights) == ["a", "b"]
    assert made_up.example == "(2, 4, 32, 32)"
    report = swap_norm(seen, "cwn", example_batch=x2d())
    assert sorted(report.changes[0].weights) == ["a", "b"]
    assert "more than one weight in front" in report.changes[0].note
    assert "found by a forward pass" in str(report)
    assert report.example is None


def test_a_concatenation_is_fed_by_all_its_parts() -> None:
    net = Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x).relu(), x], 1)),
        a=nn.Conv2d(4, 2, 1),
        b=nn.Conv2d(4, 6, 1),
        bn=nn.BatchNorm2d(12),
    )
    assert feeders(net) == {}
    assert feeders(net, x2d()) == {"bn": ["a", "b"]}
    net.run, run = None, net.run
    with pytest.raises(ConfigurationError, match="no linear or convolutional layer was found to feed it by the order"):
        swap_norm(net, "wn")
    net.run = run
    swap_norm(net, "wn", example_batch=x2d())


def test_tracing_sees_frozen_weights_and_leaves_everything_as_it_was() -> None:
    net = worn(ConvNet())
    net.requires_grad_(False)
    net[3] = parametrizations.spectral_norm(net[3])
    state, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert feeders(net, torch.rand(4, 3, 8, 8, generator=torch.Generator())) == {"1": ["0"], "4": ["3"]}
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == []
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_normalization_that_nothing_feeds_or_nobody_calls() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    report = swap_norm(copy.deepcopy(net), "wn", example_batch=x2d())
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("0", "no linear or convolutional layer was found to feed it")
    ]
    note = swap_norm(net, "none").changes[0].note
    assert note == "γ, β and running statistics dropped: no weight in front"
    net = Net(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6), idle=nn.BatchNorm2d(6))
    (idle,) = swap_norm(net, "wn", example_batch=x2d()).left
    assert (idle.name, idle.reason) == ("idle", "no linear or convolutional layer was found to feed it")


def test_keyword_arguments_and_several_inputs() -> None:
    net = Net(lambda m, x: m.bn(input=m.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    assert feeders(net, (x2d(),)) == feeders(net, {"x": x2d()}) == {"bn": ["conv"]}
