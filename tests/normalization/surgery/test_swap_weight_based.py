"""swap_norm to pairs of normalizations, and on weights that are already parametrized or cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, normalize_weight, swap_norm
from lightning_normgeo.normalization.parametrizations import Gain, parametrizations_of
from support.small_models import PAIRS, PreActivation, conv_bn, x2d


def test_statistics_of_a_trained_batch_normalization_do_not_fit_changed_weights() -> None:
    for to in ("bn+ws", "bn+cwn", "bn+sn"):
        assert "renew them in training mode" not in swap_norm(conv_bn(), to).changes[0].note
        net = conv_bn()
        net(x2d())
        norm = net[1]
        report = swap_norm(net, to)
        assert net[1] is norm
        assert "running statistics are those of the old weights: renew them in training mode" in str(report)


def test_pairs_fold_nothing_and_have_no_gain() -> None:
    for to in PAIRS:
        net = conv_bn()
        gamma = net[1].weight
        swap_norm(net, to)
        assert not any(isinstance(p, Gain) for p in parametrizations_of(net[0]))
        assert NORMS[to].data == "mbn" or net[1].weight is gamma
        assert net[0].bias is None


def test_pairs_say_which_weights_they_could_not_normalize() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(5)
    )
    report = swap_norm(net, "gn+ws", groups=1)
    assert "0, which feeds it, cannot be parametrized: its rows have one element each" in report.changes[0].note
    assert "no linear or convolutional layer was found to feed it" in report.changes[2].note
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6))
    report = swap_norm(net, "bn+ws")
    assert [(entry.name, entry.reason.partition(", and ")[0]) for entry in report.left] == [
        ("1", "it is batch normalization already")
    ]


@pytest.mark.parametrize("to", NORMS)
def test_a_second_time_changes_nothing(to: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(1 if to != "ln" else 2, 6))
    swap_norm(net, to)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    none_left = NORMS[to].data is None
    match = "has no normalization layers" if none_left else f"would change nothing: 1: it is {NORMS[to].title} already"
    with pytest.raises(ConfigurationError, match=match.replace("+", r"\+")):
        swap_norm(net, to)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_weights_that_stay_parametrized_are_reported() -> None:
    net = conv_bn()
    swap_norm(net, "bn+ws")
    assert "the weight of 0 keeps its weight standardization" in swap_norm(net, "gn").changes[0].note
    assert "the weight of 0 keeps its weight standardization" in swap_norm(net, "bn+ws").changes[0].note
    with pytest.raises(
        ConfigurationError, match="0, which feeds it, cannot be parametrized: its weight is parametrized a"
    ):
        swap_norm(net, "wn")
    note = swap_norm(net, "none").changes[0].note
    assert note == "γ, β and running statistics dropped: the weight of 0 is parametrized without a gain for each row"


def test_a_normalization_in_front_of_weights_done_before() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), PreActivation(4, 4), PreActivation(4, 4))
    x = torch.rand(2, 3, 8, 8)
    swap_norm(net, "wn", layers="1.*", example_batch=x)
    swap_norm(net, "wn", layers="2.*", example_batch=x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_weights_computed_by_hooks_are_left_alone() -> None:
    net = conv_bn()
    prune.random_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ConfigurationError, match="its weight is no parameter but computed"):
        swap_norm(net, "wn")
    assert "dropped: the weight of 0 is parametrized" in swap_norm(net, "none").changes[0].note
    assert net(x2d()).isfinite().all()


def test_zero_rows_have_no_direction() -> None:
    for to in ("wn", "cwn", "ws"):
        net = conv_bn()
        with torch.no_grad():
            net[0].weight[:2] = 0 if to == "wn" else 0.3
        with pytest.raises(ConfigurationError, match="2 of its rows have no direction"):
            swap_norm(net, to)
        with pytest.raises(ConfigurationError, match=f"Conv2d cannot be parametrized by '{to}': 2 of its rows"):
            normalize_weight(net[0], to)
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ConfigurationError, match="6 of its rows have no direction"):
        swap_norm(net, "sn")
