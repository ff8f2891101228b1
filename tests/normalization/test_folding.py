"""swap_norm to weight-based normalizations: exact folding, and normalizations that cannot be folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import swap_norm
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from lightning_normgeo.normalization.parametrizations import parametrizations_of
from support.small_models import WEIGHT, Net, conv_bn, worn, x2d


def fed(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    return worn(nn.Sequential(convolution, norm).double()).eval()


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: fed(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.1)), (3, 4, 5, 5)),
    "bias": (lambda: fed(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)), (3, 4, 5, 5)),
    "depthwise": (lambda: fed(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (3, 4, 5, 5)),
    "linear": (lambda: fed(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "one-d": (lambda: fed(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (3, 4, 5)),
    "three-d": (lambda: fed(nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6)), (3, 4, 3, 3, 3)),
    "transposed": (lambda: fed(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (3, 4, 5, 5)),
    "no-affine": (lambda: fed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (3, 4, 5, 5)),
    "sync": (lambda: fed(nn.Conv2d(4, 6, 3, bias=False), nn.SyncBatchNorm(6)), (3, 4, 5, 5)),
    "mean-only": (lambda: fed(nn.Conv2d(4, 6, 3), MeanOnlyBatchNorm(6)), (3, 4, 5, 5)),
    "tracking-instance-norm": (
        lambda: fed(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        (3, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("to", ["none", "wn", "sn"])
@pytest.mark.parametrize("case", FOLDED)
def test_folding_keeps_the_function_of_evaluation_mode(case: str, to: str, traced: bool) -> None:
    build, shape = FOLDED[case]
    net, x = build(), torch.randn(shape, dtype=torch.float64)
    expected = net(x)
    report = swap_norm(net, to, example_batch=x if traced else None)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert "folded into weight and bias of 0" in report.changes[0].note
    assert type(net[1]) is nn.Identity


@pytest.mark.parametrize("case", [case for case in FOLDED if case not in ("mean-only", "tracking-instance-norm")])
def test_mean_only_batch_normalization_keeps_it_too(case: str) -> None:
    build, shape = FOLDED[case]
    net, x = build(), torch.randn(shape, dtype=torch.float64)
    expected, beta = net(x), net[1].bias
    report = swap_norm(net, "wn+mbn")
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert beta is None or net[1].bias is beta
    assert "running variance folded into weight of 0" in report.changes[0].note
    assert "dropped" not in report.changes[0].note
    y = net.train()(x)  # and behaves like mean-only batch normalization in training
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).mean(1), net[1].bias.detach())


@pytest.mark.parametrize("to", ["cwn", "ws"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("case", [case for case in FOLDED if case != "mean-only"])
def test_centering_changes_nothing_but_the_mean_of_rows(case: str, to: str, unbiased: bool) -> None:
    build, shape = FOLDED[case]
    net, x = build(), torch.randn(shape, dtype=torch.float64)
    dim = int(case == "transposed")
    with torch.no_grad():
        weight = net[0].weight
        weight -= weight.mean([d for d in range(weight.ndim) if d != dim], keepdim=True)
    expected = net(x)
    swap_norm(net, to, unbiased=unbiased)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_grouped_transposed_convolutions_are_folded_but_not_parametrized() -> None:
    net = fed(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = net(x)
    for to in WEIGHT:
        with pytest.raises(ConfigurationError, match="grouped transposed convolution"):
            swap_norm(net, to)
    assert torch.equal(net(x), expected)
    swap_norm(net, "none")
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("to", ["none", *WEIGHT, "wn+mbn"])
def test_a_gamma_of_zero_keeps_the_direction_of_its_row(to: str) -> None:
    """Residual branches often start with γ = 0; rows of zeros would give NaN, or never learn."""
    net = conv_bn()
    with torch.no_grad():
        net[1].weight.zero_()
    swap_norm(net, to)
    y = net(x2d())
    assert torch.equal(y, torch.zeros_like(y))
    (y * torch.randn_like(y)).sum().backward()
    (_, gain), *_ = [(n, p) for n, p in net.named_parameters() if "gain" in n or "original0" in n] or [
        ("", net[0].weight)
    ]
    assert gain.grad.isfinite().all()
    assert gain.grad.abs().min() > 0


def test_a_single_gamma_of_zero_under_spectral_normalization() -> None:
    net = worn(conv_bn()).double().eval()
    with torch.no_grad():
        net[1].weight[2] = 0
    x = x2d().double()
    expected = net(x)
    swap_norm(net, "sn")
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("traced", [False, True])
def test_weights_with_a_gain_take_the_scale_into_it(traced: bool) -> None:
    """A weight that is already normalized, in front of a normalization that is removed."""
    x = x2d().double()
    for first, then in [("wn+mbn", "wn"), ("wn+mbn", "none"), ("wn+mbn", "bn"), ("wn", "wn"), ("wn", "none")]:
        net = worn(conv_bn(bias=True).double()).eval()
        if first == "wn":
            parametrizations.weight_norm(net[0])
        else:
            swap_norm(net, first)
        expected = net(x)
        swap_norm(net, then, example_batch=x if traced else None)
        assert len(parametrizations_of(net[0])) == 1
        if then == "bn":  # the running mean is kept, the variance starts at 1
            expected = (expected - net[1].bias.view(1, -1, 1, 1)) / math.sqrt(1 + net[1].eps) + net[1].bias.view(
                1, -1, 1, 1
            )
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    net = worn(conv_bn().double()).eval()
    parametrizations.weight_norm(net[0], dim=None)  # one norm for all rows
    with pytest.raises(ConfigurationError, match="the weight of 0 is parametrized without a gain for each row"):
        swap_norm(net, "none")


def test_dropout_that_does_nothing_is_looked_through() -> None:
    net = worn(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)).double()).eval()
    x = x2d().double()
    expected = net(x)
    swap_norm(net, "wn", example_batch=x)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_frozen_stays_frozen() -> None:
    net = conv_bn()
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())
    for to in ("wn", "none"):
        frozen = copy.deepcopy(net)
        swap_norm(frozen, to)
        assert not any(p.requires_grad for p in frozen.parameters())
    for to in ("cwn", "ws", "sn", "wn"):
        tuned = copy.deepcopy(net)
        tuned[1].requires_grad_(True)  # only γ and β are trained, so not the directions of the new weights
        swap_norm(tuned, to)
        trained = {name.rpartition(".")[2] for name, p in tuned.named_parameters() if p.requires_grad}
        assert trained == {"bias", "original0" if to == "wn" else "gain"}


@pytest.mark.parametrize("training", [True, False])
def test_spectral_normalization_is_in_the_mode_of_its_layer(training: bool) -> None:
    net = conv_bn().train(training)
    swap_norm(net, "sn")
    assert {child.training for child in net.modules()} == {training}


def test_nothing_is_folded_where_nothing_is_to_be_folded() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.InstanceNorm2d(6))
    report = swap_norm(net, "wn")
    assert report.changes[0].note == ""
    assert net[0].bias is None


# normalizations that cannot be folded

NOT_FOLDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)), "is not directly in front"),
    "activation": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), "not directly in front"),
    "subclass": (
        lambda: nn.Sequential(
            type("Same", (nn.Conv2d,), {"forward": lambda s, x: x[:, :1] * s.weight.mean()})(4, 6, 3),
            nn.BatchNorm2d(6),
        ),
        "Same has a forward of its own",
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_what_cannot_be_folded_is_dropped_where_it_does_nothing_and_else_left_alone(case: str) -> None:
    build, why = NOT_FOLDED[case]
    net = build()
    weight = net[0].weight.detach().clone()
    for to in ("none", "wn", "wn+mbn"):
        swapped = copy.deepcopy(net)
        if case != "subclass":  # in that case there is a single channel, and the normalization never ran
            report = swap_norm(swapped, to)
            assert "dropped" in report.changes[0].note
            assert why in report.changes[0].note
            assert report.kept
            assert report.change == pytest.approx(5e-6, rel=0.1)  # ε
        torch.testing.assert_close(swapped[0].weight, weight)
        swapped = worn(copy.deepcopy(net))
        state = {name: tensor.clone() for name, tensor in swapped.state_dict().items()}
        with pytest.raises(ConfigurationError, match=f"would change nothing: .*{why}"):
            swap_norm(swapped, to)
        assert all(torch.equal(tensor, state[name]) for name, tensor in swapped.state_dict().items())


@pytest.mark.parametrize("to", ["none", "wn", "wn+mbn"])
def test_a_convolution_with_two_readers_is_not_folded(to: str) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + y

    net = Net(run, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    weight = net.conv.weight.detach().clone()
    report = swap_norm(net, to, example_batch=x2d())
    assert "conv is not directly in front of this layer alone" in report.changes[0].note
    torch.testing.assert_close(net.conv.weight, weight)


@pytest.mark.parametrize("traced", [True, False])
def test_a_convolution_in_front_of_two_normalizations(traced: bool) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.clean(y) + m.adversarial(y)

    net = Net(run, conv=nn.Conv2d(4, 6, 3), clean=nn.BatchNorm2d(6), adversarial=nn.BatchNorm2d(6))
    report = swap_norm(copy.deepcopy(net), "wn", example_batch=x2d() if traced else None)
    assert [change.weights for change in report.changes] == [("conv",), ()]
    assert all("conv is not directly in front" in change.note for change in report.changes)
    report = swap_norm(net, "wn", layers="clean", example_batch=x2d() if traced else None)
    assert "conv is not directly in front" in report.changes[0].note


def test_a_convolution_used_twice_or_a_normalization_called_twice_is_not_folded() -> None:
    net = Net(lambda m, x: m.bn(m.conv(m.conv(x))), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    assert "not directly in front" in swap_norm(net, "none", example_batch=x2d()).changes[0].note
    net = Net(lambda m, x: m.bn(m.b(m.bn(m.a(x)))), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    report = swap_norm(net, "wn", example_batch=x2d())
    assert report.changes[0].weights == ("a", "b")
    assert "more than one weight in front" in report.changes[0].note


def test_tied_weights_are_neither_folded_nor_parametrized() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[2].weight = net[0].weight
    with pytest.raises(
        ConfigurationError, match=r"[02], which feeds it, cannot be parametrized: its weight is used elsewh"
    ):
        swap_norm(net, "wn")
    report = swap_norm(copy.deepcopy(net), "none")
    assert all("dropped: 2 is not directly in front" in change.note for change in report.changes)
    assert report.kept
    report = swap_norm(net, "gn+ws")
    assert all("its weight is used elsewhere too" in change.note for change in report.changes)
    assert net[2].weight is net[0].weight


def test_a_view_between_hides_which_channels_are_meant() -> None:
    """A linear layer over the last dimension, whose width equals the second one, over which the normalization works."""
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    report = swap_norm(net, "none", example_batch=torch.randn(3, 8, 5))
    assert "not directly in front" in report.changes[0].note
    net = Net(lambda m, x: m.bn(m.fc(x).view(-1, 3, 2, 2)), fc=nn.Linear(5, 12), bn=nn.BatchNorm2d(3))
    for to in ("none", "wn", "gn"):
        report = swap_norm(copy.deepcopy(net), to, example_batch=torch.randn(4, 5))
    assert "1 layer changed" in str(report)
