"""Batch normalization folded into the preceding layer: which are folded, the same function, and full restoration."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normgeo.robustness import FoldedModel
from support.folded_models import folds, images, net_of
from support.small_models import Net, PreActivation, worn


def run_all(net, x):
    for layer in net.children():
        x = layer(x)
    return x


# --- whole models -----------------------------------------------------------------------------------------------------


def convolutions(net):
    return {name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}


EXPECTED = {
    "resnet18": convolutions,
    "mobilenet_v2": convolutions,
    # the input of a concatenation is normalized behind it, and differently by every layer that reads it
    "densenet121": lambda net: {n for n in convolutions(net) if n == "features.conv0" or n.endswith(".conv1")},
    "googlenet": convolutions,
}
OPTIONS = {"googlenet": {"aux_logits": False, "init_weights": False}}


def model(name, dtype):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=7, **OPTIONS.get(name, {}))
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return net.to(dtype).eval()


@pytest.mark.parametrize("name", EXPECTED)
def test_known_models_in_double_precision(name):
    net = model(name, torch.float64)
    assert folds(net, images(2, 3, 40, 40)) == EXPECTED[name](net)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_known_model_in_single_precision(channels_last):
    net, x = model("resnet18", torch.float32), images(2, 3, 64, 64, dtype=torch.float32)
    assert folds(net, x, 1e-5, channels_last) == convolutions(net)
    folded = FoldedModel(net, net, x, channels_last)
    weights = [p for (_, name), p in folded._parameters.items() if name == "weight" and p.shape[2:] == (3, 3)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) == channels_last for w in weights)


# --- layer by layer ---------------------------------------------------------------------------------------------------

POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
FOLDED = {
    "without bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), *POOL),
    "with bias": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *POOL),
    "grouped and strided": (nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1), nn.BatchNorm2d(6), *POOL),
    "zero padding": (nn.Conv2d(3, 6, 3, padding=2), nn.BatchNorm2d(6), nn.ReLU(), *POOL),
    "reflected padding": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), *POOL),
    "without gamma and beta": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), *POOL),
    "large epsilon": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5), *POOL),
    "linear": (nn.Linear(6, 4), nn.BatchNorm1d(4)),
    "linear without bias": (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)),
    "one dimension": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten()),
    "three dimensions": (nn.Conv3d(3, 4, 2, bias=False), nn.BatchNorm3d(4), nn.Flatten()),
    "frozen": (nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4), *POOL),
}
SHAPES = {
    "linear": (5, 6),
    "linear without bias": (5, 6),
    "one dimension": (5, 3, 8),
    "three dimensions": (5, 3, 4, 4, 4),
}


@pytest.mark.parametrize("case", FOLDED)
def test_is_folded(case):
    layers = copy.deepcopy(FOLDED[case])
    assert folds(net_of(*layers), images(*SHAPES.get(case, (5, 3, 8, 8)))) == {"0"}


def test_the_norms_are_those_of_the_weight_and_of_the_function():
    net = net_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folded = FoldedModel(net, net, images(2, 3, 8, 8))
    conv, norm = net
    factors = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = conv.weight.norm(), (conv.weight * factors.view(-1, 1, 1, 1)).norm()
    assert folded.folded["0"] == pytest.approx([value.item() for value in expected], rel=1e-12)


def training(net):
    net[1].train()
    return net


class WithActivation(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x.mean()


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


def patched(net):
    norm, forward = net[1], net[1].forward
    norm.forward = lambda x: forward(x).abs()
    return net


def hooked(at, hook, before=False):
    net = with_norm(nn.BatchNorm2d(4))
    (net[at].register_forward_pre_hook if before else net[at].register_forward_hook)(hook)
    return net


def tied(net):
    net.add_module("9", nn.Identity())
    net[-1].weight = net[0].weight
    return net


def conv(**changes):
    return nn.Conv2d(3, 4, 3, **changes)


def with_norm(norm, first=None):
    return net_of(first or conv(), norm, *POOL)


LEFT = {
    "training": lambda: training(with_norm(nn.BatchNorm2d(4))),
    "no running statistics": lambda: with_norm(nn.BatchNorm2d(4, track_running_stats=False)),
    "transposed": lambda: net_of(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), *POOL),
    "behind an activation": lambda: net_of(conv(), nn.ReLU(), nn.BatchNorm2d(4), *POOL),
    "behind nothing": lambda: net_of(nn.BatchNorm2d(3), conv(), *POOL),
    "with an activation": lambda: with_norm(WithActivation(4)),
    "a forward of its own": lambda: with_norm(Doubling(4)),
    "a patched forward": lambda: patched(with_norm(nn.BatchNorm2d(4))),
    "a convolution with a forward of its own": lambda: with_norm(nn.BatchNorm2d(4), OwnConv(3, 4, 3)),
    "a convolution with a weight of its own": lambda: with_norm(nn.BatchNorm2d(4), OwnConvForward(3, 4, 3)),
    "parametrized": lambda: with_norm(nn.BatchNorm2d(4), parametrizations.weight_norm(conv())),
    "spectral": lambda: with_norm(nn.BatchNorm2d(4), parametrizations.spectral_norm(conv())),
    "tied": lambda: tied(with_norm(nn.BatchNorm2d(4))),
    "a hook that looks": lambda: hooked(1, lambda *args: None),
    "a hook that adds the input": lambda: hooked(1, lambda m, i, o: o + i[0]),
    "a hook that changes the input": lambda: hooked(1, lambda m, i: (i[0] * 3,), before=True),
    "a hook on the convolution": lambda: hooked(0, lambda *args: None),
    "instance normalization": lambda: net_of(conv(), nn.InstanceNorm2d(4, track_running_stats=True), *POOL),
    "a shared convolution": lambda: worn(
        Net(lambda n, x: n.bn(n.conv(x)) + n.conv(x + 1), conv=conv(), bn=nn.BatchNorm2d(4))
    ),
    "a shared normalization": lambda: worn(
        Net(lambda n, x: n.bn(n.a(x)) + n.bn(n.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(4))
    ),
    "one registered twice": lambda: worn(
        Net(lambda n, x: n.second(n.a(x)), a=conv(), first=(bn := nn.BatchNorm2d(4)), second=bn)
    ),
    "two readers": lambda: worn(Net(lambda n, x: n.bn(y := n.a(x)) + y.sin(), a=conv(), bn=nn.BatchNorm2d(4))),
    "a result": lambda: worn(Net(lambda n, x: (y := n.a(x)) * 0 + n.bn(y), a=conv(), bn=nn.BatchNorm2d(4))),
    "a weight that is read again": lambda: worn(
        Net(lambda n, x: n.bn(n.a(x)) * n.a.weight.sum(), a=conv(), bn=nn.BatchNorm2d(4))
    ),
    "a sum": lambda: worn(Net(lambda n, x: n.bn(n.a(x) + n.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(4))),
    "a concatenation of one": lambda: worn(
        Net(lambda n, x: n.bn(torch.cat([n.a(x)], 1)), a=conv(), bn=nn.BatchNorm2d(4))
    ),
    "two different channel axes": lambda: worn(
        Net(lambda n, x: n.bn(n.a(x[:, :, 0])), a=nn.Linear(8, 3), bn=nn.BatchNorm1d(3))
    ),
    "not called": lambda: worn(Net(lambda n, x: n.a(x), a=conv(), bn=nn.BatchNorm2d(4))),
}


@pytest.mark.parametrize("case", LEFT)
def test_is_left_alone(case):
    net = LEFT[case]().double()
    net = net if case == "training" else net.eval()
    assert folds(net, images(5, 3, 8, 8)) == set()


def test_pre_activation_blocks_are_folded_inside_alone():
    net = worn(nn.Sequential(nn.Conv2d(3, 4, 3), PreActivation(4, 4), PreActivation(4, 6), *POOL)).double().eval()
    assert folds(net, images(2, 3, 8, 8)) == {"1.conv1", "2.conv1"}
