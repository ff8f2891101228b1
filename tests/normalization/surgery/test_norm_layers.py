"""swap_norm with subclasses, shared layers and containers of normalizations; models keep their classes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, swap_norm
from lightning_normgeo.normalization.parametrizations import parametrizations_of
from support.projects import ConvNet, Project, images, sgd, trainer
from support.small_models import DATA, conv_bn, worn, x2d

EXACT = ["none", "wn", "sn", "wn+mbn"]  # keep the function of evaluation mode


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: a batch normalization that also applies its own dropout and activation."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


# subclasses


@pytest.mark.parametrize("to", NORMS)
def test_a_subclass_keeps_its_activation(to: str) -> None:
    act, drop = nn.SiLU(inplace=True), nn.Dropout(0.5)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), BatchNormAct2d(6, act, drop), nn.Conv2d(6, 2, 1))
    worn(net).eval()
    x = x2d()
    expected = net(x)
    before = dict(net.named_parameters())
    if to == "bn":
        with pytest.raises(ConfigurationError, match="change nothing: 1: it is batch normalization already"):
            swap_norm(net, to)
        return
    report = swap_norm(net, to)
    if NORMS[to].data == "bn":
        assert type(net[1]) is BatchNormAct2d
        return
    assert (net[1].act, net[1].drop) == (act, drop)
    assert not net[1].training
    assert "Dropout + SiLU" in report.changes[0].after
    if to in DATA:
        assert net[1].norm.weight is before["1.weight"]
    if to in EXACT:
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_an_activation_that_was_none_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), BatchNormAct2d(6, nn.Identity()))
    swap_norm(net, "gn")
    assert type(net[1]) is nn.GroupNorm


def test_subclasses_that_do_more_are_left_alone_or_reported() -> None:
    class Split(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(6)
            self.aux = nn.ModuleList([nn.Identity()])

    class Conditional(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(6)
            self.embed = nn.Embedding(3, 6)

    class ScaleState(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(6)
            self.temperature = nn.Parameter(torch.ones(1))

    class Rectified(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    parametrized = parametrizations.weight_norm(nn.BatchNorm2d(6), dim=None)
    net = nn.ModuleList([Split(), Conditional(), ScaleState(), Rectified(6), parametrized])
    report = swap_norm(net, "gn")
    assert {entry.name: entry.reason for entry in report.left} == {
        "0": "a subclass that holds more than an activation: aux",
        "1": "a subclass that holds more than an activation: embed",
        "2": "a subclass with parameters of its own: temperature",
        "4": "its own parameters are parametrized",
    }
    assert "the forward of Rectified replaced" in report.changes[0].note


# places of layers


def test_shared_layers_are_swapped_once_under_all_their_names() -> None:
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    report = swap_norm(net, "gn")
    assert net[1] is net[3]
    assert type(net[1]) is nn.GroupNorm
    assert [(c.name, c.note) for c in report.changes][1] == ("3", "the same layer as 1")
    assert net(x2d()).isfinite().all()
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    report = swap_norm(net, "wn")  # one pair of γ, β and statistics cannot be folded into two weights
    assert type(net[1]) is type(net[3]) is nn.Identity
    assert "dropped" in report.changes[0].note


def test_a_shared_block_is_swapped_once() -> None:
    block = conv_bn(4)
    net = nn.Sequential(block, nn.ReLU(), block)
    swap_norm(net, "wn")
    assert net[0] is net[2]
    assert len(parametrizations_of(block[0])) == 1
    assert net(x2d()).isfinite().all()


def test_containers_of_any_kind() -> None:
    net = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]),
            "dict": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "norm": nn.BatchNorm2d(6)}),
            "chain": conv_bn(),
        }
    )
    assert swap_norm(net, "gn").left == ()
    assert [type(net["list"][1]), type(net["dict"]["norm"]), type(net["chain"][1])] == [nn.GroupNorm] * 3
    assert len(net["chain"]) == 2
    report = swap_norm(net, "wn")  # the order is certain in the Sequential only
    assert report.changes[0].weights == ("chain.0",)
    assert [entry.name for entry in report.left] == ["list.1", "dict.norm"]
    assert "that list.0 feeds it is a guess from the order of registration. Pass example_batch" in report.left[0].reason


def test_the_filter_chooses_by_any_name() -> None:
    net = ConvNet()
    report = swap_norm(net, "gn", layers="4")
    assert (type(net[1]), type(net[4])) == (nn.BatchNorm2d, nn.GroupNorm)
    assert [change.name for change in report.changes] == ["4"]
    assert [(entry.name, entry.reason) for entry in report.left] == [("1", "layers='4' does not match it")]
    swap_norm(net, "ln", layers=["1", "[3-9]"])
    assert (net[1].num_groups, net[4].num_groups) == (1, 1)


# models keep their features


@pytest.mark.parametrize("to", NORMS)
def test_state_dict_round_trip_and_deepcopy(to: str, tmp_path: Path) -> None:
    net, x = worn(ConvNet()).eval(), torch.rand(4, 3, 8, 8)
    if to == "bn":
        swap_norm(net, "gn")
    swap_norm(net, to)
    other = ConvNet().eval()
    if to == "bn":
        swap_norm(other, "gn")
    swap_norm(other, to)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    clone = copy.deepcopy(net)
    expected = net(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(clone(x), expected)
    clone(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert not {id(p) for p in clone.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("to", [name for name in NORMS if name != "bn"])
def test_a_lightning_trainer_trains_it(to: str) -> None:
    project = Project(sgd(momentum=0.9))
    swap_norm(project, to, example_batch=torch.rand(4, 3, 8, 8))
    before = {name: parameter.detach().clone() for name, parameter in project.named_parameters()}
    trainer(steps=2).fit(project, images(16))
    for name, parameter in project.named_parameters():
        assert parameter.isfinite().all()
        assert "3.bias" in name or not torch.equal(parameter, before[name]), name  # a layer in front of a normalization
