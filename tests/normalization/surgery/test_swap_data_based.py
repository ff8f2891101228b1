"""swap_norm between data-based normalizations keeps parameters bit by bit, for any shape and precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, swap_norm
from lightning_normgeo.normalization.layers import default_groups
from support.projects import ConvNet
from support.small_models import DATA, Net, conv_bn, worn, x2d


@pytest.mark.parametrize("to", [name for name in DATA if name != "bn"])
def test_gamma_and_beta_are_the_same_parameters(to: str) -> None:
    net = worn(ConvNet(eps=1e-3))
    before = dict(net.named_parameters())
    report = swap_norm(net, to)
    after = dict(net.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [change.name for change in report.changes] == ["1", "4"]
    assert report.parameters_after == report.parameters_before
    assert net[1].eps == 1e-3


@pytest.mark.parametrize("to", ["gn", "in", "ln", "bn"])
@pytest.mark.parametrize("affine", [True, False])
def test_flags_precision_and_eps_are_kept(to: str, affine: bool) -> None:
    source = nn.GroupNorm(2, 6, eps=0.02, affine=affine) if to == "bn" else nn.BatchNorm2d(6, eps=0.02, affine=affine)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), source, nn.ReLU()).double()
    source.eval()
    for parameter in source.parameters():
        parameter.requires_grad_(False)
    swap_norm(net, to)
    assert net.training
    assert not net[1].training
    assert net[1].eps == 0.02
    assert [p.requires_grad for p in net[1].parameters()] == [False] * (2 if affine else 0)
    assert all(t.dtype == torch.float64 for t in net[1].state_dict().values() if t.is_floating_point())
    assert net.train()(x2d().double()).dtype == torch.float64


def test_the_device_is_the_one_of_the_model_even_without_parameters() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6))
    swap_norm(net, "bn")
    assert net[1].running_mean.is_meta
    with torch.device("meta"):
        net = conv_bn()
    for to in ("gn", "wn+mbn", "wn"):
        swap_norm(net, to)
        assert all(tensor.is_meta for tensor in net.state_dict().values())
    for to in ("sn", "cwn", "ws", "none"):
        with torch.device("meta"):
            net = conv_bn()
        swap_norm(net, to)
        assert all(tensor.is_meta for tensor in net.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", NORMS)
def test_half_precision_stays_half_precision(to: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), nn.ReLU()).to(dtype)
    swap_norm(net, to)
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {dtype}


@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_is_kept(momentum: float | None) -> None:
    for to in ("bn", "wn+mbn"):
        norm = nn.SyncBatchNorm(6, momentum=momentum)
        net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm)
        swap_norm(net, to)
        assert net[1].momentum == momentum
        x, y = x2d(), x2d()
        means = [net[0](batch).mean((0, 2, 3)) for batch in (x, y)]
        net(x)
        net(y)
        share = 0.5 if momentum is None else momentum
        first = means[0] if momentum is None else share * means[0]
        torch.testing.assert_close(net[1].running_mean, first + share * (means[1] - first))


def test_running_statistics_move_between_batch_normalizations() -> None:
    net = worn(nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)))
    buffers = dict(net.named_buffers())
    report = swap_norm(net, "bn")
    assert type(net[1]) is nn.BatchNorm2d
    assert dict(net.named_buffers()).keys() == buffers.keys()
    assert all(tensor is buffers[name] for name, tensor in net.named_buffers())
    assert report.changes[0].note == ""


def test_a_batch_normalization_without_statistics_stays_without() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6, track_running_stats=False))
    swap_norm(net, "bn")
    assert net[1].running_mean is None
    assert not net[1].track_running_stats
    x = x2d()
    torch.testing.assert_close(net.eval()(x), net.train()(x))
    assert swap_norm(net, "gn").changes[0].note == ""


def test_statistics_that_go_and_come_are_reported() -> None:
    net = conv_bn()
    notes = [swap_norm(net, to).changes[0].note for to in ("gn", "ln", "bn", "in", "bn")]
    gone, new = (
        "running mean dropped, running variance dropped",
        "running mean starts anew, running variance starts anew",
    )
    assert notes == [gone, "", new, gone, new]


def test_a_chain_of_swaps_ends_where_it_began() -> None:
    net = ConvNet()
    untouched = copy.deepcopy(net)
    before = dict(net.named_parameters())
    for to in ("gn", "ln", "in", "ln", "bn"):
        swap_norm(net, to)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert net.state_dict().keys() == untouched.state_dict().keys()
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(net(x), untouched(x))
    with pytest.raises(ConfigurationError, match=r"would change nothing: 1: it is batch normalization already; 4: it"):
        swap_norm(net, "bn")


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (7, 1), (48, 24), (64, 32), (96, 32), (256, 32)]
)
def test_groups_divide_the_channels_and_hold_two_each(channels: int, groups: int) -> None:
    assert default_groups(channels) == groups
    net = conv_bn(channels)
    swap_norm(net, "gn")
    if channels == 1:
        assert net[1].num_groups == 1
    else:
        assert net[1].num_groups == groups
        assert channels // groups >= 2
    assert net(x2d()).isfinite().all()


def test_groups_can_be_chosen_and_chosen_again() -> None:
    net = conv_bn()
    swap_norm(net, "gn", groups=2)
    assert net[1].num_groups == 2
    swap_norm(net, "gn", groups=6)
    assert net[1].num_groups == 6


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("to", NORMS)
def test_any_number_of_dimensions(to: str, dims: int) -> None:
    convolution, norm = getattr(nn, f"Conv{dims}d")(4, 6, 2), getattr(nn, f"BatchNorm{dims}d")(6)
    net = nn.Sequential(convolution, nn.GroupNorm(1, 6) if to == "bn" else norm, nn.ReLU())
    swap_norm(net, to)
    y = net(torch.randn(3, 4, *[5] * dims))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    if to in ("in", "bn"):
        assert type(net[1]).__name__.endswith(f"{dims}d")


@pytest.mark.parametrize("to", [name for name in NORMS if name not in ("bn", "in")])
def test_behind_a_linear_layer(to: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6))
    swap_norm(net, to)
    net(torch.randn(5, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_instance_normalization_needs_positions() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(ConfigurationError, match="change nothing: 1: its input has one position for each channel"):
        swap_norm(net, "in")
    net = Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))
    swap_norm(net, "in", example_batch=torch.randn(2, 5, 4))  # the batch shows that the input has positions
    assert type(net.bn) is nn.InstanceNorm1d
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 4), nn.BatchNorm2d(6))
    report = swap_norm(net, "in", example_batch=x2d())
    assert [entry.name for entry in report.left] == ["3"]
    assert net(x2d()).isfinite().all()


def test_layer_normalization_over_channels() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = worn(nn.Sequential(nn.Conv2d(4, 6, 3), LayerNorm2d(6, eps=1e-6), nn.Conv2d(6, 4, 3), nn.LayerNorm([4, 2, 2])))
    gamma, joint = net[1].weight, net[3].weight.detach().clone()
    report = swap_norm(net, "gn")
    assert net[1].weight is gamma
    assert net[1].eps == 1e-6
    torch.testing.assert_close(net[3].weight, joint.mean((1, 2)))
    assert [change.note for change in report.changes] == ["", "γ averaged over positions, β averaged over positions"]
    assert net(x2d()).shape == (3, 4, 2, 2)


def test_layer_normalization_over_features_is_left_alone_unless_they_are_the_channels() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.BatchNorm1d(5))
    report = swap_norm(net, "gn")
    assert [entry.name for entry in report.left] == ["1"]
    assert "the last dimension of its input" in report.left[0].reason
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    with pytest.raises(ConfigurationError, match="change nothing: 1: it normalizes the last dimension"):
        swap_norm(net, "bn", example_batch=torch.randn(2, 3, 4))
    swap_norm(net, "bn", example_batch=torch.randn(2, 4))
    assert type(net[1]) is nn.BatchNorm1d
