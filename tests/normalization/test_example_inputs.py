"""swap_norm without an example: generated inputs, ambiguous layers that are skipped, normalizations of few values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, swap_norm
from lightning_normgeo.normalization.layers import default_groups
from support.small_models import Net, conv_bn, worn, x2d


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.bn = nn.Embedding(7, 4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bn(self.conv(self.embed(ids).transpose(1, 2)))


def declared(**attributes: Any) -> nn.Module:
    net = Net(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def digits() -> nn.Module:
    return nn.Sequential(*conv_bn(2), nn.Flatten(), nn.Linear(2 * 26 * 26, 9), nn.BatchNorm1d(9))


MADE_UP: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "images": (conv_bn, "(2, 4, 32, 32)"),
    "digits": (digits, "(2, 4, 28, 28)"),
    "signals": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), "(2, 3, 64)"),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)), "(2, 2, 16, 16, 16)"),
    "features": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6)), "(2, 12)"),
    "tokens": (Tokens, "(2, 16)"),
    "timm": (lambda: declared(default_cfg={"input_size": (4, 10, 11)}), "(2, 4, 10, 11)"),
    "Lightning": (lambda: declared(example_input_array=torch.rand(5, 4, 12, 10)), "(5, 4, 12, 10)"),
    "Hugging Face": (lambda: declared(dummy_inputs={"x": torch.rand(5, 4, 11, 10)}), "(5, 4, 11, 10)"),
    "broken": (lambda: declared(default_cfg={"input_size": (3, 10, 11)}, dummy_inputs={}), "(2, 4, 32, 32)"),
}


@pytest.mark.parametrize("case", MADE_UP)
def test_an_example_is_made_up(case: str) -> None:
    build, shape = MADE_UP[case]
    report = swap_norm(worn(build()), "none")
    assert report.example == shape
    assert report.traced
    assert report.kept
    assert f"on noise made up here, {shape})" in str(report)


def test_without_any_example_guesses_are_left_alone() -> None:
    layers = nn.ModuleDict({"conv1": nn.Conv2d(4, 6, 3), "bn1": nn.BatchNorm2d(6), "chain": conv_bn()})
    for to in NORMS:
        net = copy.deepcopy(layers)
        if to in ("gn", "ln", "in"):
            assert len(swap_norm(net, to).changes) == 2
        elif to != "bn":
            (left,) = swap_norm(net, to).left
            assert left.name == "bn1"
            assert left.reason == (
                "that conv1 feeds it is a guess from the order of registration. Pass example_batch, on which the model "
                "can be run"
            )
    layers["chain"][0].register_forward_hook(lambda *_: None)
    del layers["conv1"], layers["bn1"]
    with pytest.raises(ConfigurationError, match=r"chain\.0 feeds it is a guess"):
        swap_norm(layers, "none")
    with pytest.raises(ConfigurationError, match=r"what feeds it is unknown\. Pass example_batch"):
        swap_norm(nn.ModuleList([nn.BatchNorm2d(3)]), "none")


def test_a_made_up_input_does_not_show_what_the_last_dimension_is() -> None:
    """A model that takes (N, C) often takes (N, T, C) too, and its layer normalization is then not over channels."""
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.BatchNorm1d(9))
    assert [entry.name for entry in swap_norm(net, "gn").left] == ["1"]


# normalizations of few values


@pytest.mark.parametrize(
    ("channels", "positions", "groups"),
    [(64, 1, 8), (512, 1, 32), (6, 1, 1), (24, 1, 3), (64, 2, 16), (64, 4, 32), (64, 49, 32), (7, 1, 1), (16, None, 8)],
)
def test_default_groups_have_eight_values(channels: int, positions: int | None, groups: int) -> None:
    assert default_groups(channels, positions) == groups


@pytest.mark.parametrize("given", [True, False])
def test_an_mlp_gets_groups_that_leave_something_to_learn_from(given: bool) -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
    x = torch.randn(128, 20)
    for explicit, values in ((32, 2), (64, 1)):
        outcome = {1: "a normalization of one value returns zero", 2: "a normalization of two values keeps only"}
        with pytest.raises(ConfigurationError, match=rf"1: groups={explicit} .* {outcome[values]}.*Choose at most 8"):
            swap_norm(net, "gn", groups=explicit, example_batch=x if given else None)
    swap_norm(net, "gn", example_batch=x if given else None)
    assert (net[1].num_groups, net[4].num_groups) == (8, 8)
    assert ((net(x).abs() - 1).abs() < 1e-2).double().mean() < 0.1
    swap_norm(net, "gn", groups=16, example_batch=x if given else None)  # four values, as requested
    assert net[1].num_groups == 16


@pytest.mark.parametrize(("to", "values"), [("ln", 1), ("gn", 1), ("ln", 2), ("gn+ws", 2)])
def test_layers_of_one_or_two_values_are_left_alone(to: str, values: int) -> None:
    net = nn.Sequential(nn.Linear(20, values), nn.BatchNorm1d(values), nn.Linear(values, 9), nn.BatchNorm1d(9))
    (left,) = swap_norm(net, to, example_batch=torch.randn(4, 20)).left
    assert left.name == "1"
    many = ["one value", "two values"][values - 1]
    assert left.reason.startswith(f"its input has {values} values for each sample, and a normalization of {many} ")


@pytest.mark.parametrize(("positions", "why"), [(1, "one position for each channel"), (2, "keeps only their signs")])
def test_instance_normalization_of_small_maps_is_left_alone(positions: int, why: str) -> None:
    pool = nn.AdaptiveAvgPool2d((1, positions))
    net = nn.Sequential(*conv_bn(), pool, nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    given, made_up = copy.deepcopy(net), net
    (left,) = swap_norm(given, "in", example_batch=x2d()).left
    assert left.name == "4"
    assert why in left.reason
    assert "example_batch" not in left.reason
    (left,) = swap_norm(made_up, "in").left
    assert "Seen with an input made up here, (2, 4, 64, 64); pass example_batch to see a true one" in left.reason
    made_up.train()(x2d()).sum().backward()


# weights that their layer transforms before use


class StandardizedConv2d(nn.Conv2d):
    """Like timm's StdConv2d: the weight is standardized at every use."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)
        return F.conv2d(x, rows.view_as(self.weight), self.bias)


