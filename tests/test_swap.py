"""swap_norm: what is kept bit by bit, what is folded exactly, what is found in front, what is refused, what is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import NORMS, normalize_weight, swap_norm
from lightning_normgeo.normalization.feeders import inputs_by_graph, inputs_in_order
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm, default_groups
from lightning_normgeo.normalization.sources import normalization_layers
from lightning_normgeo.normalization.weights import Gain, parametrizations_of
from tests.projects import ConvNet, Project, images, sgd, trainer

DATA = [name for name, norm in NORMS.items() if norm.data not in (None, "mbn") and norm.weight is None]
WEIGHT = [name for name, norm in NORMS.items() if norm.data is None and norm.weight is not None]
PAIRS = [name for name, norm in NORMS.items() if norm.data is not None and norm.weight is not None]
EXACT = ["none", "wn", "sn", "wn+mbn"]  # keep the function of evaluation mode


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: a batch normalization that runs dropout and an activation of its own behind itself."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Net(nn.Module):
    """Layers by name and how to run them."""

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
    """Make parameters and statistics what training might have made of them."""
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


def no_data() -> Tensor:
    return torch.empty(0)


# what data targets keep


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
    swap_norm(net, "in", example_batch=torch.randn(2, 5, 4))  # the batch shows that there are positions
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

    class Scaled(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(6)
            self.temperature = nn.Parameter(torch.ones(1))

    class Rectified(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    parametrized = parametrizations.weight_norm(nn.BatchNorm2d(6), dim=None)
    net = nn.ModuleList([Split(), Conditional(), Scaled(), Rectified(6), parametrized])
    report = swap_norm(net, "gn")
    assert {entry.name: entry.reason for entry in report.left} == {
        "0": "a subclass that holds more than an activation: aux",
        "1": "a subclass that holds more than an activation: embed",
        "2": "a subclass with parameters of its own: temperature",
        "4": "its own parameters are parametrized",
    }
    assert "the forward of Rectified replaced" in report.changes[0].note


# folding


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
    """Residual branches often start with γ = 0; rows of zeros would be NaN, or never learn."""
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
    """A weight that is normalized already, in front of a normalization that goes."""
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
    parametrizations.weight_norm(net[0], dim=None)  # one length for all rows
    note = swap_norm(net, "none").changes[0].note
    assert note.endswith("dropped: the weight of 0 is parametrized without a gain for each row")


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
        tuned[1].requires_grad_(True)  # only γ and β are trained: their places are, and the directions are not
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


NOT_FOLDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)), "is not directly in front"),
    "activation": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), "not directly in front"),
    "subclass": (
        lambda: nn.Sequential(
            type("Same", (nn.Conv2d,), {"forward": lambda s, x: x[:, :1] * s.weight.mean()})(4, 6, 3)
        ),
        "Same has a forward of its own",
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_what_cannot_be_folded_is_dropped_and_reported(case: str) -> None:
    build, why = NOT_FOLDED[case]
    net = build()
    if case == "subclass":
        net.append(nn.BatchNorm2d(6))
    weight = net[0].weight.detach().clone()
    for to in ("none", "wn", "wn+mbn"):
        swapped = copy.deepcopy(net)
        note = swap_norm(swapped, to).changes[0].note
        assert "dropped" in note
        assert why in note
        torch.testing.assert_close(swapped[0].weight, weight)


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
        ConfigurationError, match="0, which feeds it, cannot be parametrized: its weight is used elsewh"
    ):
        swap_norm(net, "wn")
    report = swap_norm(copy.deepcopy(net), "none")
    assert all("is used elsewhere too" in change.note for change in report.changes)
    report = swap_norm(net, "gn+ws")
    assert all("its weight is used elsewhere too" in change.note for change in report.changes)
    assert net[2].weight is net[0].weight


def test_a_view_between_hides_which_channels_are_meant() -> None:
    """A linear layer over the last dimension, as wide as the second one that the normalization works on."""
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    report = swap_norm(net, "none", example_batch=torch.randn(3, 8, 5))
    assert "not directly in front" in report.changes[0].note
    net = Net(lambda m, x: m.bn(m.fc(x).view(-1, 3, 2, 2)), fc=nn.Linear(5, 12), bn=nn.BatchNorm2d(3))
    for to in ("none", "wn", "gn"):
        report = swap_norm(copy.deepcopy(net), to, example_batch=torch.randn(4, 5))
    assert "1 layer changed" in str(report)


# what is in front


def feeders(net: nn.Module, batch: Any = None) -> dict[str, list[str]]:
    sources = normalization_layers(net)
    found = inputs_in_order(net, sources) if batch is None else inputs_by_graph(net, sources, batch)
    return {
        s.name: sorted(f.name for f in found[s.layer].feeders)
        for s in sources
        if s.layer in found and found[s.layer].feeders
    }


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
    assert swap_norm(guessed, "cwn").changes[0].weights == ("b",)
    report = swap_norm(seen, "cwn", example_batch=x2d())
    assert sorted(report.changes[0].weights) == ["a", "b"]
    assert "more than one weight in front" in report.changes[0].note
    assert "found by a forward pass" in str(report)


def test_a_concatenation_is_fed_by_all_its_parts() -> None:
    net = Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.b(x).relu(), x], 1)),
        a=nn.Conv2d(4, 2, 1),
        b=nn.Conv2d(4, 6, 1),
        bn=nn.BatchNorm2d(12),
    )
    assert feeders(net) == {}
    assert feeders(net, x2d()) == {"bn": ["a", "b"]}
    with pytest.raises(ConfigurationError, match="no linear or convolutional layer was found to feed it by the order"):
        swap_norm(net, "wn")
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
    assert note == "γ, β and running statistics dropped: not one weight in front"
    net = Net(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6), idle=nn.BatchNorm2d(6))
    (idle,) = swap_norm(net, "wn", example_batch=x2d()).left
    assert (idle.name, idle.reason) == ("idle", "no linear or convolutional layer was found to feed it")


def test_keyword_arguments_and_several_inputs() -> None:
    net = Net(lambda m, x: m.bn(input=m.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    assert feeders(net, (x2d(),)) == feeders(net, {"x": x2d()}) == {"bn": ["conv"]}


# where layers live


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
    assert swap_norm(net, "wn").changes[0].weights == ("list.0",)


def test_the_filter_chooses_by_any_name() -> None:
    net = ConvNet()
    report = swap_norm(net, "gn", layers="4")
    assert (type(net[1]), type(net[4])) == (nn.BatchNorm2d, nn.GroupNorm)
    assert [change.name for change in report.changes] == ["4"]
    assert [(entry.name, entry.reason) for entry in report.left] == [("1", "layers='4' does not match it")]
    swap_norm(net, "ln", layers=["1", "[3-9]"])
    assert (net[1].num_groups, net[4].num_groups) == (1, 1)


def test_hooks_that_go_are_reported() -> None:
    for to in ("gn", "wn"):
        net = conv_bn()
        net[1].register_full_backward_hook(lambda *_: None)
        assert "its hooks dropped" in swap_norm(net, to).changes[0].note
    net = conv_bn()
    net[1].register_forward_hook(lambda *_: None)
    assert "hooks" not in swap_norm(net, "bn+ws").changes[0].note


# pairs, and weights that are parametrized already


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


# models are still models


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
        assert "3.bias" in name or not torch.equal(parameter, before[name]), name  # that one is in front of a norm


# refusals


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "unknown": (ConvNet, {"to": "wnn"}, r"norm='wnn' is unknown; choose one of: 'wn'"),
    "groups": (
        ConvNet,
        {"to": "gn", "groups": 4},
        r"1: groups=4 does not divide 6 channels. Choose a divisor, such as 3",
    ),
    "zero-groups": (
        ConvNet,
        {"to": "gn", "groups": 0},
        r"groups=0 does not divide 6 channels. Choose a divisor, such as 1",
    ),
    "other-groups": (ConvNet, {"to": "wn", "groups": 2}, r"groups=2 is for group normalization, not for 'wn'"),
    "no-norms": (lambda: nn.Linear(2, 3), {"to": "gn"}, r"Linear has no normalization layers that swap_norm could"),
    "same": (ConvNet, {"to": "bn"}, r"swap_norm\(to='bn'\) would change nothing: 1: it is batch normalization already"),
    "root": (
        lambda: nn.BatchNorm2d(3),
        {"to": "gn"},
        r"is itself a normalization \(BatchNorm2d\).*Give the model that",
    ),
    "glob": (
        ConvNet,
        {"to": "gn", "layers": "layer*"},
        r"layers='layer\*': 'layer\*' matches none of the 2 norm.*'1', '4'",
    ),
    "globs": (ConvNet, {"to": "gn", "layers": ["1", "5"]}, r"layers=\['1', '5'\]: '5' matches none of the 2"),
    "no-globs": (ConvNet, {"to": "gn", "layers": []}, r"layers=\[\]: 'an empty list' matches none of the 2"),
    "batch": (
        ConvNet,
        {"to": "wn", "example_batch": no_data()},
        r"ConvNet cannot take the example batch \(shape \(0,\)\)",
    ),
    "channels": (
        ConvNet,
        {"to": "wn", "example_batch": x2d()},
        r"cannot take the example batch \(shape \(3, 4, 6, 6\)\)",
    ),
    "lazy-norm": (lambda: nn.Sequential(nn.LazyBatchNorm2d()), {"to": "gn"}, r"0 is a lazy layer without shape yet"),
    "lazy-conv": (lazy, {"to": "gn"}, r"0 is a lazy layer without shape yet. Run one forward pass before swap_norm"),
    "parallel": (lambda: nn.DataParallel(ConvNet()), {"to": "gn"}, r"a model wrapped by DataParallel.*wrap afterwards"),
    "compiled": (
        lambda: torch.compile(ConvNet()),
        {"to": "gn"},
        r"a compiled model. Swap first and call torch.compile",
    ),
    "one-position": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        {"to": "in"},
        r"would change nothing: 1: its input has one position",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(case: str) -> None:
    build, settings, message = REFUSED[case]
    net = build()
    described, state = repr(net), None if "lazy" in case else {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        swap_norm(net, **settings)
    assert repr(net) == described
    assert state is None or all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_compiled_in_place() -> None:
    net = ConvNet()
    net.compile()
    with pytest.raises(ConfigurationError, match="compiled model"):
        swap_norm(net, "gn")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_zero_fan_in() -> None:
    net = nn.Sequential(nn.Conv2d(0, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    report = swap_norm(net, "wn")
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("1", "0, which feeds it, cannot be parametrized: it has no inputs (zero fan-in)")
    ]
    assert "folded" in swap_norm(net, "none").changes[0].note


def test_a_model_inside_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ConvNet())
        for model in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ConfigurationError, match="a model wrapped by DistributedDataParallel"):
                swap_norm(model, "gn")
    finally:
        torch.distributed.destroy_process_group()


OPTIMIZED = [
    ("gn", "4", "1", False),
    ("wn", "*", "*", True),
    ("none", "*", "*", True),
    ("wn+mbn", "*", "*", True),
    ("bn+ws", "*", "*", False),  # the weights stay the same parameters
    ("ws", "*", "*", True),
    ("wn", "4", "1", False),  # the optimizer has nothing to do with what changes
]


@pytest.mark.parametrize(("to", "layers", "held", "refused"), OPTIMIZED)
def test_an_optimizer_that_exists_already(to: str, layers: str, held: str, refused: bool) -> None:
    net = ConvNet()
    optimizer = torch.optim.SGD(net.parameters() if held == "*" else net[int(held)].parameters(), lr=0.1)
    if refused:
        with pytest.raises(ConfigurationError, match="SGD holds parameters of the model that swap_norm would replace"):
            swap_norm(net, to, layers=layers, optimizer=optimizer)
    else:
        swap_norm(net, to, layers=layers, optimizer=optimizer)


def test_an_optimizer_that_would_miss_a_parameter() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 4, 4]), nn.ReLU(), MeanOnlyBatchNorm(6))
    for layers in ("1", "3"):
        with pytest.raises(ConfigurationError, match="holds parameters of the model"):
            swap_norm(net, "gn", layers=layers, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert "γ added" in swap_norm(net, "gn", layers="3").changes[0].note


def test_gamma_without_beta_stays_without() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 1, 1], bias=False), nn.ReLU())
    swap_norm(net, "gn")
    assert net[1].bias is None
    gamma, optimizer = net[1].weight, torch.optim.SGD(net.parameters(), lr=0.1)
    for to in ("bn", "in", "ln"):
        assert "β" not in swap_norm(net, to, optimizer=optimizer).changes[0].note
        assert dict(net[1].named_parameters()) == {"weight": gamma}
        net(x2d()).sum().backward()


@pytest.mark.parametrize("to", [name for name in PAIRS if NORMS[name].weight != "wn"])
def test_weights_without_gain_stay_the_same_parameters(to: str) -> None:
    net = conv_bn()
    before = list(net.parameters())
    swap_norm(net, to, optimizer=torch.optim.SGD(before, lr=0.1))
    assert {id(p) for p in net.parameters()} == {id(p) for p in before}


def test_a_trainer_is_asked_while_it_runs() -> None:
    class Swapping(Project):
        def on_train_start(self) -> None:
            with pytest.raises(ConfigurationError, match="SGD holds parameters"):
                swap_norm(self, "wn")
            swap_norm(self, "gn")

    class Configured(Project):
        def configure_model(self) -> None:
            if not any(isinstance(m, nn.Identity) for m in self.modules()):
                swap_norm(self, "wn")

    project = Swapping()
    trainer(steps=1).fit(project, images(8))
    assert type(project.net[1]) is nn.GroupNorm
    swap_norm(project, "wn")  # the Trainer has finished and makes a new optimizer next time
    project = Configured()
    trainer(steps=1).fit(project, images(8))
    assert math.isfinite(project.net[0].weight.sum().item())


# the report


def test_the_report_as_text() -> None:
    net = nn.Sequential(ConvNet(), nn.LayerNorm(4))
    assert str(swap_norm(net, "gn", groups=2)) == "\n".join(
        [
            "to gn: 2 layers changed, 1 left alone, 674 -> 674 parameters",
            "  0.1  BatchNorm2d -> GroupNorm(2 groups) (running mean dropped, running variance dropped)",
            "  0.4  BatchNorm2d -> GroupNorm(2 groups) (running mean dropped, running variance dropped)",
            "  1    left alone: it normalizes the last dimension of its input, not channels (N, C, ...)",
        ]
    )
    assert str(swap_norm(net, "cwn", layers="0.4")) == "\n".join(
        [
            "to cwn: 1 layer changed, 2 left alone, 674 -> 666 parameters",
            "  weights in front found by the order of registration, a guess; with example_batch the model is traced",
            "  0.4  GroupNorm(2 groups) -> Identity, weights of 0.3 (γ and β folded into weight and bias of 0.3)",
            "  0.1  left alone: layers='0.4' does not match it",
            "  1    left alone: layers='0.4' does not match it",
        ]
    )


def test_the_report_counts_parameters() -> None:
    for to in NORMS:
        net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6))
        report = swap_norm(net, to)
        assert report.to == to
        assert report.parameters_before == 4 * 6 * 9 + 12
        assert report.parameters_after == sum(p.numel() for p in net.parameters())