class SameConv2d(nn.Conv2d):
    """Like timm's Conv2dSame: its own padding, with an unchanged weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias)


class ScaledLinear(nn.Linear):
    """Linear layer with an equalized learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


UNDONE: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "parametrized": (parametrizations.spectral_norm, "its weight is parametrized already"),
    "old hooks": (functools.partial(nn.utils.spectral_norm), "its weight is no parameter but computed"),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("to", ["wn", "cwn", "ws", "sn", "wn+mbn", "gn+ws"])
def test_a_weight_that_is_standardized_in_forward_is_not_parametrized(to: str, given: bool) -> None:
    net = nn.Sequential(StandardizedConv2d(4, 6, 3), nn.BatchNorm2d(6))
    example = x2d() if given else None
    if NORMS[to].data is None:
        with pytest.raises(ConfigurationError, match="StandardizedConv2d has a forward of its own, in which its"):
            swap_norm(net, to, example_batch=example)
        assert type(net[1]) is nn.BatchNorm2d
    else:
        (change,) = swap_norm(net, to, example_batch=example).changes
        assert change.weights == ()
        assert "undoes any other parametrization" in change.note


@pytest.mark.parametrize("case", UNDONE)
def test_a_weight_that_is_computed_is_not_parametrized(case: str) -> None:
    wrap, why = UNDONE[case]
    net = worn(conv_bn())
    wrap(net[0])
    for given in (True, False):
        with pytest.raises(ConfigurationError, match=why):
            swap_norm(net, "wn", example_batch=x2d() if given else None)
        with pytest.raises(ConfigurationError, match="parametrized without a gain for each row"):
            swap_norm(net, "none", example_batch=x2d() if given else None)


@pytest.mark.parametrize("to", ["none", "wn", "sn", "wn+mbn"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_that_uses_the_weight_as_it_is_is_no_obstacle(to: str, bias: bool) -> None:
    chains = [
        nn.Sequential(SameConv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6)),
        nn.Sequential(ScaledLinear(4, 6, bias=bias), nn.BatchNorm1d(6)),
    ]
    for net in chains:
        report = swap_norm(worn(net), to)
        assert "folded" in report.changes[0].note
        assert report.change < 1e-5
